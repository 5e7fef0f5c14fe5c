"""Every kernel compiles for the GPUs it is for, and keeps what it computes with in registers."""

import pytest

from tests.model.kernels.cuda.compiled import Compiled, compile_all
from tests.model.rwkv7.cuda.launches import LAUNCHES

pytestmark = pytest.mark.long

KERNELS = {"_embed", "_mix", "_time_mix", "_recurrent", "_linear", "_write_rows"}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Compiled]]:
    return compile_all("rwkv7", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("launch", LAUNCHES)
def test_kernels_compile_and_nothing_is_spilled(
    launch: str, launches: dict[str, list[Compiled]]
) -> None:
    assert {kernel.name for kernel in launches[launch]} >= KERNELS
    for kernel in launches[launch]:
        assert kernel.spilled_bytes == 0, kernel.name
        assert "tf32" not in kernel.ptx, kernel.name

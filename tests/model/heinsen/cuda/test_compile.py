"""Every kernel compiles for its GPUs, into the expected code."""

import re

import pytest

from tests.model.heinsen.cuda.launches import LAUNCHES
from tests.model.kernels.cuda.compiled import Compiled, compile_all

Launches = dict[str, list[Compiled]]

pytestmark = pytest.mark.long

UNFUSED = {"_step", "carry"}
"""Kernels that compute the rounding error of a sum: their operands must be rounded first."""

SPILLED_BYTES = {"_choose": 256, "read": 16}
"""Kernels that may spill registers. The first runs once per token, not in every layer; the other
reads whole chunks of a prompt, and one of the compilers tried (Triton 3.9) spills two numbers
there."""

each_launch = pytest.mark.parametrize("launch", LAUNCHES)
of_attention = pytest.mark.parametrize("launch", [x for x in LAUNCHES if x.startswith("attention")])


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return compile_all("heinsen", tmp_path_factory.mktemp("triton"))


@each_launch
def test_no_product_is_rounded_to_tf32(launch: str, launches: Launches) -> None:
    for kernel in launches[launch]:
        assert "tf32" not in kernel.ptx, kernel.name


@each_launch
def test_everything_stays_in_registers(launch: str, launches: Launches) -> None:
    for kernel in launches[launch]:
        assert kernel.spilled_bytes <= SPILLED_BYTES.get(kernel.name, 0), kernel.name


@of_attention
def test_strides_and_addresses_of_tokens_make_no_other_variant(
    launch: str, launches: Launches
) -> None:
    """It might sum in another order, and a sequence's bits would depend on the batch."""
    kernels = launches[launch]
    variants = {(kernel.name, kernel.ptx) for kernel in kernels}
    names = {kernel.name for kernel in kernels}
    assert len(variants) == len(names) + 1  # `carry` is one for `chunked`, another for `absorb`


@of_attention
def test_what_rounding_lost_is_not_lost_by_fusing(launch: str, launches: Launches) -> None:
    """The assembler may fuse `mul.f32` and `add.f32`, but not `mul.rn.f32`; logarithms may be
    fused."""
    unfused = [kernel for kernel in launches[launch] if kernel.name in UNFUSED]
    assert {kernel.name for kernel in unfused} == UNFUSED
    for kernel in unfused:
        assert re.search(r"add\.rn\.f32", kernel.ptx), kernel.name
        assert not re.search(r"\b(add|sub|mul|mad)(\.ftz)?\.f32|\bfma\.rn\.f32", kernel.ptx)

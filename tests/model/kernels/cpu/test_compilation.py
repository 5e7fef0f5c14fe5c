"""Compilation is reported when it happens, and only then."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from numba.core import registry

from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.kernels.cpu.compilation import can_fuse, target, watch


def set_processor(monkeypatch: pytest.MonkeyPatch, triple: str, features: str) -> None:
    codegen = type(registry.cpu_target.target_context.codegen())
    monkeypatch.setattr(codegen, "magic_tuple", lambda _: (triple, "some", features))


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("kept", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compiling_is_reported_once_and_loading_is_not(tmp_path: Path) -> None:
    path = tmp_path / "kept.py"
    path.write_text(
        "from numba import njit\n\n"
        "@njit(cache=True)\ndef double(x):\n    return 2 * x\n\n"
        "@njit(cache=True)\ndef triple(x):\n    return double(x) + x\n"
    )
    reports: list[object] = []

    def use() -> None:
        with watch(lambda: reports.append("begun"), reports.append):
            assert load(path).triple(2) == 6

    use()
    begun, seconds = reports
    assert begun == "begun"
    assert isinstance(seconds, float)
    assert seconds > 0
    use()
    assert len(reports) == 2


@pytest.mark.parametrize(
    ("triple", "features", "name"),
    [
        ("x86_64-unknown-linux-gnu", "+avx2,+avx512f,+fma", "x86_64 with AVX-512"),
        ("x86_64-unknown-linux-gnu", "+avx2,-avx512f,+fma", "x86_64 with AVX2"),
        ("aarch64-unknown-linux-gnu", "+neon", "aarch64 with NEON"),
        ("x86_64-unknown-linux-gnu", "+sse2", "x86_64"),
    ],
)
def test_the_target_is_named_with_its_widest_vectors(
    triple: str, features: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_processor(monkeypatch, triple, features)
    assert target() == name


def test_without_fused_multiply_adds_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(vocab_sz=50, d_emb=16, n_layers=1, n_heads=1, d_key=4, d_val=4)
    network = LanguageModel(config).requires_grad_(False)
    set_processor(monkeypatch, "x86_64-unknown-linux-gnu", "+avx,-fma")
    assert network.pack().backend == "plain torch (the processor has no fused multiply-add)"
    assert not network.is_compiled
    set_processor(monkeypatch, "aarch64-unknown-linux-gnu", "+neon")
    assert can_fuse()

"""Weights in fewer bits, packed and not."""

import copy
import logging
import sys

import pytest
import torch
import torch.nn.functional as F

from model import WeightDtype
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.kernels.cpu import arithmetic
from model.kernels.linear import NarrowLinear, PackedLinear, narrow, reason_not_compiled
from tests.model.calls import prefill, step

each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
WEIGHT, BIAS = torch.randn(130, 70), torch.randn(130)
X = torch.randn(2, 9, 70)
ERROR = {"float32": 1e-5, "bfloat16": 0.3, "int8": 0.5}
"""Tolerance for outputs of size about 8."""


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor restricted to float32 products, as torch computes them here."""
    monkeypatch.setattr(arithmetic, "features", list)


@pytest.mark.long
@each_dtype
@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("bias", [BIAS, None])
def test_both_kinds_compute_the_same_from_the_same_numbers(
    dtype: WeightDtype, bias: torch.Tensor | None
) -> None:
    found, plain = (kind(WEIGHT, bias, dtype)(X) for kind in (PackedLinear, NarrowLinear))
    assert found.shape == (2, 9, 130)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=2e-5)
    error = (found - F.linear(X, WEIGHT, bias)).abs().max()
    assert error < ERROR[dtype]
    assert dtype == "float32" or error > 1e-3


def test_nothing_in_is_nothing_out() -> None:
    assert PackedLinear(WEIGHT, None, "float32")(X[:, :0]).shape == (2, 0, 130)


def test_int8_has_a_scale_for_each_output_and_survives_an_output_of_zeros() -> None:
    weight = WEIGHT.clone()
    weight[3], weight[4] = 0.0, weight[4] * 1e6
    narrowed, scale = narrow(weight, "int8")
    assert scale is not None
    assert narrowed.abs().amax(1).tolist() == [127 if i != 3 else 0 for i in range(130)]
    restored = narrowed * scale.unsqueeze(1)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((restored - weight).abs() <= step * 0.501).all()


@pytest.mark.long
@each_dtype
def test_a_network_keeps_its_weights_in_the_dtype(dtype: WeightDtype) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_sz=90, d_emb=32, n_layers=2, n_heads=2, d_key=8, d_val=8)
    network = LanguageModel(config).requires_grad_(False).eval()
    served = copy.deepcopy(network).pack(dtype)
    bits = {"float32": 32, "bfloat16": 16, "int8": 8}[dtype]
    assert served.weight_bytes == network.num_parameters * bits // 8
    assert served.state_spec == network.state_spec
    ids = torch.arange(40)[None]
    exact, found = network.new_pool(1), served.new_pool(1)
    for each, pool in ((network, exact), (served, found)):
        prefill(each, ids[:, :-1], [39], pool, [0])
    expected, logits = step(network, ids[0, -1:], exact, [0]), step(served, ids[0, -1:], found, [0])
    error = (logits - expected).abs().max() / expected.std()
    assert error < {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.1}[dtype]


@pytest.mark.long
@each_dtype
@pytest.mark.parametrize("bias", [BIAS, None])
def test_in_the_weights_own_type_little_more_is_lost(
    dtype: WeightDtype, bias: torch.Tensor | None
) -> None:
    error = (PackedLinear(WEIGHT, bias, dtype)(X) - F.linear(X, WEIGHT, bias)).abs().max()
    assert error < ERROR[dtype]


@pytest.mark.long
@each_dtype
@pytest.mark.usefixtures("masked")
def test_where_nothing_can_be_compiled_torch_serves_the_same(
    dtype: WeightDtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_sz=90, d_emb=32, n_layers=2, n_heads=2, d_key=8, d_val=8)
    network = LanguageModel(config).requires_grad_(False).eval()
    compiled = copy.deepcopy(network).pack(dtype)
    monkeypatch.setitem(sys.modules, "model.kernels.cpu.products", None)
    with caplog.at_level(logging.WARNING):
        plain = network.pack(dtype)
    assert (compiled.is_compiled, plain.is_compiled) == (True, False)
    assert "compiled" in caplog.text
    assert "model.kernels.cpu.products" in plain.backend
    ids, logits = torch.arange(70)[None], []
    for each in (compiled, plain):
        pool = each.new_pool(2)
        prefill(each, ids, [70], pool, [1])
        logits.append(step(each, ids[0, :1], pool, [1]))
    torch.testing.assert_close(*logits, rtol=0, atol=2e-5)


def test_only_float32_networks_on_a_cpu_are_compiled() -> None:
    assert not reason_not_compiled(torch.device("cpu"), torch.float32)
    assert reason_not_compiled(torch.device("cpu"), torch.float64)
    assert reason_not_compiled(torch.device("cuda"), torch.float32)

"""Linear maps in Triton against torch in float64, with the same rounded weights."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import WeightDtype
from model.kernels.cuda.linear import FEW, MANY, choose_tile, linear
from model.kernels.linear import narrow

each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
ROUNDING = {"float32": 1e-6, "bfloat16": 2e-5, "int8": 2e-5}
"""Error of a product's sums, relative to the sums of absolute values: 2^-16 for split inputs."""


def randn(*shape: int, seed: int, device: torch.device) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=chance).to(device)


class Case:
    """A linear map with all options, its exact result and the tolerance."""

    def __init__(
        self,
        rows: int,
        num_in: int,
        num_out: int,
        dtype: WeightDtype,
        device: torch.device,
        *,
        norm: bool = True,
        bias: bool = True,
        glu: bool = False,
        residual: bool = False,
    ) -> None:
        weight_rows = 2 * num_out if glu else num_out
        self.x = randn(rows, num_in, seed=1, device=device) * 3 + 1
        weight = randn(weight_rows, num_in, seed=2, device=device)
        self.weight, self.scale = narrow(weight, dtype)
        self.options: dict[str, Any] = {"glu": glu}
        if norm:
            vectors = randn(2, num_in, seed=3, device=device)
            self.options["norm"] = (vectors[0], vectors[1], 1e-5)
        if residual:
            self.options["residual"] = randn(rows, num_out, seed=4, device=device)
        self.bias = randn(weight_rows, seed=5, device=device) if bias else None
        self.rounding = ROUNDING[dtype]

    def compute(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return linear(x, self.weight, self.bias, self.scale, **self.options)

    def exact(self) -> tuple[Tensor, Tensor]:
        """The result in float64, and the largest error."""
        x, weight = self.x.double(), self.weight.double()
        if self.scale is not None:
            weight = weight * self.scale.double().unsqueeze(1)
        if "norm" in self.options:
            factor, offset, eps = self.options["norm"]
            x = F.layer_norm(x, (x.shape[1],), factor.double(), offset.double(), eps)
        y = F.linear(x, weight, None if self.bias is None else self.bias.double())
        error = F.linear(x.abs(), weight.abs()) * self.rounding + 1e-6
        if self.options["glu"]:
            error = (error * (1 + y.abs())).view(len(x), 2, -1).sum(1)
            y = F.glu(y, -1)
        if "residual" in self.options:
            y = y + self.options["residual"].double()
        return y, error


def assert_exact(case: Case) -> None:
    expected, error = case.exact()
    assert ((case.compute().double() - expected).abs() <= error).all()


@each_dtype
@pytest.mark.parametrize(
    ("rows", "num_in", "num_out"),
    [(1, 16, 16), (3, 70, 130), (17, 33, 47), (64, 300, 20), (65, 129, 33), (130, 64, 70)],
)
def test_only_the_weights_are_rounded(
    rows: int, num_in: int, num_out: int, dtype: WeightDtype, device: torch.device
) -> None:
    assert_exact(Case(rows, num_in, num_out, dtype, device))


@each_dtype
@pytest.mark.parametrize("rows", [5, 66])
@pytest.mark.parametrize(
    "options",
    [
        {"norm": False, "bias": False},
        {"norm": False, "residual": True},
        {"glu": True, "norm": False},
        {"glu": True, "bias": False, "residual": True},
    ],
)
def test_what_stands_around_a_product(
    rows: int, options: dict[str, bool], dtype: WeightDtype, device: torch.device
) -> None:
    assert_exact(Case(rows, 50, 37, dtype, device, **options))


def test_every_kind_of_tile(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    for tile in (*FEW, *MANY):
        monkeypatch.setattr("model.kernels.cuda.linear.choose_tile", lambda *_, t=tile, **__: t)
        rows = 17 * tile.rows + 1 if tile.rows == 16 else tile.rows + 1
        assert_exact(Case(rows, 65, tile.outputs + 5, "bfloat16", device, glu=tile.rows > 16))


def test_few_rows_have_small_tiles_and_many_have_large_ones() -> None:
    for weight_rows in (768, 1536, 2304, 50304):
        for whole in (True, False):
            sizes = [choose_tile(2**i, weight_rows, whole=whole).rows for i in range(15)]
            assert sizes == sorted(sizes)
            assert sizes[0] == 16
    assert choose_tile(16384, 768, whole=False) == MANY[0]
    assert choose_tile(1, 50304, whole=False) == FEW[0]
    assert choose_tile(1, 2304, whole=False) == FEW[-1]


def test_the_mean_may_be_far_larger_than_what_is_apart_from_it(device: torch.device) -> None:
    for rows in (2, 66):
        case = Case(rows, 600, 16, "float32", device)
        case.x = randn(rows, 600, seed=6, device=device) + 3000
        expected, error = case.exact()
        assert ((case.compute() - expected).abs() <= 300 * error).all()


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_rows_are_selected_from_a_table(
    table_dtype: torch.dtype, id_dtype: torch.dtype, device: torch.device
) -> None:
    table = randn(20, 40, seed=1, device=device).to(table_dtype)
    weight, bias = randn(24, 40, seed=2, device=device), randn(24, seed=3, device=device)
    ids = torch.tensor([19, -1, 0, 7, 7, -5], dtype=id_dtype, device=device)
    collected = table.float()[ids.clamp(min=0)] * (ids >= 0).unsqueeze(1)
    narrowed = weight.bfloat16()
    found = linear(table, narrowed, bias, ids=ids)
    assert torch.equal(found, linear(collected, narrowed, bias))
    assert torch.equal(found[1], bias)
    assert torch.equal(found[3], found[4])
    norm = (torch.ones(40, device=device), bias.new_zeros(40), 1e-5)
    many = ids.repeat(11)
    found = linear(table, narrowed, bias, norm=norm, ids=many)
    assert torch.equal(found, linear(collected.repeat(11, 1), narrowed, bias, norm=norm))


@each_dtype
@pytest.mark.parametrize("rows", [7, 66])
def test_a_row_has_the_same_bits_in_any_company(
    rows: int, dtype: WeightDtype, device: torch.device
) -> None:
    case = Case(rows, 70, 33, dtype, device)
    expected = case.compute()[3]
    others = torch.full_like(case.x, torch.nan)
    others[3] = case.x[3]
    found = case.compute(others)
    assert torch.equal(found[3], expected)
    assert found[4].isnan().all()


def test_views_whose_rows_are_apart(device: torch.device) -> None:
    case = Case(6, 40, 24, "bfloat16", device, residual=True)
    expected = case.compute()
    wide = torch.full((6, 100), torch.nan, device=device)
    wide[:, 3:43], wide[:, 50:74] = case.x, case.options["residual"]
    case.options["residual"] = wide[:, 50:74]
    assert torch.equal(case.compute(wide[:, 3:43]), expected)


def test_nothing_beyond_the_result_is_written(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    case, memory = Case(5, 20, 19, "float32", device), torch.full((200,), torch.nan, device=device)
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: memory[:95].view(shape))
    found = case.compute()
    assert not found.isnan().any()
    assert memory[95:].isnan().all()


def test_no_rows_have_no_results(device: torch.device) -> None:
    case = Case(3, 20, 10, "bfloat16", device)
    assert case.compute(case.x[:0]).shape == (0, 10)


def test_what_a_kernel_cannot_read_is_an_error(device: torch.device) -> None:
    x, weight = randn(4, 20, seed=1, device=device), randn(10, 20, seed=2, device=device)
    vector = weight[:, 0].contiguous()
    wrong: list[tuple[tuple[Tensor | None, ...], dict[str, Any]]] = [
        ((x.T.contiguous().T, weight), {}),
        ((x[:, :19], weight), {}),
        ((x.bfloat16(), weight), {}),
        ((x, weight.half()), {}),
        ((x, weight[:, ::2]), {}),
        ((x, weight.to(torch.int8)), {}),
        ((x, weight, None, vector), {}),
        ((x, weight, vector[:9]), {}),
        ((x, weight, weight[:, 0]), {}),
        ((x, weight[:9]), {"glu": True}),
        ((x, weight), {"residual": x}),
        ((x, weight), {"residual": randn(10, 4, seed=3, device=device).T}),
        ((x, weight), {"ids": x[0]}),
        ((x, weight), {"norm": (x[0], x[0, :19], 1e-5)}),
    ]
    for arguments, options in wrong:
        with pytest.raises(ValueError, match=r"weight|scale|outputs|x must be|ids|bias|residual"):
            linear(*arguments, **options)  # type: ignore[arg-type]

"""Rows of a pool: their bytes, copying, and independence."""

import itertools
import math
import random
import struct
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.state import (
    DamagedState,
    StatePool,
    StateSpec,
    TensorSpec,
    check_values,
    contiguous_run,
    split_state,
)
from tests.model.calls import prefill, step

SPEC = StateSpec(
    (
        TensorSpec("h", (1, 3), "float32", 0.0),
        TensorSpec("m", (2, 2, 2), "float32", -1e30),
        TensorSpec("s", (2, 2, 2), "float64", 0.5),
    )
)


def pool(num_rows: int = 4, spec: StateSpec = SPEC) -> StatePool:
    """Every number of every row differs from all others."""
    made = StatePool(spec, num_rows, torch.device("cpu"))
    start = 0
    for values in made.tensors.values():
        values.copy_(torch.arange(start, start + values.numel()).view(values.shape))
        start += values.numel()
    return made


def rows(of: StatePool) -> list[list[list[float]]]:
    return [
        [values[:, row].flatten().tolist() for values in of.tensors.values()]
        for row in range(of.num_rows)
    ]


def test_a_spec_counts_its_bytes() -> None:
    assert [tensor.num_bytes for tensor in SPEC.tensors] == [12, 32, 64]
    assert SPEC.num_bytes == 108


def test_a_new_pool_holds_the_state_before_the_first_token() -> None:
    made = StatePool(SPEC, 5, torch.device("cpu"))
    for tensor in SPEC.tensors:
        layers, *per_row = tensor.shape
        values = made.tensors[tensor.name]
        assert values.shape == (layers, 5, *per_row)
        assert str(values.dtype) == f"torch.{tensor.dtype}"
        assert (values == tensor.initial).all()


def test_reset_makes_one_row_new() -> None:
    made, fresh = pool(), StatePool(SPEC, 1, torch.device("cpu"))
    before = rows(made)
    made.reset(2)
    assert rows(made) == [*before[:2], rows(fresh)[0], before[3]]


NARROW = StateSpec((*SPEC.tensors, TensorSpec("low", (2, 3), "int8", 0.0)))


def test_poison_leaves_nothing_of_one_row_and_all_of_the_others() -> None:
    made, before = pool(spec=NARROW), pool(spec=NARROW)
    made.poison(2)
    for name, values in made.tensors.items():
        poisoned = values[:, 2]
        assert (poisoned == -128).all() if name == "low" else poisoned.isnan().all()
    assert [made.export_row(i) for i in (0, 1, 3)] == [before.export_row(i) for i in (0, 1, 3)]


@pytest.mark.parametrize("way", ["reset", "import", "write"])
def test_a_new_owner_overwrites_all_of_a_poisoned_row(way: str) -> None:
    made, other = pool(spec=NARROW), pool(spec=NARROW)
    expected = {
        "reset": StatePool(NARROW, 1, torch.device("cpu")).export_row(0),
        "import": other.export_row(0),
        "write": other.export_row(0),
    }[way]
    made.poison(3)
    if way == "reset":
        made.reset(3)
    elif way == "import":
        made.import_row(3, other.export_row(0))
    else:
        made.write_row(3, other.read_row(0))
    assert made.export_row(3) == expected


@pytest.mark.parametrize(
    "spec", [SPEC, NARROW, StateSpec((*NARROW.tensors, TensorSpec("n", (2, 3), "float32", 0.0)))]
)
def test_a_row_is_gathered_as_it_is_exported_and_scattered_as_it_is_imported(
    spec: StateSpec,
) -> None:
    made, other = pool(spec=spec), pool(spec=spec)
    buffer = torch.full((spec.num_bytes,), 77, dtype=torch.uint8)
    made.gather_row(2, buffer)
    assert buffer.numpy().tobytes() == made.export_row(2)
    other.poison(1)
    other.scatter_row(1, buffer)
    assert other.export_row(1) == made.export_row(2)
    assert [other.export_row(i) for i in (0, 2, 3)] == [made.export_row(i) for i in (0, 2, 3)]


def test_a_row_that_was_read_is_a_copy() -> None:
    made = pool()
    before = rows(made)
    kept = made.read_row(1)
    made.reset(1)
    made.write_row(3, kept)
    assert rows(made)[3] == before[1]
    made.write_row(1, kept)
    assert rows(made) == [*before[:3], before[1]]


def test_exported_bytes_are_the_tensors_in_the_order_of_the_spec() -> None:
    made = pool()
    data = made.export_row(2)
    h, m, s = (made.tensors[name][:, 2].flatten().tolist() for name in ("h", "m", "s"))
    assert data == struct.pack("<3f8f8d", *h, *m, *s)
    assert len(data) == SPEC.num_bytes


def test_imported_bytes_are_the_row_that_was_exported() -> None:
    made, other = pool(), StatePool(SPEC, 2, torch.device("cpu"))
    other.import_row(1, made.export_row(2))
    assert rows(other)[1] == rows(made)[2]
    assert rows(other)[0] == rows(StatePool(SPEC, 1, torch.device("cpu")))[0]
    assert other.export_row(1) == made.export_row(2)


@pytest.mark.parametrize("length", [0, 107, 109, 216])
def test_bytes_of_another_length_are_refused(length: int) -> None:
    made = pool()
    before = rows(made)
    with pytest.raises(ValueError, match=f"108 bytes, not {length}"):
        made.import_row(1, bytes(length))
    assert rows(made) == before


@pytest.mark.parametrize(
    ("chosen", "run"),
    [
        ([0], slice(0, 1)),
        ([3, 4, 5], slice(3, 6)),
        (range(2, 4), slice(2, 4)),
        ([1, 3], None),
        ([2, 1], None),
        ([1, 1], None),
        ([1, 2, 4], None),
    ],
)
def test_rows_that_follow_each_other_are_a_slice(chosen: list[int], run: slice | None) -> None:
    assert contiguous_run(chosen) == run


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("chosen", [[1, 2, 3], [4, 1, 6]])
def test_no_row_is_read_but_those_that_are_named(compiled: bool, chosen: list[int]) -> None:
    """Prefill and step leave the same bits next to poisoned rows as next to new ones."""
    torch.manual_seed(2)
    config = ModelConfig(vocab_sz=50, d_emb=16, n_layers=2, n_heads=2, d_key=4, d_val=4)
    network = LanguageModel(config).requires_grad_(False).eval()
    if compiled:
        network.pack()
    clean, poisoned = network.new_pool(8), network.new_pool(8)
    for row in set(range(8)) - set(chosen):
        poisoned.poison(row)
    before = poisoned.export_row(5)
    seen = []
    for made in (clean, poisoned):
        prefill(network, torch.arange(27).view(3, 9), [9, 1, 4], made, chosen)
        logits = step(network, torch.tensor([7, 8, 9]), made, chosen)
        seen.append((logits.tolist(), [made.export_row(row) for row in chosen]))
    assert seen[0] == seen[1]
    assert poisoned.export_row(5) == before


SOUND = pool().export_row(1)
H, M, S = SPEC.tensors


def checked(**changed: NDArray[Any]) -> float:
    return check_values(SPEC.tensors, split_state(SPEC.tensors, SOUND) | changed)


def test_a_sound_state_has_a_magnitude() -> None:
    values = rows(pool())[1]
    assert checked() == max(map(abs, itertools.chain(*values)))
    assert checked(s=np.full(S.shape, -500.0)) == 500


def test_what_a_tensor_begins_with_is_sound_and_of_no_size() -> None:
    fresh = StatePool(SPEC, 1, torch.device("cpu"))
    assert fresh.check_row(0) == 0
    fresh.tensors["m"][0, 0, 0, 1] = -7
    assert fresh.check_row(0) == 7
    unbounded = TensorSpec("m", (2,), "float32", -math.inf)
    assert check_values((unbounded,), {"m": np.array([-math.inf, 3], np.float32)}) == 3
    with pytest.raises(DamagedState, match="1 of the 2 values of tensor m"):
        check_values((unbounded,), {"m": np.array([-math.inf, math.inf], np.float32)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("tensor", "size"), [("h", 3), ("m", 8), ("s", 8)])
@pytest.mark.parametrize("count", [1, 3])
def test_one_value_that_is_not_finite_damages_a_state(
    tensor: str, size: int, value: float, count: int
) -> None:
    made = pool()
    row = made.tensors[tensor][:, 2]
    for place in random.Random(size).sample(list(np.ndindex(*row.shape)), count):
        row[place] = value
    message = f"^{count} of the {size} values of tensor {tensor} are not finite$"
    with pytest.raises(DamagedState, match=message):
        made.check_row(2)
    assert made.check_row(1) == checked()


def test_an_erased_row_is_damaged() -> None:
    made = pool()
    made.poison(0)
    with pytest.raises(DamagedState, match="3 of the 3 values of tensor h"):
        made.check_row(0)

"""The guarantees of sessions, for every family and backend.

A sequence's bits do not depend on the batch, on how its prompt was split, or on threads; a state
that was saved, copied or restored continues as if nothing had happened.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import WeightDtype
from model.batch import Batch
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.kernels import cuda
from model.kernels.cpu import arithmetic
from model.network import Network
from model.state import StatePool
from tests.model import toy
from tests.model.calls import prefill, step
from tests.model.rwkv7 import networks as rwkv7

MOST, VOCAB = 34, 500
CONFIGS = {
    "log": ModelConfig(vocab_sz=VOCAB, d_emb=96, n_layers=2, n_heads=3, d_key=16, d_val=24),
    "linear": ModelConfig(vocab_sz=VOCAB, d_emb=48, n_layers=2, n_heads=2, values="linear"),
    "beyond": ModelConfig(
        vocab_sz=VOCAB,
        d_emb=40,
        n_layers=2,
        n_heads=2,
        d_key=16,
        d_val=24,
        decay=True,
        token_shift=True,
        output_gate=True,
    ),
}


def served(name: str, steep: bool = False, dtype: WeightDtype = "float32") -> LanguageModel:
    """A compiled network; `steep`: with keys that rise and fall by hundreds."""
    return untrained(name, steep).pack(dtype)


def masked(name: str, dtype: WeightDtype) -> LanguageModel:
    """A compiled network on a processor restricted to float32 products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "features", list)
        network = served(name, dtype=dtype)
    assert network.arithmetic == f"{dtype} x float32"
    return network


def untrained(name: str, steep: bool = False) -> LanguageModel:
    torch.manual_seed(3)
    network = LanguageModel(CONFIGS[name]).requires_grad_(False).eval()
    if steep:
        for key, parameter in network.named_parameters():
            if key.endswith("feedforward1.1.weight"):
                parameter.mul_(60)
    return network


NETWORKS: dict[str, Callable[[], Network]] = {
    **{name: partial(served, name) for name in CONFIGS},
    "steep": partial(served, "log", steep=True),
    "rwkv7": rwkv7.network,
    "toy": partial(toy.make, toy.Config(VOCAB)),
}
"""Backends whose bits do not depend on the number of tokens computed together."""

OTHER_ARITHMETIC: dict[str, Callable[[], Network]] = {
    "bfloat16": partial(served, "log", dtype="bfloat16"),
    "int8": partial(served, "beyond", dtype="int8"),
    "bfloat16 x float32": partial(masked, "beyond", "bfloat16"),
    "int8 x float32": partial(masked, "linear", "int8"),
    "rwkv7 bfloat16": partial(rwkv7.network, dtype="bfloat16"),
    "rwkv7 int8": partial(rwkv7.network, dtype="int8"),
}
"""The same, as separate parameters: each takes time to compile."""


@functools.cache
def served_network(name: str) -> Network:
    return (NETWORKS | OTHER_ARITHMETIC)[name]()


IDS = torch.randint(VOCAB, (MOST, 400), generator=torch.Generator().manual_seed(5))
NAMES = (*NETWORKS, *(pytest.param(each, marks=pytest.mark.long) for each in OTHER_ARITHMETIC))
each_network = pytest.mark.parametrize("name", NAMES)

NO_TRITON = pytest.mark.skipif(not cuda.is_available(), reason="needs Triton")
FUSED = [
    pytest.param((name, "fused"), id=f"{name} fused", marks=(*marks, NO_TRITON))
    for name in ("log", "linear")
    for marks in [(pytest.mark.gpu, pytest.mark.long)]
]
PLAIN = [pytest.param((name, "plain"), id=f"{name} plain") for name in (*CONFIGS, "rwkv7")]
SERVED = [
    pytest.param((name, "served"), id=name, marks=[pytest.mark.long] * (name in OTHER_ARITHMETIC))
    for name in (*NETWORKS, *OTHER_ARITHMETIC)
]
each_backend = pytest.mark.parametrize("backend", [*SERVED, *PLAIN, *FUSED], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, device: torch.device) -> Network:
    """A network of each backend."""
    name, kind = request.param
    match kind:
        case "plain" if name == "rwkv7":
            return rwkv7.network(plain=True)
        case "plain":
            return untrained(name)
        case "fused":
            return untrained(name).to(device).fuse()
        case _:
            return served_network(name)


def alone(network: Network, ids: Tensor, cuts: Sequence[int] = ()) -> StatePool:
    """The state after one prompt, read in pieces that end at these tokens."""
    pool = network.new_pool(1)
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        prefill(network, ids[None, start:end], [end - start], pool, [0])
    return pool


def by_steps(network: Network, ids: Tensor) -> Tensor:
    """Logits after each token of one prompt `[tokens, vocab]`."""
    pool = network.new_pool(1)
    return torch.cat([step(network, token_id[None], pool, [0]) for token_id in ids])


@each_network
@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(1, 400),
    cuts=st.sets(st.integers(1, 399), max_size=6),
    threads=st.integers(1, 3),
)
def test_a_prompt_in_pieces_is_the_whole_one(
    name: str, tokens: int, cuts: set[int], threads: int
) -> None:
    network, ids = served_network(name), IDS[0, :tokens]
    whole = alone(network, ids)
    torch.set_num_threads(threads)
    parts = alone(network, ids, sorted(cut for cut in cuts if cut < tokens))
    torch.set_num_threads(1)
    assert parts.export_row(0) == whole.export_row(0)


@each_network
def test_a_prompt_read_by_steps_is_the_whole_one(name: str) -> None:
    network, ids = served_network(name), IDS[0, :150]
    pool = network.new_pool(1)
    for token_id in ids:
        step(network, token_id[None], pool, [0])
    read = alone(network, ids)
    assert pool.export_row(0) == read.export_row(0)


@pytest.mark.long
@each_network
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=2, max_size=6),
    place=st.integers(0, 5),
    threads=st.integers(1, 3),
)
def test_prompts_read_together_are_as_if_alone(
    name: str, lengths: list[int], place: int, threads: int
) -> None:
    network, place = served_network(name), place % len(lengths)
    pool = network.new_pool(len(lengths))
    torch.set_num_threads(threads)
    prefill(network, IDS[: len(lengths), : max(lengths)], lengths, pool, range(len(lengths)))
    torch.set_num_threads(1)
    expected = alone(network, IDS[place, : lengths[place]])
    assert pool.export_row(place) == expected.export_row(0)


@each_network
@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 15, 16, 31, 32, MOST])
def test_steps_together_are_as_if_alone(name: str, count: int) -> None:
    network, rows = served_network(name), list(range(count))
    together = network.new_pool(count)
    prefill(network, IDS[:count, :9], [9] * count, together, rows)
    singles = [network.new_pool(1) for _ in rows]
    for row, single in enumerate(singles):
        single.import_row(0, together.export_row(row))
    for order in (rows, rows[::-1]):
        logits = step(network, IDS[order, 9], together, order)
        for place, row in enumerate(order):
            expected = step(network, IDS[row : row + 1, 9], singles[row], [0])
            assert torch.equal(logits[place], expected[0])
            assert together.export_row(row) == singles[row].export_row(0)


@pytest.mark.long
@each_network
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    chosen=st.sets(st.integers(0, 3), min_size=1),
    cuts=st.sets(st.integers(1, 149), max_size=3),
    threads=st.integers(1, 3),
)
def test_logits_of_a_prompt_are_those_of_its_steps(
    name: str, lengths: list[int], chosen: set[int], cuts: set[int], threads: int
) -> None:
    """Of all its tokens in order, whatever else is in the batch, scored or not."""
    network, rows = served_network(name), range(len(lengths))
    pool, found = network.new_pool(len(lengths)), [list[Tensor]() for _ in rows]
    torch.set_num_threads(threads)
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 150], strict=True):
        now = [row for row in rows if lengths[row] > start]
        if not now:
            break
        counts = [min(lengths[row], end) - start for row in now]
        scored = {place for place, row in enumerate(now) if row in chosen}
        logits = prefill(network, IDS[now, start:end], counts, pool, now, scored)
        for place in logits:
            found[now[place]].append(logits[place])
    torch.set_num_threads(1)
    for row in rows:
        ids = IDS[row, : lengths[row]]
        assert pool.export_row(row) == alone(network, ids).export_row(0)
        if row in chosen:
            assert torch.equal(torch.cat(found[row]), by_steps(network, ids))
        else:
            assert found[row] == []


@each_network
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=2, max_size=8),
    wanted=st.lists(st.integers(0, 799), max_size=20),
    threads=st.integers(1, 3),
)
def test_logits_are_those_after_the_tokens_that_are_named_in_that_order(
    name: str, lengths: list[int], wanted: list[int], threads: int
) -> None:
    """Of single tokens and prompts mixed, some of them twice."""
    network, rows = served_network(name), range(len(lengths))
    batch = Batch.of([IDS[row, :length] for row, length in enumerate(lengths)], rows)
    batch = batch.wanting([place % len(batch.token_ids) for place in wanted])
    pool = network.new_pool(len(lengths))
    torch.set_num_threads(threads)
    logits = network.forward(batch, pool)
    torch.set_num_threads(1)
    expected = [by_steps(network, IDS[row, :length]) for row, length in enumerate(lengths)]
    assert torch.equal(logits, torch.cat(expected)[batch.logits_at])
    for row, length in enumerate(lengths):
        assert pool.export_row(row) == alone(network, IDS[row, :length]).export_row(0)


def continued(network: Network, pool: StatePool, row: int, ids: Tensor) -> list[Tensor]:
    """Logits after each of some further tokens of one row."""
    return [step(network, token_id[None], pool, [row]) for token_id in ids]


def equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@each_backend
def test_a_state_continues_from_its_bytes_as_if_never_parked(backend: Network) -> None:
    """In any row, and however many sequences continue from it."""
    pool, forks = backend.new_pool(3), backend.new_pool(4)
    prefill(backend, IDS[:3, :70], [70, 9, 40], pool, [2, 0, 1])
    data = pool.export_row(2)
    expected = continued(backend, pool, 2, IDS[0, 70:75])
    for row in (3, 0):
        forks.import_row(row, data)
        assert forks.export_row(row) == data
    other = continued(backend, forks, 3, IDS[1, 70:75])
    assert not equal(other, expected)
    assert forks.export_row(0) == data
    assert equal(continued(backend, forks, 0, IDS[0, 70:75]), expected)
    assert forks.export_row(0) == pool.export_row(2)
    prefill(backend, IDS[:1, 75:100], [25], pool, [2])
    prefill(backend, IDS[:1, 75:100], [25], forks, [0])
    assert forks.export_row(0) == pool.export_row(2)


@each_backend
def test_a_row_that_was_rolled_back_is_unchanged(backend: Network) -> None:
    pool = backend.new_pool(2)
    prefill(backend, IDS[:2, :66], [66, 66], pool, [0, 1])
    data, kept = pool.export_row(1), pool.read_row(1)
    expected = continued(backend, pool, 1, IDS[0, 66:70])
    prefill(backend, IDS[1:2, 70:90], [20], pool, [1])
    assert pool.export_row(1) != data
    pool.write_row(1, kept)
    assert pool.export_row(1) == data
    assert equal(continued(backend, pool, 1, IDS[0, 66:70]), expected)


@each_backend
def test_a_row_that_was_reset_is_as_new(backend: Network) -> None:
    used, fresh = backend.new_pool(3), backend.new_pool(3)
    prefill(backend, IDS[:3, :20], [1, 20, 7], used, [0, 1, 2])
    used.reset(1)
    assert used.export_row(1) == fresh.export_row(1)
    for pool in (used, fresh):
        prefill(backend, IDS[:1, :30], [30], pool, [1])
        step(backend, IDS[:1, 30], pool, [1])
    assert used.export_row(1) == fresh.export_row(1)


@each_backend
def test_only_the_rows_that_are_named_advance(backend: Network) -> None:
    pool = backend.new_pool(5)
    prefill(backend, IDS[:5, :20], [20, 3, 1, 9, 14], pool, range(5))
    before = [pool.export_row(row) for row in range(5)]
    step(backend, IDS[:2, 20], pool, [3, 1])
    prefill(backend, IDS[:2, 21:30], [9, 4], pool, [1, 3])
    after = [pool.export_row(row) for row in range(5)]
    assert [row for row in range(5) if after[row] != before[row]] == [1, 3]


@each_backend
def test_the_last_logits_can_be_recomputed(
    backend: Network, request: pytest.FixtureRequest
) -> None:
    """Of any rows, in any order, also after the states were moved; nothing is changed by that."""
    pool = backend.new_pool(6)
    prefill(backend, IDS[:6, :20], [1, 4, 7, 10, 13, 16], pool, range(6))
    logits = step(backend, IDS[:3, 20], pool, [4, 1, 5])
    before = [pool.export_row(row) for row in range(6)]
    again = backend.logits(pool, [1, 5, 4])
    assert [pool.export_row(row) for row in range(6)] == before
    moved = backend.new_pool(2)
    moved.import_row(1, before[5])
    single = backend.logits(moved, [1])
    # The sums of plain torch depend on the size of the batch.
    tolerance = 2e-5 if "plain" in request.node.callspec.id else 0.0
    torch.testing.assert_close(again, logits[[1, 2, 0]], rtol=0, atol=tolerance)
    torch.testing.assert_close(single, logits[[2]], rtol=0, atol=tolerance)

"""A sequence's bits do not depend on its company, on how its prompt was cut, or on threads."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig
from model.network import LanguageModel
from model.state import StatePool
from tests.model.calls import prefill, step

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


def served(name: str, steep: bool = False) -> LanguageModel:
    """A compiled network; a steep one has keys that rise and fall by hundreds."""
    torch.manual_seed(3)
    network = LanguageModel(CONFIGS[name]).requires_grad_(False).eval()
    if steep:
        for key, parameter in network.named_parameters():
            if key.endswith("feedforward1.1.weight"):
                parameter.mul_(60)
    return network.pack()


NETWORKS = {name: served(name) for name in CONFIGS} | {"steep": served("log", steep=True)}
IDS = torch.randint(VOCAB, (MOST, 400), generator=torch.Generator().manual_seed(5))
each_network = pytest.mark.parametrize("name", NETWORKS)


def alone(network: LanguageModel, ids: Tensor, cuts: Sequence[int] = ()) -> StatePool:
    """The state after one prompt, read in pieces that end at these tokens."""
    pool = network.new_pool(1)
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        prefill(network, ids[None, start:end], [end - start], pool, [0])
    return pool


def by_steps(network: LanguageModel, ids: Tensor) -> Tensor:
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
    network, ids = NETWORKS[name], IDS[0, :tokens]
    whole = alone(network, ids)
    torch.set_num_threads(threads)
    parts = alone(network, ids, sorted(cut for cut in cuts if cut < tokens))
    torch.set_num_threads(1)
    assert parts.export_row(0) == whole.export_row(0)


@each_network
def test_a_prompt_read_by_steps_is_the_whole_one(name: str) -> None:
    network, ids = NETWORKS[name], IDS[0, :150]
    pool = network.new_pool(1)
    for token_id in ids:
        step(network, token_id[None], pool, [0])
    read = alone(network, ids)
    assert pool.export_row(0) == read.export_row(0)


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
    network, place = NETWORKS[name], place % len(lengths)
    pool = network.new_pool(len(lengths))
    torch.set_num_threads(threads)
    prefill(network, IDS[: len(lengths), : max(lengths)], lengths, pool, range(len(lengths)))
    torch.set_num_threads(1)
    expected = alone(network, IDS[place, : lengths[place]])
    assert pool.export_row(place) == expected.export_row(0)


@each_network
@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 15, 16, 31, 32, MOST])
def test_steps_together_are_as_if_alone(name: str, count: int) -> None:
    network, rows = NETWORKS[name], list(range(count))
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
    """Of all its tokens in their order, whatever is read beside it, scored or not."""
    network, rows = NETWORKS[name], range(len(lengths))
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
    """Of single tokens and prompts together, and some of them twice."""
    network, rows = NETWORKS[name], range(len(lengths))
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

"""In kernels the network is RWKV-7, too: in steps to be recorded, and in those with prompts."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model import WeightDtype
from model.batch import Batch
from model.decoding.cuda.decoder import GraphRunner
from model.decoding.decoder import DirectRunner, Piece
from model.decoding.runners import new_runner
from model.decoding.sampling import RecentTokens, SampledRow, SamplingParams
from model.rwkv7.config import Config
from model.rwkv7.network import RWKV7
from model.state import StatePool
from tests.model.rwkv7 import networks

TINY = Config(
    vocab_size=90,
    d_emb=48,
    num_layers=2,
    num_heads=3,
    head_size=16,
    d_ffn=70,
    decay_rank=5,
    rate_rank=3,
    value_rank=9,
    gate_rank=17,
)
ROWS = (3, 0, 4)
TOLERANCE = 2e-5


def pair(
    device: torch.device, dtype: WeightDtype = "float32", config: Config = TINY
) -> tuple[RWKV7, RWKV7]:
    """In kernels, and in plain torch."""
    ours = networks.network(config, dtype, plain=True, device=device)
    ours.fuse()
    return ours, networks.network(config, dtype, plain=True)


def decode(network: RWKV7, ids: Sequence[int], rows: Sequence[int], pool: StatePool) -> Tensor:
    recordable = network.recordable
    assert recordable is not None
    given, places = torch.tensor([ids, rows], dtype=torch.int32, device=pool.device)
    with torch.inference_mode():
        return recordable.decode(given, places, pool)


def assert_pools(found: StatePool, expected: StatePool, rows: Sequence[int] = ROWS) -> None:
    for name, values in expected.tensors.items():
        ours = found.tensors[name][:, list(rows)].cpu()
        theirs = values[:, list(rows)]
        scale = max(1.0, float(theirs.abs().max()))  # of vectors whose numbers add up
        torch.testing.assert_close(ours, theirs, rtol=0, atol=scale * TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_steps_are_those_of_plain_torch(dtype: WeightDtype, device: torch.device) -> None:
    ours, theirs = pair(device, dtype)
    found, expected = ours.new_pool(6), theirs.new_pool(6)
    for row in (1, 2, 5):
        found.poison(row)
    for ids in ([5, 89, 7], [0, 5, 5], [1, 2, 3]):
        logits = decode(ours, [*ids, -1], [*ROWS, -1], found)[:3].cpu()
        exact = theirs.forward(Batch.of_tokens(np.array(ids), list(ROWS)), expected)
        # Inputs of products with narrow weights keep 16 bits or more of their 24.
        tolerance = TOLERANCE if dtype == "float32" else 5e-4
        torch.testing.assert_close(logits, exact, rtol=0, atol=tolerance)
    if dtype == "float32":
        assert_pools(found, expected)
    for values in found.tensors.values():
        assert values[:, [1, 2, 5]].isnan().all()
    again = ours.logits(found, list(ROWS)).cpu()
    torch.testing.assert_close(again, theirs.logits(expected, list(ROWS)), rtol=0, atol=tolerance)


def test_pieces_of_all_lengths_in_one_batch_are_as_in_plain_torch(device: torch.device) -> None:
    ours, theirs = pair(device)
    found, expected = ours.new_pool(5), theirs.new_pool(5)
    for parts in ([[7], [*range(9)], [3, 4, 5]], [[1, 2, 3], [8], [9]], [[1], [2], [3]]):
        count = sum(map(len, parts))
        batch = Batch.of([np.array(part) for part in parts], list(ROWS)).wanting(np.arange(count))
        exact = theirs.forward(batch, expected)
        torch.testing.assert_close(ours.forward(batch, found).cpu(), exact, rtol=0, atol=1e-4)
    assert_pools(found, expected)


def test_the_company_of_a_row_leaves_its_bits_as_they_are(device: torch.device) -> None:
    # torch's sigmoid on a CPU rounds the end of a vector of another length otherwise.
    ours, _ = pair(device, config=replace(TINY, gate_rank=32))
    alone, together = ours.new_pool(5), ours.new_pool(5)
    for ids in ([5, 6, 7], [8, 9, 10]):
        first = decode(ours, ids[:1], ROWS[:1], alone)
        assert torch.equal(decode(ours, ids, ROWS, together)[:1], first)
    for name, values in alone.tensors.items():
        assert torch.equal(values[:, ROWS[0]], together.tensors[name][:, ROWS[0]])


def test_steps_that_run_ahead_choose_what_plain_torch_chooses(device: torch.device) -> None:
    """The third step is launched before the tokens of the first are known."""
    ours, theirs = pair(device)
    pools = ours.new_pool(6), theirs.new_pool(6)
    runner = new_runner(ours, pools[0], 4)
    assert isinstance(runner, GraphRunner)
    assert runner.runs_ahead
    direct, given, expected = DirectRunner(theirs, pools[1]), [5] * 3, list[list[int | None]]()
    greedy = SamplingParams(temperature=0.0)

    def pieces(step: int, ids: Sequence[int] | None) -> list[Piece]:
        sampled = SampledRow(greedy, step, RecentTokens())
        return [Piece(r, None if ids is None else (ids[i],), sampled) for i, r in enumerate(ROWS)]

    for step in range(4):
        expected.append(list(direct.launch(pieces(step, given)).collect().token_ids))
        given = [token_id or 0 for token_id in expected[-1]]
    flights = [runner.launch(pieces(0, [5] * 3)), runner.launch(pieces(1, None))]
    found = [list(flights.pop(0).collect().token_ids)]
    for step in (2, 3):
        flights.append(runner.launch(pieces(step, None)))
        found.append(list(flights.pop(0).collect().token_ids))
    found.append(list(flights.pop(0).collect().token_ids))
    assert found == expected
    assert_pools(*pools)


def test_a_foreign_pool_is_refused(device: torch.device) -> None:
    ours, _ = pair(device)
    other = networks.network(plain=True, device=device).new_pool(5)
    with pytest.raises(ValueError, match="new_pool"):
        decode(ours, [5], [0], other)
    with pytest.raises(IndexError):
        ours.logits(ours.new_pool(2), [2])


def test_asked_for_plain_it_is_plain(device: torch.device) -> None:
    network = networks.network(TINY, plain=True, device=device)
    assert network.recordable is None
    assert network.backend == "plain torch (as asked for)"

"""Steps launched ahead on the device sample the same tokens as sequential steps on the host."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from model.decoding.cuda.decoder import GraphRunner, batch_sizes
from model.decoding.decoder import Decoded, DirectRunner, Following, Launched, Piece
from model.decoding.runners import new_runner
from model.decoding.sampling import RecentTokens, SampledRow, SamplingParams
from model.heinsen.network import LanguageModel
from model.state import StatePool
from tests.model.heinsen.cuda.networks import TINY, fused, plain

ROWS = (3, 1, 4)
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(seed=3),
    SamplingParams(temperature=0.7, top_k=9, top_p=0.9, seed=4),
)


def one(place: int, step: int, token_id: int | None, **changes: object) -> Piece:
    """The piece of one row in a step."""
    sampled = SampledRow(PARAMS[place], step, RecentTokens())
    given = Piece(ROWS[place], None if token_id is None else (token_id,), sampled)
    return given._replace(**changes)  # type: ignore[arg-type]


class Pair:
    """The runner on the device, and its pool."""

    def __init__(self, device: torch.device, max_rows: int = 4) -> None:
        self.network = fused(plain(), device)
        self.pool = self.network.new_pool(6)
        for row in range(6):
            self.pool.poison(row)
        for row in ROWS:
            self.pool.reset(row)
        runner = new_runner(self.network, self.pool, max_rows)
        assert isinstance(runner, GraphRunner)
        self.runner = runner

    def launch(self, *inputs: Piece) -> Launched:
        return self.runner.launch(inputs)

    def state(self, place: int) -> bytes:
        return self.pool.export_row(ROWS[place])


@pytest.fixture
def pair(device: torch.device) -> Pair:
    return Pair(device)


def on_host(steps: int, places: Sequence[int] = range(3)) -> tuple[list[Decoded], StatePool]:
    """Results of plain torch, one step after the other."""
    network = plain()
    pool = network.new_pool(6)
    runner, given = DirectRunner(network, pool), list[int | None]([5] * 3)
    found = []
    for step in range(steps):
        inputs = [one(place, step, given[place], num_logprobs=2) for place in places]
        found.append(runner.launch(inputs).collect())
        for place, token_id in zip(places, found[-1].token_ids, strict=True):
            given[place] = token_id
    return found, pool


def test_tokens_are_fed_back_on_the_device(pair: Pair) -> None:
    expected, _ = on_host(4)
    pair.runner.prepare()
    under_way = pair.launch(*(one(place, 0, 5) for place in range(3)))
    found = []
    for step in range(1, 4):
        ahead = pair.launch(*(one(place, step, None) for place in range(3)))
        found.append(under_way.collect().token_ids)
        under_way = ahead
    found.append(under_way.collect().token_ids)
    assert found == [each.token_ids for each in expected]


def test_a_row_that_has_ended_is_unchanged_and_the_others_continue(pair: Pair) -> None:
    expected, _ = on_host(3)
    end = expected[0].token_ids[1]
    assert end is not None
    assert end not in (expected[0].token_ids[0], expected[0].token_ids[2])
    ends = frozenset({end, 95})
    first = pair.launch(*(one(place, 0, 5, ends=ends) for place in range(3)))
    states = [pair.state(place) for place in range(3)]
    second = pair.launch(*(one(place, 1, None, ends=ends) for place in range(3)))
    assert first.collect().token_ids == expected[0].token_ids
    token_ids = list(expected[1].token_ids)
    token_ids[1] = None
    assert second.collect().token_ids == token_ids
    assert [pair.state(place) == states[place] for place in range(3)] == [False, True, False]


def test_a_row_that_has_ended_can_continue_next_to_others(pair: Pair) -> None:
    """Its last token is sampled again, without reading anything."""
    expected, _ = on_host(3)
    end = expected[0].token_ids[1]
    assert end is not None
    first = pair.launch(*(one(place, 0, 5, ends=frozenset({end})) for place in range(3)))
    second = pair.launch(*(one(place, 1, None) for place in range(3)))
    assert (first.collect().token_ids[1], second.collect().token_ids[1]) == (end, None)
    state = pair.state(1)
    resumed = one(1, 0, None, token_ids=(), num_logprobs=2)
    third = pair.launch(one(0, 2, None), resumed, one(2, 2, None)).collect()
    assert third.token_ids == [expected[2].token_ids[0], end, expected[2].token_ids[2]]
    ours, theirs = third.scored[1], expected[0].scored[1]
    assert ours is not None
    assert theirs is not None
    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    assert pair.state(1) == state
    assert pair.launch(one(1, 1, end)).collect().token_ids == [expected[1].token_ids[1]]


def test_a_smaller_batch_does_not_see_the_rows_of_the_last(pair: Pair) -> None:
    pair.launch(*(one(place, 0, 5) for place in range(3))).collect()
    before = [pair.state(place) for place in range(3)]
    pair.launch(one(0, 1, None), one(2, 1, None)).collect()
    pair.launch(one(2, 2, None)).collect()
    assert pair.state(1) == before[1]
    free = [row for row in range(6) if row not in ROWS]
    assert all(pair.pool.tensors["h"][0, free].isnan().flatten().tolist())


def test_a_step_mixes_prompts_and_decoding_rows(pair: Pair) -> None:
    """One row continues, one ends, prompts are read in part and to their ends, scored and not, and
    a row resumes: all as on the host, step by step."""
    network = plain()
    runner, given = DirectRunner(network, network.new_pool(6)), dict[int, int | None]()

    def on_the_host(*pieces: Piece) -> Decoded:
        known = [
            each._replace(token_ids=(given[each.row] or 0,)) if each.token_ids is None else each
            for each in pieces
        ]
        positions = [each.sampled and each.sampled.position for each in pieces]
        decoded = runner.launch(known).collect()
        assert len(positions) == len(decoded.token_ids)
        given.update((each.row, decoded.token_ids[i]) for i, each in enumerate(pieces))
        return decoded

    scores = Following(1, (9, 8, 7), 2)
    steps = [
        [one(0, 0, 5), one(1, 3, 0, token_ids=(3, 1, 4, 1))],
        [one(0, 1, None), one(1, 4, None), Piece(ROWS[2], (2, 7, 1, 8), following=scores)],
        [one(0, 2, None), one(1, 0, None, token_ids=()), one(2, 7, 0, token_ids=(2, 8))],
        [one(1, 5, 6), Piece(5, (4, 4))],
        [Piece(5, (1,))],
    ]
    pair.pool.reset(5)
    for pieces in steps:
        ours, theirs = pair.launch(*pieces).collect(), on_the_host(*pieces)
        assert ours.token_ids == theirs.token_ids
        assert set(ours.followed) == set(theirs.followed)
        for place, expected in theirs.followed.items():
            for found, wanted in zip(ours.followed[place], expected, strict=True):
                assert found is not None
                assert wanted is not None
                assert found.logprob == pytest.approx(wanted.logprob, abs=1e-5)
                assert [token_id for token_id, _ in found.top] == [i for i, _ in wanted.top]


def test_the_host_samples_what_the_device_cannot(pair: Pair) -> None:
    """A bias, a penalty and a mask, each next to rows that continue on the device."""
    words = np.zeros(3, np.int32)
    words[2] = 1 << 7
    masked = SampledRow(PARAMS[1], 0, RecentTokens(), allowed=words)
    banned = SampledRow(PARAMS[0], 1, RecentTokens(), banned=tuple(range(90)))
    found = pair.launch(one(0, 0, 5), one(1, 0, 5, sampled=masked), one(2, 0, 5)).collect()
    expected, _ = on_host(2)
    assert found.token_ids[1] == 71
    assert found.token_ids[0] == expected[0].token_ids[0]
    assert found.token_ids[2] == expected[0].token_ids[2]
    step = pair.launch(
        one(0, 1, found.token_ids[0], sampled=banned), one(2, 1, None), one(1, 1, 71)
    )
    token_ids = step.collect().token_ids
    assert token_ids[0] is not None
    assert token_ids[0] >= 90
    assert token_ids[1] == expected[1].token_ids[2]


def test_probabilities_are_the_models(pair: Pair) -> None:
    expected, _ = on_host(2)
    first = pair.launch(one(0, 0, 5), one(1, 0, 5, num_logprobs=2), one(2, 0, 5, num_logprobs=0))
    second = pair.launch(*(one(place, 1, None) for place in range(3)))
    found = first.collect()
    assert second.collect().scored == {}
    assert set(found.scored) == {1, 2}
    for place, count in ((1, 2), (2, 0)):
        ours, theirs = found.scored[place], expected[0].scored[place]
        assert ours is not None
        assert theirs is not None
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [token_id for token_id, _ in ours.top] == [i for i, _ in theirs.top[:count]]


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # by Triton's interpreter
def test_a_row_without_numbers_has_no_token_and_stays(pair: Pair) -> None:
    pair.pool.poison(ROWS[1])
    first = pair.launch(*(one(place, 0, 5) for place in range(3)))
    second = pair.launch(*(one(place, 1, None) for place in range(3)))
    token_ids = first.collect().token_ids
    assert token_ids[1] is None
    assert None not in (token_ids[0], token_ids[2])
    assert second.collect().token_ids[1] is None


@pytest.mark.parametrize("most", [1, 2, 5, 8, 32, 33, 256, 1000])
def test_there_is_a_step_for_every_batch(most: int) -> None:
    sizes = batch_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for count in range(1, most + 1):
        size = min(size for size in sizes if size >= count)
        assert size <= max(2 * count, 1)
    assert len(sizes) <= 24


def test_networks_without_kernels_compute_at_once() -> None:
    network = LanguageModel(TINY)
    assert isinstance(new_runner(network, network.new_pool(1), 1), DirectRunner)

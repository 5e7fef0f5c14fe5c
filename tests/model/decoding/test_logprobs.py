"""Log-probabilities are those of a softmax in float64, independent of other rows."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.decoding import logprobs
from model.decoding.logprobs import FEW, LEAST, Scored, score

VOCAB = 300


def logits_of(num_rows: int, seed: int = 0, size: float = 4.0, vocab: int = VOCAB) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=chance) * size


def scores(logits: Tensor, token_ids: list[int], num_top: list[int]) -> list[Scored]:
    """Scores of rows that are all distributions."""
    found = [each for each in score(logits, token_ids, num_top) if each is not None]
    assert len(found) == len(token_ids)
    return found


@settings(max_examples=50, deadline=None)
@example(rows=[(0, 1)] * 5, seed=32, size=1e5, steps=8)
@given(
    rows=st.lists(st.tuples(st.integers(0, VOCAB - 1), st.integers(0, 25)), min_size=1, max_size=6),
    seed=st.integers(0, 100),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e5]),
    steps=st.sampled_from([None, 8, 1]),
)
def test_they_are_the_logarithms_of_the_softmax(
    rows: list[tuple[int, int]], seed: int, size: float, steps: int | None
) -> None:
    """With few distinct steps between the smallest and the largest logit, many are equal."""
    logits = logits_of(len(rows), seed, size)
    if steps is not None:
        logits = (logits / size * steps / 8).round() * size
    before = logits.clone()
    found = scores(logits, [token_id for token_id, _ in rows], [count for _, count in rows])
    assert torch.equal(logits, before)
    for (token_id, count), values, scored in zip(rows, logits.double().numpy(), found, strict=True):
        below = values - values.max()
        expected = below - np.logaddexp.reduce(below)
        assert scored.logprob == pytest.approx(expected[token_id], rel=1e-12, abs=1e-12)
        order = sorted(range(VOCAB), key=lambda i: (-values[i], i))[:count]
        assert [i for i, _ in scored.top] == order
        for i, logprob in scored.top:
            assert logprob == pytest.approx(expected[i], rel=1e-12, abs=1e-12)
        assert dict(scored.top).get(token_id, scored.logprob) == scored.logprob


@pytest.mark.parametrize("threads", [1, 3])
def test_a_rows_bits_do_not_depend_on_its_company(threads: int) -> None:
    logits = logits_of(9, vocab=50_304)
    ids, counts = list(range(9)), [0, 5, 1, 20, 3, 0, 7, 2, 4]
    torch.set_num_threads(threads)
    together = score(logits, ids, counts)
    torch.set_num_threads(1)
    for i in range(9):
        assert score(logits[i : i + 1], ids[i : i + 1], counts[i : i + 1]) == [together[i]]


def test_more_than_there_are_means_all() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    for count in (4, 5, 100):
        [scored] = scores(logits, [0], [count])
        assert [token_id for token_id, _ in scored.top] == [1, 2, 3, 0]


@pytest.mark.parametrize("bad", ["nan", "inf", "only -inf"])
def test_a_row_that_is_no_distribution_has_none_and_the_others_have_theirs(bad: str) -> None:
    logits = logits_of(3)
    expected = score(logits, [1, 2, 3], [2, 2, 2])
    if bad == "only -inf":
        logits[1] = -torch.inf
    else:
        logits[1, 17] = float(bad)
    assert score(logits, [1, 2, 3], [2, 2, 2]) == [expected[0], None, expected[2]]


def test_what_is_impossible_has_a_number_too() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [1e38, -1e38, 0.0]])
    found = scores(logits, [1, 1], [3, 3])
    assert [scored.logprob for scored in found] == [LEAST, LEAST]
    assert found[0].top == ((0, -np.log(2)), (2, -np.log(2)), (1, LEAST))
    assert found[1].top == ((0, 0.0), (2, LEAST), (1, LEAST))


@pytest.mark.parametrize("seed", range(5))
def test_compiled_and_plain_find_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(20, seed).round(decimals=1)
    asked = [list(range(20)), [0, 1, FEW, 3, FEW, *range(15)]]
    found = score(logits, *asked)
    monkeypatch.setattr(logprobs, "compiled_sampling", lambda: None)
    assert score(logits, *asked) == found

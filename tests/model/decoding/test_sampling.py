"""Each row's token depends only on its logits, parameters, seed and position."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from model.decoding import sampling
from model.decoding.sampling import (
    WINDOW,
    RecentTokens,
    SampledRow,
    SamplingParams,
    _draw,
    _draw_compiled,
    _draw_filtered,
    _filter,
    _penalties,
    _unpack,
    derive_seed,
    sample,
)

VOCAB = 40
DRAWS = 4000
Array = NDArray[np.float64]


def logits_of(num_rows: int, seed: int = 0, size: float = 2.0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, VOCAB, generator=chance) * size


def recent(*generated: int, prompt: tuple[int, ...] = ()) -> RecentTokens:
    made = RecentTokens()
    for token_id in prompt:
        made.append(token_id, generated=False)
    for token_id in generated:
        made.append(token_id, generated=True)
    return made


def row(params: SamplingParams, position: int = 0, seen: RecentTokens | None = None) -> SampledRow:
    return SampledRow(params, position, seen or RecentTokens())


def certain(chosen: list[int | None]) -> list[int]:
    """Tokens of rows that can all be sampled."""
    found = [token_id for token_id in chosen if token_id is not None]
    assert len(found) == len(chosen)
    return found


def draws(
    logits: Tensor, params: SamplingParams, seen: RecentTokens | None = None, count: int = DRAWS
) -> NDArray[np.int64]:
    """How often each token is sampled at the first positions."""
    rows = [row(params, position, seen) for position in range(count)]
    chosen = certain(sample(logits.expand(count, -1).clone(), rows))
    return np.bincount(chosen, minlength=len(logits))


def softmax(logits: Array) -> Array:
    weights: Array = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights


def adjusted(logits: Tensor, params: SamplingParams, seen: list[tuple[int, bool]]) -> Array:
    """Penalties and biases, token by token."""
    values: Array = logits.double().numpy().copy()
    for token_id in {token_id for token_id, _ in seen}:
        penalty = params.repetition_penalty
        values[token_id] *= penalty if values[token_id] < 0 else 1 / penalty
    for token_id in {token_id for token_id, generated in seen if generated}:
        ages = [age for age, each in enumerate(reversed(seen)) if each == (token_id, True)]
        count = sum(params.penalty_decay**age for age in ages)
        values[token_id] -= count * params.frequency_penalty + params.presence_penalty
    for token_id, bias in params.logit_bias:
        values[token_id] += bias
    return values


def kept(probabilities: Array, params: SamplingParams) -> set[int]:
    """The tokens that pass top_k, then top_p of the rest, and min_p."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    if params.top_k:
        order = order[: params.top_k]
    total, before, found = sum(probabilities[order]), 0.0, set[int]()
    for token_id in order:
        if found and params.top_p < 1 and before >= params.top_p * total:
            break
        if probabilities[token_id] >= params.min_p * max(probabilities):
            found.add(token_id)
        before += probabilities[token_id]
    return found


def distribution(logits: Array, params: SamplingParams) -> Array:
    probabilities = softmax(logits / params.temperature)
    allowed = kept(probabilities, params)
    masked: Array = np.array([p if i in allowed else 0.0 for i, p in enumerate(probabilities)])
    masked /= masked.sum()
    return masked


def assert_distributed(counts: NDArray[np.int64], expected: Array) -> None:
    """No token outside, and a chi-square of at most 5 standard deviations inside."""
    assert counts[expected == 0].sum() == 0
    wanted = expected * counts.sum()
    often = wanted >= 5
    chi_square = float(((counts - wanted)[often] ** 2 / wanted[often]).sum())
    freedom = max(1, int(often.sum()) - 1)
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 10


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5, seed=1),
        SamplingParams(temperature=3.0, seed=2),
        SamplingParams(top_k=5, seed=3),
        SamplingParams(top_p=0.7, seed=4),
        SamplingParams(min_p=0.1, seed=5),
        SamplingParams(temperature=1.5, top_k=12, top_p=0.8, min_p=0.05, seed=2**64 - 1),
    ],
)
def test_tokens_follow_the_distribution(params: SamplingParams) -> None:
    logits = logits_of(1)[0]
    counts = draws(logits, params)
    assert_distributed(counts, distribution(logits.double().numpy(), params))


@settings(max_examples=30, deadline=None)
@given(
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(0.2, 5.0),
    seed=st.integers(0, 100),
)
def test_filters_keep_exactly_the_right_set(
    top_k: int, top_p: float, min_p: float, temperature: float, seed: int
) -> None:
    """With similar logits every allowed token is sampled, and no other."""
    params = SamplingParams(temperature, top_k, top_p, min_p, seed=seed)
    logits = logits_of(1, seed, size=0.3 * temperature)[0]
    counts = draws(logits, params, count=1500)
    probabilities = softmax(logits.double().numpy() / temperature)
    assert {i for i in range(VOCAB) if counts[i]} == kept(probabilities, params)


def test_filters_break_ties_by_the_lower_id() -> None:
    level = torch.zeros(8)
    for params in (
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.375),
        SamplingParams(top_p=0.3),
        SamplingParams(top_k=6, top_p=0.5),
    ):
        assert set(np.flatnonzero(draws(level, params, count=200))) == {0, 1, 2}
    assert set(np.flatnonzero(draws(level, SamplingParams(min_p=1.0), count=400))) == set(range(8))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(repetition_penalty=0.6),
        SamplingParams(frequency_penalty=0.4),
        SamplingParams(frequency_penalty=1.5, penalty_decay=0.7, presence_penalty=0.1),
        SamplingParams(frequency_penalty=1.5, penalty_decay=0.0),
        SamplingParams(presence_penalty=-1.5),
        SamplingParams(logit_bias=((3, 4.0), (7, -100.0), (11, 0.25))),
        SamplingParams(
            repetition_penalty=1.3,
            frequency_penalty=-0.2,
            presence_penalty=0.9,
            logit_bias=((2, 1.5), (39, 3.0)),
        ),
    ],
)
def test_penalties_and_biases_are_exact(params: SamplingParams) -> None:
    """A bias that makes two tokens equal shows the exact value of every other logit."""
    logits, prompt, generated = logits_of(1)[0], (1, 2, 3, 5), (2, 2, 7, 2, 9)
    seen = [*((i, False) for i in prompt), *((i, True) for i in generated)]
    expected = adjusted(logits, params, seen)
    greedy = replace(params, temperature=0.0)
    for token_id in range(VOCAB):
        for push, wins in ((1e-3, True), (-1e-3, False)):
            gap = float(np.delete(expected, token_id).max() - expected[token_id])
            own = row(
                replace(greedy, logit_bias=(*params.logit_bias, (token_id, gap + push))),
                seen=recent(*generated, prompt=prompt),
            )
            assert (sample(logits.unsqueeze(0).clone(), [own]) == [token_id]) == wins


def test_penalties_change_the_distribution_as_they_say() -> None:
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, logit_bias=((4, 1.0),))
    logits = logits_of(1, size=1.0)[0]
    seen = [(3, False), (4, True), (5, True)]
    counts = draws(logits, params, recent(4, 5, prompt=(3,)))
    assert_distributed(counts, softmax(adjusted(logits, params, seen)))


def test_temperature_zero_takes_the_largest() -> None:
    logits = logits_of(6)
    rows = [row(SamplingParams(temperature=0.0, seed=i, top_k=i), i) for i in range(6)]
    assert sample(logits.clone(), rows) == logits.argmax(-1).tolist()


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 7, 1000]),
    top_p=st.sampled_from([0.01, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 2.0]),
    frequency_penalty=st.sampled_from([-1.0, 0.0, 0.5]),
    penalty_decay=st.sampled_from([1.0, 0.9]),
    presence_penalty=st.sampled_from([0.0, 2.0]),
    logit_bias=st.sampled_from([(), ((5, 3.0),), ((1, -100.0), (2, 0.5))]),
    seed=st.integers(0, 2**64 - 1),
)
ROWS = st.builds(
    SampledRow,
    params=PARAMS,
    position=st.integers(0, 10**9),
    recent=st.lists(st.integers(0, VOCAB - 1), max_size=20).map(lambda ids: recent(*ids)),
    banned=st.sampled_from([(), (5,), (1, 2, 39)]),
    allowed=st.sampled_from([None, np.array([0x7FFF00FF, 3], np.int32), np.zeros(2, np.int32)]),
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=8), seed=st.integers(0, 100))
def test_company_does_not_change_a_rows_token(rows: list[SampledRow], seed: int) -> None:
    logits = logits_of(len(rows), seed)
    together = sample(logits.clone(), rows)
    alone = [sample(logits[[i]].clone(), [own])[0] for i, own in enumerate(rows)]
    assert together == alone


def test_seed_and_position_decide_the_token() -> None:
    logits = logits_of(1, size=0.1)

    def tokens(seed: int, start: int) -> list[int]:
        rows = [row(SamplingParams(seed=seed), start + i) for i in range(50)]
        return certain(sample(logits.expand(50, -1).clone(), rows))

    assert tokens(7, 0) == tokens(7, 0)
    assert tokens(7, 0)[20:] == tokens(7, 20)[:30]
    for other in (tokens(8, 0), tokens(7, 1), tokens(7 + (1 << 32), 0), tokens(7, 1 << 32)):
        assert sum(a == b for a, b in zip(tokens(7, 0), other, strict=True)) < 15


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-310),
        SamplingParams(temperature=5e-324, top_p=0.5),
        SamplingParams(temperature=1e-20),
        SamplingParams(top_k=10**30),
        SamplingParams(top_p=5e-324),
        SamplingParams(top_p=0.0),
        SamplingParams(min_p=1.0),
        SamplingParams(repetition_penalty=1e-300),
        SamplingParams(repetition_penalty=1e-40, temperature=1e-310),
        SamplingParams(logit_bias=tuple((i, -100.0) for i in range(VOCAB))),
    ],
)
def test_extreme_settings_still_choose_a_token(params: SamplingParams) -> None:
    logits = logits_of(3)
    rows = [row(params, i, recent(1, 2, 3)) for i in range(3)]
    chosen = certain(sample(logits.clone(), rows))
    assert all(0 <= token_id < VOCAB for token_id in chosen)
    if min(params.temperature, params.top_p) < 1e-9 and not params.has_penalties:
        assert chosen == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("number", "chosen"), [(0.0, 3), (1 - 2**-53, 6)])
def test_the_ends_of_the_random_numbers_are_tokens_that_are_allowed(
    monkeypatch: pytest.MonkeyPatch, number: float, chosen: int
) -> None:
    monkeypatch.setattr(sampling, "_uniform", lambda *_: number)
    logits = torch.tensor([[0.0, 0.0, 0.0, 5.0, 4.0, 0.0, 5.0, 0.0, 0.0]])
    assert sample(logits, [row(SamplingParams(top_k=3))]) == [chosen]


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=60),
    filler=st.sampled_from([0, WINDOW - 30, 2 * WINDOW - 7]),
    place=st.integers(0, 60),
)
def test_recent_tokens_are_those_of_the_window(
    tokens: list[tuple[int, bool]], filler: int, place: int
) -> None:
    everything = [*((99, False) for _ in range(filler)), *tokens]
    made = RecentTokens()
    for number, (token_id, generated) in enumerate(everything):
        if number == filler + place:
            made = RecentTokens.from_bytes(made.to_bytes())
        made.append(token_id, generated=generated)
    window = everything[-WINDOW:]
    assert sorted(made.seen().tolist()) == sorted({token_id for token_id, _ in window})
    by_hand = [token_id for token_id, generated in window if generated]
    ids, counts = made.generated()
    assert sorted(ids.tolist()) == sorted(set(by_hand))
    assert counts.tolist() == [by_hand.count(token_id) for token_id in ids]
    ids, faded = made.generated(0.5)
    expected = [
        sum(0.5**age for age, each in enumerate(reversed(window)) if each == (token_id, True))
        for token_id in ids
    ]
    assert faded.tolist() == pytest.approx(expected, rel=1e-12)


def test_recent_tokens_go_from_the_oldest_to_the_newest_byte() -> None:
    made = recent(300, 5, prompt=(7,))
    values = np.frombuffer(made.to_bytes(), "<i4")
    assert len(made.to_bytes()) == 4 * WINDOW == 4096
    assert (values[:-3] == -1).all()
    assert (values[-3:] & 0xFFFF).tolist() == [7, 300, 5]
    assert RecentTokens.from_bytes(made.to_bytes()).to_bytes() == made.to_bytes()
    assert RecentTokens.from_bytes(b"").to_bytes() == RecentTokens().to_bytes()
    for length in (1, 4095, 4097):
        with pytest.raises(ValueError, match=f"4096 bytes, not {length}"):
            RecentTokens.from_bytes(bytes(length))


def test_answers_to_one_request_have_seeds_of_their_own() -> None:
    for seed in (0, 5, 2**64 - 1, -3):
        seeds = [derive_seed(seed, index) for index in range(50)]
        assert seeds[0] == seed
        assert len(set(seeds)) == 50
        assert all(0 <= derived < 2**64 for derived in seeds[1:])
        assert seeds == [derive_seed(seed, index) for index in range(50)]
    assert derive_seed(1, 2) != derive_seed(2, 1)
    rows = [row(SamplingParams(seed=derive_seed(9, index)), 4) for index in range(400)]
    assert len(set(sample(torch.zeros(400, VOCAB), rows))) > VOCAB // 2


NO_DISTRIBUTION = {
    "one nan": ([17], torch.nan),
    "first nan": ([0], torch.nan),
    "only nan": (range(VOCAB), torch.nan),
    "one inf": ([VOCAB - 1], torch.inf),
    "two inf": ([3, 4], torch.inf),
    "only -inf": (range(VOCAB), -torch.inf),
}
WAYS = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(),
    "filtered": SamplingParams(top_k=5, top_p=0.9, min_p=0.01),
    "penalised": SamplingParams(repetition_penalty=1.5, presence_penalty=0.5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NO_DISTRIBUTION)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_row_that_is_no_distribution_has_no_token_and_the_others_have_theirs(
    way: str, kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(sampling, "compiled_sampling", lambda: None)
    logits = logits_of(4)
    everything = recent(*range(VOCAB))
    rows = [row(WAYS[way], i, everything) for i in range(4)]
    expected = sample(logits.clone(), rows)
    columns, value = NO_DISTRIBUTION[kind]
    logits[2, list(columns)] = value
    assert sample(logits.clone(), rows) == [*expected[:2], None, expected[3]]
    assert None not in expected


@pytest.mark.parametrize("way", WAYS)
def test_a_token_may_be_impossible(way: str) -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 9] = -3.0
    assert sample(logits, [row(WAYS[way], seen=recent(8, 9))]) == [9]


def test_the_compiled_draw_is_the_one_in_torch() -> None:
    """Up to the rounding of float32 weights, which moves few boundaries slightly."""
    random = torch.Generator().manual_seed(9)
    logits = torch.randn(400, 3000, generator=random) * 3
    rows = [
        SampledRow(SamplingParams(temperature=0.2 + i % 7 / 3, seed=i), i, RecentTokens())
        for i in range(400)
    ]
    compiled, plain = _draw_compiled(logits, rows), _draw(logits, rows)
    assert sum(a != b for a, b in zip(compiled, plain, strict=True)) <= 1


def kept_of_sorted(weights: Tensor, params: SamplingParams) -> Tensor:
    """The weights `[vocab]` that the filters leave, from their stable order; the others are 0."""
    ordered, ids = weights.sort(stable=True, descending=True)
    ordered, ids = ordered[: params.top_k or None], ids[: params.top_k or None]
    padded = torch.zeros_like(weights)  # the sum of so many numbers has an order of its own
    padded[: len(ordered)] = ordered
    if params.top_p < 1:
        before = padded.cumsum(-1) - padded
        beyond = (before >= params.top_p * padded.sum())[: len(ordered)]
        beyond[0] = False
        count = int(torch.argmax(beyond.int())) if beyond.any() else len(ordered)
        ordered, ids = ordered[:count], ids[:count]
    found = torch.zeros_like(weights)
    found[ids] = ordered.masked_fill(ordered < params.min_p, 0.0)
    return found


@settings(max_examples=300, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 7, 40, 1000, 4096]),
    shape=st.sampled_from(["normal", "steep", "few values", "level", "one group", "impossible"]),
    temperature=st.sampled_from([0.01, 0.7, 1.0, 10.0, 1e12]),
    top_k=st.sampled_from([0, 1, 2, 20, 999, 10**6]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1 - 1e-9, 1 - 1e-13, 1 - 2**-53, 1.0]),
    min_p=st.sampled_from([0.0, 1e-5, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_filters_leave_what_the_sorted_order_says(
    vocab: int, shape: str, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """The same tokens are drawn, and no other ones left, where the sums decide by one bit, too."""
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    if shape == "steep":
        logits *= 40
    elif shape == "few values":
        logits = logits.round()
    elif shape == "level":
        logits.zero_()
    elif shape == "one group":
        logits[:, : vocab // 2] = 1e30
    elif shape == "impossible":
        logits[:, ::2] = -torch.inf
        logits[:, -1] = 1.0
    params = SamplingParams(temperature, top_k, top_p, min_p)
    rows = [row(replace(params, seed=seed + i), i) for i in range(len(logits))]
    weights = sampling._weights(logits, rows)
    expected = torch.stack([kept_of_sorted(each, params) for each in weights])
    assert torch.equal(_filter(weights, [params] * len(rows)), expected)
    cumulative = expected.cumsum(-1)
    total = cumulative[:, -1:]
    points = torch.from_numpy(sampling._points(rows)).unsqueeze(-1)
    targets = torch.minimum(points * total, total * (1 - 2**-52))
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(-1).tolist()
    assert _draw_filtered(logits, rows) == _draw(logits, rows) == chosen


def test_a_row_is_drawn_the_same_whatever_stands_beside_it() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(3))
    kinds = [
        SamplingParams(seed=1),
        SamplingParams(temperature=0.0),
        SamplingParams(seed=2, top_k=5),
        SamplingParams(seed=3, repetition_penalty=1.5),
        SamplingParams(seed=4, temperature=1e-310),
    ]
    rows = [SampledRow(params, 7, RecentTokens()) for params in kinds]
    together = sample(logits.clone(), rows)
    alone = [sample(logits[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows)]
    assert together == alone
    assert together[4] == int(logits[4].argmax())


def words(*allowed: int, vocab: int = VOCAB) -> NDArray[np.int32]:
    """Mask with a bit for each allowed token, built independently."""
    made = [0] * -(-vocab // 32)
    for token_id in allowed:
        made[token_id // 32] |= 1 << token_id % 32
    return np.array(made, np.uint32).view(np.int32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("forbidden_by", ["banned", "allowed", "both"])
def test_a_token_that_is_forbidden_is_never_chosen(way: str, forbidden_by: str) -> None:
    """The result equals that of the logits without those tokens, however large the bias."""
    logits, seen = logits_of(400, size=1.0), recent(3, 4, prompt=(5,))
    banned = set(range(0, VOCAB, 3)) if forbidden_by != "allowed" else set()
    allowed = set(range(VOCAB)) - ({31, *range(1, 32, 5)} if forbidden_by != "banned" else set())
    forbidden = sorted(banned | set(range(VOCAB)) - allowed)
    params = replace(WAYS[way], logit_bias=tuple((i, 50.0) for i in forbidden))
    own = SampledRow(
        params,
        0,
        seen,
        tuple(banned) if banned else (),
        words(*allowed) if forbidden_by != "banned" else None,
    )
    rows = [own._replace(position=i) for i in range(400)]
    expected = logits.clone()
    expected[:, forbidden] = -torch.inf
    plain = [each._replace(banned=(), allowed=None) for each in rows]
    chosen = certain(sample(logits, rows))
    assert chosen == certain(sample(expected, plain))
    assert set(chosen).isdisjoint(forbidden)
    assert len(set(chosen)) > 5


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 40, 4096])
def test_each_bit_of_a_mask_is_one_token(vocab: int) -> None:
    params = SamplingParams(temperature=0.0)
    for token_id in {0, 1, 7, 8, 30, 31, 32, vocab - 1} & set(range(vocab)):
        mask = words(token_id, vocab=vocab)
        for allowed in (mask, np.append(mask, np.int32(-1)), mask[: token_id // 32 + 1]):
            own = SampledRow(params, 0, RecentTokens(), allowed=allowed)
            assert sample(torch.zeros(1, vocab), [own]) == [token_id]


@pytest.mark.parametrize("way", WAYS)
def test_where_nothing_is_allowed_there_is_no_token(way: str) -> None:
    nothing = (
        row(WAYS[way]),
        row(WAYS[way])._replace(allowed=words()),
        row(WAYS[way])._replace(banned=tuple(range(VOCAB))),
        row(WAYS[way])._replace(banned=(3, 33), allowed=words(3, 33)),
        row(WAYS[way])._replace(allowed=np.empty(0, np.int32)),
    )
    chosen = sample(logits_of(5), nothing)
    assert chosen[0] is not None
    assert chosen[1:] == [None] * 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_mask_does_not_hide_that_a_row_is_no_distribution(way: str, value: float) -> None:
    logits = logits_of(2)
    logits[:, 17] = value
    forbidden = (
        row(WAYS[way])._replace(banned=(17, 17)),
        row(WAYS[way])._replace(allowed=words(1, 2, 3)),
    )
    assert sample(logits, forbidden) == [None, None]


@pytest.mark.parametrize("vocab", [1, 32, 45, 300])
def test_masks_are_unpacked_on_a_device_as_on_the_host(vocab: int) -> None:
    chance = np.random.default_rng(0)
    masks = chance.integers(-(2**31), 2**31, (5, -(-vocab // 32)), np.int64).astype(np.int32)
    expected = [_penalties(mask, vocab) for mask in masks]
    found = _unpack(torch.from_numpy(masks), vocab)
    np.testing.assert_array_equal(found.numpy(), np.stack(expected))


def test_recent_tokens_are_those_of_the_window_however_they_are_read() -> None:
    """Read after each token, or only at the end, over more than two windows."""
    chance = np.random.default_rng(1)
    read, unread = RecentTokens(), RecentTokens()
    kept = list[tuple[int, bool]]()
    for number in range(2 * WINDOW + 100):
        token_id, generated = int(chance.integers(40)), bool(chance.integers(2))
        kept.append((token_id, generated))
        for each in (read, unread):
            each.append(token_id, generated=generated)
        if number % 7 == 0:
            read.to_bytes()
        if number in (0, 5, WINDOW - 1, WINDOW, 2 * WINDOW + 99):
            recent = kept[-WINDOW:]
            assert sorted(read.seen().tolist()) == sorted({i for i, _ in recent})
            ids, counts = read.generated()
            assert sorted(ids.tolist()) == sorted({i for i, own in recent if own})
            assert counts.tolist() == [recent.count((i, True)) for i in ids.tolist()]
    assert unread.to_bytes() == read.to_bytes()
    assert len(unread.to_bytes()) == 4 * WINDOW

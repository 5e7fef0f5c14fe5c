"""Tokens sampled on the device equal those of `decoding.sampling` in float64 on the CPU."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.decoding import sampling
from model.decoding.cuda.sampling import choose
from model.decoding.cuda.table import SamplerTable
from model.decoding.decoder import MAX_END_TOKENS
from model.decoding.sampling import RecentTokens, SampledRow, SamplingParams, sample


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for a CPU has weights in float32, which moves borders a little."""
    monkeypatch.setattr(sampling, "compiled_sampling", lambda: None)


def logits_of(batch: int, vocab: int, seed: int = 0, size: float = 2.0) -> Tensor:
    return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * size


def ties_of(batch: int, vocab: int) -> Tensor:
    """Few distinct logits, some of them -inf, 0 and -0."""
    logits = torch.round(logits_of(batch, vocab, seed=1))
    logits[:, ::7] = -torch.inf
    logits[:, 1::7] = -0.0
    return logits


def table_of(
    params: Sequence[SamplingParams],
    device: torch.device,
    positions: Sequence[int] | None = None,
    ends: Sequence[int] = (),
) -> SamplerTable:
    """Row i + 1 has the i-th settings; row 0 is poison."""
    host, table = (
        SamplerTable(len(params), torch.device("cpu")),
        SamplerTable(len(params) + 1, device),
    )
    for i, own in enumerate(params):
        host.assign(i, own, positions[i] if positions else i, 7, ends)
    table.memory[0] = -1
    table.write(torch.arange(1, len(params) + 1, device=device), host.memory.to(device))
    return table


def choose_all(
    logits: Tensor,
    params: Sequence[SamplingParams],
    device: torch.device,
    positions: Sequence[int] | None = None,
) -> list[int | None]:
    table = table_of(params, device, positions)
    rows = torch.arange(1, len(params) + 1, dtype=torch.int32, device=device)
    chosen = torch.full((len(params),), -99, dtype=torch.int32, device=device)
    choose(logits.to(device), rows, table, chosen)
    assert table.token[1:].tolist() == chosen.tolist()
    return [token if token >= 0 else None for token in chosen.tolist()]


def assert_same(
    logits: Tensor,
    params: Sequence[SamplingParams],
    device: torch.device,
    positions: Sequence[int] | None = None,
) -> None:
    positions = positions or range(len(params))
    rows = [
        SampledRow(own, position, RecentTokens())
        for own, position in zip(params, positions, strict=True)
    ]
    assert choose_all(logits, params, device, positions) == sample(logits.clone(), rows)


each_vocab = pytest.mark.parametrize("vocab", [1, 300, 4096, 5000])


@each_vocab
def test_drawn_and_most_probable_tokens(vocab: int, device: torch.device) -> None:
    params = [
        SamplingParams(temperature=temperature, seed=seed)
        for temperature in (0.0, 0.3, 1.0, 3.0)
        for seed in (5, 2**64 - 1)
    ]
    for logits in (logits_of(8, vocab), ties_of(8, vocab), torch.zeros(8, vocab)):
        if vocab > 1 or logits.isfinite().all():
            assert_same(logits, params, device)


FILTERS = [
    SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    for top_k, top_p, min_p, temperature in [
        (1, 1.0, 0.0, 1.0),
        (7, 1.0, 0.0, 1.0),
        (40, 1.0, 0.0, 3.0),
        (10**9, 1.0, 0.0, 1.0),
        (0, 0.01, 0.0, 1.0),
        (0, 0.5, 0.0, 1.0),
        (0, 0.95, 0.0, 0.7),
        (0, 0.999, 0.0, 2.0),
        (0, 1.0, 0.1, 1.0),
        (0, 1.0, 1.0, 1.0),
        (50, 0.8, 0.0, 1.5),
        (5, 0.99, 0.0, 2.0),
        (20, 0.9, 0.05, 1.0),
    ]
]


@pytest.mark.parametrize(
    ("vocab", "kind", "every"),
    [(1, "equal", 1), (300, "equal", 2), (300, "random", 1), (5000, "ties", 3)],
)
def test_filters_leave_the_same_tokens(
    vocab: int, kind: str, every: int, device: torch.device
) -> None:
    params = [replace(own, seed=seed) for seed, own in enumerate(FILTERS[::every])]
    logits = torch.full((len(params), vocab), -3.0)
    if kind != "equal":
        logits = logits_of(len(params), vocab) if kind == "random" else ties_of(len(params), vocab)
    assert_same(logits, params, device)


@pytest.mark.parametrize("kind", ["random", "ties", "signs of 0"])
def test_filters_end_at_the_same_token(kind: str, device: torch.device) -> None:
    """The largest random number samples the last remaining token: the least probable one."""
    params, logits = FILTERS, torch.tensor([-0.0, 0.0]).repeat(1, 150)
    if kind == "signs of 0":
        params = FILTERS[1:6]
    else:
        logits = logits_of(1, 300) if kind == "random" else ties_of(1, 300)
        logits = logits.sort(-1, descending=True).values
    position = max(range(50_000), key=lambda position: sampling._uniform(0, position))
    assert_same(logits.repeat(len(params), 1), params, device, [position] * len(params))


def test_numbers_are_those_of_the_cpu(device: torch.device) -> None:
    """With that many equal logits, the token reveals the first digits of the random number."""
    seeds = [0, 1, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1, -5]
    pairs = list(itertools.product(seeds, [0, 2**31, 2**63 - 1]))
    params = [SamplingParams(seed=seed) for seed, _ in pairs]
    positions = [position for _, position in pairs]
    found = choose_all(torch.zeros(len(pairs), 4096), params, device, positions)
    expected = [int(sampling._uniform(*pair) * 4096) for pair in pairs]
    assert found == expected
    assert len(set(found)) > 15


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
    ],
)
def test_extreme_settings(params: SamplingParams, device: torch.device) -> None:
    for size in (2.0, 1e38):
        assert_same(logits_of(2, 40, size=size), [params] * 2, device)


NO_DISTRIBUTION = {
    "one nan": ([2050], torch.nan),
    "first nan": ([0], torch.nan),
    "one inf": ([2099], torch.inf),
    "two inf": ([3, 4], torch.inf),
    "only -inf": (range(2100), -torch.inf),
}
WAYS = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(),
    "filtered": SamplingParams(top_k=5, top_p=0.9, min_p=0.01),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", NO_DISTRIBUTION)
def test_a_row_that_is_no_distribution_has_no_token_and_the_others_have_theirs(
    way: str, kind: str, device: torch.device
) -> None:
    logits, params = logits_of(2, 2100), [WAYS[way]] * 2
    rows = [SampledRow(own, i, RecentTokens()) for i, own in enumerate(params)]
    expected = sample(logits.clone(), rows)
    columns, value = NO_DISTRIBUTION[kind]
    logits[0, list(columns)] = value
    assert choose_all(logits, params, device) == [None, expected[1]]


@pytest.mark.parametrize("way", WAYS)
def test_a_token_may_be_impossible(way: str, device: torch.device) -> None:
    logits = torch.full((1, 2100), -torch.inf)
    logits[0, 2055] = -3.0
    assert choose_all(logits, [WAYS[way]], device) == [2055]


def test_rows_that_are_none_are_left_alone(device: torch.device) -> None:
    params = [SamplingParams(seed=i) for i in range(5)]
    table, logits = table_of(params, device), logits_of(4, 300).to(device)
    before = table.memory.clone()
    logits[[0, 3]] = torch.nan
    rows = torch.tensor([-1, 4, 2, -7], dtype=torch.int32, device=device)
    chosen = torch.full((4,), -99, dtype=torch.int32, device=device)
    choose(logits, rows, table, chosen)
    expected = [SampledRow(params[row - 1], row - 1, RecentTokens()) for row in (4, 2)]
    assert chosen.tolist() == [-1, *sample(logits[1:3].cpu(), expected), -1]
    for row in range(6):
        own, old = table.memory[row].tolist(), before[row].tolist()
        assert (own == old) == (row not in (2, 4))
    assert table.position.tolist()[1:] == [0, 2, 2, 4, 4]
    assert table.token.tolist()[1:] == [7, chosen[2], 7, chosen[1], 7]


def test_a_row_continues_in_place_until_its_text_ends(device: torch.device) -> None:
    logits, params = logits_of(1, 300), [SamplingParams(seed=3)]
    rows = [SampledRow(params[0], position, RecentTokens()) for position in range(12)]
    expected = sample(logits.expand(12, -1).clone(), rows)
    table = table_of(params, device)
    row, chosen = (torch.ones(1, dtype=torch.int32, device=device) for _ in range(2))
    for token in expected:
        choose(logits.to(device), row, table, chosen)
        assert chosen.tolist() == [token] == table.token[1:].tolist()
    assert table.position[1] == 12


@pytest.mark.parametrize("count", [1, 3, MAX_END_TOKENS])
def test_a_token_that_ends_the_text_is_reported_but_not_continued(
    count: int, device: torch.device
) -> None:
    logits = torch.zeros(1, 40)
    logits[0, 11] = 5.0
    for ends, goes_on in (([*range(20, 20 + count - 1), 11], False), (range(20, 20 + count), True)):
        table = table_of([SamplingParams(temperature=0.0)], device, ends=list(ends))
        row, chosen = (torch.ones(1, dtype=torch.int32, device=device) for _ in range(2))
        choose(logits.to(device), row, table, chosen)
        assert chosen.tolist() == [11]
        assert table.token[1:].tolist() == [11 if goes_on else -1]
        assert table.position[1:].tolist() == [1]


def test_company_and_strides_do_not_change_a_token(device: torch.device) -> None:
    params = [*WAYS.values(), SamplingParams(top_p=0.5), SamplingParams(min_p=0.1)]
    logits = logits_of(len(params), 300)
    together = choose_all(logits, params, device)
    alone = [choose_all(logits[[i]], [own], device, [i])[0] for i, own in enumerate(params)]
    assert together == alone
    wide = torch.full((len(params), 400), torch.nan)
    wide[:, 50:350] = logits
    assert choose_all(wide[:, 50:350], params, device) == together


def test_what_the_device_cannot_do_is_an_error(device: torch.device) -> None:
    table = SamplerTable(1, torch.device("cpu"))
    for params in (SamplingParams(logit_bias=((1, 1.0),)), SamplingParams(presence_penalty=1.0)):
        with pytest.raises(ValueError, match="penalties"):
            table.assign(0, params, 0, 0, ())
    with pytest.raises(ValueError, match="at most 8"):
        table.assign(0, SamplingParams(), 0, 0, range(9))
    logits, row = logits_of(1, 40).to(device), torch.ones(1, dtype=torch.int32, device=device)
    wrong = [
        (logits.double(), row, row),
        (logits.expand(40, -1).T, row.repeat(40), row.repeat(40)),
        (logits, row.long(), row),
        (logits, row.repeat(2), row),
        (logits, row, row.long()),
        (logits[:, :0], row, row),
    ]
    for values, rows, chosen in wrong:
        with pytest.raises(ValueError, match=r"logits|rows|chosen"):
            choose(values, rows, table, chosen)

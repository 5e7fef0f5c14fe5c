"""Guarantees of the attention kernels beyond the torch functions: rows, lengths, bits.

Their equivalence with the torch functions is tested in `tests/model/heinsen/test_attention.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.heinsen import attention
from model.heinsen.attention import AttentionState
from model.heinsen.cuda.attention import absorb, chunked, step
from tests.model.heinsen.test_attention import (
    assert_near,
    assert_same,
    both_values,
    copy,
    ramp,
    tensors,
)

HEADS, D_KEY, D_VAL = 2, 6, 5
Tokens = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel leaves unwritten, or reads before writing, is NaN."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = new_empty(self, *args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def projected(
    batch: int,
    tokens: int,
    device: torch.device,
    d_key: int = D_KEY,
    d_val: int = D_VAL,
    heads: int = HEADS,
) -> Tokens:
    """q, k, v as views of one projection, as in a layer."""
    chance = torch.Generator().manual_seed(batch + tokens)
    x = torch.randn(batch, tokens, heads, 2 * d_key + d_val, generator=chance).to(device)
    q, k, v = torch.split(x, [d_key, d_key, d_val], -1)
    return q, k, v


def pool(
    rows: int,
    log_values: bool,
    device: torch.device,
    d_key: int = D_KEY,
    d_val: int = D_VAL,
    heads: int = HEADS,
) -> AttentionState:
    """Rows that have read 30 tokens each, with nonzero compensation terms."""
    _, k, v = projected(rows, 30, torch.device("cpu"), d_key, d_val, heads)
    like = torch.zeros(())
    state = AttentionState.empty(rows, heads, d_key, d_val, log_values=log_values, like=like)
    state = replace(state, z_low=state.z.char(), s_low=state.s.char())
    for t in range(30):
        attention.step(k[:, t], k[:, t], v[:, t], state)
    return state.map(lambda x: x.contiguous().to(device))


def indices(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def assert_equal(found: AttentionState, expected: AttentionState) -> None:
    """Equal bit for bit, including NaN."""
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def poison(state: AttentionState, row: int) -> None:
    for x in tensors(state):
        x[row] = torch.nan if x.is_floating_point() else -128


@both_values
def test_step_finds_its_rows_and_touches_no_others(log_values: bool, device: torch.device) -> None:
    q, k, v = (x[:, 0] for x in projected(4, 1, device))
    state = pool(6, log_values, device)
    poison(state, 1)
    before, rows, apart = copy(state), [4, -1, 0, 2], [1, 3, 5]
    y = step(q, k, v, state, indices(rows, device))
    assert (y[1] == 0).all()
    there = [i for i, row in enumerate(rows) if row >= 0]
    expected = before.select(indices([rows[i] for i in there], device).long())
    assert_near(y[there], attention.step(q[there], k[there], v[there], expected))
    assert_same(state.select(indices([rows[i] for i in there], device).long()), expected)
    assert_equal(state.select(indices(apart, device)), before.select(indices(apart, device)))


@both_values
def test_chunked_and_absorb_find_their_rows_and_touch_no_others(
    log_values: bool, device: torch.device
) -> None:
    q, k, v = projected(3, 66, device)
    state = pool(5, log_values, device)
    poison(state, 2)
    before, rows = copy(state), indices([4, -1, 0], device)
    lengths = indices([66, 9, 3], device)
    y, end = chunked(q, k, v, state, rows, lengths)
    assert end is state
    assert (y[1] == 0).all()
    assert_equal(state.select(slice(1, 4)), before.select(slice(1, 4)))
    for i, length, row in ((0, 66, 4), (2, 3, 0)):
        qi, ki, vi = (x[i : i + 1, :length] for x in (q, k, v))
        expected, after = attention.chunked(qi, ki, vi, before.select(slice(row, row + 1)))
        assert_near(y[i, :length], expected[0])
        assert (y[i, length:] == 0).all()
        assert_same(state.select(slice(row, row + 1)), after)
    assert absorb(k, v, before, rows, lengths) is before
    assert_equal(before, state)


def padded(k: Tensor, v: Tensor, lengths: list[int], log_values: bool) -> tuple[Tensor, Tensor]:
    k, v = k.clone(), v.clone()
    for i, length in enumerate(lengths):
        k[i, length:], v[i, length:] = -torch.inf, -torch.inf if log_values else 0.0
    return k, v


@both_values
def test_a_length_is_padding_from_there_on_bit_for_bit(
    log_values: bool, device: torch.device
) -> None:
    lengths = [70, 64, 5, 0]
    q, k, v = projected(4, 70, device)
    k, v = padded(k, v, lengths, log_values)
    y, end = chunked(q, k, v, pool(4, log_values, device))
    for i, length in enumerate(lengths):
        for x in (q, k, v):
            x[i, length:] = torch.nan  # nobody's memory
    found, after = chunked(q, k, v, pool(4, log_values, device), lengths=indices(lengths, device))
    assert_equal(after, end)
    for i, length in enumerate(lengths):
        assert torch.equal(found[i, :length], y[i, :length])
        assert (found[i, length:] == 0).all()


@both_values
@pytest.mark.parametrize("slope", [0.0, 1.5])
def test_cuts_at_multiples_of_a_chunk_change_no_bit(
    slope: float, log_values: bool, device: torch.device
) -> None:
    """Even if keys rise by more than float32 can hold at once."""
    q, k, v = projected(1, 80, device, heads=1)
    k, state = ramp(k.cpu(), slope).to(device), pool(1, log_values, device, heads=1)
    whole, end = chunked(q, k, v, state)
    found = []
    for start, stop in ((0, 64), (64, 80)):
        token = slice(start, stop)
        y, state = chunked(q[:, token], k[:, token], v[:, token], state)
        found.append(y)
    assert torch.equal(torch.cat(found, 1), whole)
    assert_equal(state, end)
    expected, _ = attention.chunked(q, k, v, pool(1, log_values, device, heads=1))
    assert_near(whole, expected)


@both_values
def test_a_sequence_is_the_same_in_any_company(log_values: bool, device: torch.device) -> None:
    q, k, v = (x.clone() for x in projected(3, 10, device))
    k[0] *= 1000
    v[0] *= 1000
    state = pool(3, log_values, device)
    alone = state.select(slice(1, 2)).map(Tensor.clone)
    y, end = chunked(q, k, v, state)
    one, one_end = chunked(q[1:2], k[1:2], v[1:2], alone)
    assert torch.equal(y[1:2], one)
    assert_equal(end.select(slice(1, 2)), one_end)
    y = step(q[:, 0], k[:, 0], v[:, 0], state)
    one = step(q[1:2, 0], k[1:2, 0], v[1:2, 0], alone)
    assert torch.equal(y[1:2], one)
    assert_equal(state.select(slice(1, 2)), alone)


@both_values
@pytest.mark.parametrize(("d_key", "d_val"), [(1, 1), (3, 40), (33, 2), (32, 32)])
def test_any_sizes_of_heads(d_key: int, d_val: int, log_values: bool, device: torch.device) -> None:
    q, k, v = projected(1, 70, device, d_key, d_val)
    state = pool(1, log_values, device, d_key, d_val)
    expected, after = attention.chunked(q, k, v, state)
    y, end = chunked(q, k, v, state)
    assert_near(y, expected)
    assert_same(end, after)
    expected = attention.step(q[:, 0], k[:, 0], v[:, 0], after)
    assert_near(step(q[:, 0], k[:, 0], v[:, 0], end), expected)
    assert_same(end, after)


@both_values
def test_a_state_may_have_no_compensation_terms(log_values: bool, device: torch.device) -> None:
    q, k, v = projected(2, 3, device)
    state = replace(pool(2, log_values, device), z_low=None, s_low=None)
    expected, after = attention.chunked(q, k, v, state)
    y, end = chunked(q, k, v, state)
    assert_near(y, expected)
    assert_same(end, after)
    assert_near(
        step(q[:, 0], k[:, 0], v[:, 0], end), attention.step(q[:, 0], k[:, 0], v[:, 0], after)
    )
    assert end.z_low is None
    assert end.s_low is None


def rebased(state: AttentionState, other: AttentionState) -> AttentionState:
    """The same sums relative to the other's maxima, without compensation terms."""
    kept = (state.m - other.m).exp()
    kept_s = kept.unsqueeze(-1)
    if state.n is not None and other.n is not None:
        kept_s = kept_s * (state.n - other.n).exp().unsqueeze(-2)
    return AttentionState(other.m, state.z * kept, state.s * kept_s, other.n)


@both_values
@pytest.mark.parametrize("slope", [0.0, 1.5])
def test_decaying_keys_are_as_in_torch_and_cuts_change_no_bit(
    slope: float, log_values: bool, device: torch.device
) -> None:
    """In rows of a pool, with a length, where nobody's memory follows."""
    q, k, v = projected(2, 140, device, heads=1)
    k = ramp(k.cpu(), slope).to(device)
    fall = attention.on_grid(-0.5 * torch.rand(k.shape, device=device))
    for x in (q, k, v, fall):
        x[1, 70:] = torch.nan
    rows, lengths = indices([3, 1], device), indices([140, 70], device)
    state, cut, expected = (pool(4, log_values, device, heads=1) for _ in range(3))
    y, _ = chunked(q, k, v, state, rows, lengths, fall)
    parts = []
    for start, stop in ((0, 64), (64, 140)):
        piece, left = (slice(None), slice(start, stop)), (lengths - start).clamp(max=stop - start)
        parts.append(chunked(q[piece], k[piece], v[piece], cut, rows, left, fall[piece])[0])
    assert torch.equal(torch.cat(parts, 1), y)
    assert_equal(cut, state)
    for i, (row, length) in enumerate(((3, 140), (1, 70))):
        qi, ki, vi, falls = (x[i : i + 1, :length] for x in (q, k, v, fall))
        before = expected.select(slice(row, row + 1))
        wanted, after = attention.chunked(qi, ki, vi, before, falls)
        assert_near(y[i, :length], wanted[0])
        assert_same(rebased(state.select(slice(row, row + 1)), after), after)
    absorbed = pool(4, log_values, device, heads=1)
    absorb(k, v, absorbed, rows, lengths, fall)
    assert_equal(absorbed, state)


def test_no_tokens_leave_the_state(device: torch.device) -> None:
    q, k, v = (x[:, :0] for x in projected(2, 1, device))
    state = pool(2, True, device)
    y, end = chunked(q, k, v, state)
    assert y.shape == (2, 0, HEADS, D_VAL)
    assert_equal(end, state)
    assert_equal(absorb(k, v, state), state)


BROKEN: dict[str, Callable[[AttentionState], AttentionState]] = {
    "float64": lambda state: replace(state, z=state.z.double()),
    "half of what rounding lost": lambda state: replace(state, z_low=None),
    "not contiguous": lambda state: replace(state, s=state.s.mT.contiguous().mT),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_state_that_a_kernel_would_misread_is_refused(
    broken: Callable[[AttentionState], AttentionState], device: torch.device
) -> None:
    q, k, v = projected(1, 1, device)
    state = broken(pool(1, True, device))
    rows = indices([0], device)
    with pytest.raises(ValueError, match="state"):
        step(q[:, 0], k[:, 0], v[:, 0], state)
    with pytest.raises(ValueError, match="state"):
        chunked(q, k, v, state, rows)
    with pytest.raises(ValueError, match="state"):
        absorb(k, v, state, rows)


def test_tokens_that_a_kernel_would_misread_are_refused(device: torch.device) -> None:
    q, k, v = projected(1, 2, device)
    state = pool(1, True, device)
    before = copy(state)
    for wrong in (torch.cat([q, q], -1)[..., ::2], q.double(), q.bfloat16()):
        with pytest.raises(ValueError, match="tokens"):
            step(wrong[:, 0], k[:, 0], v[:, 0], state)
        with pytest.raises(ValueError, match="tokens"):
            chunked(wrong, k, v, state, indices([0], device))
        with pytest.raises(ValueError, match="tokens"):
            absorb(wrong, v, state)
    assert_equal(state, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there are no graphs on a CPU")
def test_calls_can_be_captured_in_a_graph(device: torch.device) -> None:
    q, k, v = projected(2, 70, device)
    start, rows, lengths = pool(3, True, device), indices([2, 0], device), indices([70, 9], device)

    def calls(state: AttentionState) -> tuple[Tensor, Tensor]:
        y, _ = chunked(q, k, v, state, rows, lengths)
        return y, step(q[:, 0], k[:, 0], v[:, 0], state, rows)

    eager = copy(start)
    expected = calls(eager)
    state, graph = copy(start), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = calls(state)
    for ours, theirs in zip(tensors(state), tensors(start), strict=True):
        ours.copy_(theirs)
    graph.replay()
    assert all(map(torch.equal, found, expected))
    assert_equal(state, eager)

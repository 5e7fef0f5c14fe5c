"""Keys that decay: three equivalent forms of attention, with small rounding errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.heinsen.attention import (
    GRID,
    Attention,
    AttentionState,
    absorb,
    chunked,
    on_grid,
    quadratic,
    step,
)
from tests.model.heinsen.test_attention import (
    FORMS,
    Tokens,
    assert_near,
    both_values,
    cases,
    doubled,
    empty,
    normal,
    part,
    stepped,
    tensors,
)

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def decays(k: Tensor, most: float = 0.5, seed: int = 7) -> Tensor:
    """log f, from nearly 0 to -most nats a token; the shape of k."""
    chance = torch.Generator().manual_seed(seed)
    return on_grid(-most * (4 * torch.randn(k.shape, generator=chance) - 2).sigmoid())


def definition(inputs: Tokens, log_f: Tensor, *, log_values: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, H_S and H_Z after the last token, by the literal recurrence, in float64."""
    q, k, v = doubled(inputs)
    values = v.exp() if log_values else v
    z = torch.zeros_like(k[:, 0])
    s = z.unsqueeze(-1) * values[:, 0].unsqueeze(-2)
    y = []
    for t, f in enumerate(log_f.double().exp().unbind(1)):
        weight = k[:, t].exp()
        z = z * f + weight
        s = s * f.unsqueeze(-1) + weight.unsqueeze(-1) * values[:, t].unsqueeze(-2)
        e = q[:, t].exp()
        y.append((e.unsqueeze(-2) @ s).squeeze(-2) / (e * z).sum(-1, keepdim=True))
    all_y = torch.stack(y, 1)
    return all_y.log() if log_values else all_y, s.abs().log(), z.log()


def assert_papers_state(found: AttentionState, h_s: Tensor, h_z: Tensor, log_values: bool) -> None:
    ours_s, ours_z = found.to_paper()
    assert_near(ours_z, h_z)
    if log_values:
        assert_near(ours_s, h_s)
    else:  # near zero a signed sum has no digits of its logarithm
        assert_near(ours_s.double().exp(), h_s.exp(), float(h_s.exp().max()))


@cases([1, 2, 63, 65, 200], chunks=[2, 150], steps=[3], oracle=True)
@both_values
@pytest.mark.parametrize("most", [0.5, 2.0])
def test_every_form_is_the_recurrence(
    form: Attention, tokens: int, log_values: bool, most: float
) -> None:
    inputs = normal(tokens)
    log_f = decays(inputs[1], most)
    if form is quadratic:  # not made for the rounding of float32
        y, end = form(*doubled(inputs), empty(log_values, torch.float64), log_f.double())
    else:
        y, end = form(*inputs, empty(log_values), log_f)
    expected, h_s, h_z = definition(inputs, log_f, log_values=log_values)
    assert_near(y, expected)
    assert_papers_state(end, h_s, h_z, log_values)


@settings(max_examples=25, deadline=None)
@given(
    log_values=st.booleans(),
    lengths=st.lists(st.sampled_from([1, 2, 5, 63, 64, 65, 150]), min_size=1, max_size=5),
    chosen=st.lists(st.sampled_from([chunked, stepped]), min_size=5, max_size=5),
    steepness=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_any_split_gives_the_same(
    log_values: bool, lengths: list[int], chosen: list[Attention], steepness: float, seed: int
) -> None:
    q, k, v = normal(sum(lengths), seed)
    k, log_f = k * steepness, decays(k, seed=seed)
    whole, last = quadratic(*doubled((q, k, v)), empty(log_values, torch.float64), log_f.double())
    state, found, start = empty(log_values), [], 0
    for form, length in zip(chosen, lengths, strict=False):
        end = start + length
        y, state = form(*part((q, k, v), start, end), state, log_f[:, start:end])
        found.append(y)
        start = end
    assert_near(torch.cat(found, 1), whole)
    assert_papers_state(state, *last.to_paper(), log_values)


@both_values
@pytest.mark.parametrize("tokens", [1, 65, 130])
@pytest.mark.parametrize("steepness", [1.0, 40.0])
def test_gradients_are_those_of_the_definition(
    tokens: int, log_values: bool, steepness: float
) -> None:
    """Also through two calls, the second of which continues from the first one's state."""
    inputs = normal(tokens + 70, 2)
    inputs = (inputs[0], inputs[1] * steepness, inputs[2])
    log_f = decays(inputs[1])

    def gradients(form: Attention, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, fall = (x.detach().to(dtype, copy=True).requires_grad_() for x in (*inputs, log_f))
        state = AttentionState.empty(2, 2, 6, 4, log_values=log_values, like=q.detach())
        first, state = form(*part((q, k, v), 0, 70), state, fall[:, :70])
        second, _ = form(*part((q, k, v), 70, None), state, fall[:, 70:])
        y = torch.cat([first, second], 1)
        chance = torch.Generator().manual_seed(1)
        loss = (y * torch.randn(y.shape, generator=chance).to(dtype)).sum()
        return list(torch.autograd.grad(loss, [q, k, v, fall]))

    expected = gradients(quadratic, torch.float64)
    for ours, theirs in zip(gradients(chunked, torch.float32), expected, strict=True):
        assert theirs.abs().max() > 0
        assert_near(ours, theirs, max(1.0, float(theirs.abs().max())))


@cases([130], chunks=[130], steps=[3], oracle=True)
@both_values
def test_without_a_fall_it_is_the_papers_to_the_bit(
    form: Attention, tokens: int, log_values: bool
) -> None:
    q, k, v = normal(tokens)
    plain, end = form(q, k, v, empty(log_values))
    y, same = form(q, k, v, empty(log_values), torch.zeros_like(k))
    assert torch.equal(y, plain)
    for ours, papers in zip(tensors(same), tensors(end), strict=True):
        assert torch.equal(ours, papers)
        assert torch.equal(ours.signbit(), papers.signbit())


@each_form
@both_values
def test_padding_leaves_the_state_bit_for_bit(form: Attention, log_values: bool) -> None:
    q, k, v = normal(120)
    log_f = decays(k)
    _, state = stepped(*part((q, k, v), 0, 20), empty(log_values), log_f[:, :20])
    k[0], log_f[0] = -torch.inf, 0.0
    v[0] = -torch.inf if log_values else 0.0
    rest, falls = part((q, k, v), 20, None), log_f[:, 20:]
    y, end = form(*rest, state, falls)
    assert torch.isfinite(y).all()
    for found in (end, absorb(rest[1], rest[2], state, falls)):
        for after, before in zip(tensors(found), tensors(state), strict=True):
            assert torch.equal(after[0], before[0])
            assert after is found.n or not torch.equal(after[1], before[1])


def test_sums_are_rescaled_by_e_or_more() -> None:
    """Otherwise the rounding errors of factors near 1 would add up."""
    q, k, v = normal(2000)
    k = 0.01 * k
    log_f, state = on_grid(torch.full_like(k, -0.01)), empty(False)
    kept = []
    for t in range(2000):
        before = state.m + log_f[:, t]
        step(q[:, t], k[:, t], v[:, t], state, log_f[:, t])
        kept.append(state.m - before)
    rises = torch.stack(kept[1:])
    assert ((rises == 0) | (rises > 0.999)).all()
    assert 15 < (rises > 0).sum(0).float().mean() < 25


@each_form
def test_the_past_of_a_channel_fades(form: Attention) -> None:
    """After 200 tokens of half a nat only the latest tokens are left."""
    q, k, v = normal(300)
    y, _ = form(q, k, v, empty(False), torch.full_like(k, -0.5))
    recent, _ = form(*part((q, k, v), 100, None), empty(False), torch.full_like(k[:, 100:], -0.5))
    assert_near(y[:, -1], recent[:, -1])
    whole, _ = form(q, k, v, empty(False))
    assert (y[:, -1] - whole[:, -1]).abs().max() > 0.1


def test_log_f_is_on_its_grid_and_its_gradient_is_that_of_what_it_stands_for() -> None:
    exact = (-0.5 * torch.rand(1000)).requires_grad_()
    found = on_grid(exact)
    assert torch.equal((found / GRID).round() * GRID, found)
    assert 0 < (found - exact).abs().max() <= GRID / 2
    (gradient,) = torch.autograd.grad((2 * found).sum(), exact)
    assert torch.equal(gradient, torch.full_like(exact, 2.0))


def test_m_falls_without_an_error_of_rounding() -> None:
    q, k, v = normal(3000)
    log_f, state = decays(k, 1e-3), empty(False)
    k[:, 1:] -= 100  # m is never raised again
    for t in range(3000):
        step(q[:, t], k[:, t], v[:, t], state, log_f[:, t])
    expected = k[:, 0].double().ceil() + log_f[:, 1:].double().sum(1)
    assert torch.equal(state.m.double(), expected)

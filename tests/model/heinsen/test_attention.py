"""Three equivalent forms of attention, eq. 1 of the paper, also for extreme numbers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.heinsen.attention import (
    EMPTY,
    Attention,
    AttentionState,
    _read,
    _sum,
    absorb,
    chunked,
    quadratic,
    step,
)
from model.kernels import cuda

if cuda.is_available():
    from tests.model.heinsen.cuda import forms

BATCH, HEADS, D_KEY, D_VAL = 2, 2, 6, 4
TOLERANCE = 1e-5
LENGTHS = [1, 2, 63, 64, 65, 128, 200]
Tokens = tuple[Tensor, Tensor, Tensor]
PapersForm = Callable[[Tensor, Tensor, Tensor, AttentionState], tuple[Tensor, AttentionState]]
"""Includes the kernels, which have no decay."""


def definition(q: Tensor, k: Tensor, v: Tensor, *, log_values: bool) -> Tensor:
    """Eq. 1 literally, in float64: for exponents that float64 can hold."""
    q, k, v = q.double(), k.double(), v.double()
    similarity = torch.einsum("bthj,bihj->bhti", q.exp(), k.exp()).tril()
    weights = similarity / similarity.sum(-1, keepdim=True)
    y = torch.einsum("bhti,bihv->bthv", weights, v.exp() if log_values else v)
    return y.log() if log_values else y


def stepped(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, log_f: Tensor | None = None
) -> tuple[Tensor, AttentionState]:
    """`step` applied to many tokens without modifying its argument."""
    state = copy(state)
    falls = [None] * q.shape[1] if log_f is None else log_f.unbind(1)
    y = [step(q[:, t], k[:, t], v[:, t], state, fall) for t, fall in enumerate(falls)]
    return torch.stack(y, 1), state


FORMS: dict[str, Attention] = {"chunked": chunked, "quadratic": quadratic, "step": stepped}
INTERPRETED = cuda.is_available() and forms.DEVICE.type == "cpu"
"""Triton's interpreter needs about 0.1 s per token or chunk."""


def cases(
    tokens: Sequence[int], *, chunks: Sequence[int], steps: Sequence[int], oracle: bool = False
) -> pytest.MarkDecorator:
    """Each form, also as a kernel, with each number of tokens.

    chunks and steps are the numbers of tokens for interpreted kernels; `oracle` includes the
    definition.
    """
    found = [
        pytest.param(form, count, id=f"{name}-{count}")
        for name, form in FORMS.items()
        for count in tokens
        if oracle or form is not quadratic
    ]
    if cuda.is_available():
        for name, form, few in (
            ("chunked", forms.chunked, chunks),
            ("step", forms.stepped, steps),
        ):
            found += [
                pytest.param(form, count, id=f"{name}-kernel-{count}", marks=pytest.mark.gpu)
                for count in (few if INTERPRETED else tokens)
            ]
    return pytest.mark.parametrize(("form", "tokens"), found)


def absorb_of(form: Attention) -> Callable[[Tensor, Tensor, AttentionState], AttentionState]:
    """The `absorb` of the same implementation as a form."""
    if cuda.is_available() and form in (forms.chunked, forms.stepped):
        return forms.absorb
    return absorb


kernels_too = pytest.mark.skipif(not cuda.is_available(), reason="needs Triton")
each_chunked = pytest.mark.parametrize(
    "form",
    [pytest.param(chunked, id="chunked")]
    + (
        [pytest.param(forms.chunked, id="chunked-kernel", marks=pytest.mark.gpu)]
        if cuda.is_available()
        else []
    ),
)
both_values = pytest.mark.parametrize("log_values", [True, False], ids=["log", "linear"])


def normal(tokens: int, seed: int = 0, batch: int = BATCH) -> Tokens:
    chance = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, HEADS)
    q, k = (torch.randn(*shape, D_KEY, generator=chance) for _ in range(2))
    return q, k, torch.randn(*shape, D_VAL, generator=chance)


def part(tokens: Tokens, start: int, end: int | None) -> Tokens:
    q, k, v = tokens
    return q[:, start:end], k[:, start:end], v[:, start:end]


def doubled(tokens: Tokens) -> Tokens:
    q, k, v = tokens
    return q.double(), k.double(), v.double()


def empty(
    log_values: bool, dtype: torch.dtype = torch.float32, batch: int = BATCH
) -> AttentionState:
    """As served in float32, with compensation terms; in float64 for reference."""
    like = torch.zeros((), dtype=dtype)
    state = AttentionState.empty(batch, HEADS, D_KEY, D_VAL, log_values=log_values, like=like)
    if dtype == torch.float64:
        return state
    z_low, s_low = (x.to(torch.int8) for x in (state.z, state.s))
    return replace(state, z_low=z_low, s_low=s_low)


def copy(state: AttentionState) -> AttentionState:
    return state.map(Tensor.clone)


def tensors(state: AttentionState) -> list[Tensor]:
    values = (getattr(state, field.name) for field in fields(state))
    return [value for value in values if value is not None]


def expected_end(k: Tensor, v: Tensor, *, log_values: bool) -> AttentionState:
    """The sums of eq. 6 over all tokens relative to the maxima, in float64."""
    k, v = k.double(), v.double()
    m, n = k.amax(1).ceil(), v.amax(1).ceil() if log_values else None
    weights = (k - m.unsqueeze(1)).exp()
    values = v if n is None else (v - n.unsqueeze(1)).exp()
    s = torch.einsum("bihj,bihv->bhjv", weights, values)
    return AttentionState(m, weights.sum(1), s, n)


def assert_near(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    found, expected = found.double() / scale, expected.double() / scale
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def assert_same(found: AttentionState, expected: AttentionState) -> None:
    """Equal up to the compensation terms, which are below any tolerance here."""
    sums = (replace(state, z_low=None, s_low=None) for state in (found, expected))
    for ours, theirs in zip(*map(tensors, sums), strict=True):
        assert_near(ours, theirs)


@cases(LENGTHS, chunks=LENGTHS, steps=[1, 2], oracle=True)
@both_values
def test_every_form_is_the_definition(form: Attention, tokens: int, log_values: bool) -> None:
    q, k, v = normal(tokens)
    y, end = form(q, k, v, empty(log_values))
    assert_near(y, definition(q, k, v, log_values=log_values))
    assert_same(end, expected_end(k, v, log_values=log_values))


@cases([1, 65, 130], chunks=[1, 65], steps=[1], oracle=True)
@both_values
@pytest.mark.parametrize("carried", [1, 70])
def test_a_carried_state_stands_for_all_earlier_tokens(
    form: Attention, carried: int, tokens: int, log_values: bool
) -> None:
    q, k, v = normal(carried + tokens)
    past, later = part((q, k, v), 0, carried), part((q, k, v), carried, None)
    _, state = stepped(*past, empty(log_values))
    before = copy(state)
    y, end = form(*later, state)
    assert_near(y, definition(q, k, v, log_values=log_values)[:, carried:])
    assert_same(end, expected_end(k, v, log_values=log_values))
    assert all(map(torch.equal, tensors(state), tensors(before)))


@both_values
def test_step_updates_the_state_in_place(log_values: bool) -> None:
    q, k, v = normal(1)
    state = empty(log_values)
    places = [x.data_ptr() for x in tensors(state)]
    step(q[:, 0], k[:, 0], v[:, 0], state)
    assert [x.data_ptr() for x in tensors(state)] == places
    assert_same(state, expected_end(k, v, log_values=log_values))


def check_any_split(
    parts: Sequence[tuple[PapersForm, int]], log_values: bool, tokens: Tokens
) -> None:
    q, k, v = tokens
    whole, end = quadratic(*doubled((q, k, v)), empty(log_values, torch.float64))
    state, found = empty(log_values), []
    start = 0
    for form, length in parts:
        y, state = form(*part((q, k, v), start, start + length), state)
        found.append(y)
        start += length
    assert_near(torch.cat(found, 1), whole)
    assert_same(state, end)


def steep(tokens: int, steepness: float, seed: int) -> Tokens:
    q, k, v = normal(tokens, seed)
    return q, k * steepness, v


@settings(max_examples=25, deadline=None)
@given(
    log_values=st.booleans(),
    lengths=st.lists(st.sampled_from([1, 2, 5, 63, 64, 65, 128, 150]), min_size=1, max_size=5),
    chosen=st.lists(st.sampled_from([chunked, stepped]), min_size=5, max_size=5),
    steepness=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_any_split_gives_the_same(
    log_values: bool, lengths: list[int], chosen: list[Attention], steepness: float, seed: int
) -> None:
    parts = list(zip(chosen, lengths, strict=False))
    check_any_split(parts, log_values, steep(sum(lengths), steepness, seed))


@pytest.mark.long
@kernels_too
@settings(max_examples=3 if INTERPRETED else 25, deadline=None)
@given(data=st.data(), log_values=st.booleans(), steepness=st.sampled_from([1.0, 30.0]))
def test_any_split_of_kernels_gives_the_same(
    data: st.DataObject, log_values: bool, steepness: float
) -> None:
    by_chunks = st.tuples(st.just(forms.chunked), st.sampled_from([1, 63, 64, 65, 128]))
    by_steps = st.tuples(st.just(forms.stepped), st.sampled_from([1, 2, 5]))
    parts = data.draw(st.lists(by_chunks | by_steps, min_size=2, max_size=4))
    tokens = steep(sum(length for _, length in parts), steepness, data.draw(st.integers(0, 1000)))
    check_any_split(parts, log_values, tokens)


@each_chunked
@both_values
def test_absorb_is_the_end_state_of_chunked(form: Attention, log_values: bool) -> None:
    q, k, v = normal(150)
    _, state = form(q[:, :70], k[:, :70], v[:, :70], empty(log_values))
    _, end = form(q[:, 70:], k[:, 70:], v[:, 70:], state)
    assert_same(absorb_of(form)(k[:, 70:], v[:, 70:], state), end)


def gradients(
    attention: Attention, inputs: Tokens, past: AttentionState, dtype: torch.dtype
) -> list[Tensor]:
    """Of a fixed random function of y and of the end state, in q, k, v and the past's z and s."""
    q, k, v, z, s = (
        x.detach().to(dtype, copy=True).requires_grad_() for x in (*inputs, past.z, past.s)
    )
    m, n = past.m.to(dtype), None if past.n is None else past.n.to(dtype)
    y, end = attention(q, k, v, AttentionState(m, z, s, n))
    chance = torch.Generator().manual_seed(1)
    loss = y.new_zeros(())
    for x in (y, *end.to_paper()):
        loss = loss + (x * torch.randn(x.shape, generator=chance).to(dtype)).sum()
    return list(torch.autograd.grad(loss, [q, k, v, z, s]))


@both_values
@pytest.mark.parametrize("tokens", [1, 65, 130])
@pytest.mark.parametrize("steepness", [1.0, 5.0, 40.0])
def test_gradients_are_those_of_the_definition(
    tokens: int, log_values: bool, steepness: float
) -> None:
    past, inputs = normal(20, 1), normal(tokens, 2)
    inputs = (inputs[0], inputs[1] * steepness, inputs[2])
    if not log_values:
        past = (past[0], past[1], past[2] + 3)
    _, state = stepped(*past, empty(log_values))
    found = gradients(chunked, inputs, state, torch.float32)
    expected = gradients(quadratic, inputs, state, torch.float64)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, max(1.0, float(theirs.abs().max())))


def signs(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, -1.0)


def ramp(x: Tensor, slope: float) -> Tensor:
    """Add a slope over the tokens."""
    return x + slope * torch.arange(x.shape[1]).view(1, -1, 1, 1)


EXTREMES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "keys of +-1e4": (lambda k: 1e4 * signs(k), lambda v: v),
    "keys around +-1e4": (lambda k: 1e4 * k, lambda v: v),
    "all keys at 1e4": (lambda k: k + 1e4, lambda v: v),
    "all keys at -1e4": (lambda k: k - 1e4, lambda v: v),
    "values around +-1e3": (lambda k: k, lambda v: 1e3 * v),
    "values of +-1e3": (lambda k: k, lambda v: 1e3 * signs(v)),
    "all values at 1e3": (lambda k: k, lambda v: v + 1e3),
    "all values at -1e3": (lambda k: k, lambda v: v - 1e3),
    "keys rise a little": (lambda k: ramp(k, 1.5), lambda v: v),
    "keys rise": (lambda k: ramp(k, 20.0), lambda v: v),
    "keys rise steeply": (lambda k: ramp(k, 200.0), lambda v: v),
    "keys fall steeply": (lambda k: ramp(k, -200.0), lambda v: v),
    "values rise steeply": (lambda k: k, lambda v: ramp(v, 200.0)),
    "values fall steeply": (lambda k: k, lambda v: ramp(v, -200.0)),
    "keys and values rise": (lambda k: ramp(k, 20.0), lambda v: ramp(v, 20.0)),
}


@cases([1, 3, 20, 70], chunks=[20], steps=[3])
@both_values
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_inputs_are_right(
    form: Attention, name: str, tokens: int, log_values: bool
) -> None:
    q, k, v = normal(tokens, batch=1)
    bend_keys, bend_values = EXTREMES[name]
    k, v = bend_keys(k), bend_values(v)
    y, end = form(q, k, v, empty(log_values, batch=1))
    expected, right_end = quadratic(*doubled((q, k, v)), empty(log_values, torch.float64, batch=1))
    assert_near(y, expected, 1.0 if log_values else max(1.0, float(v.abs().max())))
    assert_near(end.to_paper()[1], right_end.to_paper()[1])


@cases([3, 100], chunks=[100], steps=[3])
@pytest.mark.parametrize("size", [1e10, 1e30])
def test_large_signed_values_are_right(form: Attention, tokens: int, size: float) -> None:
    q, k, v = normal(tokens)
    v = v * size
    y, _ = form(q, k, v, empty(False))
    assert_near(y, definition(q, k, v, log_values=False), size)


def check_finite(
    checked: Sequence[PapersForm], q: Tensor, k: Tensor, v: Tensor, log_values: bool
) -> None:
    for form in checked:
        y, end = form(q, k, v, empty(log_values, batch=len(q)))
        for x in (y, *tensors(end)):
            assert torch.isfinite(x).all()


SIZES = st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e4, 1e30])


@settings(max_examples=25, deadline=None)
@given(
    log_values=st.booleans(),
    tokens=st.sampled_from([1, 3, 30]),
    sizes=st.tuples(SIZES, SIZES, SIZES),
    shift=st.sampled_from([0.0, 1e4, -1e4]),
    seed=st.integers(0, 1000),
)
def test_any_finite_input_gives_finite_results(
    log_values: bool, tokens: int, sizes: tuple[float, float, float], shift: float, seed: int
) -> None:
    q, k, v = (x * size for x, size in zip(normal(tokens, seed), sizes, strict=True))
    check_finite([chunked, stepped], q, k + shift, v, log_values)


@pytest.mark.long
@kernels_too
@settings(max_examples=8 if INTERPRETED else 25, deadline=None)
@given(
    log_values=st.booleans(),
    sizes=st.tuples(SIZES, SIZES, SIZES),
    shift=st.sampled_from([0.0, 1e4, -1e4]),
    seed=st.integers(0, 1000),
)
def test_any_finite_input_gives_finite_results_of_kernels(
    log_values: bool, sizes: tuple[float, float, float], shift: float, seed: int
) -> None:
    q, k, v = (x * size for x, size in zip(normal(3, seed, batch=1), sizes, strict=True))
    check_finite([forms.chunked, forms.stepped], q, k + shift, v, log_values)


@settings(max_examples=25, deadline=None)
@given(
    log_values=st.booleans(),
    tokens=st.sampled_from([1, 3, 30]),
    sizes=st.tuples(*[st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e4])] * 3),
    slope=st.sampled_from([0.0, 1.0, -1.0, 50.0]),
    seed=st.integers(0, 1000),
)
@example(log_values=True, tokens=30, sizes=(0.0, 1e3, 30.0), slope=0.0, seed=0)
@example(log_values=False, tokens=30, sizes=(1e3, 30.0, 30.0), slope=0.0, seed=22)
def test_gradients_of_extreme_inputs_are_finite(
    log_values: bool, tokens: int, sizes: tuple[float, float, float], slope: float, seed: int
) -> None:
    q, k, v = (x * size for x, size in zip(normal(tokens, seed), sizes, strict=True))
    inputs = [x.requires_grad_() for x in (q, ramp(k, slope), v)]
    y, _ = chunked(inputs[0], inputs[1], inputs[2], empty(log_values))
    for gradient in torch.autograd.grad(y.sum(), inputs):
        assert torch.isfinite(gradient).all()


@both_values
@pytest.mark.parametrize("height", range(80, 96))
def test_a_failed_attempt_has_finite_gradients(height: int, log_values: bool) -> None:
    """Compiled code takes them times zeros. Keys rise so far that sums become subnormal, and 0."""
    k = torch.where(torch.arange(64) >= 40, height + 0.5, 0.0).view(1, 64, 1, 1)
    inputs = [torch.zeros_like(k), k, torch.full_like(k, 1e3), torch.full_like(k, -0.01)]
    q, k, v, log_f = (x.requires_grad_() for x in inputs)
    nothing = AttentionState.empty(1, 1, 1, 1, log_values=log_values, like=q)
    y, exact = _read(q, _sum(k, v, nothing, 64, log_f))
    assert not exact
    for gradient in torch.autograd.grad(y, inputs, torch.zeros_like(y)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@cases([1, 64, 100], chunks=[1, 100], steps=[1])
@both_values
@pytest.mark.parametrize("carried", [0, 20])
def test_padding_leaves_the_state_bit_for_bit(
    form: Attention, carried: int, tokens: int, log_values: bool
) -> None:
    q, k, v = normal(carried + tokens)
    past, rest = part((q, k, v), 0, carried), part((q, k, v), carried, None)
    state = stepped(*past, empty(log_values))[1] if carried else empty(log_values)
    k, v = rest[1].clone(), rest[2].clone()
    k[0], v[0] = -torch.inf, -torch.inf if log_values else 0.0
    y, end = form(rest[0], k, v, state)
    assert torch.isfinite(y).all()
    for after, before in zip(tensors(end), tensors(state), strict=True):
        assert torch.equal(after[0], before[0])
    assert not torch.equal(end.z[1], state.z[1])
    for after, before in zip(tensors(absorb_of(form)(k, v, state)), tensors(state), strict=True):
        assert torch.equal(after[0], before[0])


@cases([7, 90], chunks=[90], steps=[7])
@both_values
def test_padding_anywhere_is_as_if_it_were_not_there(
    form: Attention, tokens: int, log_values: bool
) -> None:
    q, k, v = normal(tokens)
    padding = torch.zeros(90, dtype=torch.bool)
    padding[[0, 1, 2, 5, 30, 31, 63, 64, 65, 89]] = True
    padding = padding[:tokens]
    expected, end = quadratic(
        *doubled((q[:, ~padding], k[:, ~padding], v[:, ~padding])), empty(log_values, torch.float64)
    )
    k, v = k.clone(), v.clone()
    k[:, padding], v[:, padding] = -torch.inf, -torch.inf if log_values else 0.0
    y, found = form(q, k, v, empty(log_values))
    assert torch.isfinite(y).all()
    assert_near(y[:, ~padding], expected)
    assert_same(found, end)


def test_the_papers_state_is_the_log_of_the_cumulative_sums() -> None:
    q, k, v = normal(100)
    _, state = chunked(q, 20 * k, 20 * v, empty(True))
    joint = 20 * (k.double().unsqueeze(-1) + v.double().unsqueeze(-2))
    h_s, h_z = joint.logcumsumexp(1)[:, -1], (20 * k.double()).logcumsumexp(1)[:, -1]
    found_s, found_z = state.to_paper()
    assert_near(found_s, h_s)
    assert_near(found_z, h_z)


def test_linear_values_have_the_log_of_the_magnitude_in_the_papers_state() -> None:
    q, k, v = normal(100)
    _, state = chunked(q, k, v, empty(False))
    total = torch.einsum("bihj,bihv->bhjv", k.double().exp(), v.double())
    assert (total < 0).any()
    assert_near(state.to_paper()[0].double().exp(), total.abs(), float(total.abs().max()))


def test_the_papers_state_can_be_restored() -> None:
    q, k, v = normal(130)
    _, state = chunked(q[:, :60], 3 * k[:, :60], 3 * v[:, :60], empty(True))
    restored = AttentionState.from_paper(*state.to_paper())
    for found, expected in zip(restored.to_paper(), state.to_paper(), strict=True):
        assert_near(found, expected)
    later = (q[:, 60:], 3 * k[:, 60:], 3 * v[:, 60:])
    assert_near(chunked(*later, restored)[0], chunked(*later, state)[0])


def test_an_empty_state_is_empty_in_the_papers_form_and_back() -> None:
    state = empty(True)
    h_s, h_z = state.to_paper()
    assert (h_s == -torch.inf).all()
    assert (h_z == -torch.inf).all()
    assert all(map(torch.equal, tensors(AttentionState.from_paper(h_s, h_z)), tensors(state)))
    assert (state.m == EMPTY).all()


def saved_bytes(tokens: int, d_key: int, d_val: int) -> int:
    """Bytes that autograd saves for the backward pass of `chunked`."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    q, k = (torch.randn(1, tokens, 2, d_key, requires_grad=True) for _ in range(2))
    v = torch.randn(1, tokens, 2, d_val, requires_grad=True)
    state = AttentionState.empty(1, 2, d_key, d_val, log_values=True, like=q.detach())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        chunked(q, k, v, state)
    return sum(storage.nbytes() for storage in kept.values())


def test_memory_of_training_is_linear_and_far_below_a_state_per_token() -> None:
    d_key = d_val = 64
    short, long = (saved_bytes(tokens, d_key, d_val) for tokens in (1024, 2048))
    assert math.isclose(long / short, 2.0, rel_tol=0.05)
    state_bytes = 2 * (d_key * d_val + 2 * d_key + d_val) * 4
    assert long / 2048 < state_bytes / 4

"""Extensions beyond the paper: each computes the same in every reading mode."""

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.heinsen.attention import GRID, Attention, chunked, quadratic
from model.heinsen.config import EXTENSIONS, FASTEST_DECAY, ModelConfig
from model.heinsen.network import LanguageModel
from model.transfer import new_transfer
from tests.model.calls import prefill, step

EVERY = [chosen for count in (1, 2, 3) for chosen in itertools.combinations(EXTENSIONS, count)]
VOCAB, LENGTH, TOLERANCE = 60, 150, 2e-5
IDS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))
each_network = pytest.mark.parametrize("chosen", EVERY, ids="+".join)
both_values = pytest.mark.parametrize("values", ["log", "linear"])


@cache
def network(chosen: tuple[str, ...], values: str = "log") -> LanguageModel:
    """Random weights, larger than those of a new network so that each extension matters."""
    torch.manual_seed(3)
    options: dict[str, Any] = {"values": values} | dict.fromkeys(chosen, True)
    config = ModelConfig(
        vocab_sz=VOCAB, d_emb=24, n_layers=2, n_heads=2, d_key=8, d_val=6, **options
    )
    made = LanguageModel(config).requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "decay" in name or "gate" in name:
            parameter.mul_(3)
    return made


@cache
def expected(chosen: tuple[str, ...], values: str = "log") -> Tensor:
    """Logits by the quadratic definition, in float64."""
    exact = copy.deepcopy(network(chosen, values)).double()
    logits: Tensor = exact.unroll(IDS, exact.empty_state(2), quadratic)[0]
    return logits


def assert_logits(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE)


def by_hand(made: LanguageModel, token_ids: Tensor) -> Tensor:
    """Logits of one sequence `[tokens]`, token by token, directly from the equations."""
    c, weights = made.config, made.double().state_dict()
    d_key, heads = c.d_key, c.n_heads
    state: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    h, rows = torch.zeros(c.d_emb).double(), []

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape, weights[f"{name}.weight"], weights[f"{name}.bias"])

    for token_id in token_ids:
        emb = weights["embed.weight"][token_id]
        a, b = linear("embed_pos.dense", emb).chunk(2)
        h = torch.logaddexp(F.logsigmoid(a) + h, b)
        x = emb + h
        for i in range(c.n_layers):
            layer = f"layers.{i}"
            u = norm(f"{layer}.feedforward1.0", x)
            nothing = (torch.zeros_like(u), torch.zeros(heads, d_key), torch.zeros(()))
            before, z, s = state.get(i, nothing)
            p = linear(f"{layer}.feedforward1.1", u)
            if c.token_shift:
                p = p.lerp(linear(f"{layer}.feedforward1.1", before), weights[f"{layer}.mix"])
            q, k, v = p.view(heads, -1).tensor_split((d_key, 2 * d_key), -1)
            f = torch.ones(heads, d_key).double()
            if c.decay:
                rates = linear(f"{layer}.decay.1", linear(f"{layer}.decay.0", u)).sigmoid()
                f = ((-FASTEST_DECAY * rates / GRID).round() * GRID).exp().view(heads, d_key)
            v = v.exp() if c.log_values else v
            z = f * z + k.exp()
            s = f.unsqueeze(-1) * s + k.exp().unsqueeze(-1) * v.unsqueeze(-2)
            y = (q.exp().unsqueeze(-1) * s).sum(-2) / (q.exp() * z).sum(-1, keepdim=True)
            y = (y.log() if c.log_values else y).flatten()
            if c.output_gate:
                y = y * F.silu(linear(f"{layer}.gate", u))
            y = F.glu(linear(f"{layer}.feedforward2.0", y))
            x, state[i] = x + linear(f"{layer}.feedforward2.2", y), (u, z, s)
        rows.append(F.linear(norm("lnorm", x), weights["embed.weight"]))
    return torch.stack(rows)


@each_network
@both_values
def test_the_definition_is_what_the_equations_say(chosen: tuple[str, ...], values: str) -> None:
    found = by_hand(copy.deepcopy(network(chosen, values)), IDS[0, :40])
    torch.testing.assert_close(found, expected(chosen, values)[0, :40], rtol=0, atol=1e-9)


@pytest.mark.long
@each_network
@both_values
def test_forward_prefill_and_steps_are_the_definition(chosen: tuple[str, ...], values: str) -> None:
    made, wanted = network(chosen, values), expected(chosen, values)
    logits, _ = made.unroll(IDS, made.empty_state(2))
    assert_logits(logits, wanted)
    pool = made.new_pool(2)
    for place, column in enumerate(IDS.unbind(1)):
        assert_logits(step(made, column, pool, [0, 1]), wanted[:, place])
    plain = made.unroll(IDS, network(chosen, values).empty_state(2), chunked)[1]
    for ours, theirs in zip(made.read_state(pool).layers, plain.layers, strict=True):
        for x, y in zip(ours.to_paper(), theirs.to_paper(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@each_network
def test_each_extension_changes_what_is_computed(chosen: tuple[str, ...]) -> None:
    """Compared with the same weights without the extension."""
    wanted = expected(chosen)
    for name in chosen:
        config = network(chosen).config.model_copy(update={name: False})
        less = LanguageModel(config)
        less.load_state_dict(network(chosen).state_dict(), strict=False)
        logits, _ = less.unroll(IDS, less.empty_state(2))
        assert (logits.detach().double() - wanted).abs().max() > 100 * TOLERANCE


@settings(max_examples=25, deadline=None)
@given(
    chosen=st.sampled_from(EVERY),
    values=st.sampled_from(["log", "linear"]),
    parts=st.lists(
        st.tuples(st.sampled_from(["prefill", "step", "forward"]), st.sampled_from([1, 5, 63, 64])),
        max_size=5,
    ),
)
def test_any_split_is_the_definition(
    chosen: tuple[str, ...], values: str, parts: list[tuple[str, int]]
) -> None:
    made, wanted = network(chosen, values), expected(chosen, values)
    pool, start = made.new_pool(2), 0
    for kind, length in [*parts, ("prefill", LENGTH)]:
        end = min(start + length, LENGTH - 1)
        if start == end:
            break
        piece = IDS[:, start:end]
        if kind == "prefill":
            prefill(made, piece, [end - start] * 2, pool, [0, 1])
        elif kind == "forward":
            logits, state = made.unroll(piece, made.read_state(pool))
            made.write_state(state, pool)
            assert_logits(logits, wanted[:, start:end])
        else:
            for place, column in enumerate(piece.unbind(1), start):
                assert_logits(step(made, column, pool, [0, 1]), wanted[:, place])
        start = end
    assert_logits(step(made, IDS[:, -1], pool, [0, 1]), wanted[:, -1])


@each_network
@pytest.mark.parametrize("scored", [False, True])
def test_ragged_sequences_in_one_batch_are_each_as_if_alone(
    chosen: tuple[str, ...], scored: bool
) -> None:
    made, wanted = network(chosen), expected(chosen)
    sequences, lengths, rows = [0, 1, 0, 1], [LENGTH - 1, 1, 64, 0], [2, 0, 4, 1]
    batch = torch.randint(VOCAB, (4, LENGTH - 1))
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        batch[row, :length] = IDS[sequence, :length]
    pool = made.new_pool(5)
    logits = prefill(made, batch, lengths, pool, rows, {2} if scored else ())
    if scored:
        assert_logits(logits[2], wanted[0, :64])
    found = step(made, IDS[sequences, lengths], pool, rows)
    assert_logits(found, wanted[sequences, lengths])


@pytest.mark.long
@each_network
@both_values
def test_gradients_are_those_of_the_definition(chosen: tuple[str, ...], values: str) -> None:
    def gradients(made: LanguageModel, attention: Attention) -> dict[str, Tensor]:
        made.requires_grad_()
        state = made.empty_state(2)
        first, state = made.unroll(IDS[:, :70], state, attention)
        second, _ = made.unroll(IDS[:, 70:], state, attention)
        logits = torch.cat([first, second], 1)[:, :-1].flatten(0, 1)
        torch.autograd.backward(F.cross_entropy(logits, IDS[:, 1:].flatten()))
        return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}

    made = copy.deepcopy(network(chosen, values))
    wanted = gradients(copy.deepcopy(made).double(), quadratic)
    found = gradients(made, chunked)
    assert set(found) == set(wanted) == {name for name, _ in made.named_parameters()}
    for name, ours in found.items():
        scale = wanted[name].abs().max()
        assert scale > 0
        torch.testing.assert_close(ours.double() / scale, wanted[name] / scale, rtol=0, atol=1e-4)


@each_network
def test_a_state_has_the_previous_inputs_only_with_token_shift(chosen: tuple[str, ...]) -> None:
    with_it, without = network(chosen).state_spec, network(()).state_spec
    more = 2 * 24 * 4 if "token_shift" in chosen else 0
    assert with_it.num_bytes == without.num_bytes + more
    assert ("previous" in [tensor.name for tensor in with_it.tensors]) is bool(more)


@each_network
def test_a_session_that_moves_continues_to_the_bit(chosen: tuple[str, ...]) -> None:
    made = network(chosen)
    pool, other = made.new_pool(1), made.new_pool(2)
    prefill(made, IDS[:1, :90], [90], pool, [0])
    data = new_transfer(pool).export_row(0).collect()
    assert len(data) == made.state_spec.num_bytes
    new_transfer(other).import_row(1, data)
    here, there = step(made, IDS[:1, 90], pool, [0]), step(made, IDS[:1, 90], other, [1])
    assert torch.equal(here, there)
    other.reset(1)
    assert other.export_row(1) == made.new_pool(1).export_row(0)


@each_network
@both_values
def test_packed_it_is_compiled_and_computes_the_same(chosen: tuple[str, ...], values: str) -> None:
    packed, wanted = copy.deepcopy(network(chosen, values)).pack(), expected(chosen, values)
    assert packed.is_compiled
    pool = packed.new_pool(2)
    for start, end in ((0, 1), (1, 66), (66, 100)):
        prefill(packed, IDS[:, start:end], [end - start] * 2, pool, [1, 0])
    for place in range(100, LENGTH):
        assert_logits(step(packed, IDS[:, place], pool, [1, 0]), wanted[:, place])


def test_without_triton_a_gpu_runs_plain_torch_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.heinsen.network.cuda.is_available", lambda: False)
    packed = copy.deepcopy(network(("decay", "output_gate")))
    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "device", torch.device("cuda"))
        packed.pack()
    assert packed.backend == "plain torch (Triton is not installed)"
    pool = packed.new_pool(2)
    prefill(packed, IDS, [LENGTH - 1] * 2, pool, [0, 1])
    wanted = expected(("decay", "output_gate"))[:, -1]
    assert_logits(step(packed, IDS[:, -1], pool, [0, 1]), wanted)


def test_a_new_networks_decays_are_spread_and_bounded() -> None:
    made = network(("decay",))
    x = torch.randn(3, 40, 24) * 100
    log_f = made.blocks[0].project(x).log_f
    assert log_f is not None
    assert -FASTEST_DECAY <= log_f.min() < -0.4
    assert -1e-2 < log_f.max() <= 0

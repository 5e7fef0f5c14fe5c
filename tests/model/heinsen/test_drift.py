"""A sum of ten million terms adds the next ones as accurately as a short sum."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.heinsen.attention import AttentionState, chunked, step
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.kernels import cuda
from tests.model import calls

if cuda.is_available():
    from model.heinsen.cuda import attention
    from tests.model.heinsen.cuda.forms import DEVICE

HEADS, D_KEY, D_VAL, TOKENS = 2, 8, 6, 3000
PAST = 2.0**25
"""Terms of 1 summed before: float32 cannot add 1 to their sum."""

Read = Callable[[Tensor, Tensor, AttentionState], AttentionState]


def read_steps(k: Tensor, v: Tensor, state: AttentionState) -> AttentionState:
    for t in range(k.shape[1]):
        step(k[:, t], k[:, t], v[:, t], state)
    return state


def read_chunks(k: Tensor, v: Tensor, state: AttentionState) -> AttentionState:
    for start in range(0, k.shape[1], 1):  # the hardest way: a call for every token
        token = slice(start, start + 1)
        _, state = chunked(k[:, token], k[:, token], v[:, token], state)
    return state


def read_compiled(k: Tensor, v: Tensor, state: AttentionState) -> AttentionState:
    kernels = pytest.importorskip("model.heinsen.cpu.kernels")
    arrays = {name: x[0].numpy() for name, x in vars(state).items() if x is not None}
    none, y = torch.empty(0, 0).numpy(), torch.empty(1, D_VAL).numpy()
    space = kernels.workspace(1, D_KEY, D_VAL)
    for t in range(k.shape[1]):
        for head in range(HEADS):
            key, value = k[0, t, head], v[0, t, head]
            names = ("m", "z", "s", "z_low", "s_low", "n")
            m, z, s, z_low, s_low, n = (
                arrays[name][head] if name in arrays else y[0] for name in names
            )
            kernels.attend(
                0, 0, 1, torch.cat([key, key, value])[None].numpy(), none, m, z, s, z_low, s_low, n,
                state.n is not None, False, y, space,
            )  # fmt: skip
    return state


def read_kernel_steps(k: Tensor, v: Tensor, state: AttentionState) -> AttentionState:
    k, v, state = k.to(DEVICE), v.to(DEVICE), state.map(lambda x: x.to(DEVICE))
    for t in range(k.shape[1]):
        attention.step(k[:, t], k[:, t], v[:, t], state)
    return state.map(Tensor.cpu)


def read_kernel_chunks(k: Tensor, v: Tensor, state: AttentionState) -> AttentionState:
    k, v, state = k.to(DEVICE), v.to(DEVICE), state.map(lambda x: x.to(DEVICE))
    for start in range(0, k.shape[1], 1):
        token = slice(start, start + 1)
        state = attention.absorb(k[:, token], v[:, token], state)
    return state.map(Tensor.cpu)


def paths(kernel_tokens: int) -> pytest.MarkDecorator:
    """Every reading mode for many tokens; fewer tokens for interpreted kernels."""
    found = [pytest.param(read, None) for read in (read_steps, read_chunks, read_compiled)]
    if cuda.is_available():
        few = kernel_tokens if DEVICE.type == "cpu" else None
        found += [
            pytest.param(read, few, marks=pytest.mark.gpu)
            for read in (read_kernel_steps, read_kernel_chunks)
        ]
    return pytest.mark.parametrize(("read", "most"), found)


both_values = pytest.mark.parametrize("log_values", [True, False], ids=["log", "linear"])


def long_past(log_values: bool) -> AttentionState:
    """The state after `PAST` tokens whose keys and log-values were all 0."""
    like = torch.zeros(())
    state = AttentionState.empty(1, HEADS, D_KEY, D_VAL, log_values=log_values, like=like)
    m = torch.zeros_like(state.m)
    z, s = torch.full_like(state.z, PAST), torch.full_like(state.s, PAST)
    n = None if state.n is None else torch.zeros_like(state.n)
    return AttentionState(m, z, s, n, z.mul(0).char(), s.mul(0).char())


def later(log_values: bool) -> tuple[Tensor, Tensor]:
    """Keys and (log-)values that do not raise the maximum."""
    random = torch.Generator().manual_seed(3)
    k = -torch.rand(1, TOKENS, HEADS, D_KEY, generator=random)
    v = torch.rand(1, TOKENS, HEADS, D_VAL, generator=random)
    return k, -v if log_values else v


def grown(
    state: AttentionState, log_values: bool, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """The growth of z and s after the tokens, and the expected growth."""
    k, v = (x[0, :most].double() for x in later(log_values))
    u = v.exp() if log_values else v
    expected = [k.exp().sum(0), torch.einsum("thj,thv->hjv", k.exp(), u)]
    found = [x[0].double() - PAST for x in (state.z, state.s)]
    return torch.cat([x.flatten() for x in found]), torch.cat([x.flatten() for x in expected])


@pytest.mark.long
@paths(kernel_tokens=40)
@both_values
def test_a_large_sum_still_grows_by_what_is_added(
    read: Read, most: int | None, log_values: bool
) -> None:
    k, v = later(log_values)
    with torch.inference_mode():
        state = read(k[:, :most], v[:, :most], long_past(log_values))
    found, expected = grown(state, log_values, most)
    last_place = PAST * 2.0**-23
    assert (found - expected).abs().max() <= last_place


@both_values
def test_without_what_rounding_lost_it_would_not(log_values: bool) -> None:
    plain = replace(long_past(log_values), z_low=None, s_low=None)
    found, expected = grown(read_steps(*later(log_values), plain), log_values)
    assert (found - expected).abs().max() > 0.1 * expected.min()


@pytest.mark.long
@paths(kernel_tokens=10)
def test_keys_that_rise_a_little_with_every_token_do_not_spoil_the_past(
    read: Read, most: int | None
) -> None:
    """A running maximum that moved each time would multiply the past by a rounded 1 - 1e-5."""
    tokens, slope = most or 4000, 1e-5
    k = slope * torch.arange(tokens).view(1, -1, 1, 1).expand(1, tokens, HEADS, D_KEY) + 0.3
    v = torch.zeros(1, tokens, HEADS, D_VAL)
    state = AttentionState.empty(1, HEADS, D_KEY, D_VAL, log_values=True, like=torch.zeros(()))
    state = replace(state, z_low=state.z.char(), s_low=state.s.char())
    with torch.inference_mode():
        state = read(k.contiguous(), v, state)
    _, h_z = state.map(Tensor.double).to_paper()
    expected = torch.logsumexp(k[0, :, 0, 0].double(), 0)
    assert (h_z - expected).abs().max() < 1e-6


def test_a_position_gate_that_forgets_nothing_counts_on() -> None:
    """h is then the log of a sum over all tokens, to which float32 could not add the next one."""
    config = ModelConfig(vocab_sz=10, d_emb=16, n_layers=1, n_heads=1, d_key=4, d_val=4)
    torch.manual_seed(1)
    network = LanguageModel(config).requires_grad_(False).eval()
    network.embed_pos.dense.weight.zero_()
    network.embed_pos.dense.bias[:16], network.embed_pos.dense.bias[16:] = 60.0, 0.0
    start = torch.tensor(1e8, dtype=torch.float64).log()
    for served in (network, LanguageModel(config).requires_grad_(False).eval()):
        if served is not network:
            served.load_state_dict(network.state_dict())
            served.pack()
        pool = served.new_pool(1)
        pool.tensors["h"].fill_(start)
        ids = torch.zeros(1, 1000, dtype=torch.long)
        calls.prefill(served, ids, [1000], pool, [0])
        for _ in range(1000):
            calls.step(served, ids[0, :1], pool, [0])
        added = pool.tensors["h"].exp() - 1e8
        torch.testing.assert_close(added, torch.full_like(added, 2000.0), rtol=1e-3, atol=0)

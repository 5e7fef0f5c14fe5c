"""The kernels of attention as forms of it: called like the torch functions, with CPU tensors."""

import torch
from torch import Tensor

from model.heinsen.attention import AttentionState
from model.heinsen.cuda import attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chunked(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, log_f: Tensor | None = None
) -> tuple[Tensor, AttentionState]:
    fall = None if log_f is None else log_f.to(DEVICE)
    y, end = attention.chunked(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), _there(state), log_f=fall)
    return y.cpu(), end.map(Tensor.cpu)


def absorb(
    k: Tensor, v: Tensor, state: AttentionState, log_f: Tensor | None = None
) -> AttentionState:
    fall = None if log_f is None else log_f.to(DEVICE)
    end = attention.absorb(k.to(DEVICE), v.to(DEVICE), _there(state), log_f=fall)
    return end.map(Tensor.cpu)


def stepped(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState, log_f: Tensor | None = None
) -> tuple[Tensor, AttentionState]:
    """`step` applied to many tokens without modifying its argument."""
    q, k, v, state = q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), _there(state).map(Tensor.clone)
    falls = [None] * q.shape[1] if log_f is None else log_f.to(DEVICE).unbind(1)
    y = [
        attention.step(q[:, t], k[:, t], v[:, t], state, log_f=fall) for t, fall in enumerate(falls)
    ]
    return torch.stack(y, 1).cpu(), state.map(Tensor.cpu)


def _there(state: AttentionState) -> AttentionState:
    return state.map(lambda x: x.to(DEVICE).contiguous())

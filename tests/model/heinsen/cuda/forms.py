"""The kernels of attention as forms of it: called like the torch functions, with CPU tensors."""

import torch
from torch import Tensor

from model.heinsen.attention import AttentionState
from model.heinsen.cuda import attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chunked(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState
) -> tuple[Tensor, AttentionState]:
    y, end = attention.chunked(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), _there(state))
    return y.cpu(), end.map(Tensor.cpu)


def absorb(k: Tensor, v: Tensor, state: AttentionState) -> AttentionState:
    return attention.absorb(k.to(DEVICE), v.to(DEVICE), _there(state)).map(Tensor.cpu)


def stepped(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState
) -> tuple[Tensor, AttentionState]:
    """`step` applied to many tokens without modifying its argument."""
    q, k, v, state = q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), _there(state).map(Tensor.clone)
    y = [attention.step(q[:, t], k[:, t], v[:, t], state) for t in range(q.shape[1])]
    return torch.stack(y, 1).cpu(), state.map(Tensor.cpu)


def _there(state: AttentionState) -> AttentionState:
    return state.map(lambda x: x.to(DEVICE).contiguous())

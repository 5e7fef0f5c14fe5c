"""Chunked and token-by-token computation agree."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.rwkv7.recurrence import CHUNK, Vectors, chunked, recurrent


def drawn(
    tokens: int, size: int, dtype: torch.dtype, fastest: bool = False
) -> tuple[Vectors, Tensor]:
    chance = torch.Generator().manual_seed(tokens)
    shape = (2, tokens, 3, size)
    r, k, v, kk, rate, decay = torch.randn(6, *shape, generator=chance, dtype=dtype)
    log_w = -0.60653066 * (torch.ones_like(decay) if fastest else (3 * decay - 2).sigmoid())
    kk = F.normalize(kk, dim=-1)
    state = torch.randn(2, 3, size, size, generator=chance, dtype=dtype)
    return (r, log_w, k, v, -kk, kk * rate.sigmoid()), state


@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
@pytest.mark.parametrize("size", [1, 24, 64])
def test_chunks_are_the_recurrence(tokens: int, size: int) -> None:
    vectors, state = drawn(tokens, size, torch.float64)
    for ours, theirs in zip(chunked(vectors, state), recurrent(vectors, state), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_fastest_decay_loses_no_digits_in_a_chunk() -> None:
    vectors, state = drawn(4 * CHUNK, 64, torch.float32, fastest=True)
    exact = recurrent(tuple(x.double() for x in vectors), state.double())  # type: ignore[arg-type]
    for ours, theirs in zip(chunked(vectors, state), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_padding_leaves_the_state_unchanged(form: object) -> None:
    assert callable(form)
    vectors, state = drawn(70, 16, torch.float64)
    r, *others = vectors
    padded = (r, *(x.index_fill(1, torch.arange(50, 70), 0) for x in others))
    _, expected = recurrent(tuple(x[:, :50] for x in vectors), state)  # type: ignore[arg-type]
    torch.testing.assert_close(form(padded, state)[1], expected, rtol=1e-9, atol=1e-9)

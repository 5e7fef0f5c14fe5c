"""The kernel matches the definition at any size, and ignores padding."""

import numpy as np
import pytest
import torch

from model.batch import Batch
from model.rwkv7.cuda.recurrence import fused
from model.rwkv7.recurrence import chunked, recurrent
from tests.model.rwkv7 import networks
from tests.model.rwkv7.test_recurrence import drawn


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("size", [5, 32, 64])
def test_the_kernel_is_the_recurrence(tokens: int, size: int, device: torch.device) -> None:
    vectors, state = drawn(tokens, size, torch.float32)
    moved = tuple(x.to(device) for x in vectors)
    exact = recurrent(tuple(x.double() for x in vectors), state.double())  # type: ignore[arg-type]
    for ours, theirs in zip(fused(moved, state.to(device)), exact, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5)


def test_cuts_and_company_leave_the_bits_as_they_are(device: torch.device) -> None:
    vectors, state = drawn(8, 32, torch.float32)
    moved, s = tuple(x.to(device) for x in vectors), state.to(device)
    y, after = fused(moved, s)  # type: ignore[arg-type]
    parts, cut = [], s[:1]
    for start, end in ((0, 3), (3, 4), (4, 8)):
        part, cut = fused(tuple(x[:1, start:end] for x in moved), cut)  # type: ignore[arg-type]
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), y[:1])
    assert torch.equal(cut, after[:1])


def test_a_network_reads_with_it(device: torch.device) -> None:
    batch = Batch.of([np.arange(6), np.arange(9, 11)], [1, 0]).wanting(np.arange(8))
    plain = networks.network(plain=True, device=device)
    plain.recurrence = chunked
    expected, found = plain.new_pool(2), plain.new_pool(2)
    logits = plain.forward(batch, expected)
    plain.recurrence = fused
    torch.testing.assert_close(plain.forward(batch, found), logits, rtol=0, atol=2e-5)
    for name, values in found.tensors.items():
        torch.testing.assert_close(values, expected.tensors[name], rtol=0, atol=2e-5)

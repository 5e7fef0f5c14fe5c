"""Muon's steps have equal singular values, and find what a matrix should be."""

import math

import pytest
import torch
from torch import nn

from model.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20)])
def test_singular_values_become_nearly_equal_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -2, min(shape))
    made = u.T @ orthogonal(100 * u @ values.diag() @ vh) @ vh.T
    assert made.diag().min() > 0.6
    assert made.diag().max() < 1.3
    torch.testing.assert_close(made, made.diag().diag(), rtol=0, atol=1e-4)


def test_no_gradient_no_step() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_a_step_has_the_size_of_one_of_adamw() -> None:
    """Root mean square of the change about 0.2 of the learning rate, beside the decay."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, 60))
    before = weight.detach().clone()
    optimizer = Muon([weight], weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.randn(40, 60)
    optimizer.step()
    change = weight.detach() - (1 - 0.1 * 0.5) * before
    assert float(change.square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.4)
    assert float((change * weight.grad).sum()) < 0


def test_it_finds_a_matrix() -> None:
    torch.manual_seed(0)
    wanted, weight = torch.randn(8, 6), nn.Parameter(torch.zeros(8, 6))
    optimizer = Muon([weight], weight_decay=0.0)
    for i in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * i / 300))
        weight.grad = weight.detach() - wanted
        optimizer.step()
    assert (weight - wanted).abs().max() < 0.05

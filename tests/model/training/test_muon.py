"""Muon's steps have equal singular values, and recover a target matrix."""

import math

import pytest
import torch
from torch import Tensor, nn

from model.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20)])
def test_singular_values_become_nearly_equal_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    values = torch.logspace(0, -2, min(shape)).diag()
    sizes = torch.tensor([100.0, 1e-3]).view(2, 1, 1)
    made = u.mT @ orthogonal(sizes * u @ values @ vh) @ vh.mT
    found = made.diagonal(dim1=1, dim2=2)
    assert found.min() > 0.6
    assert found.max() < 1.3
    torch.testing.assert_close(made, found.diag_embed(), rtol=0, atol=1e-4)


def test_no_gradient_no_step() -> None:
    assert torch.equal(orthogonal(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def stepped(weight: nn.Parameter, gradient: Tensor, blocks: int) -> Tensor:
    """The change of a first step, without weight decay."""
    before = weight.detach().clone()
    optimizer = Muon([{"params": [weight], "blocks": blocks}], weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = gradient
    optimizer.step()
    return weight.detach() - (1 - 0.1 * 0.5) * before


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_step_has_the_size_of_one_of_adamw(blocks: int) -> None:
    """Root mean square of the change about 0.2 of the learning rate, in each block."""
    torch.manual_seed(0)
    gradient = torch.randn(40, 60) * torch.logspace(0, 3, 4).repeat_interleave(10).unsqueeze(1)
    change = stepped(nn.Parameter(torch.randn(40, 60)), gradient, blocks)
    assert float(change.square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.4)
    sizes = change.view(4, -1).square().mean(1).sqrt()
    assert bool(sizes.min() > 0.8 * sizes.max()) == (blocks == 4)
    assert float((change * gradient).sum()) < 0


def test_blocks_are_steps_of_their_own() -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(12, 7), torch.randn(12, 7)
    whole = stepped(nn.Parameter(weight.clone()), gradient, 3)
    parts = [
        stepped(nn.Parameter(weight[i : i + 4].clone()), gradient[i : i + 4].clone(), 1)
        for i in (0, 4, 8)
    ]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_it_finds_a_matrix() -> None:
    torch.manual_seed(0)
    wanted, weight = torch.randn(8, 6), nn.Parameter(torch.zeros(8, 6))
    optimizer = Muon([{"params": [weight]}], weight_decay=0.0)
    for i in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * i / 300))
        weight.grad = weight.detach() - wanted
        optimizer.step()
    assert (weight - wanted).abs().max() < 0.05

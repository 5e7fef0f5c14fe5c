"""The optimizer of matrices: steps along the momentum with all its singular values made equal.

K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); scaled as in "Muon is
scalable for LLM training" (arXiv 2502.16982), so that learning rate and weight decay mean what
they mean to AdamW. `torch.optim.Muon` always computes in bfloat16, which many CPUs are slow with.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""x -> a x + b x^3 + c x^5, which five times takes singular values from 1e-3 to 1 near to 1."""


class Muon(torch.optim.Optimizer):
    """For matrices whose inputs and outputs are activations: not for embeddings."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        weight_decay: float,
        momentum: float = 0.95,
        *,
        bf16: bool = False,
    ) -> None:
        """`blocks` of a group: of how many matrices, rows below rows, each of its matrices is made,
        as the heads' projections are. The learning rate is each step's `param_groups[...]["lr"]`.

        `bf16`: steps, but no weights and no momentum, are computed in bfloat16.
        """
        defaults = {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "blocks": 1}
        super().__init__(groups, defaults)
        self._dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, momentum = parameter.grad, group["momentum"]
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(gradient)
                mean = state["mean"].lerp_(gradient, 1 - momentum)
                blocks = gradient.lerp(mean, momentum).unflatten(0, (group["blocks"], -1))
                scale = 0.2 * math.sqrt(max(blocks.shape[1:]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                step = orthogonal(blocks.to(self._dtype)).flatten(0, 1)
                parameter.add_(step, alpha=-group["lr"] * scale)


def orthogonal(x: Tensor) -> Tensor:
    """Matrices `[_, rows, columns]` with all singular values near to 1 that are not far below the
    matrix's largest."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    a, b, c = QUINTIC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x

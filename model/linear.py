"""Linear maps of a network that only serves, with weights in the dtype of the user's choice.

float32 as they are, bfloat16 rounded, int8 as whole numbers times one scale per output (its largest
weight is 127). Inputs, sums and outputs are float32 in all cases: only the weights are smaller.
"""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import WeightDtype

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def narrow(weight: Tensor, dtype: WeightDtype) -> tuple[Tensor, Tensor | None]:
    """A weight `[out, in]` in the dtype, and with int8 the scale `[out]` of each output."""
    weight = weight.detach()
    if dtype != "int8":
        return weight.to(DTYPES[dtype]), None
    scale = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale.unsqueeze(1)).round_().to(torch.int8), scale


class NarrowLinear(nn.Module):
    """`nn.Linear` in plain torch, for any device: x `[..., in]` -> `[..., out]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: WeightDtype) -> None:
        super().__init__()
        self.weight, self.scale = narrow(weight, dtype)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """`NarrowLinear` for the CPU, compiled, its weight in the order in which it is read.

    A row of the result does not depend, to the bit, on how many rows or threads there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: WeightDtype) -> None:
        from model.cpu.products import BLOCK
        from model.cpu.step import product_function

        super().__init__()
        narrowed, self.scale = narrow(weight, dtype)
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.num_outputs, self.num_inputs = narrowed.shape
        padded = F.pad(narrowed, (0, 0, 0, -self.num_outputs % BLOCK))
        self.weight = padded.view(-1, BLOCK, self.num_inputs).mT.contiguous()
        self._function = product_function(self.weight.dtype)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of weight, scale and bias; 0 where there is none. They stay as long as this object."""
        scale, bias = (0 if t is None else t.data_ptr() for t in (self.scale, self.bias))
        return self.weight.data_ptr(), scale, bias

    def forward(self, x: Tensor) -> Tensor:
        from model.cpu.team import num_threads, run_team

        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.num_outputs)
        if y.numel():
            rows = x.numel() // self.num_inputs
            places = (*self.addresses, x.data_ptr(), y.data_ptr(), 0, 0, 0)
            sizes = (rows, self.num_inputs, self.num_outputs)
            threads = num_threads(rows * self.weight.numel(), 1)
            run_team(self._function, np.array([*sizes, *places], np.int64), threads)
        return y


def why_not_compiled(device: torch.device, dtype: torch.dtype) -> str:
    """Why `PackedLinear` does not work for a network on this device, found out by running it.

    Empty if it does.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return "only float32 networks on a CPU are compiled"
    weight, x = torch.ones(2, 3), torch.ones(1, 3)
    try:
        from model.cpu.compilation import can_fuse

        if not can_fuse():
            return "the processor has no fused multiply-add"
        if torch.equal(PackedLinear(weight, None, "float32")(x), F.linear(x, weight)):
            return ""
        reason = "compiled code gives wrong results"
    except Exception as error:  # Numba is missing, or does not know this machine
        reason = f"Numba: {error}"
    log.warning("nothing is compiled for this CPU, steps will be slower: %s", reason)
    return reason

"""Linear maps of a network that only serves, with weights in the dtype of the user's choice.

float32 as they are, bfloat16 rounded, int8 as whole numbers times one scale per output (its largest
weight is 127). Outputs are float32 in all cases, and so are inputs and sums, unless the processor
multiplies in the weights' own type: then inputs are rounded to it, int8 with one scale per row.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import WeightDtype
from model.memory import large_pages

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


PART_SIZE = 1 << 16
"""Numbers of a weight that are converted at a time: what it takes beside the result is little."""


def narrow(
    weight: Tensor, dtype: WeightDtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor | None]:
    """A weight `[out, in]` in the dtype, and with int8 the scale `[out]` of each output.

    It is on the device, if one is given, and the weight itself if nothing is to be changed.
    """
    weight = weight.detach()
    device = device or weight.device
    if weight.dtype == DTYPES[dtype] and weight.device == device:
        return weight, None
    narrowed = torch.empty(weight.shape, dtype=DTYPES[dtype], device=device)
    exact = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.empty(len(weight), dtype=exact, device=device) if dtype == "int8" else None
    for rows in _parts(weight):
        part = weight[rows].to(device, exact)
        if scale is not None:
            scale[rows] = part.abs().amax(1).clamp(min=torch.finfo(exact).tiny) / 127
            part = (part / scale[rows].unsqueeze(1)).round_()
        narrowed[rows] = part
    return narrowed, scale


def _parts(weight: Tensor, unit: int = 1) -> Iterator[slice]:
    """Its rows in parts of about `PART_SIZE` numbers, each a multiple of `unit` but the last."""
    count = max(1, PART_SIZE // (weight.shape[1] * unit)) * unit
    return (slice(start, start + count) for start in range(0, len(weight), count))


class NarrowLinear(nn.Module):
    """`nn.Linear` in plain torch, for any device: x `[..., in]` -> `[..., out]`."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: WeightDtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.scale = narrow(weight, dtype, device)
        self.bias = None if bias is None else as_served(bias.detach(), device)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias


def as_served(vector: Tensor, device: torch.device | None) -> Tensor:
    """What is no weight of a product: float32 or float64, on the device if one is given."""
    dtype = torch.promote_types(vector.dtype, torch.float32)
    return vector.to(device or vector.device, dtype)


class PackedLinear(nn.Module):
    """`NarrowLinear` for the CPU, compiled, its weight in the order in which it is read.

    A row of the result does not depend, to the bit, on how many rows or threads there are.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: WeightDtype,
        device: torch.device | None = None,
    ) -> None:
        from model.kernels.cpu.arithmetic import arithmetic_for
        from model.kernels.cpu.linear import product_function
        from model.kernels.cpu.products import BLOCK

        super().__init__()
        self.arithmetic = arithmetic_for(dtype)
        together, stored = self.arithmetic.together, self.arithmetic.stored
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.num_outputs, self.num_inputs = weight.shape
        num_blocks = -(-self.num_outputs // BLOCK)
        shape = (num_blocks, -(-self.num_inputs // together), BLOCK, together)
        self.weight = large_pages().zeros(shape, stored)
        scales = []
        for rows in _parts(weight, BLOCK):
            part, scale = narrow(weight[rows], dtype, device)
            scales.append(scale)
            if stored == torch.uint8:
                part = part.view(torch.uint8) ^ 128  # plus 128
            part = F.pad(part, (0, -self.num_inputs % together)).view(len(part), -1, together)
            for start in range(0, len(part), BLOCK):
                block = part[start : start + BLOCK].transpose(0, 1)
                self.weight[(rows.start + start) // BLOCK, :, : block.shape[1]] = block
        self.scale = torch.cat([s for s in scales if s is not None]) if dtype == "int8" else None
        self._function = product_function(self.arithmetic)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of weight, scale and bias; 0 where there is none. They stay as long as this object."""
        scale, bias = (0 if t is None else t.data_ptr() for t in (self.scale, self.bias))
        return self.weight.data_ptr(), scale, bias

    def forward(self, x: Tensor) -> Tensor:
        from model.kernels.cpu.linear import PRODUCT
        from model.kernels.cpu.threads import ALONE, num_threads
        from model.kernels.cpu.workers import run_on_threads

        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.num_outputs)
        if y.numel():
            rows = x.numel() // self.num_inputs
            sizes = (rows, self.num_inputs, self.num_outputs)
            places = (self.addresses, x.data_ptr(), y.data_ptr())
            arguments = np.array((ALONE, *sizes, *places), PRODUCT)
            run_on_threads(self._function, arguments, num_threads(rows * self.weight.numel(), 1))
        return y


def reason_not_compiled(device: torch.device, dtype: torch.dtype) -> str:
    """Why `PackedLinear` does not work for a network on this device, found out by running it.

    Empty if it does.
    """
    if device.type != "cpu" or dtype == torch.float64:
        return "only float32 networks on a CPU are compiled"
    weight, x = torch.ones(2, 3), torch.ones(1, 3)
    try:
        from model.kernels.cpu import workers
        from model.kernels.cpu.compilation import can_fuse

        workers.prepare()
        if not can_fuse():
            return "the processor has no fused multiply-add"
        if torch.equal(PackedLinear(weight, None, "float32")(x), F.linear(x, weight)):
            return ""
        reason = "compiled code gives wrong results"
    except Exception as error:  # Numba is missing, or does not know this machine
        reason = f"Numba: {error}"
    log.warning("nothing is compiled for this CPU, steps will be slower: %s", reason)
    return reason

"""What products are computed in: the weights' own type, where the processor multiplies in it."""

from dataclasses import dataclass
from typing import Any

import torch
from numba import float32, int8, int32, uint16, uint32

from model import WeightDtype
from model.kernels.cpu.compilation import features


@dataclass(frozen=True)
class Arithmetic:
    """Of products with weights of one dtype."""

    weights: WeightDtype
    inputs: WeightDtype
    """What inputs are rounded to. Sums are in float32, or of int8 in int32; outputs in float32."""

    numbers: Any
    """How compiled code sees what of a weight belongs to one output and one step."""

    stored: torch.dtype
    """Each weight's"""

    together: int = 1
    """Inputs of a step."""

    instruction: str = ""
    """That does a step for 16 outputs; without one, a step is a multiply-add of float32."""

    feature: str = ""
    """The processor's that has it, as LLVM calls it."""

    @property
    def name(self) -> str:
        """As it stands in a state's blob."""
        return f"{self.weights} x {self.inputs}"


FLOAT32 = (
    Arithmetic("float32", "float32", float32, torch.float32),
    Arithmetic("bfloat16", "float32", uint16, torch.bfloat16),
    Arithmetic("int8", "float32", int8, torch.int8),
)
NARROW = (
    Arithmetic(
        "bfloat16", "bfloat16", uint32, torch.bfloat16, 2, "vdpbf16ps", "+avx512bf16"
    ),
    Arithmetic("int8", "int8", int32, torch.uint8, 4, "vpdpbusd", "+avx512vnni"),
)  # fmt: skip
"""For VPDPBUSD a weight is stored plus 128: it multiplies unsigned numbers with signed ones."""

BY_NUMBERS = {arithmetic.numbers: arithmetic for arithmetic in FLOAT32 + NARROW}


def arithmetic_for(weights: WeightDtype) -> Arithmetic:
    """The one that this processor is best at; what it can do decides, and never a measured time."""
    there = features()
    found = [a for a in NARROW + FLOAT32 if a.weights == weights and a.feature in {"", *there}]
    return found[0]

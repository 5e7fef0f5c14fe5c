"""Arithmetic of matrix products: the weights' own type, if the processor multiplies in it."""

from dataclasses import dataclass
from typing import Any

import torch
from numba import float32, int8, int32, uint16, uint32

from model import WeightDtype
from model.kernels.cpu.compilation import features


@dataclass(frozen=True)
class Arithmetic:
    """Arithmetic of products with weights of one dtype."""

    weights: WeightDtype
    inputs: WeightDtype
    """Type that inputs are rounded to. Sums are float32, or int32 for int8; outputs are float32."""

    numbers: Any
    """Type in which compiled code reads one output's weights of one step."""

    stored: torch.dtype
    """Each weight's"""

    together: int = 1
    """Number of inputs per step."""

    instruction: str = ""
    """Instruction that computes a step for 16 outputs; without one, a step is a float32
    multiply-add."""

    feature: str = ""
    """LLVM's name of the processor feature that has it."""

    @property
    def name(self) -> str:
        """Name as stored in a state's blob."""
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
"""VPDPBUSD multiplies unsigned with signed numbers, so weights are stored plus 128."""

BY_NUMBERS = {arithmetic.numbers: arithmetic for arithmetic in FLOAT32 + NARROW}


def arithmetic_for(weights: WeightDtype) -> Arithmetic:
    """The best arithmetic for this processor, determined by its features, never by measured
    times."""
    there = features()
    found = [a for a in NARROW + FLOAT32 if a.weights == weights and a.feature in {"", *there}]
    return found[0]

"""Checks shared by the families' weight readers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.kernels.linear import PART_SIZE
from model.network import CheckpointError

TensorShape = tuple[int, ...]


def check_shapes(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], source: Path
) -> None:
    """Raises CheckpointError unless exactly the expected tensors are present."""
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{source}: {shorten(missing)} missing")
    if unexpected := [name for name in found if name not in expected]:
        raise CheckpointError(f"{source}: {shorten(unexpected)} not part of this network")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                f"{source}: {name} is {list(found[name])}, not {list(shape)} as in this network"
            )


def check_finite(name: str, tensor: Tensor, source: Path) -> Tensor:
    """The tensor, if all its values are finite in float32; checked in parts to avoid a copy.

    Raises CheckpointError.
    """
    parts = torch.split(tensor.flatten(), PART_SIZE)
    if not tensor.is_floating_point() or not all(torch.isfinite(p.float()).all() for p in parts):
        raise CheckpointError(f"{source}: {name} has values that are not finite")
    return tensor


def shorten(names: Sequence[str]) -> str:
    """Names for a message, shortened."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown

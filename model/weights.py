"""Checks shared by the families' weight readers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model.files import check_file
from model.kernels.linear import PART_SIZE
from model.network import CheckpointError

TensorShape = tuple[int, ...]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict from `.safetensors`, or from `.pt`/`.pth` without running any code of it.

    Raises CheckpointError when the file is neither, OSError when it cannot be opened.
    """
    check_file(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a malformed or foreign file
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: not a file of plain tensors: {reason}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path}: not a state dict (a mapping of names to tensors)")
    return content


def parse_tensors(blob: bytes, source: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file in memory. Raises CheckpointError."""
    try:
        return safetensors.torch.load(blob)
    except Exception as error:  # of several types
        raise CheckpointError(f"{source}: not a safetensors file: {error}") from error


def pack_tensors(file: Path) -> bytes:
    """A file of tensors as safetensors: no code in it is run.

    Raises CheckpointError and OSError.
    """
    tensors = read_tensors(file)
    return safetensors.torch.save({name: t.clone().contiguous() for name, t in tensors.items()})


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

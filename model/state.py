"""The latent state of many sequences: fixed-size rows in preallocated tensors.

A network names the tensors that make up one sequence's state in a `StateSpec`. Everything outside
`model/` handles states only through that list: as rows of a `StatePool` or as bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.memory import large_pages

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a sequence's state: its name, shape, dtype and value before the first token."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    initial: float

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StateSpec:
    """All tensors of one sequence's state. Their order is the order of the bytes of a row."""

    tensors: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


RowState = tuple[Tensor, ...]
"""One row's tensors, in the order of the spec."""


class StatePool:
    """`num_rows` states side by side on one device.

    The first axis of each state tensor counts layers; rows come second, so that one layer's states
    are one contiguous block: a spec shape `[layers, ...]` is stored as `[layers, num_rows, ...]`.
    """

    def __init__(self, spec: StateSpec, num_rows: int, device: torch.device) -> None:
        self.spec = spec
        self.num_rows = num_rows
        self.device = device
        self.tensors: dict[str, Tensor] = {}
        for tensor in spec.tensors:
            layers, *per_row = tensor.shape
            shape = (layers, num_rows, *per_row)
            dtype = DTYPES[tensor.dtype]
            if device.type == "cpu":
                values = large_pages().zeros(shape, dtype)
            else:
                values = torch.empty(shape, dtype=dtype, device=device)
            self.tensors[tensor.name] = values.fill_(tensor.initial)

    @property
    def responds(self) -> bool:
        """Whether the device still computes: after some errors a GPU does nothing any more for the
        process that caused them."""
        try:
            return bool(torch.ones(1, device=self.device).sum().item() == 1)
        except RuntimeError:
            return False

    def reset(self, row: int) -> None:
        """Make the row the state before the first token."""
        for tensor in self.spec.tensors:
            self.tensors[tensor.name][:, row] = tensor.initial

    def poison(self, row: int) -> None:
        """Erase the row: NaN and -128, so that a state that is read by mistake shows at once."""
        for values in self.tensors.values():
            values[:, row] = math.nan if values.is_floating_point() else -128

    def read_row(self, row: int) -> RowState:
        """A copy of the row, on the pool's device."""
        return tuple(values[:, row].clone() for values in self.tensors.values())

    def write_row(self, row: int, state: RowState) -> None:
        """Overwrite the row with what `read_row` returned."""
        for values, copied in zip(self.tensors.values(), state, strict=True):
            values[:, row] = copied

    def gather_row(self, row: int, into: Tensor) -> None:
        """Write the row's bytes, as `export_row` gives them, to uint8 `[num_bytes]`."""
        parts = (values[:, row].reshape(-1).view(torch.uint8) for values in self.tensors.values())
        torch.cat(tuple(parts), out=into)

    def scatter_row(self, row: int, data: Tensor) -> None:
        """The inverse of `gather_row`."""
        start = 0
        for tensor, values in zip(self.spec.tensors, self.tensors.values(), strict=True):
            own = data[start : start + tensor.num_bytes]
            if start % values.itemsize:
                own = own.clone()  # a view of it has to be aligned
            values[:, row] = own.view(values.dtype).view(tensor.shape)
            start += tensor.num_bytes

    def export_row(self, row: int) -> bytes:
        """The row's tensors as little-endian bytes, one after another in the order of the spec."""
        parts = (self.tensors[t.name][:, row].contiguous().cpu() for t in self.spec.tensors)
        return b"".join(part.numpy().tobytes() for part in parts)

    def import_row(self, row: int, data: bytes) -> None:
        """Overwrite the row with bytes made by `export_row`.

        Raises ValueError when the length is not that of this pool's rows.
        """
        for name, values in split_state(self.spec.tensors, bytearray(data)).items():
            self.tensors[name][:, row] = torch.from_numpy(values).to(self.device)

    def index(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """The rows `[rows]` as compiled code takes them. Raises IndexError for one not there."""
        index = np.array(rows, np.int64)
        if index.min() < 0 or index.max() >= self.num_rows:
            raise IndexError(f"rows {list(rows)} of {self.num_rows}")
        return index

    def check_row(self, row: int) -> float:
        """The largest absolute value in the row, as `check_values`. Raises DamagedState."""
        return check_values(self.spec.tensors, split_state(self.spec.tensors, self.export_row(row)))

    def check_length(self, data: bytes) -> None:
        """Raises ValueError when a state of this pool has another number of bytes."""
        _check_length(len(data), self.spec.num_bytes)


def _check_length(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"a state of this model has {expected} bytes, not {found}")


def split_state(tensors: Sequence[TensorSpec], data: bytes | bytearray) -> dict[str, NDArray[Any]]:
    """The tensors that follow each other in a state's little-endian bytes, by name; no copies.

    Raises ValueError when the length is not that of these tensors.
    """
    _check_length(len(data), sum(tensor.num_bytes for tensor in tensors))
    arrays, start = dict[str, NDArray[Any]](), 0
    for tensor in tensors:
        dtype = np.dtype(tensor.dtype).newbyteorder("<")
        values = np.frombuffer(data, dtype, math.prod(tensor.shape), start)
        arrays[tensor.name] = values.reshape(tensor.shape)
        start += tensor.num_bytes
    return arrays


class DamagedState(ValueError):
    """A state has values that no sound state has; the message says which and how many."""


def check_values(tensors: Sequence[TensorSpec], arrays: Mapping[str, NDArray[Any]]) -> float:
    """The largest absolute value of a state, but for those that its tensors begin with.

    A sound state's numbers are finite, or the one that the tensor begins with. Raises DamagedState.
    """
    largest = 0.0
    for tensor in tensors:
        values = arrays[tensor.name]
        if values.dtype.kind != "f":
            continue
        with np.errstate(invalid="ignore"):
            found = max(float(values.max()), -float(values.min()))  # NaN if any of them is
        initial = values.dtype.type(tensor.initial)
        if not math.isfinite(found) or found == abs(float(initial)):
            changed = values[values != initial]
            damaged = changed.size - int(np.isfinite(changed).sum())
            if damaged:
                raise DamagedState(
                    f"{damaged:,} of the {values.size:,} values of tensor {tensor.name} are not "
                    "finite"
                )
            found = float(np.abs(changed).max(initial=0.0))
        largest = max(largest, found)
    return largest


def contiguous_run(rows: Sequence[int]) -> slice | None:
    """The rows as a slice if they are consecutive and rising, else None."""
    run = slice(rows[0], rows[0] + len(rows))
    return run if all(row == run.start + i for i, row in enumerate(rows)) else None

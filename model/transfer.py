"""Copies of pool rows to and from host memory, concurrent with compute.

On a GPU a row is gathered on the compute stream, a copy within the device, and copied to pinned
host memory on another stream; only the consumer of the bytes waits for it.
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.state import StatePool


class Export(Protocol):
    """A row on its way to the host."""

    @property
    def is_done(self) -> bool:
        """Whether `collect` would not block."""

    def collect(self) -> bytes:
        """The row's bytes, as from `StatePool.export_row`. Call once."""


class Transfer(Protocol):
    """Copies rows of one pool."""

    def export_row(self, row: int) -> Export:
        """Export the row as of the last launch; it may be modified immediately."""

    def import_row(self, row: int, data: bytes) -> None:
        """Overwrite the row before later launches; ValueError for a wrong length."""


@dataclass(frozen=True)
class Ready:
    """A row that is already on the host."""

    data: bytes
    is_done = True

    def collect(self) -> bytes:
        return self.data


class DirectTransfer:
    """For a pool in host memory."""

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool

    def export_row(self, row: int) -> Ready:
        return Ready(self._pool.export_row(row))

    def import_row(self, row: int, data: bytes) -> None:
        self._pool.import_row(row, data)


class PinnedTransfer:
    """For a pool on a GPU. Single-threaded: only the thread that launches steps may use it."""

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool
        self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._free_buffers = deque[_Buffer]()
        """Idle buffers; their number grows on demand."""

    def export_row(self, row: int) -> "_PinnedExport":
        buffer = self._acquire_buffer()
        self._pool.gather_row(row, buffer.on_device)
        buffer.filled.record()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(buffer.filled)
            buffer.on_host.copy_(buffer.on_device, non_blocking=True)
            buffer.crossed.record()
        return _PinnedExport(buffer, self._free_buffers)

    def import_row(self, row: int, data: bytes) -> None:
        self._pool.check_length(data)
        buffer = self._acquire_buffer()
        buffer.on_host.numpy()[:] = memoryview(data)
        with torch.cuda.stream(self._stream):
            buffer.on_device.copy_(buffer.on_host, non_blocking=True)
            buffer.crossed.record()
        torch.cuda.current_stream().wait_event(buffer.crossed)
        self._pool.scatter_row(row, buffer.on_device)
        buffer.filled.record()
        self._free_buffers.append(buffer)

    def _acquire_buffer(self) -> "_Buffer":
        """A buffer that is no longer in use."""
        if self._free_buffers and self._free_buffers[0].is_free:
            return self._free_buffers.popleft()
        return _Buffer.make(self._pool)


@dataclass(frozen=True)
class _Buffer:
    """Device and pinned host memory for a row."""

    on_device: Tensor
    on_host: Tensor
    filled: torch.cuda.Event
    """The compute stream has written or read the device side."""

    crossed: torch.cuda.Event
    """The copy stream has finished."""

    @staticmethod
    def make(pool: StatePool) -> "_Buffer":
        size = pool.spec.num_bytes
        return _Buffer(
            torch.empty(size, dtype=torch.uint8, device=pool.device),
            torch.empty(size, dtype=torch.uint8, pin_memory=True),
            *(torch.cuda.Event() for _ in range(2)),  # type: ignore[no-untyped-call]
        )

    @property
    def is_free(self) -> bool:
        return _is_over(self.filled) and _is_over(self.crossed)


@dataclass(frozen=True)
class _PinnedExport:
    buffer: _Buffer
    buffers: deque[_Buffer]

    @property
    def is_done(self) -> bool:
        return _is_over(self.buffer.crossed)

    def collect(self) -> bytes:
        self.buffer.crossed.synchronize()
        data = self.buffer.on_host.numpy().tobytes()
        self.buffers.append(self.buffer)
        return data


def _is_over(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def new_transfer(pool: StatePool) -> Transfer:
    """The best transfer for this pool."""
    return PinnedTransfer(pool) if pool.device.type == "cuda" else DirectTransfer(pool)

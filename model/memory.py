"""Memory that every step goes through, on large pages where the system has them.

On small ones a core reads a third less of it per second: it waits for the tables of pages.
"""

import functools
import math
import mmap
import threading
from contextlib import suppress

import torch
from torch import Tensor

BLOCK_BYTES = 32 << 20
"""What is smaller shares blocks of so many: most weights are smaller than a large page."""

ALIGNMENT = 64
"""Bytes of a cache line."""


class LargePages:
    """Parts of large blocks; a block goes back to the system when all of its parts are gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: mmap.mmap | None = None
        self._used = 0

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU, contiguous."""
        count = math.prod(shape)
        num_bytes = count * dtype.itemsize
        if not num_bytes or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(shape, dtype=dtype)
        if num_bytes > BLOCK_BYTES:
            part = torch.frombuffer(_block(num_bytes), dtype=dtype, count=count)
            return part.view(shape)
        with self._lock:
            if self._block is None or self._used + num_bytes > BLOCK_BYTES:
                self._block, self._used = _block(BLOCK_BYTES), 0
            part = torch.frombuffer(self._block, dtype=dtype, count=count, offset=self._used)
            self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return part.view(shape)


def _block(num_bytes: int) -> mmap.mmap:
    block = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # without large pages it is memory all the same
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


@functools.cache
def large_pages() -> LargePages:
    """The process's."""
    return LargePages()

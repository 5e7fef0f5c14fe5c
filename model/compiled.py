"""What the compiled networks of all families have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.kernels.cpu.workers import run_on_threads
from model.state import StatePool, StateSpec


class Compiled(ABC):
    """A network's `forward`, compiled for the CPU. Holds the addresses of its weights.

    May be called from several threads at once, for different rows.
    """

    def __init__(
        self,
        function: Any,
        fixed: NDArray[np.void],
        spec: StateSpec,
        vocab_sz: int,
        num_threads: Callable[[int, int], int],
    ) -> None:
        """function: reads a record like `fixed`, the arguments that all calls share."""
        self._function, self._fixed = function, fixed
        self._spec, self._vocab_sz = spec, vocab_sz
        self._num_threads = num_threads

    @abstractmethod
    def _workspace_sizes(self, tokens: int, rows: int) -> dict[str, int]:
        """Numbers of each part of the workspace, for this many tokens and other rows."""

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """The network's `logits`: one per row `[batch, vocab_sz]`."""
        index = pool.index(rows)
        return self._run(self._arguments(pool, index), 0, len(rows), len(rows))

    def _arguments(self, pool: StatePool, index: NDArray[np.int64]) -> NDArray[np.void]:
        """A call's arguments as determined by network, pool and rows; the others are 0.

        Raises ValueError for another network's pool.
        """
        if pool.spec != self._spec or pool.device.type != "cpu":
            raise ValueError("the pool was not made by this network's new_pool")
        a = self._fixed.copy()
        a["sequences"], a["index"] = len(index), index.ctypes.data
        a["pool_rows"] = pool.num_rows
        for name, tensor in pool.tensors.items():
            a[name] = tensor.data_ptr()
        return a

    def _run(self, a: NDArray[np.void], tokens: int, rows: int, num_logits: int) -> Tensor:
        """Call the compiled code: logits `[num_logits, vocab_sz]`."""
        logits = torch.empty(num_logits, self._vocab_sz)
        sizes = self._workspace_sizes(tokens, rows)
        workspace = np.empty(sum(sizes.values()), np.float32)
        address = workspace.ctypes.data
        for name, size in sizes.items():
            a[name] = address
            address += workspace.itemsize * size
        a["logits"] = logits.data_ptr()
        run_on_threads(self._function, a, self._num_threads(tokens, num_logits))
        del workspace  # compiled code writes to it until here
        return logits

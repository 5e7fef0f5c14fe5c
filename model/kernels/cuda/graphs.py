"""CUDA graphs, events and streams, with equivalents on a CPU."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], None]
"""Launches kernels on tensors with fixed addresses."""


class Recorder:
    """Records graphs on one device; their intermediate tensors share memory.

    A CPU records nothing: the work runs again each time.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._memory: Any = None

    def record(self, work: Work) -> Work:
        """Record the work as a graph. It runs once now, to compile and load its kernels."""
        work()
        if not self._on_gpu:
            return work
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            work()
        self._memory = graph.pool()
        return graph.replay


class DeviceEvent:
    """A point in the device's stream."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def mark(self) -> None:
        """Record the event after all launches so far."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Block until the device reaches it."""
        if self._event is not None:
            self._event.synchronize()


class SideStream:
    """A second stream that does not wait for later launches on the first."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self) -> AbstractContextManager[None]:
        """Context in which launches go to the second stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def host_buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory that the device can copy to and from asynchronously."""
    return torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device, copied asynchronously."""
    return move(torch.tensor(values, dtype=dtype), device)


def move(values: Tensor, device: torch.device) -> Tensor:
    """`to_device` for a tensor."""
    if device.type != "cuda" or values.device == device:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)

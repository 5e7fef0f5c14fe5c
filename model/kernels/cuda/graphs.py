"""Work for the device that is recorded once and launched as a whole."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], None]
"""Launches kernels on tensors that stay where they are."""


class Recorder:
    """Records work on one device; recordings share the memory of what they compute on the way.

    A CPU has nothing to record: there the work is done anew each time.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._memory: Any = None

    def record(self, work: Work) -> Work:
        """What does the same work again. It is done once now, to compile and to load what it
        needs."""
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
    """A point in what the device has been told to do."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def mark(self) -> None:
        """This is the point, after all that was launched so far."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Return when the device has come to it."""
        if self._event is not None:
            self._event.synchronize()


class SideStream:
    """A second line of work, which does not wait for what is launched on the first meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self) -> AbstractContextManager[None]:
        """What is launched within is on the second line."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def host_buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory that this device can copy from and to by itself."""
    return torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on the device, without waiting for what it has been told to do."""
    return move(torch.tensor(values, dtype=dtype), device)


def move(values: Tensor, device: torch.device) -> Tensor:
    """`to_device` for a tensor."""
    if device.type != "cuda" or values.device == device:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)

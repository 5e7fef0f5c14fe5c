"""Choice of the device, dtype and number of threads."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from model import WeightDtype, checkpoint
from model.checkpoint import Checkpoint
from model.decoding import sampling
from model.network import Network

FEW_BYTES = 128 << 20
"""Weight size that one thread reads in a few milliseconds. Below it, waiting for a second thread
costs more than it gains: it would have to wake up a thousand times per second, next to the
server."""


class DeviceError(ValueError):
    """The requested device is not available."""


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device for `auto`, `cpu` or `cuda`, and a description with the reason. Raises
    DeviceError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device cuda was requested, but torch finds no CUDA device")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda"), f"cuda ({torch.cuda.get_device_name()})"
    why = "" if name == "cpu" else ", no CUDA device found"
    return torch.device("cpu"), f"cpu{why}"


def choose_dtype(asked: WeightDtype | None, device: torch.device) -> WeightDtype:
    """The weights' dtype: as requested, or the device's default."""
    if asked is not None:
        return asked
    return "bfloat16" if device.type == "cuda" else "float32"


def choose_threads(threads: int | None, network: Network) -> str:
    """Set the number of CPU threads: as requested, or one for a small network.

    Returns a description.
    """
    if threads is None and network.weight_bytes < FEW_BYTES:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def load(
    folder: Path, device: torch.device, dtype: WeightDtype, report: Callable[[str], None]
) -> Checkpoint:
    """Load a checkpoint to serve. Raises CheckpointError.

    If machine code must be compiled, which takes long, `report` is called with a line before and
    after.
    """
    with _compilation_reported(report):
        loaded = checkpoint.load(folder, device, dtype)
        if device.type == "cpu":
            sampling.prepare()
    return loaded


def _compilation_reported(report: Callable[[str], None]) -> AbstractContextManager[None]:
    try:
        from model.kernels.cpu.compilation import target, watch
        from model.kernels.cpu.functions import CACHE
    except ImportError:  # without Numba nothing is compiled
        return nullcontext()
    ending = "kept for the next start" if CACHE else "not kept: set NUMBA_CACHE_DIR to a folder"
    return watch(
        lambda: report(f"compiling  machine code for {target()}, about half a minute"),
        lambda seconds: report(f"compiled   in {seconds:.1f} s, {ending}"),
    )

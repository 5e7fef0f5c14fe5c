"""Where the model runs: decided once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from model import WeightDtype, checkpoint
from model.checkpoint import Checkpoint
from model.decoding import sampling
from model.network import Network


class DeviceError(ValueError):
    """The device that was asked for is not there."""


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device for `auto`, `cpu` or `cuda`, and the reason in words. Raises DeviceError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device cuda was asked for, but torch finds no CUDA device")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda"), f"cuda ({torch.cuda.get_device_name()})"
    why = "" if name == "cpu" else ", no CUDA device found"
    return torch.device("cpu"), f"cpu{why}"


def choose_dtype(asked: WeightDtype | None, device: torch.device) -> WeightDtype:
    """The weights' dtype: as asked for, or what the device computes best with."""
    if asked is not None:
        return asked
    return "bfloat16" if device.type == "cuda" else "float32"


def choose_threads(threads: int | None, network: Network) -> str:
    """Set how many CPU threads a step uses at most: as asked for, or what the cores allow with one
    left for the clients where there are more than two.

    Returns in words how many they are, and how many a single token is worth.
    """
    cores = torch.get_num_threads()
    most = threads or (cores - 1 if cores > 2 else cores)
    torch.set_num_threads(most)
    alone = network.num_threads(1, 1)
    if threads is None and not network.is_compiled:
        most = alone
        torch.set_num_threads(most)
    words = f"{most} thread{'s' if most > 1 else ''}"
    if most == 1 or not network.is_compiled:
        return words
    work = f"{network.num_parameters / 1e6:,.1f} M multiply-adds"
    return f"up to {words} as a step has work, {alone} for a token of {work}"


def load(
    folder: Path, device: torch.device, dtype: WeightDtype, report: Callable[[str], None]
) -> Checkpoint:
    """A checkpoint to serve. Raises CheckpointError.

    If machine code is compiled, which takes long, `report` is called with a line before and after.
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

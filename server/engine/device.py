"""Choice of the device, dtype and number of threads."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from model import WeightDtype, checkpoint
from model.checkpoint import Checkpoint
from model.decoding import sampling
from model.network import Network


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


def choose_threads(threads: int | None, network: Network) -> str:
    """Set the maximum number of CPU threads per step: as requested, or one per core, minus one for
    the clients if there are more than two.

    Returns a description of the maximum and of the number for a single token.
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
    folder: Path, device: torch.device, dtype: WeightDtype | None, report: Callable[[str], None]
) -> Checkpoint:
    """Load a checkpoint for serving, by default in the dtype that suits it best. Raises
    CheckpointError.

    If machine code must be compiled, which is slow, `report` is called with a line before and
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
    ending = (
        "cached for the next start"
        if CACHE
        else "not cached: set NUMBA_CACHE_DIR to a writable folder"
    )
    return watch(
        lambda: report(f"compiling  machine code for {target()}, takes about half a minute"),
        lambda seconds: report(f"compiled   in {seconds:.1f} s, {ending}"),
    )

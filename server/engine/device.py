"""Where the model runs: decided once."""

import torch


class DeviceError(ValueError):
    """The device that was asked for is not there."""


def choose_device(name: str, threads: int | None) -> tuple[torch.device, str]:
    """The device for `auto`, `cpu` or `cuda`, and the reason in words. Raises DeviceError.

    Sets the number of CPU threads of this process.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device cuda was asked for, but torch finds no CUDA device")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda"), f"cuda ({torch.cuda.get_device_name()})"
    why = "" if name == "cpu" else ", no CUDA device found"
    return torch.device("cpu"), f"cpu ({torch.get_num_threads()} threads{why})"

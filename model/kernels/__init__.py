"""What the network computes, in Triton: for CUDA, or on a CPU in Triton's interpreter.

The only place that imports triton. `is_available` tells whether the modules here can be imported.
"""

from importlib.util import find_spec

from model.config import ModelConfig


def is_available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def missing_for(config: ModelConfig) -> str:
    """Which of the config's extensions have no kernels, in words; empty if there are none."""
    names = ", ".join(config.extensions)
    return f"no Triton kernels for {names}" if names else ""

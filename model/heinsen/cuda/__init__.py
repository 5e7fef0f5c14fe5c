"""Prefill and decode on a GPU, with Triton kernels.

Tests run the same code on a CPU with Triton's interpreter.
"""

from model.heinsen.config import ModelConfig


def unsupported_extensions(config: ModelConfig) -> str:
    """Names of the config's extensions without kernels, as a message; empty if there are none."""
    names = ", ".join(config.extensions)
    return f"no Triton kernels for {names}" if names else ""

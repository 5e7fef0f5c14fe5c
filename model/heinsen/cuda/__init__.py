"""A network's `prefill` and `step` on a GPU, from Triton kernels.

Without a GPU all of it also runs on a CPU, in Triton's interpreter, which tests do.
"""

from model.heinsen.config import ModelConfig


def unsupported_extensions(config: ModelConfig) -> str:
    """Which of the config's extensions have no kernels, in words; empty if there are none."""
    names = ", ".join(config.extensions)
    return f"no Triton kernels for {names}" if names else ""

"""Triton kernels, for CUDA or, in Triton's interpreter, for a CPU.

Modules in folders named cuda can be imported only if `is_available`.
"""

from importlib.util import find_spec


def is_available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None

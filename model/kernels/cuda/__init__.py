"""In Triton: for CUDA, or on a CPU in Triton's interpreter.

`is_available` tells whether this package's modules in folders named cuda can be imported.
"""

from importlib.util import find_spec


def is_available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None

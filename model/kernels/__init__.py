"""What the network computes, in Triton: for CUDA, or on a CPU in Triton's interpreter.

The only place that imports triton. `is_available` tells whether the modules here can be imported.
"""

from importlib.util import find_spec


def is_available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None

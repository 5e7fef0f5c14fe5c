"""Kernels run on the GPU where there is one, and in Triton's interpreter where there is none."""

from pathlib import Path

import pytest
import torch

from model import kernels

OF_KERNELS = [Path(__file__).parent / name for name in ("kernels", "cuda")]
collect_ignore = [] if kernels.is_available() else OF_KERNELS


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""Kernels run on the GPU where there is one, and in Triton's interpreter where there is none."""

import pytest
import torch

from model.kernels import cuda

collect_ignore_glob = [] if cuda.is_available() else ["*/cuda"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

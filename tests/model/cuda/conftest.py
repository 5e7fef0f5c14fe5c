"""On the GPU where there is one, in Triton's interpreter where there is none."""

from pathlib import Path

import pytest
import torch

from model import kernels

HERE = Path(__file__).parent
collect_ignore_glob = [] if kernels.is_available() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the network runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

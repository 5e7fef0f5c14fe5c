"""One engine for the tests that need nothing special of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint
from tests.server.engine.driver import Driver


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint, torch.device("cpu"))


@pytest.fixture
def driver(checkpoint: Checkpoint) -> Iterator[Driver]:
    made = Driver(checkpoint)
    yield made
    made.engine.stop()

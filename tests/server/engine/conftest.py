"""One engine for the tests without special settings; tests that generate run twice, the second time
with steps that run ahead and with states that arrive some steps after the end of their turn."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint
from server.engine import worker
from tests.server.engine.ahead import running_beside
from tests.server.engine.driver import Driver
from tests.server.engine.stepper import SMALL, Clock, Stepper

GENERATE = (
    "test_engine",
    "test_prefixes",
    "test_resuming",
    "test_rows",
    "test_scoring",
    "test_steps",
    "test_structured",
    "test_worker",
)
"""Modules whose tests do so."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in GENERATE:
        metafunc.parametrize("decoder", ["direct", "ahead"], indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)  # else pytest drops it where a test has parameters
def decoder(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the network's steps are launched."""
    kind = getattr(request, "param", "direct")
    with running_beside() if kind == "ahead" else nullcontext():
        yield kind


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint, torch.device("cpu"))


@pytest.fixture
def driver(checkpoint: Checkpoint) -> Iterator[Driver]:
    made = Driver(checkpoint)
    yield made
    made.engine.stop()


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    """The clock for the deadlines of a stepper's requests."""
    made = Clock()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker, "time", made)
        yield made


@pytest.fixture
def stepper(checkpoint: Checkpoint, clock: Clock) -> Stepper:
    del clock
    return Stepper(checkpoint, SMALL)

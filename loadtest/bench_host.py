"""The host's work per token besides the network: text, limits, events, planning of steps.

    python -m loadtest host

Runs the engine's worker on the default model with free steps: a stand-in returns tokens, so that
all of the time is the host's. On a GPU it must be less than the device's time for the step.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer

from model import PRETRAINED, checkpoint
from model.decoding.decoder import CompletedStep, Decoded, Piece
from model.decoding.sampling import SamplingParams
from model.network import Network
from model.state import StatePool
from server.engine.inbox import Inbox
from server.engine.messages import Continuation, EngineRequest, Event, RowReleased, Submit
from server.engine.scheduler import EngineLimits
from server.engine.worker import Worker
from server.metrics import Metrics

PROMPT = (1, 2, 3)
ROWS = (1, 16, 64, 256)
ORDINARY = range(300, 900)
"""Tokens that do not end a text."""


class StandIn:
    """A runner that returns tokens without computing."""

    runs_ahead = True

    def __init__(self) -> None:
        self._num_launches = 0

    def prepare(self) -> None:
        pass

    def launch(self, pieces: Sequence[Piece]) -> CompletedStep:
        self._num_launches += 1
        return CompletedStep(
            Decoded([ORDINARY[(self._num_launches + each.row) % 600] for each in pieces])
        )


def main(
    folder: Annotated[Path, typer.Option("--checkpoint", help="Folder of the model.")] = PRETRAINED,
    rows: Annotated[list[int] | None, typer.Option(help="Sequences; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of each.")] = 400,
) -> None:
    """Measure and print."""
    loaded = checkpoint.load(folder, torch.device("cpu"))

    def stand_in(network: Network, pool: StatePool, max_rows: int) -> StandIn:
        del network, pool, max_rows
        return StandIn()

    print(f"{'rows':>6} {'us a token':>11} {'ms a step':>10} {'tokens/s':>10}")
    for count in rows or ROWS:
        with patch("model.decoding.runners.new_runner", stand_in):
            seconds = min(_run(loaded, count, tokens) for _ in range(3))
        per_token = seconds / (count * tokens)
        print(
            f"{count:>6} {1e6 * per_token:>11.1f} {1e3 * per_token * count:>10.3f} "
            f"{1 / per_token:>10,.0f}"
        )


def _run(loaded: checkpoint.Checkpoint, rows: int, tokens: int) -> float:
    limits = EngineLimits(rows, 0, rows, 100 * rows, 512, 0.1, 0)
    inbox = Inbox(limits.max_waiting, limits.max_waiting_tokens)
    num_events = 0

    def deliver(events: list[Event | RowReleased]) -> None:
        nonlocal num_events
        num_events += len(events)

    worker = Worker(loaded, limits, inbox, deliver, Metrics())
    for row in range(rows):
        request = EngineRequest(
            *(f"r{row}", None, Continuation(), PROMPT, tokens, SamplingParams(seed=row)),
            ignore_eos=True,
        )
        inbox.submit(Submit(request, time.monotonic()))
    while not worker._scheduler.decoding:
        worker.step()
    started = time.thread_time()
    while not worker._scheduler.idle:
        worker.step()
    seconds = time.thread_time() - started
    assert num_events >= rows * tokens
    return seconds

"""The real server around a stand-in engine, which emits text at a given rate and computes nothing.

    python -m loadtest.front_server STREAMS TOKENS_PER_S [flags of latentd serve]

Once all requests have arrived, each gets one token per step, from the engine's thread and in one
batch per step, until it has as many as requested. Every text has one `MARK` and its emission time.
"""

import sys
import threading
import time
from collections.abc import Sequence
from unittest.mock import patch

from typer.main import get_command

from model.checkpoint import Checkpoint
from server.__main__ import app
from server.engine.messages import (
    EngineRequest,
    EngineTimings,
    Event,
    Finished,
    RowReleased,
    TextDelta,
)
from server.engine.scheduler import EngineLimits
from server.engine.worker import Deliver
from server.metrics import Metrics

MARK = "~"
PAUSE_S = 1.0
"""Seconds between the last request and the first token, for the answers to begin."""


class StandIn:
    """The interface of `server.engine.engine.Engine` that the app needs."""

    num_streams = 1
    tokens_per_s = 1.0
    keeps_prefixes = False

    def __init__(
        self, checkpoint: Checkpoint, limits: EngineLimits, deliver: Deliver, metrics: Metrics
    ) -> None:
        del checkpoint, limits, metrics
        self._deliver = deliver
        self._arrived = threading.Condition()
        self._waiting: list[EngineRequest] = []
        self._cancelled = set[str]()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The thread ends with the process."""

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def submit(self, *requests: EngineRequest) -> None:
        with self._arrived:
            self._waiting.extend(requests)
            self._arrived.notify()

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    def release(self, name: str) -> None:
        """No row is retained."""

    def _run(self) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: len(self._waiting) >= self.num_streams)
                requests, self._waiting = self._waiting, []
            time.sleep(PAUSE_S)
            self._emit(requests)

    def _emit(self, requests: Sequence[EngineRequest]) -> None:
        """Emit steps at the rate; late steps are not skipped."""
        started = due = time.perf_counter()
        num_steps = max(request.max_tokens for request in requests)
        for step in range(num_steps):
            due += len(requests) / self.tokens_per_s
            if (ahead := due - time.perf_counter()) > 0:
                time.sleep(ahead)
            text = f"{MARK}{time.monotonic_ns() // 1000} "
            events: list[Event | RowReleased] = [
                TextDelta(request.request_id, text)
                for request in requests
                if request.request_id not in self._cancelled
            ]
            self._deliver(events)
            if step == num_steps - 1:
                total_s = time.perf_counter() - started
                rate = num_steps * len(requests) / total_s
                print(f"emitted    {rate:.0f}", flush=True)
                timings = EngineTimings(0.0, 0.0, 0.0, total_s)
                self._deliver(
                    [
                        Finished(request.request_id, "", "length", num_steps, timings)
                        for request in requests
                    ]
                )


def main() -> None:
    """Serve."""
    StandIn.num_streams, StandIn.tokens_per_s = int(sys.argv[1]), float(sys.argv[2])
    with patch("server.api.app.Engine", StandIn):
        get_command(app)(args=["serve", *sys.argv[3:]], prog_name="latentd")


if __name__ == "__main__":
    main()

"""The engine's thread-safe interface: requests in, events out."""

import threading
import time

from model.checkpoint import Checkpoint
from server.engine.inbox import Inbox
from server.engine.messages import Cancel, EngineRequest, Forget, Release, Stop, Submit
from server.engine.scheduler import EngineLimits
from server.engine.worker import Deliver, Worker
from server.errors import ShuttingDown
from server.metrics import Metrics

__all__ = ["Engine", "EngineLimits"]


class Engine:
    """Runs requests on a checkpoint's network. All public methods are thread-safe.

    `deliver` is called in the engine's thread, at most once per step, with that step's events.
    After a cancellation no further events of the request are delivered, except those in transit.
    """

    def __init__(
        self, checkpoint: Checkpoint, limits: EngineLimits, deliver: Deliver, metrics: Metrics
    ) -> None:
        self.keeps_prefixes = limits.prefix_cache_bytes >= checkpoint.network.state_spec.num_bytes
        """Whether states of beginnings are kept for later prompts."""

        self._inbox = Inbox(
            limits.max_waiting,
            limits.max_waiting_tokens,
            max_waiting_bytes=limits.max_waiting_bytes,
        )
        self._worker = Worker(checkpoint, limits, self._inbox, deliver, metrics)
        self._thread = threading.Thread(target=self._worker.run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after the current step; running requests get no further events."""
        self._inbox.put(Stop())
        self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @property
    def running_step_s(self) -> float:
        """Duration of the current step so far in seconds; 0 between steps."""
        started = self._worker.step_started
        return 0.0 if started is None else time.monotonic() - started

    def submit(self, *requests: EngineRequest) -> None:
        """Queue requests, all or none.

        Raises Overloaded if the queue is full, and ShuttingDown if the engine has stopped, as it
        does when its device is lost.
        """
        self._check_running()
        now = time.monotonic()
        self._inbox.submit(*(Submit(request, now) for request in requests))
        self._check_running()  # it may have stopped just before

    def cancel(self, request_id: str) -> None:
        """Cancel a request in any phase; unknown and finished ones are ignored."""
        self._inbox.put(Cancel(request_id))

    def release(self, state_id: str) -> None:
        """Free the row retained under this state id; unknown ids are ignored."""
        self._inbox.put(Release(state_id))

    def forget(self, owner: str) -> None:
        """Drop all cached states of an owner's prompts."""
        self._inbox.put(Forget(owner))

    def _check_running(self) -> None:
        if not self.is_running:
            raise ShuttingDown("the engine has stopped; see the server's log")

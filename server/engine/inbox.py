"""Message queue of the engine's thread, with a bounded number of waiting requests."""

import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress

from model.shares import has_space
from server.engine.messages import EngineMessage, EngineRequest, Submit
from server.errors import Overloaded

RECENT = 64
"""Number of recent requests that estimate the queue's speed."""

MAX_RETRY_AFTER_S = 60


class Inbox:
    """Thread-safe queue read by the engine's thread.

    A request counts as waiting from submission until `left_queue`.
    """

    def __init__(
        self,
        max_waiting: int,
        max_waiting_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        max_waiting_bytes: int | None = None,
    ) -> None:
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._max_waiting_bytes = max_waiting_bytes
        self._num_waiting = Counter[str]()
        self._num_tokens = Counter[str]()
        """By owner."""

        self._num_bytes = 0
        """Size of the states of waiting requests."""

        self._clock = clock
        self._left = deque[float](maxlen=RECENT + 1)
        """When the queue last became non-empty, and when requests left it since."""

        self._lock = threading.Lock()
        self._messages: queue.SimpleQueue[EngineMessage] = queue.SimpleQueue()

    def submit(self, *messages: Submit) -> None:
        """Queue requests of one owner, all or none.

        Raises Overloaded if the queue is full and the owner has its share of it, or if the states
        of waiting requests fill their memory.
        """
        owner = messages[0].request.owner
        num_tokens = sum(message.request.num_to_read for message in messages)
        num_bytes = sum(_state_bytes(message.request) for message in messages)
        with self._lock:
            if not self._has_space(self._num_waiting, owner, len(messages), self._max_waiting):
                raise self._overloaded(
                    f"{self._num_waiting.total()} requests are waiting already", "queue_full"
                )
            if not self._has_space(self._num_tokens, owner, num_tokens, self._max_waiting_tokens):
                raise self._overloaded(
                    f"{self._num_tokens.total()} prompt tokens are waiting already",
                    "queue_tokens_full",
                )
            most = self._max_waiting_bytes
            is_more = num_bytes > 0 and self._num_bytes > 0  # a single one may have any size
            if most is not None and is_more and self._num_bytes + num_bytes > most:
                raise self._overloaded(
                    f"{self._num_bytes} bytes of states are waiting already", "queue_states_full"
                )
            if not self._num_waiting:
                self._left.clear()
                self._left.append(self._clock())
            self._num_waiting[owner] += len(messages)
            self._num_tokens[owner] += num_tokens
            self._num_bytes += num_bytes
        for message in messages:
            self._messages.put(message)

    def put(self, message: EngineMessage) -> None:
        """Queue a message other than a request."""
        self._messages.put(message)

    @property
    def empty(self) -> bool:
        return self._messages.empty()

    def receive(self, *, wait: bool, timeout_s: float | None = None) -> Iterator[EngineMessage]:
        """Receive all pending messages; with `wait`, block for the first one, up to `timeout_s`."""
        with suppress(queue.Empty):
            if wait:
                yield self._messages.get(timeout=timeout_s)
            while True:
                yield self._messages.get_nowait()

    def left_queue(self, request: EngineRequest) -> None:
        """The request got a row or ended."""
        with self._lock:
            self._num_waiting[request.owner] -= 1
            self._num_tokens[request.owner] -= request.num_to_read
            self._num_bytes -= _state_bytes(request)
            if not self._num_waiting[request.owner]:
                del self._num_waiting[request.owner], self._num_tokens[request.owner]
            self._left.append(self._clock())

    def _has_space(self, waiting: Counter[str], owner: str, new: int, most: int) -> bool:
        num_owners = len(self._num_waiting.keys() | {owner})
        return has_space(waiting[owner], waiting.total(), new, most, num_owners)

    def _overloaded(self, message: str, code: str) -> Overloaded:
        """The error, with an estimate of when the queue will have drained at its recent speed."""
        wait_s = 0.0
        if self._left:
            elapsed_s = self._clock() - self._left[0]
            wait_s = self._num_waiting.total() * elapsed_s / max(1, len(self._left) - 1)
        return Overloaded(message, code, min(max(1, math.ceil(wait_s)), MAX_RETRY_AFTER_S))


def _state_bytes(request: EngineRequest) -> int:
    """Size of the state that a request carries; initial states are shared."""
    source = request.source
    return 0 if source is None or source.is_initial else len(source.data)

"""The way into the engine's thread: a queue of messages, in which few enough requests wait."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress

from server.engine.messages import EngineRequest, Message, Submit
from server.errors import Overloaded


class Inbox:
    """Any thread may put messages in; the engine's takes them out.

    A request counts as waiting from its submission until the engine says that it does not.
    """

    def __init__(self, max_waiting: int, max_waiting_tokens: int) -> None:
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._num_waiting = self._num_tokens = 0
        self._lock = threading.Lock()
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def submit(self, *messages: Submit) -> None:
        """Queue requests, all or none. Raises Overloaded when too many wait already."""
        num_tokens = sum(len(message.request.token_ids) for message in messages)
        with self._lock:
            if self._num_waiting + len(messages) > self._max_waiting:
                raise Overloaded(f"{self._num_waiting} requests are waiting already")
            if self._num_tokens + num_tokens > self._max_waiting_tokens:
                raise Overloaded(
                    f"{self._num_tokens} prompt tokens are waiting already", "queue_tokens_full"
                )
            self._num_waiting += len(messages)
            self._num_tokens += num_tokens
        for message in messages:
            self._messages.put(message)

    def put(self, message: Message) -> None:
        """Queue what takes no place among the waiting."""
        self._messages.put(message)

    @property
    def empty(self) -> bool:
        return self._messages.empty()

    def take(self, *, wait: bool) -> Iterator[Message]:
        """The messages that are there; if there are none and so asked, the next one first."""
        if wait:
            yield self._messages.get()
        with suppress(queue.Empty):
            while True:
                yield self._messages.get_nowait()

    def waits_no_more(self, request: EngineRequest) -> None:
        """The request has a row, or has ended."""
        with self._lock:
            self._num_waiting -= 1
            self._num_tokens -= len(request.token_ids)

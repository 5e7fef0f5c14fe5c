"""Records of requests and turns for logs and traces: names, numbers and times, never content.

Filled in while the request runs; times are of `time.monotonic`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class TurnRecord:
    """A request's turn."""

    max_tokens: int
    num_choices: int
    prompt_tokens: int
    """As in the answer's usage: includes the session's history, counted once for all choices."""

    is_detached: bool = False
    """Whether it outlives its request's connection; it may end before or after the request."""

    started: float = field(default_factory=time.monotonic)
    """When it was submitted to the engine."""

    cached_tokens: int = 0
    """Cached tokens among them."""

    generated_tokens: int = 0
    """Sampled tokens; of an abandoned turn, those delivered."""

    queue_s: float | None = None
    prefill_s: float | None = None
    """None for a turn that did not complete."""

    first_token_s: float | None = None
    decoded_s: float | None = None
    """From submission to the last token."""

    committing: tuple[float, float] | None = None
    """Start and end of the commit."""

    answer_id: str = ""
    reasons: tuple[str, ...] = ()
    """Finish reasons of the choices."""

    outcome: str = "cancelled"
    error: str | None = None
    """Code of the error that ended it."""

    ended: float | None = None
    """None while running."""

    on_end: Callable[[], None] | None = None
    """Called at the end."""

    def end(self) -> None:
        """Finish the record."""
        self.ended = time.monotonic()
        if self.on_end is not None:
            self.on_end()


@dataclass
class RequestRecord:
    """An HTTP request."""

    request_id: str = ""
    method: str = ""
    client: str | None = None
    """The client's address."""

    started: float = field(default_factory=time.monotonic)
    trace_headers: dict[str, str] = field(default_factory=dict)
    """Trace context headers from the client."""

    endpoint: str = "unknown"
    """The route, with placeholders for ids."""

    status: int = 0
    """0: no response was started."""

    outcome: str = ""
    error: str | None = None
    """Code of the error returned."""

    key: str | None = None
    """Name of the client's key."""

    session_id: str | None = None
    streams: bool = False
    turn: TurnRecord | None = None
    ended: float = 0.0

    def end(self) -> None:
        """Finish the record. A detached turn determines the outcome."""
        turn, self.ended = self.turn, time.monotonic()
        if turn is None:
            return
        self.error = self.error or turn.error
        if turn.is_detached:
            self.outcome = turn.outcome

    def fields(self) -> dict[str, object]:
        """Fields of the log line, without unknown ones."""
        turn = self.turn
        known: dict[str, object] = {
            "request_id": self.request_id,
            "method": self.method,
            "endpoint": self.endpoint,
            "status": self.status or None,
            "outcome": self.outcome,
            "error": self.error,
            "key": self.key,
            "client": self.client,
            "session": self.session_id,
        }
        if turn is not None:
            known |= {
                "tokens_in": turn.prompt_tokens,
                "tokens_cached": turn.cached_tokens,
                "tokens_out": turn.generated_tokens,
                "queue_s": turn.queue_s,
                "prefill_s": turn.prefill_s,
                "first_token_s": turn.first_token_s,
            }
        known["total_s"] = self.ended - self.started
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in known.items()
            if value is not None
        }

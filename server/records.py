"""What the log and the traces say of a request: names, numbers and times, never content.

A record is filled while its request runs; its times are of `time.monotonic`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class TurnRecord:
    """The turn that a request ran."""

    max_tokens: int
    num_choices: int
    prompt_tokens: int
    """As the answer's usage counts them: with the history of a session, once for all choices."""

    is_detached: bool = False
    """It goes on without its request's connection, and may end before it or after it."""

    started: float = field(default_factory=time.monotonic)
    """When the engine got it."""

    cached_tokens: int = 0
    """Those of them that did not need to be read."""

    generated_tokens: int = 0
    """Tokens that were sampled; of a turn that was abandoned, those that its reader has seen."""

    queue_s: float | None = None
    prefill_s: float | None = None
    """None for a turn that did not get to its end, as for the time until its last token."""

    first_token_s: float | None = None
    decoded_s: float | None = None
    """From the start to the last token."""

    committing: tuple[float, float] | None = None
    """When the commit of its state began and ended."""

    answer_id: str = ""
    reasons: tuple[str, ...] = ()
    """Why each of the choices ended."""

    outcome: str = "cancelled"
    error: str | None = None
    """The code of the error that ended it."""

    ended: float | None = None
    """None while it runs."""

    when_ended: Callable[[], None] | None = None
    """Called at the end."""

    def end(self) -> None:
        """Nothing changes any more."""
        self.ended = time.monotonic()
        if self.when_ended is not None:
            self.when_ended()


@dataclass
class RequestRecord:
    """A request over HTTP."""

    request_id: str = ""
    method: str = ""
    client: str | None = None
    """The address, if there is one."""

    started: float = field(default_factory=time.monotonic)
    trace_headers: dict[str, str] = field(default_factory=dict)
    """What the client says of the trace that the request belongs to."""

    endpoint: str = "unknown"
    """The route, in which ids are placeholders."""

    status: int = 0
    """0: no answer began."""

    outcome: str = ""
    error: str | None = None
    """The code of the error that was the answer."""

    key: str | None = None
    """What the client's key is called."""

    session_id: str | None = None
    streams: bool = False
    turn: TurnRecord | None = None
    ended: float = 0.0

    def end(self) -> None:
        """All of it is over. A detached turn says how."""
        turn, self.ended = self.turn, time.monotonic()
        if turn is None:
            return
        self.error = self.error or turn.error
        if turn.is_detached:
            self.outcome = turn.outcome

    def fields(self) -> dict[str, object]:
        """What the log has of it; what is not known is left out."""
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

"""Errors reported to clients; server/api renders them."""

NO_RETRY = {"x-should-retry": "false"}
"""Makes the official clients, which retry many errors, not retry this one."""


class LatentdError(Exception):
    """An error with the fields of OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str,
        param: str | None = None,
        code: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        """The error object's `type`."""
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def outcome(self) -> str:
        """The request's outcome in the metrics."""
        return "server_error" if self.status >= 500 else "client_error"

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object."""
        facts = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": facts}


class InvalidRequest(LatentdError):
    """The request is invalid."""

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(
            message, status=status, kind="invalid_request_error", param=param, code=code
        )


class NeedsStream(InvalidRequest):
    """A parameter that needs `stream: true`."""

    def __init__(self, param: str) -> None:
        super().__init__(f"{param} needs stream: true", param)


class NotFound(InvalidRequest):
    """The named object does not exist."""

    def __init__(self, message: str, param: str | None, code: str) -> None:
        super().__init__(message, param, code, 404)


class Conflict(LatentdError):
    """The named object is in a conflicting state; retrying would not help."""

    def __init__(self, message: str, param: str, code: str) -> None:
        super().__init__(
            message, status=409, kind="conflict_error", param=param, code=code, headers=NO_RETRY
        )


class SessionBusy(Conflict):
    """Another turn of the session is running."""

    def __init__(self, session_id: str) -> None:
        super().__init__(
            f"session {session_id} is busy with another turn", "session_id", "session_busy"
        )


class TurnMismatch(Conflict):
    """The session is not at the expected turn."""

    def __init__(self, session_id: str, turn: int, expected: int) -> None:
        super().__init__(
            f"session {session_id} is at turn {turn}, not at {expected}",
            "expected_turn",
            "turn_mismatch",
        )


class KeyReused(Conflict):
    """An Idempotency-Key was reused for another request."""

    def __init__(self) -> None:
        super().__init__(
            "this Idempotency-Key was used for a different request",
            "Idempotency-Key",
            "idempotency_key_reused",
        )


class ResponseGone(Conflict):
    """A response was deleted or cancelled while being generated; nothing was stored."""

    def __init__(self, response_id: str) -> None:
        super().__init__(
            f"response {response_id} was deleted or cancelled before it was complete",
            "response_id",
            "response_gone",
        )


class Unauthorized(LatentdError):
    """The API key is missing or invalid."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            status=401,
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class QuotaExceeded(LatentdError):
    """The owner's quota of sessions, responses or bytes is used up."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(
            message, status=429, kind="insufficient_quota", code=code, headers=NO_RETRY
        )


class RateLimited(LatentdError):
    """A rate limit, named by the code, would be exceeded."""

    def __init__(self, message: str, code: str, retry_after_s: int) -> None:
        super().__init__(
            message,
            status=429,
            kind="rate_limit_error",
            code=code,
            headers={"Retry-After": str(retry_after_s)},
        )


class Overloaded(LatentdError):
    """A queue, named by the code, is full."""

    def __init__(self, message: str, code: str, retry_after_s: int = 1) -> None:
        super().__init__(
            message,
            status=429,
            kind="rate_limit_error",
            code=code,
            headers={"Retry-After": str(retry_after_s)},
        )


class Cancelled(LatentdError):
    """The turn was cancelled on purpose."""

    def __init__(self) -> None:
        super().__init__(
            "the turn was cancelled", status=409, kind="conflict_error", code="cancelled"
        )

    @property
    def outcome(self) -> str:
        return "cancelled"


class EventsGone(LatentdError):
    """The requested events of a stream are no longer stored."""

    def __init__(self, stream_id: str, first: int) -> None:
        super().__init__(
            f"stream {stream_id} has only the events from {first} on",
            status=410,
            kind="invalid_request_error",
            param="Last-Event-ID",
            code="events_gone",
            headers=NO_RETRY,
        )


class DeadlineExceeded(LatentdError):
    """The request exceeded its deadline; retrying would fail the same way."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"the request did not finish within {timeout_s:g} seconds",
            status=504,
            kind="timeout_error",
            param="timeout",
            code="deadline_exceeded",
            headers=NO_RETRY,
        )

    @property
    def outcome(self) -> str:
        return "deadline_exceeded"


class ShuttingDown(LatentdError):
    """The server accepts no new work."""

    def __init__(self, message: str = "the server is shutting down") -> None:
        super().__init__(
            message,
            status=503,
            kind="server_error",
            code="shutting_down",
            headers={"Retry-After": "5"},
        )


class StorageFailed(LatentdError):
    """Reading or writing a session failed; it is unchanged."""

    def __init__(self, message: str, status: int = 503, code: str = "storage_failed") -> None:
        super().__init__(message, status=status, kind="server_error", code=code)


class StorageFull(StorageFailed):
    """The disk or the store's quota is full."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 507, "storage_full")
        self.headers.update(NO_RETRY)


class StateDamaged(LatentdError):
    """A turn produced non-finite values. It was rolled back, and the state before it is intact: the
    request may be retried."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the state was damaged during the turn ({reason}); the turn was rolled back to the "
            "intact state before it",
            status=500,
            kind="server_error",
            code="state_damaged",
        )


class NotReady(LatentdError):
    """The server is not ready, for the reason named by the code."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message, status=503, kind="server_error", code=code)


class SessionDamaged(StorageFailed):
    """A session's stored state is damaged."""

    def __init__(self, session_id: str, turn: int, reason: str) -> None:
        super().__init__(
            f"the state of session {session_id} after turn {turn} is unusable ({reason}); an "
            "earlier turn may still be intact: rewind to it",
            503,
            "session_damaged",
        )
        self.headers.update(NO_RETRY)


class ResponseDamaged(StorageFailed):
    """A response's stored state is damaged."""

    def __init__(self, response_id: str, reason: str) -> None:
        super().__init__(
            f"the state after response {response_id} is unusable ({reason}); an earlier "
            "response may still be intact: continue from it",
            503,
            "response_damaged",
        )
        self.headers.update(NO_RETRY)


class IncompatibleState(LatentdError):
    """A blob is not a state of this server's model; the message names the difference."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message, status=422, kind="invalid_request_error", code="unfit_state", headers=NO_RETRY
        )


class InternalError(LatentdError):
    """An internal error."""

    def __init__(self, message: str = "internal server error; see the server's log") -> None:
        super().__init__(message, status=500, kind="server_error", code="internal_error")

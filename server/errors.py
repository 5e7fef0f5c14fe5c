"""Errors that a client sees, as facts; server/api renders them."""

NO_RETRY = {"x-should-retry": "false"}
"""Tells the official clients, which repeat many failed requests, not to repeat this one."""


class LatentdError(Exception):
    """An error with what OpenAI's error object needs."""

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
        """How a request that ends with it is counted."""
        return "server_error" if self.status >= 500 else "client_error"

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object."""
        facts = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": facts}


class InvalidRequest(LatentdError):
    """The request is wrong; the message says what would be right."""

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(
            message, status=status, kind="invalid_request_error", param=param, code=code
        )


class NeedsStream(InvalidRequest):
    """A parameter that has a meaning for streams only, in a request without one."""

    def __init__(self, param: str) -> None:
        super().__init__(f"{param} needs stream: true", param)


class NotFound(InvalidRequest):
    """What the request names does not exist."""

    def __init__(self, message: str, param: str | None, code: str) -> None:
        super().__init__(message, param, code, 404)


class Conflict(LatentdError):
    """What the request names is not in the state that it needs; repeating it would not help."""

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
    """The session is not at the turn that the request expects."""

    def __init__(self, session_id: str, turn: int, expected: int) -> None:
        super().__init__(
            f"session {session_id} is at turn {turn}, not at {expected}",
            "expected_turn",
            "turn_mismatch",
        )


class KeyReused(Conflict):
    """An Idempotency-Key came again with another request."""

    def __init__(self) -> None:
        super().__init__(
            "this Idempotency-Key belongs to an earlier turn with another request",
            "Idempotency-Key",
            "idempotency_key_reused",
        )


class ResponseGone(Conflict):
    """A response was deleted or cancelled while it was being made; nothing of it was stored."""

    def __init__(self, response_id: str) -> None:
        super().__init__(
            f"response {response_id} was deleted or cancelled before it was complete",
            "response_id",
            "response_gone",
        )


class Unauthorized(LatentdError):
    """The request has no key, or none that this server knows."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            status=401,
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class QuotaExceeded(LatentdError):
    """An owner has as many sessions, responses, or bytes of them, as one may have."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(
            message, status=429, kind="insufficient_quota", code=code, headers=NO_RETRY
        )


class RateLimited(LatentdError):
    """A caller, or all together, would use more than the limit that the code names."""

    def __init__(self, message: str, code: str, retry_after_s: int) -> None:
        super().__init__(
            message,
            status=429,
            kind="rate_limit_error",
            code=code,
            headers={"Retry-After": str(retry_after_s)},
        )


class Overloaded(LatentdError):
    """Too many requests, or too many tokens, wait already; the code tells which."""

    def __init__(self, message: str, code: str, retry_after_s: int = 1) -> None:
        super().__init__(
            message,
            status=429,
            kind="rate_limit_error",
            code=code,
            headers={"Retry-After": str(retry_after_s)},
        )


class Cancelled(LatentdError):
    """Somebody ended the turn on purpose."""

    def __init__(self) -> None:
        super().__init__(
            "the turn was cancelled", status=409, kind="conflict_error", code="cancelled"
        )

    @property
    def outcome(self) -> str:
        return "cancelled"


class EventsGone(LatentdError):
    """A stream has told more than is kept of it."""

    def __init__(self, stream_id: str, first: int) -> None:
        super().__init__(
            f"of stream {stream_id} only the events from {first} on are kept",
            status=410,
            kind="invalid_request_error",
            param="Last-Event-ID",
            code="events_gone",
            headers=NO_RETRY,
        )


class DeadlineExceeded(LatentdError):
    """The request did not end in time; repeating it would do the same work in vain."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"the request did not end within {timeout_s:g} seconds",
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
    """No new work is taken."""

    def __init__(self, message: str = "the server is shutting down") -> None:
        super().__init__(
            message,
            status=503,
            kind="server_error",
            code="shutting_down",
            headers={"Retry-After": "5"},
        )


class StorageFailed(LatentdError):
    """A session could not be written or read; it is as it was before the request."""

    def __init__(self, message: str, status: int = 503, code: str = "storage_failed") -> None:
        super().__init__(message, status=status, kind="server_error", code=code)


class StorageFull(StorageFailed):
    """The disk, or what the store may take of it, is full."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 507, "storage_full")
        self.headers.update(NO_RETRY)


class StateDamaged(LatentdError):
    """What a turn computed are no numbers any more. Nothing of it is kept, and the state that it
    began from is sound: the request may be repeated."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the state was damaged while the turn ran ({reason}); the turn was undone, and what "
            "it began from is as it was",
            status=500,
            kind="server_error",
            code="state_damaged",
        )


class NotReady(LatentdError):
    """Something of the server has to be mended; the code tells what."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message, status=503, kind="server_error", code=code)


class SessionDamaged(StorageFailed):
    """A state in the store is not what was put there."""

    def __init__(self, session_id: str, turn: int, reason: str) -> None:
        super().__init__(
            f"the state of session {session_id} after turn {turn} cannot be used ({reason}); an "
            "earlier turn may still be good: rewind to it",
            503,
            "session_damaged",
        )
        self.headers.update(NO_RETRY)


class ResponseDamaged(StorageFailed):
    """The state after a stored response is not what was put there."""

    def __init__(self, response_id: str, reason: str) -> None:
        super().__init__(
            f"the state after response {response_id} cannot be used ({reason}); an earlier "
            "response may still be good: continue from it",
            503,
            "response_damaged",
        )
        self.headers.update(NO_RETRY)


class UnfitState(LatentdError):
    """A blob that is not a state for this server; the message names what differs."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message, status=422, kind="invalid_request_error", code="unfit_state", headers=NO_RETRY
        )


class InternalError(LatentdError):
    """A fault of the server."""

    def __init__(self, message: str = "internal server error; see the server's log") -> None:
        super().__init__(message, status=500, kind="server_error", code="internal_error")

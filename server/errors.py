"""Errors that a client sees, as facts; server/api renders them."""


class LatentdError(Exception):
    """An error with what OpenAI's error object needs."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        """The error object's `type`."""
        self.param = param
        self.code = code
        self.headers = headers or {}

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
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(
            message, status=status, kind="invalid_request_error", param=param, code=code
        )


class NotFound(InvalidRequest):
    """What the request names does not exist."""

    def __init__(self, message: str, param: str | None, code: str) -> None:
        super().__init__(message, param, code, 404)


class SessionBusy(LatentdError):
    """Another turn of the session is running; official clients must not repeat the request."""

    def __init__(self, session_id: str) -> None:
        super().__init__(
            f"session {session_id} is busy with another turn",
            status=409,
            kind="conflict_error",
            param="session_id",
            code="session_busy",
            headers={"x-should-retry": "false"},
        )


class Overloaded(LatentdError):
    """Too many requests, or too many tokens, wait already; the code tells which."""

    def __init__(self, message: str, code: str = "queue_full") -> None:
        super().__init__(
            message,
            status=429,
            kind="rate_limit_error",
            code=code,
            headers={"Retry-After": "1"},
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
            headers={"x-should-retry": "false"},
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
    """A session could not be written or read; it is as it was before the turn."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=507, kind="server_error", code="storage_failed")


class InternalError(LatentdError):
    """A fault of the server."""

    def __init__(self, message: str = "the server failed; its log tells more") -> None:
        super().__init__(message, status=500, kind="server_error", code="internal_error")

"""HTTP client for a running server's sessions."""

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from server.api.schemas.chat import ChatChunk
from server.api.schemas.completions import Completion, CompletionChoice
from server.api.schemas.generation import Timings, Usage
from server.api.schemas.problems import ErrorResponse
from server.api.schemas.sessions import (
    Checkpoint,
    CheckpointList,
    Session,
    SessionDeleted,
    SessionList,
)

SESSIONS = "/v1/sessions"
PAGE = 100
"""Sessions per page."""

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DONE = b"[DONE]"
UNIX = "unix:"
"""Prefix of a server address that is the path of a Unix socket."""

TIMEOUT_S = 60.0
NOT_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
    UnicodeError,
)
"""Errors after which the server has certainly not received the request."""

StreamChunk = ChatChunk | Completion
EVENTS: TypeAdapter[StreamChunk | ErrorResponse] = TypeAdapter(StreamChunk | ErrorResponse)
ModelT = TypeVar("ModelT", bound=BaseModel)


class ClientError(Exception):
    """The request failed; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RefusedError(ClientError):
    """The server responded with an error; the message is the server's."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


class UnexpectedResponseError(ClientError):
    """The response is not from a latentd server."""


class UnfinishedError(ClientError):
    """The answer ended early: whether the turn was committed is unknown."""


@dataclass(frozen=True)
class Exported:
    """A session's state after a turn."""

    turn: int
    blob: bytes


@dataclass(frozen=True)
class TurnRequest:
    """A turn to run exactly once, however often the request is sent."""

    path: str
    """CHAT or COMPLETIONS."""

    body: Mapping[str, Any]
    key: str
    """The Idempotency-Key."""


@dataclass(frozen=True)
class TurnEnd:
    """A committed turn."""

    turn: int
    """The turn's number."""

    usage: Usage
    reason: Literal["stop", "length"] | None
    timings: Timings | None


class Client:
    """A connection to one server. Every method raises ClientError."""

    def __init__(self, url: str, key: str) -> None:
        """With an empty `key`, no Authorization header is sent."""
        if not key.isascii() or not key.isprintable():
            raise ClientError("a key must consist of printable ASCII characters")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url, transport = url, None
        if url.startswith(UNIX):
            transport, url = httpx.HTTPTransport(uds=url.removeprefix(UNIX)), "http://localhost"
        try:
            self._http = httpx.Client(
                base_url=url, headers=headers, timeout=TIMEOUT_S, transport=transport
            )
        except httpx.InvalidURL as error:
            raise ClientError(f"{url}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def sessions(self, limit: int | None) -> Iterator[Session]:
        """Newest first, at most `limit`, fetched page by page."""
        after, left = None, limit
        while left is None or left > 0:
            params = {"limit": str(PAGE if left is None else min(PAGE, left))}
            if after is not None:
                params["after"] = after
            page = self._parse(SessionList, self._request("GET", SESSIONS, params))
            yield from page.data
            if not page.has_more or not page.data:
                return
            after = page.data[-1].id
            left = None if left is None else left - len(page.data)

    def create(self) -> Session:
        """Create an empty session."""
        return self._parse(Session, self._request("POST", SESSIONS))

    def session(self, session_id: str) -> Session:
        return self._parse(Session, self._request("GET", _path(session_id)))

    def turns(self, session_id: str) -> list[Checkpoint]:
        """The session's checkpoints, newest first."""
        return self._parse(CheckpointList, self._request("GET", _path(session_id, "turns"))).data

    def export(self, session_id: str, turn: int | None) -> Exported:
        """Export the current state, or that after an earlier turn."""
        params = {} if turn is None else {"turn": str(turn)}
        response = self._request("GET", _path(session_id, "state"), params)
        turn_header = response.headers.get("x-session-turn", "")
        if not turn_header.isdecimal():
            raise self._unexpected(response)
        return Exported(int(turn_header), response.content)

    def import_state(self, blob: bytes, metadata: Mapping[str, str], ttl: float | None) -> Session:
        """Create a session from an exported blob."""
        params = {"metadata": json.dumps(metadata)} if metadata else {}
        if ttl is not None:
            params["ttl"] = str(ttl)
        response = self._request("POST", f"{SESSIONS}/import", params, blob=blob)
        return self._parse(Session, response)

    def fork(self, session_id: str, turn: int | None) -> Session:
        """Fork the session."""
        body = {} if turn is None else {"turn": turn}
        return self._parse(Session, self._request("POST", _path(session_id, "fork"), body=body))

    def rewind(self, session_id: str, turn: int) -> Session:
        body = {"turn": turn}
        return self._parse(Session, self._request("POST", _path(session_id, "rewind"), body=body))

    def delete(self, session_id: str) -> None:
        self._parse(SessionDeleted, self._request("DELETE", _path(session_id)))

    def run_turn(self, asked: TurnRequest) -> Generator[str | TurnEnd, None, None]:
        """Stream a turn: pieces of text, then its end.

        A turn that was already committed is replayed. Closing the iterator closes the connection,
        and the server rolls back a turn that is not finished. Raises UnfinishedError, RefusedError
        and, if the server has not received the request, ClientError.
        """
        headers = {"Idempotency-Key": asked.key}
        try:
            with self._http.stream(
                "POST", asked.path, json=asked.body, headers=headers
            ) as response:
                if not response.is_success:
                    response.read()
                    raise self._refusal(response)
                yield from self._pieces(response)
        except NOT_SENT as error:
            raise ClientError(self._reason(error)) from error
        except (httpx.HTTPError, UnexpectedResponseError) as error:
            raise UnfinishedError(self._reason(error)) from error

    def _pieces(self, response: httpx.Response) -> Iterator[str | TurnEnd]:
        """Yields the text of a stream's events, then the end of the turn."""
        turn, usage, reason, timings = None, None, None, None
        ended = False
        for data in event_data(response.iter_bytes()):
            if ended or data == DONE:
                ended = True  # drain the rest, so that the connection can be reused
                continue
            event = self._event(data, response)
            turn = turn if event.session_turn is None else event.session_turn
            usage, timings = event.usage or usage, event.timings or timings
            for choice in event.choices:
                reason = choice.finish_reason or reason
                text = choice.text if isinstance(choice, CompletionChoice) else choice.delta.content
                if text:
                    yield text
        if not ended:
            raise UnfinishedError(f"{self._url}: the answer ended early")
        if turn is None or usage is None:
            raise self._unexpected(response)
        yield TurnEnd(turn, usage, reason, timings)

    def _event(self, data: bytes, response: httpx.Response) -> StreamChunk:
        try:
            event = EVENTS.validate_json(data)
        except ValidationError as error:
            raise self._unexpected(response) from error
        if isinstance(event, ErrorResponse):
            raise UnfinishedError(event.error.message)
        return event

    def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: Any = None,
        blob: bytes | None = None,
    ) -> httpx.Response:
        """Send a request, `body` as JSON or `blob` as it is. Raises ClientError for error
        responses."""
        headers = {} if blob is None else {"Content-Type": "application/octet-stream"}
        try:
            response = self._http.request(
                method, path, params=params, json=body, content=blob, headers=headers
            )
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise ClientError(self._reason(error)) from error
        if not response.is_success:
            raise self._refusal(response)
        return response

    def _reason(self, error: Exception) -> str:
        """Why the request failed."""
        if isinstance(error, UnexpectedResponseError):
            return str(error)
        if isinstance(error, httpx.TimeoutException):
            return f"{self._url}: no response within {TIMEOUT_S:g} seconds"
        return f"{self._url}: {str(error) or type(error).__name__}"

    def _refusal(self, response: httpx.Response) -> RefusedError:
        error = self._parse(ErrorResponse, response).error
        return RefusedError(error.message, error.code)

    def _parse(self, kind: type[ModelT], response: httpx.Response) -> ModelT:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise self._unexpected(response) from error

    def _unexpected(self, response: httpx.Response) -> UnexpectedResponseError:
        return UnexpectedResponseError(
            f"{self._url}: the response (status {response.status_code}) is not from latentd"
        )


def event_data(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events that have one `data:` line each.

    Only a line feed ends a line: the data may contain other Unicode line separators.
    """
    begun = b""
    for chunk in chunks:
        *lines, begun = (begun + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _path(session_id: str, *rest: str) -> str:
    return "/".join([SESSIONS, quote(session_id, safe=""), *rest])

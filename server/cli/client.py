"""The sessions of a running server, over HTTP."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

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
"""Sessions that a server tells at once."""

TIMEOUT_S = 60.0
Answer = TypeVar("Answer", bound=BaseModel)


class ClientError(Exception):
    """There is no answer; one line says why."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RefusedError(ClientError):
    """The server's answer is an error; the message is the server's."""


@dataclass(frozen=True)
class Exported:
    """A session's state after this turn."""

    turn: int
    blob: bytes


class Client:
    """A connection to one server. Every call raises ClientError."""

    def __init__(self, url: str, key: str) -> None:
        """With an empty key, none is shown."""
        if not key.isascii() or not key.isprintable():
            raise ClientError("a key is made of printable ASCII characters")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = url
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)
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
        """Newest first, at most `limit`, asked for page by page."""
        after, left = None, limit
        while left is None or left > 0:
            params = {"limit": str(PAGE if left is None else min(PAGE, left))}
            if after is not None:
                params["after"] = after
            page = self._parse(SessionList, self._ask("GET", SESSIONS, params))
            yield from page.data
            if not page.has_more or not page.data:
                return
            after = page.data[-1].id
            left = None if left is None else left - len(page.data)

    def session(self, session_id: str) -> Session:
        return self._parse(Session, self._ask("GET", _path(session_id)))

    def turns(self, session_id: str) -> list[Checkpoint]:
        """The checkpoints kept, newest first."""
        return self._parse(CheckpointList, self._ask("GET", _path(session_id, "turns"))).data

    def export(self, session_id: str, turn: int | None) -> Exported:
        """The state now, or after an earlier turn."""
        params = {} if turn is None else {"turn": str(turn)}
        response = self._ask("GET", _path(session_id, "state"), params)
        told = response.headers.get("x-session-turn", "")
        if not told.isdecimal():
            raise self._strange(response)
        return Exported(int(told), response.content)

    def import_state(self, blob: bytes, metadata: Mapping[str, str], ttl: float | None) -> Session:
        """The session that goes on from the blob."""
        params = {"metadata": json.dumps(metadata)} if metadata else {}
        if ttl is not None:
            params["ttl"] = str(ttl)
        response = self._ask("POST", f"{SESSIONS}/import", params, blob=blob)
        return self._parse(Session, response)

    def fork(self, session_id: str, turn: int | None) -> Session:
        """The new session."""
        body = {} if turn is None else {"turn": turn}
        return self._parse(Session, self._ask("POST", _path(session_id, "fork"), body=body))

    def rewind(self, session_id: str, turn: int) -> Session:
        body = {"turn": turn}
        return self._parse(Session, self._ask("POST", _path(session_id, "rewind"), body=body))

    def delete(self, session_id: str) -> None:
        self._parse(SessionDeleted, self._ask("DELETE", _path(session_id)))

    def _ask(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: Any = None,
        blob: bytes | None = None,
    ) -> httpx.Response:
        """The answer, if it is no error. `body` is sent as JSON, a `blob` as it is."""
        headers = {} if blob is None else {"Content-Type": "application/octet-stream"}
        try:
            response = self._http.request(
                method, path, params=params, json=body, content=blob, headers=headers
            )
        except httpx.TimeoutException as error:
            raise ClientError(f"{self._url}: no answer within {TIMEOUT_S:g} seconds") from error
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            reason = str(error) or type(error).__name__
            raise ClientError(f"{self._url}: {reason}") from error
        if not response.is_success:
            raise RefusedError(self._parse(ErrorResponse, response).error.message)
        return response

    def _parse(self, kind: type[Answer], response: httpx.Response) -> Answer:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise self._strange(response) from error

    def _strange(self, response: httpx.Response) -> ClientError:
        return ClientError(
            f"{self._url}: the answer, of status {response.status_code}, is not one of latentd"
        )


def _path(session_id: str, *rest: str) -> str:
    return "/".join([SESSIONS, quote(session_id, safe=""), *rest])

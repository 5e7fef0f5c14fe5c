"""A client's sessions and stored responses on a server, without ids and times."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx


class Refused(Exception):
    """The server rejected a valid request."""


@dataclass(frozen=True)
class SeenSession:
    turn: int
    tokens: int
    num_checkpoints: int
    checkpoints: tuple[tuple[int, int, int], ...]
    """Turn, tokens and bytes of each."""

    parent_turn: int | None
    status: str


@dataclass(frozen=True)
class SeenResponse:
    status: str
    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    turn: int = 1
    """Turn of a session that starts from it."""

    @property
    def has_state(self) -> bool:
        """Whether it can be continued."""
        return self.status in ("completed", "incomplete")


INTERRUPTED = SeenResponse("failed", "", error="server_error")
"""A background response whose server was killed."""

World = dict[str, SeenSession | SeenResponse]
"""A client's objects, by name."""

Verdict = Literal["as acknowledged", "committed", "lost", "half applied"]


@dataclass(frozen=True)
class Listed:
    """A listed session, with the content of its metadata."""

    id: str
    client: int
    life: int
    name: str
    facts: dict[str, Any]


def judge(before: World, after: World, seen: World) -> Verdict:
    """The outcome of a step; `after` equals `before` if none was in flight."""
    if seen == before:
        return "as acknowledged"
    if seen == after:
        return "committed"
    for name in before.keys() & after.keys():
        if name not in seen or seen[name].turn < min(before[name].turn, after[name].turn):
            return "lost"
    return "half applied"


async def list_sessions(http: httpx.AsyncClient) -> list[Listed]:
    """All sessions of the server."""
    found: list[Listed] = []
    page: dict[str, Any] = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {} if page["last_id"] is None else {"after": page["last_id"]}
        page = check(await http.get("/v1/sessions", params={"limit": 100} | after)).json()
        for facts in page["data"]:
            notes = facts["metadata"]
            listed = Listed(
                facts["id"], int(notes["client"]), int(notes["life"]), notes["name"], facts
            )
            found.append(listed)
    return found


async def look_at_sessions(
    http: httpx.AsyncClient, sessions: Sequence[Listed], life: int
) -> dict[str, SeenSession]:
    """A client's sessions; one of another life of the client gets a different name."""
    world = dict[str, SeenSession]()
    for session in sessions:
        response = check(await http.get(f"/v1/sessions/{session.id}/turns"))
        facts, kept = session.facts, response.json()["data"]
        name = session.name if session.life == life else f"{session.name} of life {session.life}"
        world[name] = SeenSession(
            turn=facts["turn"],
            tokens=facts["tokens"],
            num_checkpoints=facts["checkpoints"],
            checkpoints=tuple((c["turn"], c["tokens"], c["bytes"]) for c in kept),
            parent_turn=None if facts["parent"] is None else facts["parent"]["turn"],
            status=facts["status"],
        )
    return world


async def look_at_responses(http: httpx.AsyncClient, ids: Mapping[str, str]) -> World:
    """The existing ones of these responses, by name."""
    world = World()
    for name, response_id in ids.items():
        response = await http.get(f"/v1/responses/{response_id}")
        if response.status_code != 404:
            world[name] = seen_response(check(response).json())
    return world


def seen_response(found: Any) -> SeenResponse:
    """Parses a response object."""
    texts = [part["text"] for item in found["output"] for part in item["content"]]
    usage = found["usage"] or {"input_tokens": 0, "output_tokens": 0}
    return SeenResponse(
        status=found["status"],
        text="".join(texts),
        prompt_tokens=usage["input_tokens"],
        completion_tokens=usage["output_tokens"],
        error=None if found["error"] is None else found["error"]["code"],
    )


async def state_digest(http: httpx.AsyncClient, session_id: str) -> str:
    """Digest of an exported state: its header's metadata in any order, and its bits."""
    response = await http.get(f"/v1/sessions/{session_id}/state")
    if response.status_code == 404:
        return "nothing"  # before the first turn
    blob = check(response).content
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.dumps(json.loads(blob[8:end]), sort_keys=True)
    return hashlib.sha256(header.encode() + blob[end:]).hexdigest()


async def response_digest(http: httpx.AsyncClient, response_id: str, notes: dict[str, str]) -> str:
    """`state_digest` of a session that starts from the response, and is deleted at once."""
    body = {"response_id": response_id, "metadata": notes}
    response = await http.post("/v1/sessions", json=body)
    if response.status_code == 400 and response.json()["error"]["code"] == "response_unusable":
        return "nothing"
    session_id = check(response).json()["id"]
    try:
        return await state_digest(http, session_id)
    finally:
        check(await http.delete(f"/v1/sessions/{session_id}"))


def check(response: httpx.Response) -> httpx.Response:
    """The response. Raises Refused if it is an error."""
    if not response.is_success:
        raise Refused(f"{response.status_code}: {response.text}")
    return response

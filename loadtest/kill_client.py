"""A client that takes the steps of a script, and sees whatever a session shows to its owner."""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from loadtest.kill_scripts import Create, Delete, Fork, Rewind, Step, Take


class Refused(Exception):
    """The server did not do what it should have done."""


@dataclass(frozen=True)
class Answer:
    """What a turn says, but for what depends on caches and on the hour."""

    text: str
    finish_reason: str | None
    session_turn: int | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Seen:
    """A session as the API shows it, but for its id and the hours."""

    turn: int
    tokens: int
    num_checkpoints: int
    checkpoints: tuple[tuple[int, int, int], ...]
    """Turn, tokens and bytes of each."""

    parent_turn: int | None
    status: str


World = dict[str, Seen]
"""A client's sessions by name."""


@dataclass(frozen=True)
class Listed:
    """A session of the list, with what its metadata tell."""

    id: str
    client: int
    life: int
    name: str
    facts: dict[str, Any]


class Client:
    """Takes steps. Raises Refused, and httpx.TransportError when the server dies."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.life = 0
        """How often it has come to the end of its script."""

        self.ids: dict[str, str] = {}
        """Of its sessions, by name."""

        self.on_last_token: Callable[[], object] = lambda: None
        """Called when a stream shows its last token, before its end."""

        self.phase = ""
        """Where the running step is, as far as can be seen from here."""

        self.text = ""
        """What the running turn has said so far."""

        self.replayed = False
        """Whether the last turn's answer was one that the server had kept."""

    async def take(self, http: httpx.AsyncClient, step: Step, key: str) -> Answer | None:
        """Take a step; a turn has an answer."""
        self.phase, self.text, self.replayed = type(step).__name__.lower(), "", False
        match step:
            case Create(name):
                body: dict[str, Any] = {"metadata": self._metadata(name)}
                self.ids[name] = (await self._post(http, "/v1/sessions", body))["id"]
            case Fork(name, source, turn):
                path = f"/v1/sessions/{self.ids[source]}/fork"
                body = {"turn": turn, "metadata": self._metadata(name)}
                self.ids[name] = (await self._post(http, path, body))["id"]
            case Rewind(name, turn):
                await self._post(http, f"/v1/sessions/{self.ids[name]}/rewind", {"turn": turn})
            case Delete(name):
                _check(await http.delete(f"/v1/sessions/{self.ids[name]}"))
                del self.ids[name]
            case Take():
                return await self._turn(http, step, key)
        return None

    async def _turn(self, http: httpx.AsyncClient, step: Take, key: str) -> Answer:
        body = {"session_id": self.ids[step.name], "expected_turn": step.turn} | step.body
        request = http.build_request(
            "POST", "/v1/completions", json=body, headers={"Idempotency-Key": key}
        )
        is_stream = bool(step.body.get("stream"))
        self.phase = "prefill" if is_stream else "turn in one piece"
        response = await http.send(request, stream=True)
        try:
            if response.status_code != 200:
                await response.aread()
            _check(response)
            self.replayed = response.headers.get("Idempotent-Replayed") == "true"
            if not is_stream:
                return _answer(json.loads(await response.aread()))
            return await self._read(response, step.body["max_tokens"])
        finally:
            await response.aclose()

    async def _read(self, response: httpx.Response, max_tokens: int) -> Answer:
        """A stream. The event with a reason acknowledges the turn, whatever happens after it."""
        answer = None
        try:
            async for event in _events(response):
                self.text += event["choices"][0]["text"]
                self.phase = "decode"
                if event["choices"][0]["finish_reason"] is not None:
                    answer = _answer(event, self.text)
                elif event["usage"]["completion_tokens"] == max_tokens:
                    self.phase = "commit"
                    self.on_last_token()
        except httpx.TransportError:
            if answer is None:
                raise
        if answer is None:
            raise Refused("the stream ended without a reason")
        return answer

    async def _post(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
        return _check(await http.post(path, json=body)).json()

    def _metadata(self, name: str) -> dict[str, str]:
        return {"client": f"{self.number}", "life": f"{self.life}", "name": name}


async def list_sessions(http: httpx.AsyncClient) -> list[Listed]:
    """All that the server has."""
    found: list[Listed] = []
    page: dict[str, Any] = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {} if page["last_id"] is None else {"after": page["last_id"]}
        page = _check(await http.get("/v1/sessions", params={"limit": 100} | after)).json()
        for facts in page["data"]:
            told = facts["metadata"]
            listed = Listed(
                facts["id"], int(told["client"]), int(told["life"]), told["name"], facts
            )
            found.append(listed)
    return found


async def look(http: httpx.AsyncClient, sessions: Sequence[Listed], life: int) -> World:
    """What a client's sessions are; one of another life of the client gets a name of its own."""
    world = World()
    for session in sessions:
        response = _check(await http.get(f"/v1/sessions/{session.id}/turns"))
        facts, kept = session.facts, response.json()["data"]
        name = session.name if session.life == life else f"{session.name} of life {session.life}"
        world[name] = Seen(
            turn=facts["turn"],
            tokens=facts["tokens"],
            num_checkpoints=facts["checkpoints"],
            checkpoints=tuple((c["turn"], c["tokens"], c["bytes"]) for c in kept),
            parent_turn=None if facts["parent"] is None else facts["parent"]["turn"],
            status=facts["status"],
        )
    return world


async def state_digest(http: httpx.AsyncClient, session_id: str) -> str:
    """Digest of an exported state: the facts of its header, whatever their order, and its bits."""
    response = await http.get(f"/v1/sessions/{session_id}/state")
    if response.status_code == 404:
        return "nothing"  # before the first turn
    blob = _check(response).content
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.dumps(json.loads(blob[8:end]), sort_keys=True)
    return hashlib.sha256(header.encode() + blob[end:]).hexdigest()


async def _events(response: httpx.Response) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Refused(f"{event['error']}")
            yield event


def _answer(completion: Any, text: str | None = None) -> Answer:
    choice, usage = completion["choices"][0], completion["usage"]
    return Answer(
        text=choice["text"] if text is None else text,
        finish_reason=choice["finish_reason"],
        session_turn=completion["session_turn"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )


def _check(response: httpx.Response) -> httpx.Response:
    if not response.is_success:
        raise Refused(f"{response.status_code}: {response.text}")
    return response

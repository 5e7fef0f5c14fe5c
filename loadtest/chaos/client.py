"""A client that runs the steps of a script."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.chaos.look import Refused, SeenResponse, check, seen_response
from loadtest.chaos.scripts import (
    Begin,
    Create,
    Delete,
    Erase,
    Fork,
    Respond,
    Rewind,
    ScriptedTurn,
    Step,
)

POLL_S = 0.02
"""Seconds between polls of a background response."""


@dataclass(frozen=True)
class TurnResult:
    """Result of a turn, without what depends on caches and times."""

    text: str
    finish_reason: str | None
    session_turn: int | None
    prompt_tokens: int
    completion_tokens: int
    id: str = field(compare=False)


class Client:
    """Runs steps. Raises Refused, and httpx.TransportError when the server dies."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.life = 0
        """Number of times the script was completed."""

        self.sessions: dict[str, str] = {}
        """Ids by name."""

        self.responses: dict[str, str] = {}
        """Ids by name, including one whose end was not received."""

        self.erased: list[str] = []
        """Ids of responses that must no longer exist."""

        self.on_last_token: Callable[[], object] = lambda: None
        """Called when a stream shows its last token, before its end."""

        self.phase = ""
        """Phase of the running step, as far as it is visible to the client."""

        self.text = ""
        """Text of the running step's answer so far."""

        self.is_created = False
        """Whether the running step's background response has been acknowledged."""

        self.replayed = False
        """Whether the last turn's answer was replayed by the server."""

    async def run(
        self, http: httpx.AsyncClient, step: Step, key: str
    ) -> TurnResult | SeenResponse | None:
        """Run a step; turns and responses have a result."""
        self.phase, self.text = type(step).__name__.lower(), ""
        self.replayed = self.is_created = False
        match step:
            case Create(name):
                await self._create(http, name, "/v1/sessions", {})
            case Fork(name, source, turn):
                path = f"/v1/sessions/{self.sessions[source]}/fork"
                await self._create(http, name, path, {"turn": turn})
            case Begin(name, response):
                body = {"response_id": self.responses[response]}
                await self._create(http, name, "/v1/sessions", body)
            case Rewind(name, turn):
                await self._post(http, f"/v1/sessions/{self.sessions[name]}/rewind", {"turn": turn})
            case Delete(name):
                check(await http.delete(f"/v1/sessions/{self.sessions[name]}"))
                del self.sessions[name]
            case Erase(name):
                check(await http.delete(f"/v1/responses/{self.responses[name]}"))
                self.erased.append(self.responses.pop(name))
            case ScriptedTurn():
                return await self._turn(http, step, key)
            case Respond():
                return await self._respond(http, step)
        return None

    def notes(self, name: str) -> dict[str, str]:
        """Metadata of the object with this name."""
        return {"client": f"{self.number}", "life": f"{self.life}", "name": name}

    async def _create(
        self, http: httpx.AsyncClient, name: str, path: str, body: dict[str, Any]
    ) -> None:
        created = await self._post(http, path, body | {"metadata": self.notes(name)})
        self.sessions[name] = created["id"]

    async def _turn(self, http: httpx.AsyncClient, step: ScriptedTurn, key: str) -> TurnResult:
        body = {"session_id": self.sessions[step.name], "expected_turn": step.turn} | step.body
        is_stream = bool(step.body.get("stream"))
        self.phase = "prefill" if is_stream else "turn in one piece"
        headers = {"Idempotency-Key": key}
        async with http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
            check(response)
            self.replayed = response.headers.get("Idempotent-Replayed") == "true"
            if not is_stream:
                return _answer(json.loads(await response.aread()))
            return await self._read_turn(response, step.body["max_tokens"])

    async def _read_turn(self, response: httpx.Response, max_tokens: int) -> TurnResult:
        """Read a stream. The event with a finish reason acknowledges the turn, whatever happens
        afterwards."""
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

    async def _respond(self, http: httpx.AsyncClient, step: Respond) -> SeenResponse:
        body = step.body | {"metadata": self.notes(step.name)}
        if step.previous is not None:
            body["previous_response_id"] = self.responses[step.previous]
        if step.body.get("stream"):
            found = await self._stream_response(http, step, body)
        else:
            self.phase = "background creation" if step.is_background else "response in one piece"
            found = await self._post(http, "/v1/responses", body)
            self._note_created(step, found["id"])
        path = f"/v1/responses/{self.responses[step.name]}"
        if step.is_cancelled:
            self.phase = "cancel"
            found = await self._post(http, f"{path}/cancel", {})
        while found["status"] == "in_progress":
            await asyncio.sleep(POLL_S)
            found = check(await http.get(path)).json()
        return seen_response(found)

    async def _stream_response(
        self, http: httpx.AsyncClient, step: Respond, body: dict[str, Any]
    ) -> Any:
        """The response in its last event; of one to be cancelled, after the first text."""
        where = "background" if step.is_background else "response"
        self.phase = f"{where} prefill"
        found, num_tokens = None, 0
        async with http.stream("POST", "/v1/responses", json=body) as response:
            if response.status_code != 200:
                await response.aread()
            check(response)
            try:
                async for event in _events(response):
                    if event["type"] == "response.created":
                        self._note_created(step, event["response"]["id"])
                    elif event["type"] == "response.output_text.delta":
                        self.phase = f"{where} decode"
                        self.text += event["delta"]
                        num_tokens += len(event["logprobs"])
                        if step.is_cancelled:
                            return {"status": "in_progress"}
                        if num_tokens == step.body["max_output_tokens"]:
                            self.phase = f"{where} commit"
                            self.on_last_token()
                    elif event["type"] in ("response.completed", "response.incomplete"):
                        found = event["response"]
            except httpx.TransportError:
                if found is None:
                    raise
        if found is None:
            raise Refused("the stream ended without a response")
        if seen_response(found).text != self.text:
            raise Refused(f"the stream said {self.text!r}, its end {found}")
        return found

    def _note_created(self, step: Respond, response_id: str) -> None:
        self.responses[step.name] = response_id
        if step.is_background:
            self.is_created, self.phase = True, "background"

    async def _post(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
        return check(await http.post(path, json=body)).json()


async def _events(response: httpx.Response) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Refused(f"{event['error']}")
            yield event


def _answer(completion: Any, text: str | None = None) -> TurnResult:
    choice, usage = completion["choices"][0], completion["usage"]
    return TurnResult(
        text=choice["text"] if text is None else text,
        finish_reason=choice["finish_reason"],
        session_turn=completion["session_turn"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        id=completion["id"],
    )

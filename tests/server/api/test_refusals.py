"""Every rejection is a status, before any header of a stream is sent.

Then nothing is held or stored, and no stream begins; also in the background.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server.api.refusals import BY_STATUS
from tests.server.api.chats import STRICT, make_checkpoint
from tests.server.api.test_store_failures import broken_disk
from tests.server.live import LiveServer, live_server, tiny_settings

MESSAGES = [{"role": "user", "content": "the cat"}]
ENDLESS = {"prompt": [5], "max_tokens": 60_000, "ignore_eos": True, "stream": True}
KEY = {"Authorization": "Bearer alpha", "Idempotency-Key": "key-1"}
LIMITED = {"api_key": ("alpha",)}


@dataclass(frozen=True)
class World:
    """A server with a session with one turn, and a response."""

    server: LiveServer
    client: httpx.Client
    session_id: str
    response_id: str

    def requests(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """One request of each kind that runs a turn."""
        turn = {"session_id": self.session_id, "max_tokens": 2, "stream": True}
        completion = turn | {"prompt": [5, 6, 7, 8]}
        response: dict[str, Any] = {"input": "the cat", "previous_response_id": self.response_id}
        response |= {"max_output_tokens": 2}
        return {
            "completion": ("/v1/completions", completion),
            "resumable": ("/v1/completions", completion | {"resumable": True}),
            "chat": ("/v1/chat/completions", turn | {"messages": MESSAGES}),
            "response": ("/v1/responses", response | {"stream": True}),
            "background": ("/v1/responses", response | {"background": True}),
            "followed": ("/v1/responses", response | {"background": True, "stream": True}),
            "session": ("/v1/sessions", {"prompt": [5, 6, 7, 8]}),
        }

    def held(self) -> dict[str, Any]:
        """All resources that a turn acquires, or leaves behind."""
        service = self.server.service
        return {
            "stored": service.ledger._store.total,
            "busy": set(service.ledger._open),
            "streams": set(service.streams._streams),
            "space": dict(service.streams._running),
            "running": dict(service.limiter._running),
            "reserved": len(service.ledger._quota._reserved),
            "turns": len(service.open_turns._turns),
        }

    @contextmanager
    def endless(self, **changes: object) -> Iterator[None]:
        """A turn that runs, or waits if none can run."""
        with self.server.client() as other:
            other.headers.update(self.client.headers)
            with other.stream("POST", "/v1/completions", json=ENDLESS | changes) as response:
                assert response.status_code == 200
                yield


Meanwhile = Callable[[World], AbstractContextManager[object]]


@contextmanager
def full(world: World, num_tokens: int = 1) -> Iterator[None]:
    """The only row is in use, and `num_tokens` tokens wait."""
    with world.endless():
        world.server.wait_until_running(1)
        with world.endless(prompt=[5] * num_tokens):
            yield


@contextmanager
def draining(world: World) -> Iterator[None]:
    world.server.service.draining.set()
    try:
        yield
    finally:
        world.server.service.draining.clear()


def quota(**most: int) -> Meanwhile:
    @contextmanager
    def within(world: World) -> Iterator[None]:
        quota = world.server.service.ledger._quota
        before = quota._quotas
        quota._quotas = replace(before, **most)
        try:
            yield
        finally:
            quota._quotas = before

    return within


@contextmanager
def damaged(world: World) -> Iterator[None]:
    async def load(entry_id: str, turn: int) -> bytes:
        del entry_id, turn
        return b"no state"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.server.service.ledger._store, "load", load)
        yield


def used(path: str, body: dict[str, Any]) -> Meanwhile:
    """Another request came first."""

    def before(world: World) -> AbstractContextManager[object]:
        own = body | {name: world.session_id for name in body if name == "session_id"}
        response = world.client.post(path, json=own, headers=KEY)
        assert response.status_code == 200, response.text
        return nullcontext()

    return before


TURNS = ("completion", "resumable", "chat")
RESPONSES = ("response", "background", "followed")
DETACHED = ("resumable", "background", "followed")
CHATS = ("chat", *RESPONSES)
ALL = (*TURNS, *RESPONSES, "session")


@dataclass(frozen=True)
class Refusal:
    status: int
    code: str
    of: tuple[str, ...]
    meanwhile: Meanwhile = nullcontext
    changes: dict[str, Any] = field(default_factory=dict)
    """Applies to bodies with these parameters."""

    settings: dict[str, Any] = field(default_factory=dict)


LONG = {
    "prompt": [5] * 61,
    "messages": [{"role": "user", "content": "xy" * 61}],
    "input": "xy" * 61,
}
NO = {"messages": [{"role": "user", "content": "no"}], "input": "no"}
UNCACHED = {"host_cache_bytes": 0, "warm_sessions": 0}
NARROW = {"max_running": 1, "warm_sessions": 0}
REFUSALS = [
    Refusal(400, "context_length_exceeded", ALL, changes=LONG, settings={"max_prompt_tokens": 60}),
    Refusal(400, "invalid_value", ("completion", "session"), changes={"prompt": [10**6]}),
    Refusal(400, "invalid_value", CHATS, changes=NO),
    Refusal(404, "session_not_found", TURNS, changes={"session_id": "sess_none"}),
    Refusal(404, "response_not_found", RESPONSES, changes={"previous_response_id": "resp_none"}),
    Refusal(404, "model_not_found", (*TURNS, *RESPONSES), changes={"model": "other"}),
    Refusal(409, "session_busy", TURNS, lambda w: w.endless(session_id=w.session_id)),
    Refusal(409, "turn_mismatch", TURNS, changes={"expected_turn": 9}),
    Refusal(
        409,
        "idempotency_key_reused",
        TURNS,
        used("/v1/completions", {"prompt": [9], "max_tokens": 1, "session_id": ""}),
    ),
    Refusal(
        429, "concurrent_requests", ALL, World.endless, settings={"key_concurrent_requests": 1}
    ),
    Refusal(429, "requests_per_minute", ALL, settings={"key_requests_per_minute": 2}),
    Refusal(
        429,
        "tokens_per_minute",
        ALL,
        used("/v1/completions", {"prompt": [5] * 80, "max_tokens": 99, "ignore_eos": True}),
        settings={"key_tokens_per_minute": 150},
    ),
    Refusal(429, "queue_full", ALL, full, settings=NARROW | {"max_waiting": 1}),
    Refusal(
        429,
        "queue_tokens_full",
        ALL,
        lambda w: full(w, num_tokens=57),
        settings=NARROW | {"max_waiting_tokens": 60},
    ),
    Refusal(429, "too_many_streams", DETACHED, settings={"max_resumable_streams": 0}),
    Refusal(429, "session_bytes_quota_exceeded", ALL, quota(bytes_per_owner=1)),
    Refusal(429, "response_quota_exceeded", RESPONSES, quota(responses_per_owner=1)),
    Refusal(429, "session_quota_exceeded", ("session",), quota(sessions_per_owner=1)),
    Refusal(503, "shutting_down", ALL, draining),
    Refusal(503, "storage_failed", ALL, lambda w: broken_disk(w.server)),
    Refusal(503, "session_damaged", TURNS, damaged, settings=UNCACHED),
    Refusal(503, "response_damaged", RESPONSES, damaged, settings=UNCACHED),
    Refusal(507, "storage_full", ALL, quota(bytes=1)),
    Refusal(507, "storage_full", ("session",), quota(sessions=1)),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveServer]]:
    """A server with these settings, shared between tests."""
    folder = make_checkpoint(tmp_path_factory.mktemp("chat") / "model", STRICT)
    running = dict[str, LiveServer]()
    with ExitStack() as stack:

        def start(**changes: object) -> LiveServer:
            name = json.dumps(changes, sort_keys=True)
            if name not in running:
                data = tmp_path_factory.mktemp("data")
                settings = tiny_settings(folder, data, **LIMITED, **changes)
                running[name] = stack.enter_context(live_server(settings))
            return running[name]

        yield start


@pytest.fixture(autouse=True)
def no_minute_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = SimpleNamespace(time=lambda: 90.0)
    monkeypatch.setattr("limits.aio.storage.memory.time", stopped)


@contextmanager
def world(server: LiveServer) -> Iterator[World]:
    with server.client() as client:
        client.headers.update({"Authorization": KEY["Authorization"]})
        session_id = client.post("/v1/sessions").json()["id"]
        turn = {"prompt": [5], "max_tokens": 1, "session_id": session_id}
        assert client.post("/v1/completions", json=turn).status_code == 200
        made = client.post("/v1/responses", json={"input": "a", "max_output_tokens": 1})
        assert made.status_code == 200, made.text
        server.wait_until_idle()
        yield World(server, client, session_id, made.json()["id"])
    server.wait_until_idle()


@pytest.mark.long
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: f"{r.status}-{r.code}-{r.of[0]}")
def test_a_refusal_is_a_status(start: Callable[..., LiveServer], refusal: Refusal) -> None:
    with world(start(**refusal.settings)) as w, refusal.meanwhile(w):
        for name in refusal.of:
            path, body = w.requests()[name]
            own = set(body) | {"model", "expected_turn"}
            body |= {param: to for param, to in refusal.changes.items() if param in own}
            headers = KEY if name in TURNS else {}
            before = w.held()
            response = w.client.post(path, json=body, headers=headers)
            assert response.headers["content-type"] == "application/json", (name, response.text)
            found = response.status_code, response.json()["error"]["code"]
            assert found == (refusal.status, refusal.code), (name, response.text)
            assert "X-Stream-ID" not in response.headers
            assert w.held() == before, name


def test_nothing_else_refuses_these_requests(start: Callable[..., LiveServer]) -> None:
    with world(start()) as w:
        for name, (path, body) in w.requests().items():
            response = w.client.post(path, json=body)
            assert response.status_code in (200, 201), (name, response.text)


def test_a_response_in_the_background_is_stored_before_it_is_answered(
    start: Callable[..., LiveServer],
) -> None:
    """If that fails, its turn does not start."""
    with world(start()) as w:
        body = {"input": "the cat", "background": True}
        before = w.held()
        with broken_disk(w.server):  # nothing earlier needs it
            for streamed in (False, True):
                answer = w.client.post("/v1/responses", json=body | {"stream": streamed})
                assert answer.status_code == 503, answer.text
                assert answer.json()["error"]["code"] == "storage_failed"
        w.server.wait_until_idle()
        assert w.held() == before


def test_every_status_of_a_turn_is_tried() -> None:
    later, elsewhere = {500, 504}, {401, 408, 410, 413, 415, 422}
    assert {refusal.status for refusal in REFUSALS} == set(BY_STATUS) - later - elsewhere

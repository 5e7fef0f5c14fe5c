"""Bodies of requests that do not run yet take a bounded amount of memory, which keys share."""

import gzip
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.held import HeldBytes, Hold
from server.errors import Overloaded
from tests.patience import PATIENCE_S, wait_until
from tests.server.api.chats import make_checkpoint
from tests.server.live import LiveServer, live_server, tiny_settings

ONE, OTHER = "key-of-one", "key-of-the-other"
BODY = 300_000


@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 700), st.booleans()),
        max_size=60,
    )
)
def test_owners_share_what_may_be_held(calls: list[tuple[str, int, bool]]) -> None:
    """One alone has all; nobody is refused within a third; what is released is there again."""
    held, holds = HeldBytes(1000), list[tuple[Hold, str, int]]()
    for owner, count, releases in calls:
        if releases and holds:
            hold, *_ = holds.pop(0)
            hold.release()
            hold.release()
        own = sum(size for _, each, size in holds if each == owner)
        total = sum(size for *_, size in holds)
        assert held.of(owner) == own
        hold = Hold(held, owner)
        is_refused = False
        try:
            hold.add(count)
        except Overloaded:
            is_refused = True
        else:
            holds.append((hold, owner, count))
        if is_refused:
            assert total + count > 1000
            assert own + count > 333
        else:
            assert own + count <= 1000 or not total


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("held")
    settings = tiny_settings(
        make_checkpoint(folder),
        folder / "data",
        api_key=(ONE, OTHER),
        max_running=1,
        warm_sessions=0,
        max_held_bytes=1 << 20,
        max_body_bytes=1 << 20,
        max_prompt_tokens=1 << 20,
        request_timeout_s=PATIENCE_S,
    )
    with live_server(settings) as server:
        yield server


@contextmanager
def streams(live: LiveServer, key: str, count: int, **asked: object) -> Iterator[None]:
    """While the block runs, so many streams are there whose requests have BODY bytes."""
    body = json.dumps({"prompt": [5], "stream": True, "ignore_eos": True} | asked)
    with ExitStack() as stack:
        client = stack.enter_context(live.client())
        for _ in range(count):
            answer = client.stream("POST", "/v1/completions", content=padded(body), headers=of(key))
            assert stack.enter_context(answer).status_code == 200
        yield


def padded(body: str) -> bytes:
    return body.ljust(BODY).encode()


def of(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


def tried(live: LiveServer, key: str, content: bytes) -> int:
    """The status of a request with this body."""
    with live.client() as client:
        return client.post("/v1/completions", content=content, headers=of(key)).status_code


SHORT = json.dumps({"prompt": [5], "max_tokens": 1})
FULL = "only 1048576 may (--max-held-bytes)"


@pytest.mark.parametrize("kind", ["whole", "in parts", "packed"])
def test_waiting_bodies_are_bounded_and_others_have_their_share(
    live: LiveServer, kind: str
) -> None:
    contents: dict[str, bytes | Iterator[bytes]] = {
        "whole": padded(SHORT),
        "in parts": iter([padded(SHORT)]),
        "packed": gzip.compress(padded(SHORT)),
    }
    with streams(live, ONE, 1, max_tokens=60_000):
        wait_until(lambda: live.num_waiting() == 0)
        with streams(live, ONE, 3, max_tokens=1):
            with live.client() as client:
                headers = of(ONE) | ({"Content-Encoding": "gzip"} if kind == "packed" else {})
                answer = client.post("/v1/completions", content=contents[kind], headers=headers)
            assert answer.status_code == 429
            assert answer.json()["error"]["code"] == "held_bytes_full"
            assert FULL in answer.json()["error"]["message"]
            assert answer.headers["Retry-After"]
            with streams(live, OTHER, 1, max_tokens=1):
                pass
        wait_until(lambda: live.num_waiting() == 0)
        with streams(live, ONE, 3, max_tokens=1):  # those before have gone away
            pass
    live.wait_until_idle()
    with streams(live, ONE, 1, max_tokens=60_000), streams(live, OTHER, 3, max_tokens=1):
        pass


def test_what_runs_and_what_was_refused_holds_nothing(live: LiveServer) -> None:
    for _ in range(5):
        assert tried(live, ONE, padded(SHORT)) == 200
        assert tried(live, ONE, padded("{}")) == 400
        assert tried(live, ONE, padded("nothing")) == 400
    with streams(live, ONE, 1, max_tokens=60_000), streams(live, ONE, 3, max_tokens=1):
        pass


def test_one_body_may_always_come(live: LiveServer) -> None:
    live.wait_until_idle()
    assert tried(live, ONE, SHORT.ljust(1 << 20).encode()) == 200

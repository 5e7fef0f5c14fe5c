"""Limits: what is rejected, until when, and what responses report; with a simulated clock."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.auth import Caller
from server.api.limits import Limiter
from server.errors import InvalidRequest, RateLimited
from server.keys import Limits
from server.settings import Settings
from tests.patience import PATIENCE_S, wait_until
from tests.server.api.calls import BODY, complete, send
from tests.server.api.chats import make_checkpoint
from tests.server.api.test_operations import sample
from tests.server.live import LiveServer, live_server, tiny_settings

HALF_PAST = 90.0
"""A time in the middle of a minute."""


class Clock:
    def __init__(self) -> None:
        self.now = HALF_PAST

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replaces the library's clock."""
    clock = Clock()
    monkeypatch.setattr("limits.aio.storage.memory.time", SimpleNamespace(time=clock.time))
    return clock


def limiter(**changes: int) -> Limiter:
    return Limiter(Settings.model_validate(changes))


def caller(owner: str = "key_a", **limits: int) -> Caller:
    return Caller(owner, limits=Limits(**limits))


async def use(limits: Limiter, who: Caller, num_tokens: int = 1, num_generated: int = 0) -> None:
    """A complete request."""
    allowance = limits.enter(who)
    try:
        await allowance.check(num_tokens)
        await allowance.charge(num_tokens)
        await allowance.leave(num_generated)
    finally:
        await allowance.leave(0)


async def refusal(limits: Limiter, who: Caller, num_tokens: int = 1) -> tuple[str | None, int]:
    """Code and Retry-After."""
    with pytest.raises(RateLimited) as caught:
        await use(limits, who, num_tokens)
    assert caught.value.status == 429
    return caught.value.code, int(caught.value.headers["Retry-After"])


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await main()

    asyncio.run(whole())


def test_as_many_requests_as_the_limit_says(clock: Clock) -> None:
    async def main() -> None:
        limits, who = limiter(), caller(requests_per_minute=3)
        for _ in range(3):
            await use(limits, who)
        code, wait_s = await refusal(limits, who)
        assert (code, wait_s) == ("requests_per_minute", 31)
        await use(limits, caller("key_b", requests_per_minute=3))
        clock.now += wait_s - 2
        await refusal(limits, who)
        clock.now += 2
        await use(limits, who)
        await refusal(limits, who)

    run(main)


@pytest.mark.usefixtures("clock")
def test_a_refused_request_costs_nothing() -> None:
    async def main() -> None:
        limits, who = limiter(), caller(requests_per_minute=2, tokens_per_minute=10)
        await use(limits, who, 8)
        for _ in range(5):
            assert (await refusal(limits, who, 3))[0] == "tokens_per_minute"
        await use(limits, who, 2)

    run(main)


def test_generated_tokens_may_pass_the_limit_and_then_nothing_is_left(clock: Clock) -> None:
    async def main() -> None:
        limits, who = limiter(), caller(tokens_per_minute=100)
        await use(limits, who, 10, num_generated=190)  # 200 in this minute
        assert (await limits.headers(who))["x-ratelimit-remaining-tokens"] == "0"
        code, wait_s = await refusal(limits, who, 0)
        # 30 s to the next minute, of which half has to pass until 200 weigh less than 100.
        assert (code, wait_s) == ("tokens_per_minute", 61)
        clock.now += wait_s - 2
        await refusal(limits, who, 0)
        clock.now += 2
        await use(limits, who, 0)

    run(main)


@pytest.mark.usefixtures("clock")
def test_a_prompt_that_can_never_fit_gets_no_retry_after() -> None:
    async def main() -> None:
        limits, who = limiter(), caller(tokens_per_minute=100)
        with pytest.raises(InvalidRequest, match=r"101 tokens.* exceeds") as caught:
            await use(limits, who, 101)
        assert caught.value.status == 400
        assert "Retry-After" not in caught.value.headers
        await use(limits, who, 100)

    run(main)


def test_all_callers_share_the_servers_limits(clock: Clock) -> None:
    async def main() -> None:
        limits = limiter(requests_per_minute=3, tokens_per_minute=50)
        await use(limits, caller("key_a"), 20)
        await use(limits, caller("key_b"), 20)
        assert (await refusal(limits, caller("key_c"), 11))[0] == "tokens_per_minute"
        await use(limits, caller("key_c"), 10)
        clock.now += 60
        await use(limits, caller("key_a"), 1)

    run(main)


def test_the_wait_is_that_of_the_limit_that_lasts_longest(clock: Clock) -> None:
    async def main() -> None:
        limits, who = limiter(), caller(requests_per_minute=1, tokens_per_minute=100)
        await use(limits, who, 100)
        code, wait_s = await refusal(limits, who, 50)
        assert (code, wait_s) == ("tokens_per_minute", 60)
        clock.now += wait_s
        await use(limits, who, 50)

    run(main)


@pytest.mark.usefixtures("clock")
def test_places_are_given_back_once() -> None:
    async def main() -> None:
        limits, who = limiter(), caller(concurrent_requests=2, tokens_per_minute=100)
        first, second = limits.enter(who), limits.enter(who)
        with pytest.raises(RateLimited) as caught:
            limits.enter(who)
        assert caught.value.code == "concurrent_requests"
        assert caught.value.headers["Retry-After"] == "1"
        limits.enter(caller("key_b", concurrent_requests=2))
        for num_generated in (5, 7, 0):
            await first.leave(num_generated)
        limits.enter(who)
        with pytest.raises(RateLimited):
            limits.enter(who)
        assert (await limits.headers(who))["x-ratelimit-remaining-tokens"] == "95"
        await second.leave(0)

    run(main)


@pytest.mark.usefixtures("clock")
def test_headers_report_the_limit_with_the_least_left() -> None:
    async def main() -> None:
        limits = limiter(requests_per_minute=10)
        who = caller(requests_per_minute=20, tokens_per_minute=6000)
        assert await limits.headers(who) == {
            "x-ratelimit-limit-requests": "10",
            "x-ratelimit-remaining-requests": "10",
            "x-ratelimit-reset-requests": "0s",
            "x-ratelimit-limit-tokens": "6000",
            "x-ratelimit-remaining-tokens": "6000",
            "x-ratelimit-reset-tokens": "0s",
        }
        await use(limits, who, 100, num_generated=20)
        reported = await limits.headers(who)
        assert reported["x-ratelimit-remaining-requests"] == "9"
        assert reported["x-ratelimit-remaining-tokens"] == "5880"
        assert reported["x-ratelimit-reset-requests"] == "30s"
        assert reported["x-ratelimit-reset-tokens"] == "1m30s"
        assert await limiter().headers(caller()) == {}

    run(main)


@settings(deadline=None)
@given(
    uses=st.lists(st.tuples(st.floats(0, 40), st.integers(0, 30), st.integers(0, 60)), max_size=12),
    num_tokens=st.integers(0, 100),
)
def test_a_client_that_waits_for_retry_after_gets_through(
    uses: list[tuple[float, int, int]], num_tokens: int
) -> None:
    now = Clock()

    async def main() -> None:
        limits, who = limiter(), caller(requests_per_minute=4, tokens_per_minute=100)
        for pause_s, prompt, generated in uses:
            now.now += pause_s
            try:
                await use(limits, who, prompt, generated)
            except RateLimited:
                continue
        try:
            await limits.check(who, num_tokens)
        except RateLimited as error:
            wait_s = int(error.headers["Retry-After"])
            assert 1 <= wait_s <= 120
            now.now += max(0.0, wait_s - 1.01)
            with pytest.raises(RateLimited):
                await limits.check(who, num_tokens)
            now.now += min(wait_s, 1.01)
            await limits.check(who, num_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("limits.aio.storage.memory.time", SimpleNamespace(time=now.time))
        run(main)


def test_what_is_counted_is_forgotten(clock: Clock) -> None:
    async def main() -> None:
        limits = limiter(requests_per_minute=10**9)
        for minute in range(5):
            for number in range(50):
                who = caller(f"key_{number}", requests_per_minute=5, tokens_per_minute=10**9)
                await use(limits, who, 1000, 1000)
            await asyncio.sleep(0)
            assert len(limits._storage.storage) <= 101 * min(minute + 1, 3)
            assert len(limits._storage.events) == 0
            clock.now += 60
        clock.now += 120
        await use(limits, caller())
        await asyncio.sleep(0)
        assert len(limits._storage.storage) == 1
        assert not limits._running

    run(main)


@pytest.fixture
def limited(tmp_path: Path, clock: Clock) -> Iterator[LiveServer]:
    changes: dict[str, Any] = {
        "api_key": ("alpha", "beta"),
        "key_requests_per_minute": 4,
        "key_tokens_per_minute": 100,
        "key_concurrent_requests": 1,
    }
    clock.now = HALF_PAST
    folder = make_checkpoint(tmp_path)
    with live_server(tiny_settings(folder, tmp_path, **changes)) as running:
        yield running


def client_of(server: LiveServer, key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=PATIENCE_S)


def left(response: httpx.Response) -> tuple[str, str]:
    headers = response.headers
    return headers["x-ratelimit-remaining-requests"], headers["x-ratelimit-remaining-tokens"]


def test_answers_report_what_is_left(limited: LiveServer) -> None:
    body = BODY | {"prompt": [1, 2], "max_tokens": 3}
    with client_of(limited, "alpha") as client:
        assert left(client.get("/v1/models")) == ("4", "100")
        assert left(client.post("/v1/completions", json=body)) == ("3", "95")
        streamed = client.post("/v1/completions", json=body | {"stream": True})
        assert left(streamed) == ("2", "93")  # before anything is generated
        assert left(client.get("/v1/models")) == ("2", "90")
        assert left(client.post("/v1/completions", json={"wrong": 1})) == ("2", "90")
        assert "x-ratelimit-limit-requests" not in client.get("/health/live").headers


def test_a_session_begun_with_a_text_counts_and_an_empty_one_does_not(limited: LiveServer) -> None:
    with client_of(limited, "alpha") as client:
        assert left(client.post("/v1/sessions")) == ("4", "100")
        assert left(client.post("/v1/sessions", json={"prompt": [1, 2, 3]})) == ("3", "97")


def test_a_limit_refuses_counts_and_lets_through_again(limited: LiveServer, clock: Clock) -> None:
    body = BODY | {"max_tokens": 1}
    reason = "admission_rejections_total"
    with client_of(limited, "alpha") as client, client_of(limited, "beta") as other:
        for _ in range(4):
            complete(client, max_tokens=1)
        before = sample(client, reason, reason="requests_per_minute")
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "requests_per_minute")
        assert "4 requests per minute" in error["message"]
        assert sample(client, reason, reason="requests_per_minute") == before + 1
        assert left(refused)[0] == "0"
        complete(other, max_tokens=1)
        clock.now += int(refused.headers["Retry-After"])
        complete(client, max_tokens=1)


def test_a_prompt_above_the_limit_is_a_wrong_request(limited: LiveServer) -> None:
    with client_of(limited, "alpha") as client:
        answer = client.post("/v1/completions", json=BODY | {"prompt": [1] * 101})
    assert answer.status_code == 400
    assert "exceeds" in answer.json()["error"]["message"]


ENDLESS = {"prompt": [1], "max_tokens": 50_000, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_place_back(limited: LiveServer, stream: bool) -> None:
    endless = ENDLESS | {"stream": stream}
    generated = limited.service.metrics.generation_tokens_total._value
    with client_of(limited, "alpha") as client:
        with client_of(limited, "alpha") as leaving:
            if stream:
                endless |= {"stream_options": {"continuous_usage_stats": True}}
                with leaving.stream("POST", "/v1/completions", json=endless) as running:
                    lines = running.iter_lines()
                    next(lines)
                    refused = client.post("/v1/completions", json=BODY)
                    assert refused.json()["error"]["code"] == "concurrent_requests"
                    assert refused.headers["Retry-After"] == "1"
                    reported = (json.loads(line[6:]) for line in lines if line.startswith("data: "))
                    next(each for each in reported if each["usage"]["completion_tokens"] > 100)
            else:
                with closing(send(limited.url, endless, authorization="Bearer alpha")):
                    wait_until(lambda: generated.get() > 200)
        limited.wait_until_idle()
        answers = {client.post("/v1/completions", json=BODY).json()["error"]["code"]}
        assert answers == {"tokens_per_minute"}  # what it generated until then counts


def test_a_request_that_fails_gives_its_place_back(limited: LiveServer) -> None:
    with client_of(limited, "alpha") as client:
        for _ in range(3):
            missing = client.post("/v1/completions", json=BODY | {"session_id": "sess_none"})
            assert missing.status_code == 404
        assert left(client.post("/v1/completions", json=BODY | {"max_tokens": 1}))[0] == "3"


def test_the_official_client_waits_for_retry_after(
    limited: LiveServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(time=time.time, sleep=sleep))
    url, model = f"{limited.url}/v1", limited.service.model_name
    with openai.OpenAI(base_url=url, api_key="alpha", max_retries=0) as client:
        for _ in range(4):
            client.completions.create(model=model, prompt=[1], max_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=model, prompt=[1], max_tokens=1)
        told_s = int(caught.value.response.headers["retry-after"])
        patient = client.with_options(max_retries=1)
        patient.completions.create(model=model, prompt=[1], max_tokens=1)
    assert slept == [told_s]


def test_chats_responses_and_resumable_streams_count_too(limited: LiveServer) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "ignore_eos": True}
    with client_of(limited, "alpha") as client:
        answer = client.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 200
        used = answer.json()["usage"]["total_tokens"]
        assert left(answer) == ("3", str(100 - used))
        response = {"input": [{"role": "user", "content": "a"}], "max_output_tokens": 1}
        answer = client.post("/v1/responses", json=response)
        assert answer.status_code == 200, answer.text
        used += answer.json()["usage"]["total_tokens"]
        assert left(answer) == ("2", str(100 - used))
        endless = ENDLESS | {"stream": True, "resumable": True}
        with client.stream("POST", "/v1/completions", json=endless) as running:
            stream_id = running.headers["X-Stream-ID"]
        refused = client.post("/v1/completions", json=BODY)  # it goes on without its connection
        assert refused.json()["error"]["code"] == "concurrent_requests"
        assert client.delete(f"/v1/streams/{stream_id}").status_code == 200
        assert left(client.get("/v1/models"))[0] == "1"
        refused = client.post("/v1/completions", json=BODY | {"prompt": [1] * 90})
        assert refused.json()["error"]["code"] == "tokens_per_minute"


@pytest.mark.usefixtures("clock")
def test_sequences_have_places_of_their_own() -> None:
    async def main() -> None:
        limits, who = limiter(), caller(concurrent_sequences=4, requests_per_minute=9)
        first, second = limits.enter(who), limits.enter(who)
        with pytest.raises(InvalidRequest) as wrong:
            await first.check(1, 5)
        assert wrong.value.code == "concurrent_sequences"
        await first.check(1, 3)
        with pytest.raises(RateLimited) as caught:
            await second.check(1, 2)
        assert caught.value.code == "concurrent_sequences"
        await second.check(1, 1)
        await first.leave(0)
        await second.leave(0)
        assert not limits._sequences
        await limits.enter(who).check(1, 4)

    run(main)


def test_what_costs_counts_though_it_generates_nothing(limited: LiveServer) -> None:
    schema = {"type": "integer", "multipleOf": 0}
    with client_of(limited, "alpha") as client:
        assert left(client.post("/tokenize", json={"prompt": "the cat"}))[0] == "3"
        used = 100 - int(left(client.get("/v1/models"))[1])
        assert used > 0
        assert left(client.post("/detokenize", json={"tokens": [1] * 10})) == ("2", str(90 - used))
        refused = client.post("/v1/completions", json=BODY | {"guided_json": schema})
        assert (refused.status_code, left(refused)[0]) == (400, "1")
        session = client.post("/v1/sessions").json()["id"]
        assert left(client.post(f"/v1/sessions/{session}/fork"))[0] == "0"
        for path in (f"/v1/sessions/{session}/fork", "/tokenize", "/v1/sessions/import"):
            refused = client.post(path, json={"prompt": "a"} if path == "/tokenize" else None)
            assert refused.json()["error"]["code"] == "requests_per_minute"
        refused = client.get(f"/v1/sessions/{session}/state")
        assert refused.json()["error"]["code"] == "requests_per_minute"
        assert client.delete(f"/v1/sessions/{session}").status_code == 200


def test_usage_is_reported_by_key(limited: LiveServer) -> None:
    with client_of(limited, "alpha") as client, client_of(limited, "beta") as other:
        answer = complete(client, prompt=[1, 2, 3], max_tokens=2, ignore_eos=True)
        client.post("/v1/sessions", json={"prompt": [1, 2], "metadata": {"a": "b"}})
        used = client.get("/v1/usage").json()
        assert used["requests"] == 2
        assert used["prompt_tokens"] == 5
        assert used["completion_tokens"] == answer["usage"]["completion_tokens"] == 2
        assert (used["sessions"], used["responses"], used["states"]) == (1, 0, 1)
        assert used["bytes"] > len('{"a": "b"}')
        nothing = other.get("/v1/usage").json()
        assert {nothing[name] for name in used if name not in ("object", "since")} == {0}

"""Streams that outlive their connection: replay, bounds, ownership, cancelling."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.sse import KEEP_ALIVE_WITH_IDS
from server.api.streams import EventLog, Stream, StreamLimits, Streams
from server.errors import EventsGone, NotFound, Overloaded
from tests.patience import wait_until
from tests.server.api.calls import BODY, text_of
from tests.server.live import LiveServer, live_server, tiny_settings

LONG = {"stream": True, "resumable": True, "max_tokens": 60_000}
SHORT = {"stream": True, "resumable": True}


async def read(log: EventLog, start: int = 0) -> list[bytes]:
    return [events async for events in log.follow(start, 0.01) if events != KEEP_ALIVE_WITH_IDS]


def test_a_log_keeps_its_last_events_within_its_bytes() -> None:
    async def main() -> None:
        log = EventLog(max_bytes=50)
        for number in range(0, 100, 4):
            await log.append([b"%09d" % each for each in range(number, number + 4)])
        assert (log.first, log.num_events) == (95, 100)
        await log.append([b"x" * 200])  # larger than all: it alone is kept
        assert (log.first, log.num_events) == (100, 101)
        await log.append([b"last"])
        log.end()
        assert await read(log, 101) == [b"last"]
        assert await read(log, 102) == []

    asyncio.run(main())


def test_readers_follow_events_and_get_keep_alives_in_silence() -> None:
    async def main() -> None:
        log, seen = EventLog(1000), list[bytes]()
        silent = asyncio.Event()
        await log.append([b"0"])

        async def follow() -> None:
            async for events in log.follow(0, 0.001):
                seen.append(events)
                if events == KEEP_ALIVE_WITH_IDS:
                    silent.set()

        reader = asyncio.create_task(follow())
        async with asyncio.timeout(60):
            await silent.wait()
            await log.append([b"1", b"2"])
            log.end()
            await reader
        # What waits together comes together.
        assert [events for events in seen if events != KEEP_ALIVE_WITH_IDS] == [b"0", b"12"]

    asyncio.run(main())


def test_a_reader_that_needs_dropped_events_is_disconnected() -> None:
    async def main() -> None:
        log = EventLog(max_bytes=10)
        await log.append([b"0" * 8])
        follower = log.follow(0, 60)
        assert await anext(follower) == b"0" * 8
        await log.append([b"1" * 8])
        await log.append([b"2" * 8])
        with pytest.raises(StopAsyncIteration):
            await anext(follower)

    asyncio.run(main())


def test_ended_streams_make_space_and_are_forgotten_in_time() -> None:
    now = 1000.0

    async def main() -> None:
        nonlocal now
        streams = Streams(StreamLimits(2, 1000, ttl_s=10), clock=lambda: now)
        for name in ("a", "b", "c"):
            with streams.space("me"):
                stream = streams.add("me", name)
            assert streams.expires_at(stream) is None
            stream.end("completed")
            stream.ended_at = now
        with pytest.raises(NotFound):
            streams.get("me", "a")
        with pytest.raises(NotFound):
            streams.get("you", "b")
        assert streams.get("me", "c").status == "completed"
        now += 10
        with pytest.raises(NotFound):
            streams.get("me", "c")
        with streams.space("me"), streams.space("me"):
            with pytest.raises(Overloaded), streams.space("me"):
                pass
            with streams.space("you"), pytest.raises(Overloaded), streams.space("you"):
                pass
        with streams.space("me"):
            pass

    asyncio.run(main())


def test_what_fills_a_stream_is_cancelled_and_waited_for() -> None:
    """Even if it has not started; cancelling twice waits once."""
    ended = list[str]()

    async def fill(stream: Stream) -> None:
        try:
            await stream.log.append([b"0"])
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append(stream.id)
            stream.end("cancelled")

    async def main() -> None:
        streams = Streams(StreamLimits(4, 1000, ttl_s=10))
        for name in ("a", "b", "c", "d"):
            stream = streams.add("me", name)
            stream.start(fill(stream))
        await streams.get("me", "a").cancel()
        await streams.get("me", "a").cancel()
        assert ended == ["a"]
        await streams.delete("me", "b")
        with pytest.raises(NotFound):
            streams.get("me", "b")
        await streams.close()
        assert ended == ["a", "b", "c", "d"]
        assert await read(streams.get("me", "c").log) == [b"0"]
        stream = streams.get("me", "a")
        await stream.log.append([b"x" * 1000])
        with pytest.raises(EventsGone, match="from 1 on"):
            stream.response(1, start=0)

    asyncio.run(main())


@pytest.fixture(scope="module")
def keyed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = tiny_settings(
        tiny_checkpoint,
        tmp_path_factory.mktemp("data"),
        api_key=("alpha", "beta"),
        max_resumable_streams=3,
        stream_buffer_bytes=200_000,
        stream_keepalive_s=0.2,
    )
    with live_server(settings) as running:
        yield running


@pytest.fixture
def client(keyed: LiveServer) -> Iterator[httpx.Client]:
    with keyed.client() as client:
        client.headers["Authorization"] = "Bearer alpha"
        yield client


def events_of(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Ids and data in order of arrival."""
    data = ""
    for line in lines:
        if line.startswith("data: "):
            data = line[6:]
        elif line.startswith("id: "):
            yield int(line[4:]), data


def text(events: list[tuple[int, str]]) -> str:
    answers = [json.loads(data) for _, data in events if data != "[DONE]"]
    return "".join(choice["text"] for answer in answers for choice in answer["choices"])


def resume(client: httpx.Client, stream_id: str, last: int | None) -> list[tuple[int, str]]:
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    response = client.get(f"/v1/streams/{stream_id}", headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return list(events_of(iter(response.text.splitlines())))


def begin(
    client: httpx.Client, num_chars: int, **changes: object
) -> tuple[str, list[tuple[int, str]]]:
    """Begin a stream and disconnect after an event, once this much text was received."""
    with client.stream("POST", "/v1/completions", json=BODY | changes) as response:
        assert response.status_code == 200
        lines, seen = response.iter_lines(), list[tuple[int, str]]()
        coming = events_of(lines)
        while len(text(seen)) < num_chars:
            seen.append(next(coming))
        return response.headers["X-Stream-ID"], seen


@pytest.mark.parametrize("num_chars", [1, 5, 50])
def test_a_lost_connection_loses_nothing(client: httpx.Client, num_chars: int) -> None:
    session_id = client.post("/v1/sessions").json()["id"]
    long = {"max_tokens": 500}
    stream_id, seen = begin(client, num_chars, **SHORT | long, session_id=session_id)
    rest = resume(client, stream_id, seen[-1][0])
    assert [number for number, _ in seen + rest] == list(range(len(seen + rest)))
    assert rest[-1][1] == "[DONE]"
    assert text(seen + rest) == text_of(client, **long)
    assert resume(client, stream_id, None) == seen + rest
    assert client.get(f"/v1/sessions/{session_id}").json()["turn"] == 1
    assert {json.loads(data)["id"] for _, data in rest[:-1]} == {stream_id}


def test_after_the_last_event_there_is_nothing(client: httpx.Client) -> None:
    """An EventSource reconnects after every end, until it gets 204."""
    stream_id, seen = begin(client, 1, **SHORT)
    last = resume(client, stream_id, seen[-1][0])[-1][0]
    for asked in ({"headers": {"Last-Event-ID": str(last)}}, {"params": {"after": str(last)}}):
        response = client.get(f"/v1/streams/{stream_id}", **asked)  # type: ignore[arg-type]
        assert (response.status_code, response.content) == (204, b"")
    assert [number for number, _ in resume(client, stream_id, last - 1)] == [last]


def test_two_readers_get_the_same(client: httpx.Client) -> None:
    stream_id, _ = begin(client, 1, **SHORT)
    assert resume(client, stream_id, None) == resume(client, stream_id, None)


def test_without_resumable_a_lost_connection_ends_the_turn(
    client: httpx.Client, keyed: LiveServer
) -> None:
    session_id = client.post("/v1/sessions").json()["id"]
    body = BODY | {"stream": True, "max_tokens": 60_000, "session_id": session_id}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert "X-Stream-ID" not in response.headers
        first = next(line for line in response.iter_lines() if line.startswith("data: "))
        stream_id = json.loads(first[6:])["id"]
    keyed.wait_until_idle()
    assert client.get(f"/v1/sessions/{session_id}").json()["turn"] == 0
    assert client.get(f"/v1/streams/{stream_id}").status_code == 404


def test_cancelling_rolls_the_turn_back(client: httpx.Client, keyed: LiveServer) -> None:
    session_id = client.post("/v1/sessions").json()["id"]
    stream_id, _ = begin(client, 1, **LONG, session_id=session_id)
    busy = client.post("/v1/completions", json=BODY | {"session_id": session_id})
    assert busy.json()["error"]["code"] == "session_busy"
    answer = client.post(f"/v1/streams/{stream_id}/cancel").json()
    assert (answer["id"], answer["status"]) == (stream_id, "cancelled")
    keyed.wait_until_idle()
    last = resume(client, stream_id, answer["events"] - 3)
    assert json.loads(last[-2][1])["error"]["code"] == "cancelled"
    assert client.get(f"/v1/sessions/{session_id}").json()["turn"] == 0
    assert text_of(client, session_id=session_id) == text_of(client)
    assert client.post(f"/v1/streams/{stream_id}/cancel").json()["status"] == "cancelled"
    assert client.delete(f"/v1/streams/{stream_id}").json()["deleted"] is True
    assert client.get(f"/v1/streams/{stream_id}").status_code == 404


def test_the_buffer_is_bounded(client: httpx.Client, keyed: LiveServer) -> None:
    ids = {"return_token_ids": True}  # more bytes than are kept, in however few events
    stream_id, _ = begin(client, 1, **LONG | ids)
    log = keyed.service.streams._streams[stream_id].log
    wait_until(lambda: log.first > 1)
    old = {"Last-Event-ID": "0"}
    error = client.get(f"/v1/streams/{stream_id}", headers=old).json()["error"]
    assert (error["code"], error["param"]) == ("events_gone", "Last-Event-ID")
    kept = int(error["message"].split("from ")[1].split(" ")[0])
    assert kept > 1
    client.delete(f"/v1/streams/{stream_id}")


def test_streams_are_their_owners(client: httpx.Client, keyed: LiveServer) -> None:
    stream_id, _ = begin(client, 1, **LONG)
    with keyed.client() as other:
        other.headers["Authorization"] = "Bearer beta"
        answers = [
            other.get(f"/v1/streams/{stream_id}"),
            other.post(f"/v1/streams/{stream_id}/cancel"),
            other.delete(f"/v1/streams/{stream_id}"),
        ]
    assert {answer.status_code for answer in answers} == {404}
    assert {answer.json()["error"]["code"] for answer in answers} == {"stream_not_found"}
    assert client.delete(f"/v1/streams/{stream_id}").status_code == 200


def test_the_number_of_streams_is_limited(client: httpx.Client) -> None:
    running = [begin(client, 1, **LONG)[0] for _ in range(3)]
    refused = client.post("/v1/completions", json=BODY | SHORT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
    assert int(refused.headers["Retry-After"]) >= 1
    for stream_id in running:
        client.delete(f"/v1/streams/{stream_id}")
    assert client.post("/v1/completions", json=BODY | SHORT).status_code == 200


@pytest.mark.parametrize("last", ["-1", "x", "100", "9" * 30, ""])
def test_an_id_of_no_event_is_refused(client: httpx.Client, last: str) -> None:
    stream_id, _ = begin(client, 1, **SHORT)
    resume(client, stream_id, None)
    response: Any = client.get(f"/v1/streams/{stream_id}", params={"after": last})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Last-Event-ID"

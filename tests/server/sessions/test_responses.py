"""Responses: any of them can be gone on from, and each is stored wholly, once, or not at all."""

import asyncio
import json
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from server.errors import (
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    ResponseDamaged,
    ResponseGone,
    StorageFailed,
    StorageFull,
)
from server.sessions.codec import SessionState
from server.sessions.quota import Quotas
from server.sessions.store import ResponseRecord, Usage
from tests.server.sessions.stores import forbidden, raw, until_waiting, writer_held
from tests.server.sessions.worlds import CODEC, ME, World, state, world

BLOB = CODEC.encode(state())


def body(status: str = "completed", **facts: object) -> str:
    return json.dumps({"object": "response", "status": status} | facts)


async def respond(
    w: World,
    name: str,
    mark: bytes,
    previous: str | None = None,
    warm: str | None = None,
    ttl_s: float | None = None,
) -> ResponseRecord:
    """One whole response."""
    async with w.responses.begin(ME, previous, name, ttl_s) as turn:
        await turn.commit(state(mark), warm, body(mark=mark.decode()))
        return turn.record


async def after(w: World, name: str) -> SessionState:
    return await w.responses.state_after(ME, name)


def mark_of(found: SessionState) -> bytes:
    return found.state[:1]


async def not_found(what: Awaitable[object], param: str = "response_id") -> None:
    with pytest.raises(NotFound) as caught:
        await what
    assert (caught.value.code, caught.value.param) == ("response_not_found", param)


@contextmanager
def at(seconds: float) -> Iterator[None]:
    """The clock of responses, so many seconds from now."""
    then = time.time() + seconds
    with patch("server.sessions.responses.time.time", return_value=then):
        yield


def stored(w: World) -> float | None:
    return w.metrics.registry.get_sample_value("latentd_responses")


def test_ids_are_long_and_never_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            ids = {w.responses.new_id() for _ in range(50)}
            assert len(ids) == 50
            assert all(name.startswith("resp_") and len(name) >= 37 for name in ids)

    asyncio.run(main())


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_response_goes_on_from_any_earlier_one_also_after_a_restart(
    tmp_path: Path, cache_bytes: int
) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes) as w:
            async with w.responses.begin(ME, None, "a") as turn:
                assert (turn.is_fresh, turn.keeps_answer, turn.warm) == (True, True, None)
                await turn.commit(state(b"a"), None, body(mark="a"))
                assert turn.record == await w.responses.get(ME, "a")
            assert turn.record.body == body(mark="a")
            assert (turn.record.status, turn.record.num_tokens) == ("completed", 5)
            await respond(w, "b", b"b", "a")
            await respond(w, "c", b"c", "b")
        async with world(tmp_path, cache_bytes) as w:
            for number, previous in enumerate("abcab"):
                async with w.responses.begin(ME, previous, f"{number}") as turn:
                    assert not turn.is_fresh
                    assert await turn.load() == state(previous.encode())
                    await turn.commit(state(b"%d" % number), None, body("incomplete"))
            for name in "abc01234":
                assert await after(w, name) == state(name.encode())
            assert (await w.responses.get(ME, "4")).status == "incomplete"
            assert stored(w) == 8
            bodies = [(await w.responses.get(ME, name)).body for name in "abc01234"]
            held = 8 * len(BLOB) + sum(map(len, bodies))
            assert w.held()["store"] == (0, held)

    asyncio.run(main())


def test_many_branch_from_one_at_the_same_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await respond(w, "root", b"r", None, "row of root")
            taken = list[str | None]()

            async def branch(mark: bytes) -> None:
                async with w.responses.begin(ME, "root", f"branch {mark!r}") as turn:
                    taken.append(turn.take_warm())
                    assert await turn.load() == state(b"r")
                    await asyncio.sleep(0.005)
                    await turn.commit(state(mark), f"row of {mark!r}", body())
                    assert turn.warm == f"row of {mark!r}"

            marks = [b"%c" % number for number in range(97, 109)]
            await asyncio.gather(*(branch(mark) for mark in marks))
            assert sorted(taken, key=str) == [*[None] * 11, "row of root"]
            for mark in marks:
                assert await after(w, f"branch {mark!r}") == state(mark)

    asyncio.run(main())


def test_a_row_that_was_not_used_is_given_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await respond(w, "a", b"a", None, "row")
            async with w.responses.begin(ME, "a", "b") as turn:
                assert turn.take_warm() == "row"
                assert turn.warm is None
                turn.put_back_warm("row")
            async with w.responses.begin(ME, "a", "c") as turn:
                assert turn.warm == "row"
            w.places.row_evicted("row")
            async with w.responses.begin(ME, "a", "d") as turn:
                assert turn.take_warm() is None

    asyncio.run(main())


def test_what_is_not_committed_never_was(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            with suppress(RuntimeError):
                async with w.responses.begin(ME, None, "a"):
                    raise RuntimeError
            await not_found(w.responses.get(ME, "a"))
            assert w.store.total == Usage()
            await respond(w, "a", b"a")  # nothing of the first attempt is in the way

    asyncio.run(main())


def test_a_commit_whose_caller_leaves_takes_place(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with writer_held(w.store):
                leaving = asyncio.create_task(respond(w, "a", b"a"))
                await until_waiting(w.store)
                leaving.cancel()
                await asyncio.sleep(0.02)
                assert not leaving.done()  # it waits for its commit
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert await after(w, "a") == state(b"a")

    asyncio.run(main())


def test_the_end_is_on_the_disk_before_it_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with writer_held(w.store):
                committing = asyncio.create_task(respond(w, "a", b"a"))
                await until_waiting(w.store)
                assert not committing.done()
            await committing

    asyncio.run(main())


@pytest.mark.parametrize("is_pending", [False, True])
def test_a_failing_disk_leaves_everything_as_it_was(tmp_path: Path, is_pending: bool) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await respond(w, "a", b"a", None, "row")
            if is_pending:
                await w.responses.create_pending(ME, "b", body("queued"))
            before = w.store.total
            async with w.responses.begin(ME, "a", "b") as turn:
                with (
                    forbidden(w.store, sqlite3.SQLITE_TRANSACTION, "COMMIT"),
                    pytest.raises(StorageFailed),
                ):
                    await turn.commit(state(b"b"), "row of b", body())
                assert turn.warm == "row"
                assert w.store.total == before
                failed = body("failed")
                assert await w.responses.finish_without_state(ME, "b", failed)
            assert (await w.responses.get(ME, "b")).body == failed
            assert "b" not in w.cache
            assert await after(w, "a") == state(b"a")

    asyncio.run(main())


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await respond(w, "a", b"a")
            before, db = w.store.total, w.store._writer.db
            [num_pages] = db.execute("PRAGMA page_count").fetchone()
            db.execute(f"PRAGMA max_page_count = {num_pages}")
            with pytest.raises(StorageFull):
                await respond(w, "b", b"b", "a")
            db.execute("PRAGMA max_page_count = 10000")
            assert w.store.total == before
            assert await after(w, "a") == state(b"a")
            await respond(w, "b", b"b", "a")

    asyncio.run(main())


def test_damage_is_named_and_others_are_good(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, 0) as w:
            await respond(w, "a", b"a")
            await respond(w, "b", b"b", "a")
            w.store._writer.db.execute(
                "UPDATE responses SET blob = ? WHERE id = 'b'", [BLOB[:-1] + b"?"]
            )
            async with w.responses.begin(ME, "b", "c") as turn:
                with pytest.raises(ResponseDamaged, match=r"response b .*checksum") as caught:
                    await turn.load()
            assert (caught.value.status, caught.value.code) == (503, "response_damaged")
            assert type(turn.damaged("why")) is ResponseDamaged
            assert "response b" in turn.damaged("why").message
            assert await after(w, "a") == state(b"a")

    asyncio.run(main())


def test_nobody_else_finds_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await respond(w, "a", b"a")
            await w.responses.create_pending(ME, "p", body("queued"))

            async def go_on(owner: str, name: str) -> None:
                async with w.responses.begin(owner, name, "other"):
                    pass

            for owner, name in (("another", "a"), ("another", "p"), (ME, "ghost")):
                await not_found(w.responses.get(owner, name))
                await not_found(w.responses.delete(owner, name))
                await not_found(w.responses.as_session(owner, name, {}, None))
                await not_found(go_on(owner, name), "previous_response_id")
                await not_found(w.responses.state_after(owner, name), "previous_response_id")
                assert not await w.responses.finish_without_state(owner, name, body("failed"))
            assert (await w.responses.get(ME, "p")).status == "queued"
            assert await after(w, "a") == state(b"a")

    asyncio.run(main())


def test_what_has_no_state_cannot_be_gone_on_from(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            for status in ("failed", "cancelled", "incomplete"):
                async with w.responses.begin(ME, None, status):
                    assert await w.responses.finish_without_state(ME, status, body(status))
            await w.responses.create_pending(ME, "queued", body("queued"))
            async with w.responses.begin(ME, None, "running"):
                for name, why in (
                    ("failed", "failed"),
                    ("cancelled", "was cancelled"),
                    ("incomplete", "without its state"),
                    ("queued", "not complete yet"),
                    ("running", "not complete yet"),
                ):
                    with pytest.raises(InvalidRequest, match=f"{name} .*{why}") as caught:
                        await after(w, name)
                    error = caught.value
                    assert (error.status, error.param) == (400, "previous_response_id")

    asyncio.run(main())


def test_a_response_in_the_background(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            made = await w.responses.create_pending(ME, "a", body("queued"), 60.0)
            assert await w.responses.get(ME, "a") == made
            assert (made.status, made.is_finished, made.has_state) == ("queued", False, False)
            async with w.responses.begin(ME, None, "a") as turn:
                await turn.commit(state(b"a"), "row", body())
            found = await w.responses.get(ME, "a")
            done = replace(made, status="completed", body=body(), num_tokens=5, has_state=True)
            assert found == turn.record == done
            assert await after(w, "a") == state(b"a")
            assert not await w.responses.finish_without_state(ME, "a", body("cancelled"))
            assert w.store.total == Usage(0, 1, len(BLOB) + len(body()), 1)

    asyncio.run(main())


def test_of_two_ends_the_first_counts(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            for name in "ab":
                await w.responses.create_pending(ME, name, body("in_progress"))
            async with w.responses.begin(ME, None, "a") as turn:
                assert await w.responses.finish_without_state(ME, "a", body("cancelled"))
                with pytest.raises(ResponseGone) as caught:
                    await turn.commit(state(b"a"), "row", body())
                assert turn.warm is None
            assert caught.value.status == 409
            assert (await w.responses.get(ME, "a")).status == "cancelled"
            async with w.responses.begin(ME, None, "b") as turn, writer_held(w.store):
                committing = asyncio.create_task(turn.commit(state(b"b"), None, body()))
                await until_waiting(w.store)
                assert not await w.responses.finish_without_state(ME, "b", body("cancelled"))
            await committing
            assert (await w.responses.get(ME, "b")).status == "completed"
            assert "a" not in w.cache

    asyncio.run(main())


@pytest.mark.parametrize("is_pending", [False, True])
@pytest.mark.parametrize("moment", ["before", "during"])
def test_what_is_deleted_while_it_is_made_does_not_come_back(
    tmp_path: Path, is_pending: bool, moment: str
) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            if is_pending:
                await w.responses.create_pending(ME, "a", body("queued"))
            async with w.responses.begin(ME, None, "a") as turn:
                if moment == "before":
                    await w.responses.delete(ME, "a")
                    with pytest.raises(ResponseGone):
                        await turn.commit(state(b"a"), "row", body())
                else:
                    async with writer_held(w.store):
                        committing = asyncio.create_task(turn.commit(state(b"a"), "row", body()))
                        await until_waiting(w.store)
                        deleting = asyncio.create_task(w.responses.delete(ME, "a"))
                        await until_waiting(w.store, 2)
                    await deleting
                    with pytest.raises(ResponseGone):
                        await committing
                assert turn.warm is None
                assert not await w.responses.finish_without_state(ME, "a", body("cancelled"))
                await not_found(w.responses.delete(ME, "a"))
            await not_found(w.responses.get(ME, "a"))
            assert (w.store.total, stored(w)) == (Usage(), 0)
            assert "a" not in w.cache
            assert b"a" * 56 not in raw(tmp_path)

    asyncio.run(main())


def test_what_is_deleted_before_it_is_begun_is_not_made(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.responses.create_pending(ME, "a", body("queued"))
            await w.responses.delete(ME, "a")
            with pytest.raises(ResponseGone):
                async with w.responses.begin(ME, None, "a"):
                    pytest.fail("it began")
            assert w.store.total == Usage()

    asyncio.run(main())


def test_deletion_leaves_nothing_anywhere_but_what_went_on_from_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await respond(w, "a", b"a", None, "row")
            async with w.responses.begin(ME, "a", "b") as turn:
                await w.responses.delete(ME, "a")
                await not_found(turn.load(), "previous_response_id")
                await turn.commit(state(b"b"), None, body())
            assert w.forgotten == ["row"]
            assert "a" not in w.cache
            assert b"a" * 56 not in raw(tmp_path)
            assert await after(w, "b") == state(b"b")

    asyncio.run(main())


def test_a_state_that_is_read_while_it_is_deleted_is_not_cached(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await respond(w, "a", b"a")
            found, deleted = asyncio.Event(), asyncio.Event()
            real = w.store.responses.load_blob

            async def load_blob(name: str) -> bytes | None:
                blob = await real(name)
                found.set()
                await deleted.wait()
                return blob

            w.places.forget("a")
            with patch.object(w.store.responses, "load_blob", load_blob):
                loading = asyncio.create_task(after(w, "a"))
                await found.wait()
                await w.responses.delete(ME, "a")
                deleted.set()
                assert await loading == state(b"a")
            assert "a" not in w.cache

    asyncio.run(main())


def test_it_is_kept_for_its_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, most_ttl_s=100.0) as w:
            short = await respond(w, "short", b"s", None, "row", ttl_s=50.0)
            usual = await respond(w, "usual", b"u")
            assert short.expires_at == short.created_at + 50.0
            assert usual.expires_at == usual.created_at + 100.0
            with pytest.raises(InvalidRequest, match=r"ttl is 101, the most is 100"):
                await respond(w, "long", b"l", ttl_s=101.0)
            with at(40):
                assert await w.responses.sweep() == 0
            with at(60):
                await not_found(w.responses.get(ME, "short"))
                await not_found(after(w, "short"), "previous_response_id")
                await not_found(w.responses.delete(ME, "short"))
                assert await w.responses.sweep() == 1
                assert await w.responses.sweep() == 0
                assert await after(w, "usual") == state(b"u")
            assert w.forgotten == ["row"]
            assert b"s" * 56 not in raw(tmp_path)
        async with world(tmp_path) as w:
            assert (await respond(w, "lasting", b"l")).expires_at is None

    asyncio.run(main())


def test_what_is_being_made_does_not_expire(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.responses.create_pending(ME, "a", body("queued"), 10.0)
            async with w.responses.begin(ME, None, "a") as turn:
                with at(20):
                    assert await w.responses.sweep() == 0
                    assert (await w.responses.get(ME, "a")).status == "queued"
                await turn.commit(state(b"a"), None, body())
            with at(20):
                assert await w.responses.sweep() == 1

    asyncio.run(main())


def test_what_the_end_of_the_server_interrupted_has_failed(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.responses.create_pending(ME, "queued", body("queued", metadata={"k": "é"}))
            await w.responses.create_pending(ME, "running", body("in_progress"))
            await respond(w, "done", b"d")
        async with world(tmp_path) as w:
            await w.responses.create_pending(ME, "new", body("queued"))
            assert await w.responses.recover() == 2
            assert await w.responses.recover() == 0
            for name in ("queued", "running"):
                found = await w.responses.get(ME, name)
                told = json.loads(found.body)
                assert found.status == told["status"] == "failed"
                assert told["error"]["code"] == "server_error"
                assert "stopped" in told["error"]["message"]
                assert told["object"] == "response"
            assert json.loads((await w.responses.get(ME, "queued")).body)["metadata"] == {"k": "é"}
            assert (await w.responses.get(ME, "new")).status == "queued"
            assert (await w.responses.get(ME, "done")).status == "completed"
            await w.responses.delete(ME, "queued")

    asyncio.run(main())


def test_an_end_that_could_not_be_stored_is_told_by_the_next_sweep(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.responses.create_pending(ME, "a", body("queued"))
            await w.responses.sweep()
            assert (await w.responses.get(ME, "a")).status == "queued"
            with (
                forbidden(w.store, sqlite3.SQLITE_TRANSACTION, "COMMIT"),
                pytest.raises(StorageFailed),
            ):
                await w.responses.finish_without_state(ME, "a", body("cancelled"))
            assert (await w.responses.get(ME, "a")).status == "queued"
            await w.responses.sweep()
            assert (await w.responses.get(ME, "a")).status == "failed"

    asyncio.run(main())


def test_a_response_becomes_a_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, quotas=Quotas(sessions_per_owner=1)) as w:
            await respond(w, "a", b"a")
            made = await w.responses.as_session(ME, "a", {"k": "v"}, 60.0)
            assert made == await w.get(made.id)
            assert (made.turn, made.num_tokens, made.num_checkpoints) == (1, 5, 1)
            assert (made.metadata, made.ttl_s, made.owner) == ({"k": "v"}, 60.0, ME)
            await w.responses.delete(ME, "a")
            assert await w.load(made.id) == state(b"a")
            assert (await w.advance(made.id, state(b"b"))).turn == 2
            await respond(w, "b", b"b")
            with pytest.raises(QuotaExceeded):
                await w.responses.as_session(ME, "b", {}, None)

    asyncio.run(main())


def test_there_are_at_most_so_many(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, quotas=Quotas(responses_per_owner=2)) as w:
            await respond(w, "a", b"a")
            await w.responses.create_pending(ME, "b", body("queued"))
            for call in (
                respond(w, "c", b"c"),
                w.responses.create_pending(ME, "d", body("queued")),
            ):
                with pytest.raises(QuotaExceeded, match=r"2 stored responses") as caught:
                    await call
                assert caught.value.code == "response_quota_exceeded"
            await respond(w, "b", b"b")  # it was counted when it was stored
            for _ in range(3):
                await w.new()  # a session is no response
            await w.responses.delete(ME, "a")
            answers = await asyncio.gather(
                *(respond(w, f"{number}", b"n") for number in range(4)), return_exceptions=True
            )
            assert [type(answer) for answer in answers].count(QuotaExceeded) == 3

    asyncio.run(main())


@pytest.mark.parametrize("everybodys", [False, True])
def test_their_bytes_are_those_of_the_sessions_too(tmp_path: Path, everybodys: bool) -> None:
    most = 2 * CODEC.usual_blob_bytes
    quotas = Quotas(bytes=most) if everybodys else Quotas(bytes_per_owner=most)

    async def main() -> None:
        async with world(tmp_path, quotas=quotas) as w:
            name = await w.new()
            await respond(w, "a", b"a")
            await w.responses.create_pending(ME, "b", body("queued", text="x" * 8000))
            for call in (respond(w, "c", b"c"), w.advance(name, state(b"s"))):
                with pytest.raises((QuotaExceeded, StorageFull)):
                    await call
            await w.responses.delete(ME, "b")
            async with w.sessions.turn(ME, name):
                with pytest.raises((QuotaExceeded, StorageFull)):
                    await respond(w, "c", b"c")  # what a session's turn reserves is taken
            await respond(w, "c", b"c")

    asyncio.run(main())


@pytest.mark.parametrize("told", ["[]", "{}", '{"status": "done"}', "no"])
def test_a_body_must_tell_its_status(tmp_path: Path, told: str) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.responses.begin(ME, None, "a") as turn:
                with pytest.raises((ValueError, KeyError, TypeError)):
                    await turn.commit(state(b"a"), None, told)
            assert w.store.total == Usage()

    asyncio.run(main())


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["respond", "pend", "finish", "fail", "delete", "restart", "session"]),
        st.integers(0, 7),
        st.integers(-1, 7),
    ),
    max_size=25,
)


@given(STEPS)
@settings(max_examples=20, deadline=None, phases=[Phase.generate])
def test_whatever_is_done_each_answers_with_its_own_state(steps: Sequence[Step]) -> None:
    """Against a model: which responses there are, and the state after each."""
    there: dict[str, bytes | None] = {}
    open_now = set[str]()
    num_sessions = 0

    async def take(w: World, number: int, step: Step) -> None:
        nonlocal num_sessions
        what, which, from_which = step
        name, mark = f"r{which}", b"%c" % (number + 60)
        previous = None if from_which < 0 else f"r{from_which}"
        match what:
            case "pend" if name not in there:
                await w.responses.create_pending(ME, name, body("queued"))
                there[name] = None
                open_now.add(name)
            case "respond" | "finish":
                if (what == "finish") != (name in open_now) or name in there.keys() - open_now:
                    return
                if previous is not None and there.get(previous) is None:
                    with pytest.raises((NotFound, InvalidRequest)):
                        await respond(w, name, mark, previous)
                    return
                await respond(w, name, mark, previous, warm=f"row {number}")
                there[name] = mark
                open_now.discard(name)
            case "fail":
                kept = await w.responses.finish_without_state(ME, name, body("failed"))
                assert kept == (name in open_now)
                open_now.discard(name)
            case "delete":
                with suppress(NotFound):
                    await w.responses.delete(ME, name)
                    assert name in there
                there.pop(name, None)
                if name in open_now:
                    with pytest.raises(ResponseGone):
                        await respond(w, name, mark)
                    open_now.discard(name)
            case "session" if there.get(name) is not None:
                made = await w.responses.as_session(ME, name, {}, None)
                assert mark_of(await w.load(made.id)) == there[name]
                num_sessions += 1

    async def check(w: World) -> None:
        for name, mark in there.items():
            if mark is not None:
                assert mark_of(await after(w, name)) == mark
        usage = await w.store.usage(ME)
        assert usage.num_responses == len(there) == stored(w)
        states = sum(mark is not None for mark in there.values())
        assert (usage.num_states, usage.num_sessions) == (states + num_sessions, num_sessions)
        told = sum([len((await w.responses.get(ME, name)).body.encode()) for name in there])
        assert usage.num_bytes == usage.num_states * len(BLOB) + told

    async def main(folder: Path) -> None:
        left = list(enumerate(steps))
        while left:
            async with world(folder) as w:
                assert await w.responses.recover() == len(open_now)
                open_now.clear()
                while left and left[0][1][0] != "restart":
                    await take(w, *left.pop(0))
                    await check(w)
                del left[:1]

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))

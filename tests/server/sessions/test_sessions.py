"""Sessions: one writer each, turns that happen wholly or not at all, and states where they are said
to be."""

import asyncio
import sqlite3
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import InvalidRequest, NotFound, SessionBusy, StorageFailed
from server.sessions.codec import Codec
from tests.patience import PATIENCE_S
from tests.server.sessions.stores import commit, forbidden, raw, until_waiting, writer_held
from tests.server.sessions.worlds import (
    CACHED_BYTES,
    CODEC,
    ME,
    SPEC,
    STATE_BYTES,
    VOCAB,
    World,
    state,
    world,
)

BLOB = CODEC.encode(state())


def test_ids_are_long_and_never_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            ids = {await w.new() for _ in range(50)}
            assert len(ids) == 50
            assert all(name.startswith("sess_") and len(name) >= 37 for name in ids)

    asyncio.run(main())


def test_a_new_session_survives_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            made = await w.sessions.create(ME, {"topic": "cats"})
            assert made == await w.sessions.get(ME, made.id)
            assert (made.turn, made.num_tokens, made.metadata) == (0, 0, {"topic": "cats"})
            assert made.created_at == made.last_used_at > 1.7e9
        async with world(tmp_path) as w:
            assert await w.sessions.get(ME, made.id) == made

    asyncio.run(main())


def test_a_turn_moves_the_session_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            made = await w.sessions.create(ME, {"k": "v"})
            for number in (1, 2):
                after = await w.advance(made.id, state(position=5 * number))
                assert after == replace(
                    made,
                    turn=number,
                    num_tokens=5 * number,
                    num_checkpoints=number,
                    last_used_at=after.last_used_at,
                )
                assert after.last_used_at > made.last_used_at
                assert after == await w.sessions.get(ME, made.id)

    asyncio.run(main())


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("reopened", [False, True])
def test_what_is_loaded_is_what_was_committed(
    tmp_path: Path, cache_bytes: int, reopened: bool
) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes) as w:
            first, second = await w.new(), await w.new()
            await w.advance(first, state(b"a"))
            await w.advance(second, state(b"b", 1))
            await w.advance(first, state(b"c", 10**9))
            if not reopened:
                assert await w.load(first) == state(b"c", 10**9, turn=2)
                assert await w.load(second) == state(b"b", 1)
        if reopened:
            async with world(tmp_path, cache_bytes) as w:
                assert await w.load(first) == state(b"c", 10**9, turn=2)
                assert await w.load(second) == state(b"b", 1)

    asyncio.run(main())


def test_a_cached_state_needs_no_store(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            await w.advance(session_id, state(b"a"))
            async with w.sessions.turn(ME, session_id) as turn, writer_held(w.store):
                assert await asyncio.wait_for(turn.load(), PATIENCE_S) == state(b"a")
        async with world(tmp_path) as w:
            async with w.sessions.turn(ME, session_id) as turn:
                async with writer_held(w.store):
                    loading = asyncio.create_task(turn.load())
                    await until_waiting(w.store)
                    assert not loading.done()
                await loading
                async with writer_held(w.store):
                    assert await asyncio.wait_for(turn.load(), PATIENCE_S) == state(b"a")
            assert w.metrics.registry.get_sample_value("latentd_session_load_seconds_count") == 2

    asyncio.run(main())


def test_a_session_has_one_writer(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id, other = await w.new(), await w.new()
            async with w.sessions.turn(ME, session_id):
                assert w.sessions.is_busy(session_id)
                with pytest.raises(SessionBusy):
                    await w.load(session_id)
                with pytest.raises(SessionBusy):
                    await w.sessions.delete(ME, session_id)
                assert w.sessions.is_busy(session_id)
                assert (await w.sessions.get(ME, session_id)).turn == 0
                await w.advance(other, state())
            assert not w.sessions.is_busy(session_id)
            await w.advance(session_id, state())

    asyncio.run(main())


def test_whoever_fails_gives_the_session_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            with pytest.raises(KeyError):
                async with w.sessions.turn(ME, session_id):
                    raise KeyError
            for _ in range(2):
                with pytest.raises(NotFound):
                    await w.load("sess_nobody")
                with pytest.raises(NotFound):
                    await w.sessions.delete(ME, "sess_nobody")
            assert not w.sessions.is_busy("sess_nobody")
            with pytest.raises(NotFound) as caught:
                await w.load("x" * 100_000)
            assert len(caught.value.message) < 200
            assert (await w.advance(session_id, state())).turn == 1

    asyncio.run(main())


def test_exactly_one_of_many_gets_the_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            answers = await asyncio.gather(
                *(w.advance(session_id, state()) for _ in range(10)), return_exceptions=True
            )
            assert [type(answer) for answer in answers].count(SessionBusy) == 9
            assert (await w.sessions.get(ME, session_id)).turn == 1

    asyncio.run(main())


async def begin_to_commit(
    w: World, session_id: str, begun: asyncio.Event, go: asyncio.Event
) -> None:
    async with w.sessions.turn(ME, session_id) as turn:
        begun.set()
        await go.wait()
        await turn.commit(state(b"a"), "row")


@pytest.mark.parametrize("num_cancels", [1, 3])
def test_a_commit_outlives_its_caller_and_keeps_the_lock(tmp_path: Path, num_cancels: int) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id, begun, go = await w.new(), asyncio.Event(), asyncio.Event()
            caller = asyncio.create_task(begin_to_commit(w, session_id, begun, go))
            await begun.wait()
            async with writer_held(w.store):
                go.set()
                await until_waiting(w.store)
                for _ in range(num_cancels):
                    caller.cancel()
                    await asyncio.sleep(0.01)
                assert not caller.done()
                assert w.sessions.is_busy(session_id)
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert not w.sessions.is_busy(session_id)
            assert (await w.sessions.get(ME, session_id)).turn == 1
            assert await w.tier(session_id) == "device"
            assert await w.load(session_id) == state(b"a")

    asyncio.run(main())


def test_whoever_is_cancelled_while_a_commit_settles_learns_of_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id, begun, go = await w.new(), asyncio.Event(), asyncio.Event()
            went_on = list[str]()

            async def stubborn() -> None:
                async with w.sessions.turn(ME, session_id) as turn:
                    begun.set()
                    await go.wait()
                    with suppress(asyncio.CancelledError):
                        await turn.commit(state(b"a"), None)
                    assert turn.record.turn == 0
                    await turn.settle()
                    went_on.append(session_id)

            caller = asyncio.create_task(stubborn())
            await begun.wait()
            async with writer_held(w.store):
                go.set()
                for _ in range(3):
                    await asyncio.sleep(0.01)
                    caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert not went_on
            assert (await w.sessions.get(ME, session_id)).turn == 1

    asyncio.run(main())


def test_a_turn_cancelled_before_its_commit_never_happened(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id, begun, go = await w.new(), asyncio.Event(), asyncio.Event()
            caller = asyncio.create_task(begin_to_commit(w, session_id, begun, go))
            await begun.wait()
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert not w.sessions.is_busy(session_id)
            assert (await w.sessions.get(ME, session_id)).turn == 0
            assert await w.tier(session_id) is None

    asyncio.run(main())


def test_a_failed_commit_leaves_the_session_as_it_was(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            before = await w.advance(session_id, state(b"a"))
            held = w.held()
            [num_pages] = w.store._writer.db.execute("PRAGMA page_count").fetchone()
            w.store._writer.db.execute(f"PRAGMA max_page_count = {num_pages}")
            async with w.sessions.turn(ME, session_id) as turn:
                for _ in range(2):
                    with pytest.raises(StorageFailed, match="full"):
                        await turn.commit(replace(state(b"b"), recent=bytes(300_000)), "row")
                    assert turn.record == before
                    assert turn.warm is None
                    assert await turn.load() == state(b"a")
            assert await w.sessions.get(ME, session_id) == before
            assert w.held() == held
            w.store._writer.db.execute("PRAGMA max_page_count = 10000")
            assert (await w.advance(session_id, state(b"b"))).turn == 2

    asyncio.run(main())


def test_a_state_of_another_size_is_not_committed(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            before = await w.advance(session_id, state(b"a"))
            async with w.sessions.turn(ME, session_id) as turn:
                with pytest.raises(ValueError, match="bytes"):
                    await turn.commit(replace(state(b"b"), state=bytes(STATE_BYTES + 1)), None)
            assert await w.sessions.get(ME, session_id) == before
            assert await w.load(session_id) == state(b"a")

    asyncio.run(main())


@pytest.mark.parametrize(
    "blob",
    [b"", b"noise", Codec("0" * 64, SPEC, VOCAB).encode(state()), BLOB[:-1], BLOB[:-1] + b"x"],
)
def test_a_stored_state_that_cannot_be_read_is_named(tmp_path: Path, blob: bytes) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            await commit(w.store, session_id, 1, blob)
            for _ in range(2):
                with pytest.raises(StorageFailed, match=session_id):
                    await w.load(session_id)
            assert await w.tier(session_id) == "store"
            await w.sessions.delete(ME, session_id)

    asyncio.run(main())


def test_a_session_without_a_state_has_nothing_to_load(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            with pytest.raises(StorageFailed, match=f"{session_id} after turn 0 .*missing"):
                await w.load(session_id)

    asyncio.run(main())


def test_the_fastest_tier_is_reported(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes=2 * CACHED_BYTES) as w:
            names = [await w.new() for _ in range(3)]
            assert [await w.tier(name) for name in names] == [None] * 3
            assert w.held() == {"device": (0, 0), "host": (0, 0), "store": (3, 0)}
            await w.advance(names[0], state(b"a"), warm="row a")
            await w.advance(names[1], state(b"b"))
            await w.advance(names[2], state(b"c"))
            assert [await w.tier(name) for name in names] == ["device", "host", "host"]
            assert w.evictions("host") == 1
            stored = w.store.total.num_bytes
            assert stored > 3 * CACHED_BYTES
            assert w.held() == {
                "device": (1, STATE_BYTES),
                "host": (2, 2 * CACHED_BYTES),
                "store": (3, stored),
            }
            w.places.row_evicted("row of nobody")
            assert [w.evictions("device"), await w.tier(names[0])] == [0, "device"]
            w.places.row_evicted("row a")
            assert [w.evictions("device"), await w.tier(names[0])] == [1, "store"]
            assert w.held()["device"] == (0, 0)
            await w.load(names[0])
            assert [await w.tier(name) for name in names] == ["host", "store", "host"]
            assert w.evictions("host") == 2
            value = w.metrics.registry.get_sample_value("latentd_session_state_bytes")
            assert value == w.sessions.state_bytes == STATE_BYTES

    asyncio.run(main())


def test_a_warm_row_is_taken_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            await w.advance(session_id, state(b"a"), warm="row 1")
            async with w.sessions.turn(ME, session_id) as turn:
                assert [turn.warm, turn.take_warm()] == ["row 1", "row 1"]
                assert [turn.warm, turn.take_warm()] == [None, None]
                assert w.held()["device"] == (0, 0)
                turn.put_back_warm("row 1")
                assert w.held()["device"] == (1, STATE_BYTES)
                assert [turn.warm, turn.take_warm()] == ["row 1", "row 1"]
            assert await w.tier(session_id) == "host"
            await w.advance(session_id, state(b"b"), warm="row 2")
            w.places.row_evicted("row 1")
            assert await w.tier(session_id) == "device"

    asyncio.run(main())


def test_deletion_erases_everywhere(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            gone, stays = await w.new(), await w.new()
            await w.advance(gone, state(b"A"), warm="row")
            await w.advance(stays, state(b"B"))
            await w.sessions.delete(ME, gone)
            assert w.forgotten == ["row"]
            for call in (w.get, w.delete, w.load):
                with pytest.raises(NotFound) as caught:
                    await call(gone)
                assert (caught.value.status, caught.value.code) == (404, "session_not_found")
            assert gone not in w.cache
            assert b"A" * STATE_BYTES not in raw(tmp_path)
            assert b"B" * STATE_BYTES in raw(tmp_path)
            held = w.held()
            assert [held[tier][0] for tier in ("device", "host", "store")] == [0, 1, 1]
            await w.sessions.delete(ME, stays)
            assert w.forgotten == ["row"]
            assert w.held() == {"device": (0, 0), "host": (0, 0), "store": (0, 0)}

    asyncio.run(main())


def test_a_deletion_that_fails_keeps_no_state_in_memory(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            await w.advance(session_id, state(b"a"))
            await w.advance(session_id, state(b"a"), warm="row")
            forbid = forbidden(w.store, sqlite3.SQLITE_DELETE, "sessions")
            with forbid, pytest.raises(StorageFailed):
                await asyncio.wait_for(w.delete(session_id), PATIENCE_S)
            assert session_id not in w.cache
            assert w.forgotten == ["row"]
            assert await w.tier(session_id) == "store"
            assert await w.load(session_id) == state(b"a", turn=2)
            assert not w.sessions.is_busy(session_id)

    asyncio.run(main())


def test_sessions_are_listed_newest_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            made = [await w.new() for _ in range(5)]
            await w.advance(made[0], state())
            first = [found.id for found in await w.sessions.list(ME, 3, None)]
            rest = [found.id for found in await w.sessions.list(ME, 3, first[-1])]
            assert first + rest == made[::-1]
            assert await w.sessions.list(ME, 3, made[0]) == []

    asyncio.run(main())


@pytest.mark.parametrize("after", ["", "sess_nobody", "x" * 100_000])
def test_a_page_after_nobody_is_refused(tmp_path: Path, after: str) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.new()
            with pytest.raises(InvalidRequest) as caught:
                await w.sessions.list(ME, 3, after)
            assert (caught.value.status, caught.value.param) == (400, "after")
            assert len(caught.value.message) < 200

    asyncio.run(main())

"""A turn in the ledger: it starts from exactly one state, and ends once, atomically."""

import asyncio
import errno
import json
import sqlite3
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from model.state import split_state
from server.api.generation.turn import run_to_end
from server.errors import (
    InternalError,
    InvalidRequest,
    LatentdError,
    NotFound,
    ResponseDamaged,
    ResponseGone,
    SessionDamaged,
    StateDamaged,
    StorageFailed,
    StorageFull,
)
from server.sessions.codec import Codec, SessionState
from server.sessions.ledger import AfterResponse, NextTurn, SessionHead, new_state_id
from server.sessions.ledger_turn import LedgerTurn
from server.sessions.store import Entry, EntryKind, NewState, StoreUsage
from tests.patience import PATIENCE_S, until
from tests.server.sessions.stores import (
    FILES,
    KINDS,
    forbidden,
    full_disk,
    raw,
    state_files,
    states_in_files,
    unreadable,
    until_queued,
    writer_held,
    written,
)
from tests.server.sessions.worlds import (
    CODEC,
    ME,
    SPEC,
    STATE_BYTES,
    VOCAB,
    World,
    body,
    state,
    world,
)

BLOB = CODEC.encode(state())


@pytest.fixture(params=[False, True], ids=["in SQLite", "in files"])
def are_large(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether states are stored in files."""
    with states_in_files(1 if request.param else 1 << 20):
        yield request.param


@asynccontextmanager
async def going_on(w: World, start: Entry) -> AsyncIterator[LedgerTurn]:
    """The next turn of a session, or a response after a response."""
    is_session = start.kind == "session"
    opened = w.next_turn(start.id) if is_session else w.making("next", start.id)
    async with opened as turn:
        yield turn


def end_of(turn: LedgerTurn) -> str | None:
    return body() if turn.needs_body else None


async def commit(turn: LedgerTurn, after: SessionState, state_id: str | None = None) -> Entry:
    await turn.commit(after, state_id or new_state_id(), end_of(turn))
    assert turn.entry is not None
    return turn.entry


async def of_me(w: World, entry: Entry) -> Entry:
    return await w.ledger.get(ME, entry.kind, entry.id)


async def replace_blob(w: World, entry: Entry, blob: bytes) -> None:
    await w.store._run(
        lambda db: db.execute(
            "UPDATE checkpoints SET blob = ? WHERE state_id = ?", [blob, entry.state_id]
        )
    )


def test_a_turn_moves_the_session_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            made = await w.ledger.create(ME, {"k": "v"})
            for number in (1, 2):
                async with w.next_turn(made.id) as turn:
                    assert (turn.start is None) == (number == 1)
                    assert not turn.needs_body
                    await turn.commit(state(position=5 * number), f"state {number}", None)
                after = turn.entry
                assert after is not None
                assert after == replace(
                    made,
                    turn=number,
                    num_tokens=5 * number,
                    num_checkpoints=number,
                    state_id=f"state {number}",
                    last_used_at=after.last_used_at,
                )
                assert after.last_used_at > made.last_used_at
                assert after == await w.get(made.id)

    asyncio.run(main())


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("reopened", [False, True])
def test_what_is_loaded_is_what_was_committed(
    tmp_path: Path, cache_bytes: int, reopened: bool, are_large: bool
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
        assert len(state_files(tmp_path)) == (3 if are_large else 0)

    asyncio.run(main())


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_response_continues_from_any_earlier_one_also_after_a_restart(
    tmp_path: Path, cache_bytes: int, are_large: bool
) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes) as w:
            async with w.making("a") as turn:
                assert (turn.start, turn.needs_body, turn.start_id) == (None, True, "")
                assert await turn.load() is None
                await turn.commit(state(b"a"), "state a", body(mark="a"))
                made = turn.entry
                assert made == await w.response("a")
            assert made.body == body(mark="a")
            assert (made.status, made.num_tokens, made.state_id) == ("completed", 5, "state a")
            assert made.is_finished
            await w.respond("b", b"b", "a")
            await w.respond("c", b"c", "b")
        async with world(tmp_path, cache_bytes) as w:
            for number, previous in enumerate("abcab"):
                async with w.making(f"{number}", previous) as turn:
                    assert turn.start_id == (await w.response(previous)).state_id
                    assert await turn.load() == state(previous.encode())
                    await turn.commit(state(b"%d" % number), new_state_id(), body("incomplete"))
            for name in "abc01234":
                assert await w.after(name) == state(name.encode())
            assert (await w.response("4")).status == "incomplete"
            assert w.value("responses") == 8
            bodies = [(await w.response(name)).body or "" for name in "abc01234"]
            held = 8 * len(BLOB) + sum(map(len, bodies))
            assert w.held()["store"] == (0, held)
        assert len(state_files(tmp_path)) == (8 if are_large else 0)

    asyncio.run(main())


def test_many_branch_from_one_at_the_same_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            root = await w.respond("root", b"r", has_row=True)
            begun, all_begun = list[bytes](), asyncio.Event()

            async def branch(mark: bytes) -> None:
                async with w.making(f"branch {mark!r}", "root") as turn:
                    assert turn.start_id == root.state_id
                    assert await turn.load() == state(b"r")
                    begun.append(mark)
                    if len(begun) == len(marks):
                        all_begun.set()
                    await all_begun.wait()
                    await commit(turn, state(mark))

            marks = [b"%c" % number for number in range(97, 109)]
            await asyncio.gather(*(branch(mark) for mark in marks))
            for mark in marks:
                assert await w.after(f"branch {mark!r}") == state(mark)
            assert await w.response("root") == root

    asyncio.run(main())


def test_a_turn_of_which_nothing_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.respond("a", b"a")
            before = w.store.total
            async with w.turn(AfterResponse("a"), None) as turn:
                assert (turn.entry, turn.needs_body, turn.state_id) == (None, False, None)
                assert await turn.load() == state(b"a")
                for call in (turn.store_pending(body()), turn.commit(state(), "id", body())):
                    with pytest.raises(InternalError):
                        await call
                await turn.abandon(body())
            async with w.turn(None, None) as turn:
                assert await turn.load() is None
            assert w.store.total == before

    asyncio.run(main())


def test_a_cached_state_needs_no_store(tmp_path: Path, are_large: bool) -> None:
    del are_large

    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            await w.advance(session_id, state(b"a"))
            async with w.next_turn(session_id) as turn:
                with unreadable(w.store):
                    assert await turn.load() == state(b"a")
        async with world(tmp_path) as w:
            async with w.next_turn(session_id) as turn:
                with unreadable(w.store), pytest.raises(StorageFailed):
                    await turn.load()
                async with writer_held(w.store):  # no commit keeps it waiting
                    assert await asyncio.wait_for(turn.load(), PATIENCE_S) == state(b"a")
                with unreadable(w.store):
                    assert await turn.load() == state(b"a")
            assert w.value("session_load_seconds_count") == 3

    asyncio.run(main())


def test_a_commit_caches_the_new_state_and_forgets_the_one_before(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            made = [await w.advance(name, state(mark)) for mark in (b"a", b"b", b"c")]
            assert [w.is_cached(entry) for entry in made] == [False, False, True]
            assert w.held()["host"][0] == 1
            await w.respond("r", b"r")
            await w.respond("s", b"s", "r")
            assert w.held()["host"][0] == 3  # a response stays
            assert w.value("session_commit_seconds_count") == 5

    asyncio.run(main())


@pytest.mark.parametrize("num_cancels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_commit_outlives_its_caller_and_keeps_the_lock(
    tmp_path: Path, kind: EntryKind, num_cancels: int, are_large: bool
) -> None:
    del are_large

    async def main() -> None:
        async with world(tmp_path) as w:
            start, go = await w.made(kind, b"a"), asyncio.Event()
            opened = list[LedgerTurn]()

            async def run() -> None:
                async with going_on(w, start) as turn:
                    opened.append(turn)
                    await go.wait()
                    await run_to_end(turn.commit(state(b"b"), "after", end_of(turn)))

            caller = asyncio.create_task(run())
            await until(lambda: bool(opened))
            made = opened[0].entry
            assert made is not None
            async with writer_held(w.store):
                go.set()
                await until_queued(w.store)
                for _ in range(num_cancels):
                    caller.cancel()
                    await asyncio.sleep(0)
                assert not caller.done()
                assert w.ledger.is_busy(made.id)
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert not w.ledger.is_busy(made.id)
            after = await of_me(w, made)
            assert after.turn == made.turn + 1
            assert w.ledger.tier(after) == "host"
            assert await w.state_of(after) == state(b"b", turn=after.turn)

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_commit_that_is_cancelled_itself_is_whole(
    tmp_path: Path, kind: EntryKind, are_large: bool
) -> None:
    """As at the end of the event loop: work queued for the store's thread is done."""

    async def main() -> None:
        async with world(tmp_path, cache_bytes=0) as w:
            start = await w.made(kind, b"a")
            async with going_on(w, start) as turn:
                made = turn.entry
                assert made is not None
                async with writer_held(w.store):
                    committing = asyncio.create_task(commit(turn, state(b"b"), "after"))
                    await until_queued(w.store)
                    committing.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await committing
            await written(w.store)
            after = await of_me(w, made)
            assert after.state_id == "after"
            assert await w.state_of(after) == state(b"b", turn=after.turn)
            assert ("after" in state_files(tmp_path)) == are_large

    asyncio.run(main())


def test_a_turn_cancelled_before_its_commit_never_happened(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id, begun = await w.new(), asyncio.Event()

            async def run() -> None:
                async with w.next_turn(session_id):
                    begun.set()
                    await asyncio.Event().wait()

            caller = asyncio.create_task(run())
            await begun.wait()
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert not w.ledger.is_busy(session_id)
            assert (await w.get(session_id)).turn == 0
            assert await w.tier(session_id) is None
            with suppress(RuntimeError):
                async with w.making("a"):
                    raise RuntimeError
            with pytest.raises(NotFound):
                await w.response("a")
            assert w.store.total == StoreUsage(num_sessions=1)
            await w.respond("a", b"a")  # nothing of the first attempt is in the way

    asyncio.run(main())


def test_the_end_is_durable_before_the_commit_returns(tmp_path: Path, are_large: bool) -> None:
    del are_large

    async def main() -> None:
        async with world(tmp_path) as w:
            async with writer_held(w.store):
                committing = asyncio.create_task(w.respond("a", b"a"))
                await until_queued(w.store)
                assert not committing.done()
            await committing

    asyncio.run(main())


def broken(w: World) -> AbstractContextManager[None]:
    return forbidden(w.store, sqlite3.SQLITE_TRANSACTION, "COMMIT")


def full(w: World) -> AbstractContextManager[None]:
    return full_disk(w.store)


@contextmanager
def full_for_files(w: World) -> Iterator[None]:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w.store._files, "write", write)
        yield


FAULTS: list[tuple[Callable[[World], AbstractContextManager[None]], type[StorageFailed], bool]] = [
    (broken, StorageFailed, False),
    (broken, StorageFailed, True),
    (full, StorageFull, False),
    (full, StorageFull, True),
    (full_for_files, StorageFull, True),
]


@pytest.mark.parametrize("kind", ["session", "response", "pending"])
@pytest.mark.parametrize(("fault", "expected", "is_large"), FAULTS)
def test_a_failed_commit_leaves_everything_unchanged(
    tmp_path: Path,
    kind: str,
    fault: Callable[[World], AbstractContextManager[None]],
    expected: type[StorageFailed],
    is_large: bool,
) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            start = await w.made("session" if kind == "session" else "response", b"a", has_row=True)
            async with going_on(w, start) as turn:
                if kind == "pending":
                    await turn.store_pending(body("queued"))
                before, files = (turn.entry, w.held(), w.store.total), state_files(tmp_path)
                with fault(w):
                    for number in (1, 2):
                        with pytest.raises(expected) as caught:
                            await commit(turn, replace(state(b"b"), recent=bytes(300_000)), "after")
                        assert caught.value.status == (507 if expected is StorageFull else 503)
                        assert (turn.entry, w.held(), w.store.total) == before
                        assert state_files(tmp_path) == files
                        assert "after" not in w.cache
                        assert w.metrics.session_commit_failures_total._value.get() == number
                        assert await turn.load() == state(b"a")
                assert (await of_me(w, start)).state_id == start.state_id
                assert w.ledger.tiers.tier(start) == "device"
                after = await commit(turn, state(b"b"), "after")  # under the same name
            assert await w.state_of(after) == state(b"b", turn=after.turn)
            assert ("after" in state_files(tmp_path)) == is_large

    with states_in_files(1 if is_large else 1 << 20):
        asyncio.run(main())


def test_after_a_failed_commit_a_stored_response_fails(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.making("a") as turn:
                await turn.store_pending(body("in_progress"))
                with broken(w), pytest.raises(StorageFailed):
                    await commit(turn, state(b"a"))
                await turn.abandon(body("failed"))
            found = await w.response("a")
            assert (found.status, found.body, found.state_id) == ("failed", body("failed"), None)

    asyncio.run(main())


def test_a_state_of_another_size_is_not_committed(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            session_id = await w.new()
            before = await w.advance(session_id, state(b"a"))
            async with w.next_turn(session_id) as turn:
                with pytest.raises(ValueError, match="bytes"):
                    await commit(turn, replace(state(b"b"), state=bytes(STATE_BYTES + 1)))
            assert await w.get(session_id) == before
            assert await w.load(session_id) == state(b"a")

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("place", "tensor"), [(0, "m"), (1, "h")])
def test_a_state_that_is_not_sound_is_not_committed(
    tmp_path: Path, kind: EntryKind, place: int, tensor: str
) -> None:
    arrays = split_state(SPEC, bytearray(STATE_BYTES))
    arrays[tensor].flat[1] = np.nan if place else -np.inf
    damaged = b"".join(values.tobytes() for values in arrays.values())

    async def main() -> None:
        async with world(tmp_path) as w:
            start = await w.made(kind, b"a", has_row=True)
            async with going_on(w, start) as turn:
                before = (turn.entry, w.held(), w.store.total)
                with pytest.raises(StateDamaged, match=f"1 of the .* tensor {tensor}") as caught:
                    await commit(turn, replace(state(b"b"), state=damaged), "after")
                assert (caught.value.status, caught.value.code) == (500, "state_damaged")
                assert (turn.entry, w.held(), w.store.total) == before
                assert "after" not in w.cache
                assert await turn.load() == state(b"a")
                await commit(turn, state(b"c", position=9), "after")
            value = w.metrics.registry.get_sample_value
            counted = {"turn": 1, "idle": 0, "store": 0}
            for found, count in counted.items():
                assert value("latentd_damaged_states_total", {"found": found}) == count
            assert value("latentd_state_position") == 9
            assert value("latentd_state_magnitude") == CODEC.check(state(b"c"))
            assert value("latentd_session_commit_failures_total") == 0

    asyncio.run(main())


def test_a_session_that_moved_meanwhile_is_not_advanced(tmp_path: Path, are_large: bool) -> None:
    """As when another program wrote to the store."""
    del are_large

    async def main() -> None:
        async with world(tmp_path) as w:
            start = await w.made("session", b"a")
            async with w.next_turn(start.id) as turn:
                moved = replace(start, turn=2, state_id=None)
                await w.store.advance(moved, NewState("moved", CODEC.encode(state(b"m"))), 8)
                files = state_files(tmp_path)
                with pytest.raises(StorageFailed, match=r"is no longer at turn 1"):
                    await commit(turn, state(b"b"))
            assert (await w.get(start.id)).state_id == "moved"
            assert state_files(tmp_path) == files

    asyncio.run(main())


FOREIGN = Codec("0" * 64, SPEC, VOCAB, "int8 x int8").encode(state())
DAMAGED = [b"", b"noise", FOREIGN, BLOB[:-1], BLOB[:-1] + b"x"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blob", DAMAGED)
def test_a_stored_state_that_cannot_be_read_is_named_and_others_are_good(
    tmp_path: Path, kind: EntryKind, blob: bytes, are_large: bool
) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes=0) as w:
            made, other = await w.made(kind, b"a"), await w.made(kind, b"b")
            if are_large:
                (tmp_path / FILES / (made.state_id or "")).write_bytes(blob)
            else:
                await replace_blob(w, made, blob)
            for _ in range(2):
                await check_damaged(w, made, "")
            # what another model made is not damaged
            count = 0 if blob == DAMAGED[2] else 2
            assert w.metrics.damaged_states_total.labels(found="store")._value.get() == count
            assert w.ledger.tier(made) == "store"
            assert await w.state_of(other) == state(b"b")
            await w.ledger.delete(ME, kind, made.id)

    asyncio.run(main())


async def check_damaged(w: World, entry: Entry, reason: str) -> None:
    is_session = entry.kind == "session"
    expected = SessionDamaged if is_session else ResponseDamaged
    async with going_on(w, entry) as turn:
        with pytest.raises(expected, match=rf"{entry.kind} {entry.id} .*{reason}") as caught:
            await turn.load()
        assert type(turn.damaged("why")) is expected
    assert (caught.value.status, caught.value.code) == (503, f"{entry.kind}_damaged")
    assert caught.value.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_damage(tmp_path: Path, kind: EntryKind) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes=0) as w:
            made = await w.made(kind, b"a")
            (tmp_path / FILES / (made.state_id or "")).unlink()
            await check_damaged(w, made, "missing")
            await w.ledger.delete(ME, kind, made.id)
            assert w.store.total == StoreUsage()

    with states_in_files():
        asyncio.run(main())


def test_after_damage_an_earlier_turn_is_still_good(tmp_path: Path, are_large: bool) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes=0) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            newest = await w.advance(name, state(b"b"))
            if are_large:
                path = tmp_path / FILES / (newest.state_id or "")
                path.write_bytes(path.read_bytes()[:-1] + b"?")
            else:
                await replace_blob(w, newest, CODEC.encode(state(b"b", turn=2))[:-1] + b"?")
            with pytest.raises(SessionDamaged, match=r"after turn 2 .*checksum.*rewind"):
                await w.load(name)
            await w.ledger.rewind(ME, name, 1)
            assert await w.load(name) == state(b"a")
            assert (await w.advance(name, state(b"c"))).turn == 2

    asyncio.run(main())


def test_a_session_whose_checkpoint_is_gone_does_not_start_afresh(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            await w.advance(name, state(b"b"))
            await w.store._run(lambda db: db.execute("DELETE FROM checkpoints WHERE turn = 2"))
            found = await w.get(name)
            assert (found.turn, found.state_id, w.ledger.tier(found)) == (2, None, None)
            await check_damaged(w, found, "missing")
            for turn in (None, 2):
                for call in (w.ledger.fork, w.ledger.export):
                    with pytest.raises(NotFound, match=r"of turn 2; .*: 1"):
                        await call(ME, name, turn)
            await w.ledger.rewind(ME, name, 1)
            assert await w.load(name) == state(b"a")

    asyncio.run(main())


def test_no_tier_answers_with_the_state_of_another_turn(tmp_path: Path) -> None:
    """Even if erasing from a tier was missed."""

    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            await w.advance(name, state(b"b"), has_row=True)
            rewound = await w.store.rewind(name, 1, 0.0)
            assert rewound is not None
            assert w.ledger.tier(rewound) == "store"
            async with w.next_turn(name) as turn:
                assert turn.start_id == rewound.state_id
                assert await turn.load() == state(b"a")

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_erased_while_it_is_read_is_not_cached(
    tmp_path: Path, kind: EntryKind
) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            made, other = await w.made(kind, b"a"), await w.made("session", b"b")
            start = made if kind == "response" else await w.ledger.fork(ME, made.id, 1)
            w.tiers.forget(made.state_id)
            found, go = asyncio.Event(), asyncio.Event()
            real = w.store.load

            async def load(entry_id: str, turn: int) -> bytes | None:
                blob = await real(entry_id, turn)
                found.set()
                await go.wait()
                return blob

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(w.store, "load", load)
                loading = asyncio.create_task(w.state_of(start))
                await found.wait()
                await w.ledger.delete(ME, kind, made.id)
                go.set()
                assert await loading == state(b"a")
            assert not w.is_cached(made)
            assert await w.state_of(other) == state(b"b")

    asyncio.run(main())


def test_a_response_that_is_deleted_while_a_turn_continues_it(
    tmp_path: Path, are_large: bool
) -> None:
    del are_large

    async def main() -> None:
        async with world(tmp_path) as w:
            gone = await w.respond("a", b"a", has_row=True)
            async with w.making("b", "a") as turn:
                await w.delete_response("a")
                with pytest.raises(NotFound, match="no response a") as caught:
                    await turn.load()
                assert caught.value.param == "previous_response_id"
                await commit(turn, state(b"b"))
            assert w.released == [gone.state_id]
            assert not w.is_cached(gone)
            assert b"a" * STATE_BYTES not in raw(tmp_path)
            assert await w.after("b") == state(b"b")

    asyncio.run(main())


def test_a_response_in_the_background(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.making("a", ttl_s=60.0) as turn:
                await turn.store_pending(body("queued"))
                made = turn.entry
                assert made is not None
                assert await w.response("a") == made
                assert (made.status, made.is_finished, made.state_id) == ("queued", False, None)
                assert made.expires_at == made.created_at + 60.0
                assert w.value("responses") == 1
                after = await commit(turn, state(b"a"), "after")
                await turn.abandon(body("cancelled"))  # after its end
            assert await w.response("a") == after
            assert after == replace(
                made,
                turn=1,
                last_used_at=after.last_used_at,
                status="completed",
                body=body(),
                num_tokens=5,
                state_id="after",
                num_checkpoints=1,
            )
            assert await w.after("a") == state(b"a")
            assert w.store.total == StoreUsage(0, 1, 1, len(BLOB) + len(body()))

    asyncio.run(main())


def test_of_two_ends_the_first_counts(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.making("a") as turn:
                await turn.store_pending(body("in_progress"))
                await turn.abandon(body("cancelled"))
                with pytest.raises(InternalError, match="nothing to commit"):
                    await commit(turn, state(b"a"))
                await turn.abandon(body("failed"))
            assert (await w.response("a")).status == "cancelled"
            async with w.making("b") as turn:
                await turn.store_pending(body("in_progress"))
                async with writer_held(w.store):
                    committing = asyncio.create_task(commit(turn, state(b"b")))
                    await until_queued(w.store)
                    await turn.abandon(body("cancelled"))
                await committing
            assert (await w.response("b")).status == "completed"
            async with w.next_turn(await w.new()) as turn:
                await commit(turn, state(b"c"))
                with pytest.raises(InternalError, match="nothing to commit"):
                    await commit(turn, state(b"d"))

    asyncio.run(main())


def test_what_is_abandoned_leaves_nothing_unless_it_was_stored(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.making("a") as turn:
                await turn.abandon(body("failed"))
            async with w.next_turn(await w.new()) as turn:
                await turn.abandon(body("failed"))
            assert w.store.total == StoreUsage(num_sessions=1)
            async with w.making("b") as turn:
                await turn.store_pending(body("queued"))
                await turn.abandon(None)  # its end is not known
                assert (await w.response("b")).status == "queued"

    asyncio.run(main())


@pytest.mark.parametrize("wrong", ["[]", "{}", '{"status": "done"}', "no", None])
def test_a_response_is_not_stored_without_a_body_that_shows_its_status(
    tmp_path: Path, wrong: str | None
) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.making("a") as turn:
                with pytest.raises((ValueError, KeyError, TypeError, InternalError)):
                    await turn.commit(state(b"a"), new_state_id(), wrong)
                if wrong is not None:
                    with pytest.raises((ValueError, KeyError, TypeError)):
                        await turn.store_pending(wrong)
            assert w.store.total == StoreUsage()

    asyncio.run(main())


def test_a_turn_with_a_key_is_not_committed_without_its_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            async with w.turn(SessionHead(name), NextTurn("key", "asked")) as turn:
                with pytest.raises(InternalError, match="without its answer"):
                    await turn.commit(state(), new_state_id(), None)
            assert (await w.get(name)).turn == 0

    asyncio.run(main())


@asynccontextmanager
async def held(target: object, method: str) -> AsyncIterator[Callable[[], bool]]:
    """Within the context a thread that calls the method blocks; yields whether one does."""
    reached, go, real = threading.Event(), threading.Event(), getattr(target, method)

    def call(*arguments: object) -> object:
        reached.set()
        assert go.wait(PATIENCE_S)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, method, call)
        try:
            yield reached.is_set
        finally:
            go.set()


@asynccontextmanager
async def held_at(w: World, phase: str) -> AsyncIterator[Callable[[], bool]]:
    """Within the context a commit blocks at this phase; yields whether it has reached it."""
    match phase:
        case "encoding":
            async with held(CODEC, "encode") as is_there:
                yield is_there
        case "file":
            async with held(w.store._files, "write") as is_there:
                yield is_there
        case _:
            async with writer_held(w.store):
                yield lambda: w.store._writer._jobs.qsize() > 0


async def check_gone(w: World, folder: Path) -> None:
    """Nothing of a response "a" remains, and it cannot be deleted again."""
    for call in (w.response, w.delete_response):
        with pytest.raises(NotFound):
            await call("a")
    assert (w.store.total, w.value("responses"), w.held()["host"][0]) == (StoreUsage(), 0, 0)
    assert state_files(folder) == set()
    assert b"a" * STATE_BYTES not in raw(folder)


PHASES = [
    *(("before", False), ("before", True), ("encoding", False), ("encoding", True)),
    *(("file", True), ("store", False), ("store", True)),
]


@pytest.mark.parametrize("is_pending", [False, True])
@pytest.mark.parametrize(("phase", "is_large"), PHASES)
def test_what_is_deleted_while_it_is_made_does_not_come_back(
    tmp_path: Path, is_pending: bool, phase: str, is_large: bool
) -> None:
    """Before the commit, while it encodes the state, writes its file, and writes the response."""

    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.making("a") as turn:
                if is_pending:
                    await turn.store_pending(body("queued"))
                if phase == "before":
                    await w.delete_response("a")
                    with pytest.raises(ResponseGone) as caught:
                        await commit(turn, state(b"a"), "after")
                else:
                    async with held_at(w, phase) as is_there:
                        committing = asyncio.create_task(commit(turn, state(b"a"), "after"))
                        await until(is_there)
                        deleting = asyncio.create_task(w.delete_response("a"))
                        await until(lambda: turn.is_deleted)
                    await deleting
                    with pytest.raises(ResponseGone) as caught:
                        await committing
                assert caught.value.status == 409
                await turn.abandon(body("cancelled"))
                assert "after" not in w.cache
                with pytest.raises(NotFound):
                    await w.delete_response("a")
            await check_gone(w, tmp_path)

    with states_in_files(1 if is_large else 1 << 20):
        asyncio.run(main())


def test_what_is_deleted_after_its_commit_but_before_its_end_is_erased(
    tmp_path: Path, are_large: bool
) -> None:
    del are_large

    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.making("a") as turn:
                after = await commit(turn, state(b"a"))
                w.tiers.row_retained(after.state_id or "")
                await w.delete_response("a")
                assert w.released == [after.state_id]
            await check_gone(w, tmp_path)

    asyncio.run(main())


@pytest.mark.parametrize("is_held", [False, True])
def test_what_is_deleted_before_it_is_stored_is_not_stored(tmp_path: Path, is_held: bool) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.making("a") as turn:
                if is_held:
                    async with writer_held(w.store):
                        storing = asyncio.create_task(turn.store_pending(body("queued")))
                        await until_queued(w.store)
                        deleting = asyncio.create_task(w.delete_response("a"))
                        await until(lambda: turn.is_deleted)
                    await deleting
                else:
                    await w.delete_response("a")
                    storing = asyncio.create_task(turn.store_pending(body("queued")))
                with pytest.raises(ResponseGone):
                    await storing
                with pytest.raises(ResponseGone):
                    await commit(turn, state(b"a"))
            await check_gone(w, tmp_path)

    asyncio.run(main())


def test_two_deletions_of_what_is_being_made(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.making("a") as turn:
                await turn.store_pending(body("queued"))
                async with writer_held(w.store):
                    both = asyncio.gather(
                        *(w.delete_response("a") for _ in range(2)), return_exceptions=True
                    )
                    await until_queued(w.store, 2)
                first, second = await both
                assert first is None
                assert second is None or isinstance(second, NotFound)
                with pytest.raises(ResponseGone):
                    await commit(turn, state(b"a"))
            await check_gone(w, tmp_path)

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


class Model:
    """The expected content of a ledger of responses and sessions forked from them."""

    def __init__(self) -> None:
        self.states: dict[str, bytes | None] = {}
        self.making: dict[str, tuple[LedgerTurn, AbstractAsyncContextManager[LedgerTurn]]] = {}
        self.num_sessions = 0

    async def close(self, name: str) -> LedgerTurn:
        turn, opened = self.making.pop(name)
        await opened.__aexit__(None, None, None)
        return turn

    async def step(self, w: World, number: int, step: Step) -> None:
        what, which, from_which = step
        name, mark = f"r{which}", b"%c" % (number + 60)
        previous = None if from_which < 0 else f"r{from_which}"
        match what:
            case "pend" | "respond" if name not in self.states:
                if previous is not None and self.states.get(previous) is None:
                    with pytest.raises((NotFound, InvalidRequest)):
                        await w.respond(name, mark, previous)
                elif what == "respond":
                    await w.respond(name, mark, previous, has_row=True)
                    self.states[name] = mark
                else:
                    opened = w.making(name, previous)
                    turn = await opened.__aenter__()
                    self.making[name] = (turn, opened)
                    await turn.store_pending(body("queued"))
                    self.states[name] = None
            case "finish" if name in self.making:
                turn = self.making[name][0]
                if turn.is_deleted:
                    with pytest.raises(ResponseGone):
                        await commit(turn, state(mark))
                else:
                    await commit(turn, state(mark))
                    self.states[name] = mark
                await self.close(name)
            case "fail" if name in self.making:
                await self.making[name][0].abandon(body("failed"))
                await self.close(name)
            case "delete":
                if name in self.states:
                    await w.delete_response(name)
                    del self.states[name]
                    if name in self.making:
                        turn = self.making[name][0]
                        with pytest.raises(LatentdError):
                            await commit(turn, state(mark))
                        await self.close(name)
                else:
                    with pytest.raises(NotFound):
                        await w.delete_response(name)
            case "session" if self.states.get(name) is not None:
                made = await w.ledger.fork_response(ME, name, {}, None)
                loaded = await w.load(made.id)
                assert loaded is not None
                assert loaded.state[:1] == self.states[name]
                self.num_sessions += 1

    async def check(self, w: World, folder: Path) -> None:
        for name, mark in self.states.items():
            if mark is not None:
                loaded = await w.after(name)
                assert loaded is not None
                assert loaded.state[:1] == mark
        usage = await w.store.usage(ME)
        assert usage.num_responses == len(self.states) == w.value("responses")
        states = sum(mark is not None for mark in self.states.values())
        assert usage.num_states == states + self.num_sessions
        assert usage.num_sessions == self.num_sessions
        bodies = [(await w.response(name)).body or "" for name in self.states]
        held = usage.num_states * len(BLOB) + sum(len(found.encode()) for found in bodies)
        assert usage.num_bytes == held
        assert all(json.loads(found)["object"] == "response" for found in bodies)
        kept = w.store._run(lambda db: db.execute("SELECT DISTINCT state_id FROM checkpoints"))
        assert state_files(folder) == {state_id for (state_id,) in (await kept).fetchall()}


@given(STEPS)
@settings(max_examples=20, deadline=None, phases=[Phase.generate])
def test_whatever_is_done_each_response_answers_with_its_own_state(steps: Sequence[Step]) -> None:
    """Against a model: which responses there are, and the state after each."""

    async def main(folder: Path) -> None:
        model, left = Model(), list(enumerate(steps))
        while left:
            async with world(folder) as w:
                await w.ledger.recover()
                while left and left[0][1][0] != "restart":
                    await model.step(w, *left.pop(0))
                    await model.check(w, folder)
                del left[:1]
                num_making = len(model.making)
                for name in list(model.making):
                    await model.close(name)
            async with world(folder) as w:
                assert await w.ledger.recover() == num_making

    with tempfile.TemporaryDirectory() as folder, states_in_files():
        asyncio.run(main(Path(folder)))

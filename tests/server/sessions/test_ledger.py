"""The ledger: access, lifetimes, and complete erasure."""

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import (
    IncompatibleState,
    InvalidRequest,
    KeyReused,
    LatentdError,
    NotFound,
    QuotaExceeded,
    SessionBusy,
    StorageFailed,
    TurnMismatch,
)
from server.sessions.clock import Clock
from server.sessions.ledger import (
    AfterResponse,
    NewResponse,
    NewSession,
    NextTurn,
    SessionHead,
    Source,
    Target,
    new_response_id,
    new_state_id,
)
from server.sessions.quota import Quotas
from server.sessions.store import Entry, EntryKind, StoredAnswer, StoreUsage
from tests.server.sessions.stores import (
    KINDS,
    forbidden,
    raw,
    state_files,
    states_in_files,
    until_queued,
    writer_held,
)
from tests.server.sessions.worlds import CODEC, ME, STATE_BYTES, World, body, state, world

BLOB = CODEC.encode(state())


@pytest.fixture(params=[False, True], ids=["in SQLite", "in files"], autouse=True)
def are_large(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether states are stored in files."""
    with states_in_files(1 if request.param else 1 << 20):
        yield request.param


@contextmanager
def at(seconds: float) -> Iterator[None]:
    """The ledger's clock, this many seconds from now."""
    real = Clock.now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clock, "now", lambda clock: real(clock) + seconds)
        yield


async def not_found(
    what: Awaitable[object], kind: EntryKind = "session", param: str | None = None
) -> None:
    with pytest.raises(NotFound) as caught:
        await what
    error = caught.value
    assert (error.status, error.code) == (404, f"{kind}_not_found")
    assert error.param == (param or f"{kind}_id")
    assert len(error.message) < 200


async def begin(w: World, owner: str, source: Source, target: Target) -> None:
    """A turn that is abandoned."""
    async with w.ledger.begin(owner, source, target):
        pass


def test_ids_are_long_and_never_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            sessions = {await w.new() for _ in range(50)}
            responses = {new_response_id() for _ in range(50)}
            assert len(sessions) == len(responses) == 50
            assert all(name.startswith("sess_") and len(name) >= 37 for name in sessions)
            assert all(name.startswith("resp_") and len(name) >= 37 for name in responses)
            states = {new_state_id() for _ in range(50)}
            assert len(states) == 50
            assert all(name.isalnum() and len(name) == 32 for name in states)

    asyncio.run(main())


def test_a_new_session_survives_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            made = await w.ledger.create(ME, {"topic": "cats"}, 60.0)
            assert made == await w.get(made.id)
            assert (made.turn, made.num_tokens, made.metadata) == (0, 0, {"topic": "cats"})
            assert made.created_at == made.last_used_at > 1.7e9
            assert made.expires_at == made.created_at + 60.0
        async with world(tmp_path) as w:
            assert await w.get(made.id) == made

    asyncio.run(main())


def test_a_session_can_begin_with_a_turn_also_from_a_response(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.respond("a", b"a")
            for source in (None, AfterResponse("a")):
                async with w.turn(source, NewSession({"k": "v"}, 60.0)) as turn:
                    loaded = await turn.load()
                    assert loaded == (None if source is None else state(b"a"))
                    assert not turn.needs_body
                    await turn.commit(state(b"s"), new_state_id(), None)
                made = turn.entry
                assert made is not None
                assert made == await w.get(made.id)
                assert (made.turn, made.num_checkpoints, made.ttl_s) == (1, 1, 60.0)
                assert await w.load(made.id) == state(b"s")
            async with w.turn(None, NewSession({}, None)):
                pass
            assert len(await w.ledger.list(ME, "session", 10, None)) == 2

    asyncio.run(main())


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (SessionHead("s"), None),
        (SessionHead("s"), NewSession()),
        (SessionHead("s"), NewResponse("r")),
        (None, NextTurn()),
        (AfterResponse("r"), NextTurn()),
    ],
)
def test_a_head_and_a_next_turn_belong_together(
    tmp_path: Path, source: Source, target: Target
) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            with pytest.raises(ValueError, match="head"):
                await begin(w, ME, source, target)

    asyncio.run(main())


@pytest.mark.parametrize("has_row", [False, True])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_rewound_session_continues_from_the_earlier_state(
    tmp_path: Path, has_row: bool, cache_bytes: int
) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes) as w:
            name = await w.new()
            for mark in (b"a", b"b", b"c"):
                newest = await w.advance(name, state(mark), has_row=has_row)
            w.released.clear()
            assert (await w.ledger.rewind(ME, name, 2)).turn == 2
            assert w.released == ([newest.state_id] if has_row else [])
            assert not w.is_cached(newest)
            assert await w.load(name) == state(b"b", turn=2)
            after = await w.advance(name, state(b"d"))
            assert (after.turn, after.num_checkpoints) == (3, 3)
            assert await w.load(name) == state(b"d", turn=3)
            assert [c.turn for c in await w.ledger.checkpoints(ME, name)] == [3, 2, 1]
            await w.ledger.rewind(ME, name, 0)
            assert await w.tier(name) is None
            assert await w.load(name) is None

    asyncio.run(main())


def test_a_busy_session_is_not_rewound_but_can_be_forked(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            async with w.next_turn(name) as turn:
                with pytest.raises(SessionBusy):
                    await w.ledger.rewind(ME, name, 1)
                fork = await w.ledger.fork(ME, name, None)
                await turn.commit(state(b"b"), new_state_id(), None)
            assert (fork.turn, fork.parent_id, fork.parent_turn) == (1, name, 1)
            assert await w.load(fork.id) == state(b"a")
            assert await w.load(name) == state(b"b", turn=2)
            await w.delete(name)
            assert await w.load(fork.id) == state(b"a")

    asyncio.run(main())


def test_a_fork_has_its_parents_facts_unless_given_others(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            source = await w.ledger.create(ME, {"k": "v"}, 60.0)
            same = await w.ledger.fork(ME, source.id, None)
            assert (same.metadata, same.ttl_s, same.owner) == ({"k": "v"}, 60.0, ME)
            other = await w.ledger.fork(ME, source.id, 0, {}, 5.0)
            assert (other.metadata, other.ttl_s) == ({}, 5.0)
            assert len({source.id, same.id, other.id}) == 3

    asyncio.run(main())


def test_turns_without_a_checkpoint_are_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, keep_turns=2) as w:
            name = await w.new()
            for mark in (b"a", b"b", b"c"):
                await w.advance(name, state(mark))
            for call in (w.ledger.rewind, w.ledger.fork, w.ledger.export):
                for turn in (1, 4):
                    with pytest.raises(NotFound, match=f"of turn {turn}; .*: 3, 2") as caught:
                        await call(ME, name, turn)
                    assert caught.value.code == "turn_not_found"
            assert await w.load(name) == state(b"c", turn=3)
            with pytest.raises(NotFound, match="none"):
                await w.ledger.export(ME, await w.new(), None)

    asyncio.run(main())


def test_another_owner_finds_no_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            calls: list[Callable[[str], Awaitable[object]]] = [
                lambda owner: w.ledger.get(owner, "session", name),
                lambda owner: w.ledger.checkpoints(owner, name),
                lambda owner: w.ledger.fork(owner, name, 1),
                lambda owner: w.ledger.rewind(owner, name, 0),
                lambda owner: w.ledger.export(owner, name, None),
                lambda owner: w.ledger.delete(owner, "session", name),
                lambda owner: begin(w, owner, SessionHead(name), NextTurn()),
            ]

            async def nobody_finds_it() -> None:
                for call in calls:
                    await not_found(call("another"))
                assert await w.ledger.list("another", "session", 10, None) == []
                with pytest.raises(LatentdError, match="no session"):
                    await w.ledger.list("another", "session", 10, name)

            await nobody_finds_it()
            async with w.next_turn(name):
                await nobody_finds_it()  # not even that it is busy
            assert await w.load(name) == state(b"a")

    asyncio.run(main())


def test_another_owner_finds_no_response(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.respond("a", b"a")
            async with w.making("p") as turn:
                await turn.store_pending(body("queued"))
                for owner, name in (("another", "a"), ("another", "p"), (ME, "ghost")):
                    await not_found(w.ledger.get(owner, "response", name), "response")
                    await not_found(w.ledger.delete(owner, "response", name), "response")
                    made = w.ledger.fork_response(owner, name, {}, None)
                    await not_found(made, "response", "response_id")
                    for target in (None, NewResponse("other"), NewSession()):
                        going_on = begin(w, owner, AfterResponse(name), target)
                        await not_found(going_on, "response", "previous_response_id")
                assert (await w.response("p")).status == "queued"
            assert await w.after("a") == state(b"a")

    asyncio.run(main())


def test_a_session_is_no_response_and_a_response_no_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.respond("a", b"a")
            name = await w.new()
            await w.advance(name, state(b"s"))

            async def nobody_mistakes_them() -> None:
                await not_found(w.response(name), "response")
                await not_found(w.delete_response(name), "response")
                await not_found(w.after(name), "response", "previous_response_id")
                await not_found(w.ledger.fork_response(ME, name, {}, None), "response")
                for call in (w.get, w.delete, w.load):
                    await not_found(call("a"))
                await not_found(w.ledger.rewind(ME, "a", 1))
                await not_found(w.ledger.fork(ME, "a", None))

            await nobody_mistakes_them()
            async with w.next_turn(name) as turn:
                await nobody_mistakes_them()
                await turn.commit(state(b"t"), new_state_id(), None)
            assert await w.load(name) == state(b"t", turn=2)

    asyncio.run(main())


def test_long_unknown_names_are_not_repeated(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            for name in ("sess_nobody", "x" * 100_000):
                for _ in range(2):
                    await not_found(w.load(name))
                    await not_found(w.delete(name))
                assert not w.ledger.is_busy(name)

    asyncio.run(main())


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_turn_can_depend_on_the_one_before(tmp_path: Path, cache_bytes: int) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes) as w:
            name = await w.new()
            await w.advance(name, state(b"a"), expected=0)
            for expected in (0, 2):
                with pytest.raises(TurnMismatch, match=f"at turn 1, not at {expected}") as caught:
                    await w.advance(name, state(b"b"), expected=expected)
                assert caught.value.headers == {"x-should-retry": "false"}
                assert not w.ledger.is_busy(name)
            await w.advance(name, state(b"c"), expected=1)
            assert await w.load(name) == state(b"c", turn=2)

    asyncio.run(main())


async def answered(w: World, name: str, target: NextTurn, expected: int | None = None) -> str:
    """The stored answer of the turn; if there is none, the turn is run."""
    async with w.ledger.begin(ME, SessionHead(name, expected), target) as turn:
        if isinstance(turn, StoredAnswer):
            return turn.answer
        assert turn.needs_body
        assert turn.entry is not None
        await turn.commit(state(b"x"), new_state_id(), f"answer {turn.entry.turn + 1}")
        return ""


def test_a_turn_with_a_key_is_run_once(tmp_path: Path) -> None:
    first, second = NextTurn("key 1", "asked"), NextTurn("key 2", "asked")

    async def main() -> None:
        async with world(tmp_path) as w:
            name, other = await w.new(), await w.new()
            assert await answered(w, name, first, 0) == ""
            assert await answered(w, name, first, 0) == "answer 1"
            assert await answered(w, name, second) == ""
            assert await answered(w, other, first, 0) == ""
        async with world(tmp_path) as w:
            assert await answered(w, name, first, 0) == "answer 1"
            assert await answered(w, name, second) == "answer 2"
            assert (await w.get(name)).turn == 2
            async with w.next_turn(name):
                assert await answered(w, name, first) == "answer 1"  # also while it is busy
                with pytest.raises(SessionBusy):
                    await answered(w, name, NextTurn("key 3", "asked"))
            for other_request in (replace(first, request="other"), replace(second, request="")):
                with pytest.raises(KeyReused):
                    await answered(w, name, other_request)
            assert b"key 1" not in raw(tmp_path)
            await w.ledger.rewind(ME, name, 1)
            assert await answered(w, name, second) == ""  # that turn never was

    asyncio.run(main())


def test_of_requests_with_one_key_that_race_one_is_run(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name, key = await w.new(), NextTurn("key", "asked")
            answers = await asyncio.gather(
                *(answered(w, name, key) for _ in range(20)), return_exceptions=True
            )
            assert answers.count("") == 1
            others = {type(answer) for answer in answers if answer not in ("", "answer 1")}
            assert others <= {SessionBusy}
            assert (await w.get(name)).turn == 1

    asyncio.run(main())


def test_a_key_is_as_good_as_its_checkpoint(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, keep_turns=2) as w:
            name, key = await w.new(), NextTurn("key", "asked")
            await answered(w, name, key)
            await w.advance(name, state())
            assert await answered(w, name, key) == "answer 1"
            await w.advance(name, state())
            assert await answered(w, name, key) == ""

    asyncio.run(main())


def test_a_session_has_one_writer(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name, other = await w.new(), await w.new()
            async with w.next_turn(name):
                assert w.ledger.is_busy(name)
                assert await w.tier(name) == "device"
                for call in (w.load, w.delete):
                    with pytest.raises(SessionBusy):
                        await call(name)
                assert w.ledger.is_busy(name)
                assert (await w.get(name)).turn == 0
                await w.advance(other, state())
            assert not w.ledger.is_busy(name)
            await w.advance(name, state())

    asyncio.run(main())


def test_a_failure_unlocks_the_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            with pytest.raises(KeyError):
                async with w.next_turn(name):
                    raise KeyError
            assert (await w.advance(name, state())).turn == 1

    asyncio.run(main())


def test_one_of_many_at_a_time_gets_the_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            answers = await asyncio.gather(
                *(w.advance(name, state()) for _ in range(10)), return_exceptions=True
            )
            # Who looks when a turn has just ended may begin the next one.
            turns = sorted(answer.turn for answer in answers if isinstance(answer, Entry))
            assert turns == [*range(1, 1 + len(turns))]
            assert [type(answer) for answer in answers].count(SessionBusy) == 10 - len(turns)
            assert (await w.get(name)).turn == len(turns)

    asyncio.run(main())


def test_sessions_are_listed_newest_first_and_responses_apart(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            made = list[str]()
            for number in range(5):
                made.append(await w.new())
                await w.respond(f"{number}", b"r")
            await w.advance(made[0], state())
            first = [found.id for found in await w.ledger.list(ME, "session", 3, None)]
            rest = [found.id for found in await w.ledger.list(ME, "session", 3, first[-1])]
            assert first + rest == made[::-1]
            assert await w.ledger.list(ME, "session", 3, made[0]) == []
            responses = await w.ledger.list(ME, "response", 9, "3")
            assert [found.id for found in responses] == ["2", "1", "0"]

    asyncio.run(main())


@pytest.mark.parametrize("after", ["", "sess_nobody", "x" * 100_000])
def test_a_page_after_an_unknown_entry_is_rejected(tmp_path: Path, after: str) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.new()
            with pytest.raises(InvalidRequest) as caught:
                await w.ledger.list(ME, "session", 3, after)
            assert (caught.value.status, caught.value.param) == (400, "after")
            assert len(caught.value.message) < 200

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_deletion_erases_everywhere(tmp_path: Path, kind: EntryKind, are_large: bool) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            gone = await w.made(kind, b"A", has_row=True)
            stays = await w.made(kind, b"B")
            await w.ledger.delete(ME, kind, gone.id)
            assert w.released == [gone.state_id]
            for _ in range(2):
                await not_found(w.ledger.get(ME, kind, gone.id), kind)
                await not_found(w.ledger.delete(ME, kind, gone.id), kind)
            assert not w.is_cached(gone)
            assert b"A" * STATE_BYTES not in raw(tmp_path)
            assert b"B" * STATE_BYTES in raw(tmp_path)
            assert state_files(tmp_path) == ({stays.state_id} if are_large else set())
            num_sessions = int(kind == "session")
            held = w.held()
            assert [held[tier][0] for tier in ("device", "host", "store")] == [0, 1, num_sessions]
            assert w.value("responses") == 1 - num_sessions
            await w.ledger.delete(ME, kind, stays.id)
            assert w.released == [gone.state_id]
            assert w.held() == {"device": (0, 0), "host": (0, 0), "store": (0, 0)}
            assert (w.store.total, state_files(tmp_path)) == (StoreUsage(), set())

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_deletion_that_fails_keeps_no_state_in_memory(tmp_path: Path, kind: EntryKind) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            made = await w.made(kind, b"a", has_row=True)
            with (
                forbidden(w.store, sqlite3.SQLITE_DELETE, "entries"),
                pytest.raises(StorageFailed),
            ):
                await w.ledger.delete(ME, kind, made.id)
            assert not w.is_cached(made)
            assert w.released == [made.state_id]
            assert w.ledger.tier(made) == "store"
            assert await w.state_of(made) == state(b"a")
            assert not w.ledger.is_busy(made.id)

    asyncio.run(main())


def test_of_two_deletions_at_once_one_finds_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            for kind, other in (("response", NotFound), ("session", SessionBusy)):
                made = await w.made("response" if kind == "response" else "session", b"a")
                async with writer_held(w.store):
                    both = asyncio.gather(
                        *(w.ledger.delete(ME, made.kind, made.id) for _ in range(2)),
                        return_exceptions=True,
                    )
                    await until_queued(w.store, 2 if kind == "response" else 1)
                assert sorted([type(answer) for answer in await both], key=str) == sorted(
                    [type(None), other], key=str
                )
            assert w.store.total == StoreUsage()

    asyncio.run(main())


def test_an_unused_session_expires(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name, lasting = await w.new(ttl_s=60.0), await w.new()
            gone = await w.advance(name, state(b"a"), has_row=True)
            stays = await w.advance(lasting, state(b"b"))
            with at(50):
                assert await w.ledger.sweep() == 0
                assert (await w.get(name)).expires_at is not None
            with at(70):
                for call in (w.get, w.load, w.delete):
                    await not_found(call(name))
                assert [s.id for s in await w.ledger.list(ME, "session", 10, None)] == [lasting]
                assert await w.ledger.sweep() == 1
                assert await w.ledger.sweep() == 0
            assert w.released == [gone.state_id]
            assert not w.is_cached(gone)
            assert state_files(tmp_path) <= {stays.state_id or ""}
            assert b"a" * STATE_BYTES not in raw(tmp_path)
            assert w.held()["store"][0] == 1
            assert w.value("sessions_expired_total") == 1
            assert await w.load(lasting) == state(b"b")

    asyncio.run(main())


def test_use_makes_a_session_last(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new(ttl_s=60.0)
            with at(50):
                await w.advance(name, state(b"a"))
            with at(100):
                assert await w.ledger.sweep() == 0
                await w.ledger.rewind(ME, name, 1)
            with at(150):
                assert (await w.get(name)).turn == 1
            with at(161):
                assert await w.ledger.sweep() == 1

    asyncio.run(main())


def test_time_that_goes_back_shortens_no_lifetime(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            before = await w.ledger.create(ME, {}, 60.0)
            with at(-3600):
                after = await w.advance(before.id, state(b"a"))
                assert after == await w.get(before.id)
                rewound = await w.ledger.rewind(ME, before.id, 1)
            for entry in (after, rewound):
                assert entry.last_used_at == before.last_used_at
                assert entry.expires_at == before.expires_at
            assert (await w.ledger.checkpoints(ME, before.id))[0].created_at == before.created_at
            with at(50):
                assert await w.ledger.sweep() == 0
                assert await w.load(before.id) == state(b"a")

    asyncio.run(main())


def test_use_means_nothing_to_an_absolute_lifetime() -> None:
    entry = Entry("response", "r", ME, 10.0, 10.0, expires_at=100.0)
    assert entry.used(50.0) == replace(entry, last_used_at=50.0)
    assert replace(entry, expires_at=None).used(50.0).expires_at is None
    assert replace(entry, ttl_s=30.0).used(50.0).expires_at == 80.0
    assert replace(entry, ttl_s=30.0).used(5.0) == replace(entry, ttl_s=30.0, expires_at=40.0)


def test_a_response_is_kept_for_its_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, max_response_ttl_s=100.0) as w:
            short = await w.respond("short", b"s", ttl_s=50.0, has_row=True)
            usual = await w.respond("usual", b"u")
            assert short.expires_at == short.created_at + 50.0
            assert usual.expires_at == usual.created_at + 100.0
            with pytest.raises(InvalidRequest, match=r"ttl is 101, the maximum is 100"):
                await w.respond("long", b"l", ttl_s=101.0)
            with at(40):
                assert await w.ledger.sweep() == 0
                await w.respond("late", b"l", "short")  # no use makes it last
            with at(60):
                await not_found(w.response("short"), "response")
                await not_found(w.after("short"), "response", "previous_response_id")
                await not_found(w.delete_response("short"), "response")
                assert await w.ledger.sweep() == 1
                assert await w.ledger.sweep() == 0
                assert await w.after("usual") == state(b"u")
            assert w.released == [short.state_id]
            assert not w.is_cached(short)
            assert b"s" * STATE_BYTES not in raw(tmp_path)
            assert w.value("sessions_expired_total") == 0
        async with world(tmp_path) as w:
            assert (await w.respond("lasting", b"l")).expires_at is None

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_turn_advances_does_not_expire(tmp_path: Path, kind: EntryKind) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = "a" if kind == "response" else await w.new(ttl_s=60.0)
            opened = w.making("a", ttl_s=60.0) if kind == "response" else w.next_turn(name)
            async with opened as turn:
                if kind == "response":
                    await turn.store_pending(body("queued"))
                with at(70):
                    assert await w.ledger.sweep() == 0
                    found = await w.ledger.get(ME, kind, name)
                    assert (found.turn, found.is_finished) == (0, kind == "session")
                    end = body() if kind == "response" else None
                    await turn.commit(state(b"a"), new_state_id(), end)
                    assert await w.ledger.sweep() == 0
                    assert (await w.ledger.get(ME, kind, name)).turn == 1
            with at(100):
                assert await w.ledger.sweep() == int(kind == "response")
            with at(140):
                assert await w.ledger.sweep() == int(kind == "session")
            assert w.store.total == StoreUsage()

    asyncio.run(main())


def test_what_is_used_while_the_sweep_looks_is_not_erased(tmp_path: Path) -> None:
    """It had expired when the sweep asked the store, and its turn ended before the sweep came to
    it."""

    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new(ttl_s=60.0)
            real = w.store.expired

            async def expired(now: float, limit: int) -> list[Entry]:
                found = list(await real(now, limit))
                await turn.commit(state(b"a"), new_state_id(), None)
                await stack.__aexit__(None, None, None)
                return found

            stack = w.next_turn(name)
            turn = await stack.__aenter__()
            with at(70), pytest.MonkeyPatch.context() as patch:
                patch.setattr(w.store, "expired", expired)
                assert await w.ledger.sweep() == 0
                assert await w.load(name) == state(b"a")

    asyncio.run(main())


def test_what_is_exported_can_be_imported(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path / "one") as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            await w.advance(name, state(b"b", 77))
            _, first, earlier = await w.ledger.export(ME, name, 1)
            entry, second, blob = await w.ledger.export(ME, name, None)
            assert (entry.id, first, second) == (name, 1, 2)
        async with world(tmp_path / "two") as w:
            moved, arithmetic = await w.ledger.import_blob("them", blob, {"k": "v"}, 9.0)
            assert (moved.turn, moved.num_tokens, moved.num_checkpoints) == (2, 77, 1)
            assert (moved.metadata, moved.ttl_s, moved.owner) == ({"k": "v"}, 9.0, "them")
            assert arithmetic == "float32 x float32"
            assert moved == await w.ledger.get("them", "session", moved.id)
            async with w.turn(SessionHead(moved.id, 2), NextTurn(), "them") as turn:
                assert await turn.load() == state(b"b", 77, turn=2)
            early, _ = await w.ledger.import_blob(ME, earlier, {}, None)
            assert await w.load(early.id) == state(b"a")
            before, files = w.store.total, state_files(tmp_path / "two")
            for wrong in (b"", blob[:-1], blob[:-1] + b"?", b"x" * 1000):
                with pytest.raises(IncompatibleState) as caught:
                    await w.ledger.import_blob(ME, wrong, {}, None)
                assert caught.value.status == 422
            assert (w.store.total, state_files(tmp_path / "two")) == (before, files)

    asyncio.run(main())


def test_a_rewind_whose_caller_leaves_is_whole(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            newest = await w.advance(name, state(b"b"), has_row=True)
            reading = asyncio.Event()
            real = w.store.rewind

            async def rewind(entry_id: str, turn: int, now: float) -> Entry | None:
                reading.set()
                return await real(entry_id, turn, now)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(w.store, "rewind", rewind)
                leaving = asyncio.create_task(w.ledger.rewind(ME, name, 1))
                await reading.wait()
                leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            found = await w.get(name)
            assert await w.load(name) == state(b"a" if found.turn == 1 else b"b", turn=found.turn)
            assert found.turn == 2 or not w.is_cached(newest)
            assert w.released == [newest.state_id]

    asyncio.run(main())


def test_a_rewind_that_fails_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            await w.advance(name, state(b"b"), has_row=True)
            w.store._writer.db.execute("PRAGMA query_only = ON")
            with pytest.raises(StorageFailed):
                await w.ledger.rewind(ME, name, 1)
            w.store._writer.db.execute("PRAGMA query_only = OFF")
            assert (await w.get(name)).turn == 2
            assert await w.load(name) == state(b"b", turn=2)

    asyncio.run(main())


def test_a_rewind_to_the_present_turn_forgets_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            entry = await w.advance(name, state(b"a"), has_row=True)
            assert (await w.ledger.rewind(ME, name, 1)).turn == 1
            assert (w.released, await w.tier(name)) == ([], "device")
            assert w.is_cached(entry)

    asyncio.run(main())


def test_a_session_can_start_from_a_response(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, quotas=Quotas(sessions_per_owner=1)) as w:
            await w.respond("a", b"a")
            made = await w.ledger.fork_response(ME, "a", {"k": "v"}, 60.0)
            assert made == await w.get(made.id)
            assert (made.turn, made.num_tokens, made.num_checkpoints) == (1, 5, 1)
            assert (made.metadata, made.ttl_s, made.owner) == ({"k": "v"}, 60.0, ME)
            await w.delete_response("a")
            assert await w.load(made.id) == state(b"a")
            assert (await w.advance(made.id, state(b"b"))).turn == 2
            await w.respond("b", b"b")
            with pytest.raises(QuotaExceeded):
                await w.ledger.fork_response(ME, "b", {}, None)

    asyncio.run(main())


def test_what_has_no_state_cannot_be_continued(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            for status in ("failed", "cancelled", "incomplete"):
                async with w.making(status) as turn:
                    await turn.store_pending(body("queued"))
                    await turn.abandon(body(status))
            async with w.making("running"), w.making("queued") as turn:
                await turn.store_pending(body("queued"))
                for name, why in (
                    ("failed", "failed"),
                    ("cancelled", "was cancelled"),
                    ("incomplete", "without its state"),
                    ("queued", "not complete yet"),
                    ("running", "not complete yet"),
                ):
                    with pytest.raises(InvalidRequest, match=f"{name} .*{why}") as caught:
                        await w.after(name)
                    error = caught.value
                    assert (error.status, error.param) == (400, "previous_response_id")
                    assert error.code == "response_unusable"
                    with pytest.raises(InvalidRequest, match=why) as caught:
                        await w.ledger.fork_response(ME, name, {}, None)
                    assert caught.value.param == "response_id"

    asyncio.run(main())


def test_what_the_end_of_the_server_interrupted_has_failed(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            for name, first in (
                ("queued", body("queued", metadata={"k": "é"})),
                ("running", body("in_progress")),
            ):
                async with w.making(name) as turn:
                    await turn.store_pending(first)
            await w.respond("done", b"d")
        async with world(tmp_path) as w, w.making("new") as turn:
            await turn.store_pending(body("queued"))
            assert await w.ledger.recover() == 2
            assert await w.ledger.recover() == 0
            for name in ("queued", "running"):
                found = await w.response(name)
                shown = json.loads(found.body or "")
                assert found.status == shown["status"] == "failed"
                assert shown["error"]["code"] == "server_error"
                assert "stopped" in shown["error"]["message"]
                assert shown["object"] == "response"
            queued = json.loads((await w.response("queued")).body or "")
            assert queued["metadata"] == {"k": "é"}
            assert (await w.response("new")).status == "queued"
            assert (await w.response("done")).status == "completed"
            await w.delete_response("queued")

    asyncio.run(main())


def test_an_end_that_could_not_be_stored_is_reported_by_the_next_sweep(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            async with w.making("a") as turn:
                await turn.store_pending(body("queued"))
                await w.ledger.sweep()
                assert (await w.response("a")).status == "queued"
                with (
                    forbidden(w.store, sqlite3.SQLITE_TRANSACTION, "COMMIT"),
                    pytest.raises(StorageFailed),
                ):
                    await turn.abandon(body("cancelled"))
            assert (await w.response("a")).status == "queued"
            await w.ledger.sweep()
            assert (await w.response("a")).status == "failed"

    asyncio.run(main())

"""What else can happen to a session: conditions, forks, rewinds, transport, and its end."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from server.sessions.turn import TurnCondition

from server.errors import (
    KeyReused,
    LatentdError,
    NotFound,
    SessionBusy,
    SessionDamaged,
    StorageFailed,
    TurnMismatch,
    UnfitState,
)
from tests.server.sessions.stores import commit, raw, until_waiting, writer_held
from tests.server.sessions.worlds import CODEC, ME, World, state, world


@pytest.mark.parametrize("warm", [None, "row"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_rewound_session_goes_on_from_the_earlier_state(
    tmp_path: Path, warm: str | None, cache_bytes: int
) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes) as w:
            name = await w.new()
            for mark in (b"a", b"b", b"c"):
                await w.advance(name, state(mark), warm)
            w.forgotten.clear()
            assert (await w.sessions.rewind(ME, name, 2)).turn == 2
            assert w.forgotten == ([] if warm is None else [warm])
            assert await w.tier(name) == "store"
            assert await w.load(name) == state(b"b", turn=2)
            after = await w.advance(name, state(b"d"))
            assert (after.turn, after.num_checkpoints) == (3, 3)
            assert await w.load(name) == state(b"d", turn=3)
            assert [c.turn for c in await w.sessions.checkpoints(ME, name)] == [3, 2, 1]
            await w.sessions.rewind(ME, name, 0)
            assert await w.tier(name) is None

    asyncio.run(main())


def test_a_busy_session_is_not_rewound_but_can_be_forked(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            async with w.sessions.turn(ME, name) as turn:
                with pytest.raises(SessionBusy):
                    await w.sessions.rewind(ME, name, 1)
                fork = await w.sessions.fork(ME, name, None)
                await turn.commit(state(b"b"), None)
            assert (fork.turn, fork.parent_id, fork.parent_turn) == (1, name, 1)
            assert await w.load(fork.id) == state(b"a")
            assert await w.load(name) == state(b"b", turn=2)

    asyncio.run(main())


def test_a_fork_has_its_parents_facts_unless_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            source = await w.sessions.create(ME, {"k": "v"}, 60.0)
            same = await w.sessions.fork(ME, source.id, None)
            assert (same.metadata, same.ttl_s, same.owner) == ({"k": "v"}, 60.0, ME)
            other = await w.sessions.fork(ME, source.id, 0, {}, 5.0)
            assert (other.metadata, other.ttl_s) == ({}, 5.0)
            assert len({source.id, same.id, other.id}) == 3

    asyncio.run(main())


def test_turns_that_are_not_kept_are_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, keep_turns=2) as w:
            name = await w.new()
            for mark in (b"a", b"b", b"c"):
                await w.advance(name, state(mark))
            for call in (w.sessions.rewind, w.sessions.fork, w.sessions.export):
                for turn in (1, 4):
                    with pytest.raises(NotFound, match=f"after turn {turn}; .*: 3, 2") as caught:
                        await call(ME, name, turn)
                    assert caught.value.code == "turn_not_found"
            assert await w.load(name) == state(b"c", turn=3)
            with pytest.raises(NotFound, match="none"):
                await w.sessions.export(ME, await w.new(), None)

    asyncio.run(main())


def test_another_owner_finds_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))

            async def advance(owner: str, session_id: str) -> None:
                async with w.sessions.turn(owner, session_id):
                    pass

            calls: list[Callable[[str], Awaitable[object]]] = [
                lambda owner: w.sessions.get(owner, name),
                lambda owner: w.sessions.checkpoints(owner, name),
                lambda owner: w.sessions.fork(owner, name, 1),
                lambda owner: w.sessions.rewind(owner, name, 0),
                lambda owner: w.sessions.export(owner, name, None),
                lambda owner: w.sessions.delete(owner, name),
                lambda owner: advance(owner, name),
            ]

            async def nobody_finds_it() -> None:
                for call in calls:
                    with pytest.raises(NotFound) as caught:
                        await call("another")
                    assert caught.value.code == "session_not_found"
                assert await w.sessions.list("another", 10, None) == []
                with pytest.raises(LatentdError, match="no session"):
                    await w.sessions.list("another", 10, name)

            await nobody_finds_it()
            async with w.sessions.turn(ME, name):
                await nobody_finds_it()  # not even that it is busy
            assert await w.load(name) == state(b"a")

    asyncio.run(main())


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_turn_can_depend_on_the_one_before(tmp_path: Path, cache_bytes: int) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes) as w:
            name = await w.new()
            await w.advance(name, state(b"a"), condition=TurnCondition(0))
            for expected in (0, 2):
                with pytest.raises(TurnMismatch, match=f"at turn 1, not at {expected}") as caught:
                    await w.advance(name, state(b"b"), condition=TurnCondition(expected))
                assert caught.value.headers == {"x-should-retry": "false"}
                assert not w.sessions.is_busy(name)
            await w.advance(name, state(b"c"), condition=TurnCondition(1))
            assert await w.load(name) == state(b"c", turn=2)

    asyncio.run(main())


async def answered(w: World, name: str, condition: TurnCondition) -> str | None:
    """The answer that the turn had before; if none, the turn is taken."""
    async with w.sessions.turn(ME, name, condition) as turn:
        if turn.answer is None:
            assert turn.keeps_answer
            await turn.commit(state(b"x"), None, f"answer {turn.record.turn + 1}")
            return None
        return turn.answer


def test_a_turn_with_a_key_is_taken_once(tmp_path: Path) -> None:
    first, second = TurnCondition(0, "key 1", "asked"), TurnCondition(None, "key 2", "asked")

    async def main() -> None:
        async with world(tmp_path) as w:
            name, other = await w.new(), await w.new()
            assert await answered(w, name, first) is None
            assert await answered(w, name, first) == "answer 1"
            assert await answered(w, name, second) is None
            assert await answered(w, other, first) is None
        async with world(tmp_path) as w:
            assert await answered(w, name, first) == "answer 1"
            assert await answered(w, name, second) == "answer 2"
            assert (await w.get(name)).turn == 2
            async with w.sessions.turn(ME, name):
                assert await answered(w, name, first) == "answer 1"  # also while it is busy
                with pytest.raises(SessionBusy):
                    await answered(w, name, TurnCondition(None, "key 3", "asked"))
            for other_request in (replace(first, request="other"), replace(second, request="")):
                with pytest.raises(KeyReused):
                    await answered(w, name, other_request)
            assert b"key 1" not in raw(tmp_path)
            await w.sessions.rewind(ME, name, 1)
            assert await answered(w, name, second) is None  # that turn never was

    asyncio.run(main())


def test_of_requests_with_one_key_that_race_one_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name, key = await w.new(), TurnCondition(None, "key", "asked")
            answers = await asyncio.gather(
                *(answered(w, name, key) for _ in range(20)), return_exceptions=True
            )
            assert answers.count(None) == 1
            others = {type(answer) for answer in answers if answer is not None}
            assert others <= {SessionBusy, str}
            assert (await w.get(name)).turn == 1

    asyncio.run(main())


def test_a_key_is_as_good_as_its_checkpoint(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, keep_turns=2) as w:
            name, key = await w.new(), TurnCondition(None, "key", "asked")
            await answered(w, name, key)
            await w.advance(name, state())
            assert await answered(w, name, key) == "answer 1"
            await w.advance(name, state())
            assert await answered(w, name, key) is None

    asyncio.run(main())


@contextmanager
def at(seconds: float) -> Iterator[None]:
    """The clock of sessions, so many seconds from now."""
    then = time.time() + seconds
    with patch("server.sessions.sessions.time.time", return_value=then):
        yield


def test_a_session_that_nobody_uses_expires(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name, lasting = await w.new(ttl_s=60.0), await w.new()
            await w.advance(name, state(b"a"), "row")
            await w.advance(lasting, state(b"b"))
            with at(50):
                assert await w.sessions.sweep() == 0
                assert (await w.get(name)).expires_at is not None
            with at(70):
                for call in (w.get, w.load, w.delete):
                    with pytest.raises(NotFound):
                        await call(name)
                assert [s.id for s in await w.sessions.list(ME, 10, None)] == [lasting]
                assert await w.sessions.sweep() == 1
                assert await w.sessions.sweep() == 0
            assert w.forgotten == ["row"]
            assert name not in w.cache
            assert b"a" * 56 not in raw(tmp_path)
            assert w.held()["store"][0] == 1
            assert w.metrics.registry.get_sample_value("latentd_sessions_expired_total") == 1
            assert await w.load(lasting) == state(b"b")

    asyncio.run(main())


def test_use_makes_it_last(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new(ttl_s=60.0)
            with at(50):
                await w.advance(name, state(b"a"))
            with at(100):
                assert await w.sessions.sweep() == 0
                await w.sessions.rewind(ME, name, 1)
            with at(150):
                assert (await w.get(name)).turn == 1
            with at(161):
                assert await w.sessions.sweep() == 1

    asyncio.run(main())


def test_a_turn_that_runs_is_use(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new(ttl_s=60.0)
            async with w.sessions.turn(ME, name) as turn:
                with at(70):
                    assert await w.sessions.sweep() == 0
                    assert (await w.get(name)).turn == 0
                    await turn.commit(state(b"a"), None)
            with at(100):
                assert await w.sessions.sweep() == 0
                assert await w.load(name) == state(b"a")

    asyncio.run(main())


def test_what_is_exported_can_be_imported(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path / "one") as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            await w.advance(name, state(b"b", 77))
            _, first, earlier = await w.sessions.export(ME, name, 1)
            record, second, blob = await w.sessions.export(ME, name, None)
            assert (record.id, first, second) == (name, 1, 2)
        async with world(tmp_path / "two") as w:
            moved = await w.sessions.import_blob("them", blob, {"k": "v"}, 9.0)
            assert (moved.turn, moved.num_tokens, moved.num_checkpoints) == (2, 77, 1)
            assert (moved.metadata, moved.ttl_s, moved.owner) == ({"k": "v"}, 9.0, "them")
            assert moved == await w.sessions.get("them", moved.id)
            async with w.sessions.turn("them", moved.id, TurnCondition(2)) as turn:
                assert await turn.load() == state(b"b", 77, turn=2)
            early = await w.sessions.import_blob(ME, earlier, {}, None)
            assert await w.load(early.id) == state(b"a")
            before = w.store.total
            for wrong in (b"", blob[:-1], blob[:-1] + b"?", b"x" * 1000):
                with pytest.raises(UnfitState) as caught:
                    await w.sessions.import_blob(ME, wrong, {}, None)
                assert caught.value.status == 422
            assert w.store.total == before

    asyncio.run(main())


def test_after_damage_an_earlier_turn_is_still_good(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            await commit(w.store, name, 2, CODEC.encode(state(b"b"))[:-1] + b"?", keep=8)
            with pytest.raises(SessionDamaged, match=r"after turn 2 .*checksum.*rewind"):
                await w.load(name)
            await w.sessions.rewind(ME, name, 1)
            assert await w.load(name) == state(b"a")

    asyncio.run(main())


def test_a_place_never_answers_with_another_turn(tmp_path: Path) -> None:
    """Even if somebody had forgotten to forget."""

    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            await w.advance(name, state(b"b"), "row")
            await w.store.rewind(name, 1, time.time())
            async with w.sessions.turn(ME, name) as turn:
                assert turn.take_warm() is None
                assert await turn.load() == state(b"a")

    asyncio.run(main())


def test_a_rewind_whose_caller_leaves_is_whole(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            await w.advance(name, state(b"b"), "row")
            async with writer_held(w.store):
                leaving = asyncio.create_task(w.sessions.rewind(ME, name, 1))
                await until_waiting(w.store)
                leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            found = await w.get(name)
            assert await w.load(name) == state(b"a" if found.turn == 1 else b"b", turn=found.turn)

    asyncio.run(main())


def test_a_rewind_that_fails_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            await w.advance(name, state(b"a"))
            await w.advance(name, state(b"b"), "row")
            w.store._writer.db.execute("PRAGMA query_only = ON")
            with pytest.raises(StorageFailed):
                await w.sessions.rewind(ME, name, 1)
            w.store._writer.db.execute("PRAGMA query_only = OFF")
            assert (await w.get(name)).turn == 2
            assert await w.load(name) == state(b"b", turn=2)

    asyncio.run(main())

"""Checkpoints in the SQLite store: stored, forked and rewound to, with their answers."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import StorageFailed
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import Entry, StoredAnswer, StoreUsage
from tests.server.sessions.stores import (
    blob_of,
    commit,
    found,
    insert,
    new_state,
    opened,
    response,
    session,
    states_in_files,
)


@pytest.fixture(params=[False, True], ids=["in SQLite", "in files"], autouse=True)
def are_large(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether states are stored in files."""
    with states_in_files(1 if request.param else 1 << 30):
        yield request.param


async def with_turns(store: SQLiteStore, name: str, count: int, keep: int) -> Entry:
    """A session of some turns; the blob of each is its number."""
    await store.insert(session(name, of=name))
    for turn in range(1, count + 1):
        await commit(store, name, turn, b"%d" % turn, keep=keep)
    return await found(store, name)


async def kept(store: SQLiteStore, name: str) -> dict[int, bytes | None]:
    """Turns that have a checkpoint, newest first, and their blobs."""
    return {c.turn: await store.load(name, c.turn) for c in await store.checkpoints(name)}


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (3, [5, 4, 3]), (8, [5, 4, 3, 2, 1])])
def test_the_last_turns_have_checkpoints(tmp_path: Path, keep: int, left: list[int]) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            last = await with_turns(store, "a", 5, keep)
            await with_turns(store, "b", 2, keep)
            assert await kept(store, "a") == {turn: b"%d" % turn for turn in left}
            assert list(await kept(store, "a")) == left
            assert last.num_checkpoints == len(left)
            newest = (await store.checkpoints("a"))[0]
            assert (newest.num_tokens, newest.created_at, newest.num_bytes) == (50, 105.0, 1)
            assert store.total.num_states == len(left) + min(keep, 2)

    asyncio.run(main())


def test_the_number_of_checkpoints_can_be_lowered(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await with_turns(store, "a", 6, keep=8)
            await commit(store, "a", 7, b"7", keep=2)
            assert list(await kept(store, "a")) == [7, 6]

    asyncio.run(main())


def test_a_fork_is_an_independent_copy(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await with_turns(store, "a", 4, keep=3)
            before = (await store.get("session", "a"), await kept(store, "a"))
            made = replace(session("b", of="b"), turn=3, parent_id="a", parent_turn=3, ttl_s=9.0)
            forked = await store.fork("a", made)
            shared = new_state("a", 3, b"3").id
            assert forked == replace(made, num_tokens=30, state_id=shared, num_checkpoints=1)
            assert forked == await store.get("session", "b")
            await commit(store, "b", 4, b"other", keep=3)
            assert await kept(store, "b") == {4: b"other", 3: b"3"}
            assert (await store.get("session", "a"), await kept(store, "a")) == before
            assert store.total == StoreUsage(2, 0, 5, 9)
            await store.delete("session", "a")
            assert await kept(store, "b") == {4: b"other", 3: b"3"}
            assert store.total == StoreUsage(1, 0, 2, 6)

    asyncio.run(main())


@pytest.mark.parametrize(("name", "turn"), [("a", 1), ("a", 5), ("a", -1), ("nobody", 3)])
def test_only_turns_with_a_checkpoint_can_be_forked_or_rewound_to(
    tmp_path: Path, name: str, turn: int
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            before = await with_turns(store, "a", 4, keep=3)
            assert await store.fork(name, replace(session("b"), turn=turn)) is None
            assert await store.get("session", "b") is None
            assert await store.rewind(name, turn, 1.0) is None
            assert await store.load(name, turn) is None
            assert await store.get("session", "a") == before

    asyncio.run(main())


def test_the_empty_beginning_is_always_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await with_turns(store, "a", 4, keep=3)
            fresh = await store.fork("a", replace(session("b"), turn=0))
            assert fresh is not None
            assert (fresh.turn, fresh.num_tokens, fresh.num_checkpoints) == (0, 0, 0)
            rewound = await store.rewind("a", 0, 200.0)
            assert rewound is not None
            assert (rewound.turn, rewound.num_tokens, rewound.num_checkpoints) == (0, 0, 0)
            assert store.total == StoreUsage(2)
            await commit(store, "a", 1, b"again")
            assert await blob_of(store, "a") == b"again"

    asyncio.run(main())


def test_a_rewind_goes_back_and_forgets_what_was_after(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            before = await with_turns(store, "a", 4, keep=3)
            rewound = await store.rewind("a", 3, 200.0)
            assert rewound == replace(
                before,
                turn=3,
                num_tokens=30,
                state_id=new_state("a", 3, b"3").id,
                num_checkpoints=2,
                last_used_at=200.0,
            )
            assert rewound == await store.get("session", "a")
            assert await kept(store, "a") == {3: b"3", 2: b"2"}
            await commit(store, "a", 4, b"another 4", keep=3)
            assert await kept(store, "a") == {4: b"another 4", 3: b"3", 2: b"2"}

    asyncio.run(main())


def test_an_answer_is_kept_as_long_as_its_turn(tmp_path: Path) -> None:
    def answer(turn: int) -> StoredAnswer:
        return StoredAnswer(f"key {turn}", f"request {turn}", f"answer {turn} é")

    async def answered(store: SQLiteStore) -> list[int]:
        return [t for t in range(1, 6) if await store.find_answer("a", f"key {t}") == answer(t)]

    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await store.insert(session("b"))
            for turn in range(1, 6):
                await commit(store, "a", turn, b"-", keep=3, answer=answer(turn))
            assert store.total == StoreUsage(2, 0, 3, 3 + 3 * len("answer 1 é".encode()))
        async with opened(tmp_path) as store:
            assert await answered(store) == [3, 4, 5]
            assert await store.find_answer("b", "key 5") is None
            await store.fork("a", replace(session("c"), turn=5))
            assert await store.find_answer("c", "key 5") is None
            await store.rewind("a", 4, 1.0)
            assert await answered(store) == [3, 4]
            await commit(store, "a", 5, b"-", keep=3)
            assert await answered(store) == [3, 4]
            with pytest.raises(StorageFailed):
                await commit(store, "a", 6, b"-", keep=3, answer=answer(4))
            assert await answered(store) == [3, 4]

    asyncio.run(main())


def test_what_has_expired_is_found_the_longest_over_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name, ttl_s in (("a", 10.0), ("b", 30.0), ("c", None), ("d", 5.0)):
                await store.insert(replace(session(name), ttl_s=ttl_s).used(100.0))
            for name, expires_at in (("r", 107.0), ("s", None)):
                await store.insert(replace(response(name), expires_at=expires_at))

            async def expired(now: float, limit: int) -> list[str]:
                return [entry.id for entry in await store.expired(now, limit)]

            assert await expired(104.9, 10) == []
            assert await expired(110.0, 10) == ["d", "r", "a"]
            assert await expired(1000.0, 2) == ["d", "r"]
            assert (await store.expired(105.0, 10))[0] == await found(store, "d")
            sessions = await store.list("session", "", 9, None, 110.0)
            assert [entry.id for entry in sessions] == ["c", "b"]
            responses = await store.list("response", "", 9, None, 110.0)
            assert [entry.id for entry in responses] == ["s"]
            await commit(store, "a", 1, b"used", ttl_s=10.0)  # at 101
            assert await expired(110.9, 10) == ["d", "r"]
            assert await expired(111.0, 10) == ["d", "r", "a"]
            await store.rewind("a", 1, 120.0)
            assert await expired(129.9, 10) == ["d", "r"]
            rewound = await store.rewind("a", 1, 50.0)  # time that goes back shortens nothing
            assert rewound is not None
            assert (rewound.last_used_at, rewound.expires_at) == (120.0, 130.0)

    asyncio.run(main())


def test_the_state_of_a_response_can_become_a_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            source = await insert(store, replace(response("r"), turn=1, num_tokens=7), b"state")
            await store.insert(response("bare"))
            made = replace(session("s", topic="cats"), turn=1)
            copied = await store.fork("r", made)
            expected = replace(made, num_tokens=7, state_id=source.state_id, num_checkpoints=1)
            assert copied == expected
            assert await blob_of(store, "s") == b"state"
            before = store.total
            assert before == StoreUsage(1, 2, 2, 9 + 9 + 5 + 5 + len(json.dumps({"topic": "cats"})))
            for name, turn in (("bare", 1), ("bare", 0), ("r", 0), ("nobody", 1)):
                assert await store.fork(name, replace(session("t"), turn=turn)) is None
            assert (await store.get("session", "t"), store.total) == (None, before)
            await store.delete("response", "r")
            await commit(store, "s", 2, b"next", keep=8)
            assert await store.load("s", 1) == b"state"

    asyncio.run(main())

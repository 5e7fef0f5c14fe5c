"""Checkpoints, forks, kept answers and accounts in the SQLite store."""

import asyncio
import random
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import StorageFailed
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import KeptAnswer, SessionRecord, Turn, Usage
from tests.server.sessions.stores import blob_of, commit, opened, raw, record, writer_held


async def with_turns(store: SQLiteStore, name: str, count: int, keep: int) -> SessionRecord:
    """A session of so many turns; the blob of each is its number."""
    await store.create(record(name, of=name))
    for turn in range(1, count + 1):
        await commit(store, name, turn, b"%d" % turn, keep=keep)
    found = await store.get(name)
    assert found is not None
    return found


async def kept(store: SQLiteStore, name: str) -> dict[int, bytes | None]:
    """Turns that have a checkpoint, newest first, and their blobs."""
    return {c.turn: await store.load_blob(name, c.turn) for c in await store.checkpoints(name)}


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (3, [5, 4, 3]), (8, [5, 4, 3, 2, 1])])
def test_the_last_turns_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            found = await with_turns(store, "a", 5, keep)
            await with_turns(store, "b", 2, keep)
            assert await kept(store, "a") == {turn: b"%d" % turn for turn in left}
            assert list(await kept(store, "a")) == left
            assert found.num_checkpoints == len(left)
            newest = (await store.checkpoints("a"))[0]
            assert (newest.num_tokens, newest.created_at, newest.num_bytes) == (50, 105.0, 1)
            assert store.total.num_states == len(left) + min(keep, 2)

    asyncio.run(main())


def test_fewer_may_be_kept_from_now_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await with_turns(store, "a", 6, keep=8)
            await commit(store, "a", 7, b"7", keep=2)
            assert list(await kept(store, "a")) == [7, 6]

    asyncio.run(main())


def test_a_fork_is_a_copy_that_goes_its_own_way(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await with_turns(store, "a", 4, keep=3)
            before = (await store.get("a"), await kept(store, "a"))
            made = replace(record("b", of="b"), turn=3, parent_id="a", parent_turn=3, ttl_s=9.0)
            forked = await store.fork("a", made)
            assert forked == replace(made, num_tokens=30, num_checkpoints=1)
            assert forked == await store.get("b")
            await commit(store, "b", 4, b"other", keep=3)
            assert await kept(store, "b") == {4: b"other", 3: b"3"}
            assert (await store.get("a"), await kept(store, "a")) == before
            assert store.total == Usage(2, 5, 9)
            await store.delete("a")
            assert await kept(store, "b") == {4: b"other", 3: b"3"}
            assert store.total == Usage(1, 2, 6)

    asyncio.run(main())


@pytest.mark.parametrize(("name", "turn"), [("a", 1), ("a", 5), ("a", -1), ("nobody", 3)])
def test_only_kept_turns_can_be_forked_or_rewound_to(tmp_path: Path, name: str, turn: int) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            before = await with_turns(store, "a", 4, keep=3)
            assert await store.fork(name, replace(record("b"), turn=turn)) is None
            assert await store.get("b") is None
            assert await store.rewind(name, turn, 1.0) is None
            assert await store.load_blob(name, turn) is None
            assert await store.get("a") == before

    asyncio.run(main())


def test_the_empty_beginning_is_always_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await with_turns(store, "a", 4, keep=3)
            fresh = await store.fork("a", replace(record("b"), turn=0))
            assert fresh is not None
            assert (fresh.turn, fresh.num_tokens, fresh.num_checkpoints) == (0, 0, 0)
            rewound = await store.rewind("a", 0, 200.0)
            assert rewound is not None
            assert (rewound.turn, rewound.num_tokens, rewound.num_checkpoints) == (0, 0, 0)
            assert store.total == Usage(2, 0, 0)
            await commit(store, "a", 1, b"again")
            assert await blob_of(store, "a") == b"again"

    asyncio.run(main())


def test_a_rewind_goes_back_and_forgets_what_was_after(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            before = await with_turns(store, "a", 4, keep=3)
            rewound = await store.rewind("a", 3, 200.0)
            assert rewound == replace(
                before, turn=3, num_tokens=30, num_checkpoints=2, last_used_at=200.0
            )
            assert rewound == await store.get("a")
            assert await kept(store, "a") == {3: b"3", 2: b"2"}
            await commit(store, "a", 4, b"another 4", keep=3)
            assert await kept(store, "a") == {4: b"another 4", 3: b"3", 2: b"2"}

    asyncio.run(main())


def test_an_answer_is_kept_as_long_as_its_turn(tmp_path: Path) -> None:
    def answer(turn: int) -> KeptAnswer:
        return KeptAnswer(f"key {turn}", f"request {turn}", f"answer {turn} é")

    async def found(store: SQLiteStore) -> list[int]:
        return [t for t in range(1, 6) if await store.find_answer("a", f"key {t}") == answer(t)]

    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.create(record("a"))
            await store.create(record("b"))
            for turn in range(1, 6):
                await commit(store, "a", turn, b"-", keep=3, answer=answer(turn))
            assert store.total == Usage(2, 3, 3 + 3 * len("answer 1 é".encode()))
        async with opened(tmp_path) as store:
            assert await found(store) == [3, 4, 5]
            assert await store.find_answer("b", "key 5") is None
            await store.fork("a", replace(record("c"), turn=5))
            assert await store.find_answer("c", "key 5") is None
            await store.rewind("a", 4, 1.0)
            assert await found(store) == [3, 4]
            await commit(store, "a", 5, b"-", keep=3)
            assert await found(store) == [3, 4]
            with pytest.raises(StorageFailed):
                await commit(store, "a", 6, b"-", keep=3, answer=answer(4))
            assert await found(store) == [3, 4]

    asyncio.run(main())


def test_deletion_erases_checkpoints_and_answers(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "ab":
                await store.create(record(name))
                for turn in range(1, 5):
                    mark = f"<{name} {turn}>"
                    kept = KeptAnswer(mark, mark, f"<answer {name} {turn}>")
                    await commit(store, name, turn, mark.encode() * 2000, keep=3, answer=kept)
            assert b"<a 2>" in raw(tmp_path)
            assert b"<answer a 4>" in raw(tmp_path)
            await store.delete("a")
            left = raw(tmp_path)
            for turn in range(1, 5):
                assert b"<a %d><a" % turn not in left
                assert b"<answer a %d>" % turn not in left
            assert b"<answer b 4>" in left
            assert store.total.num_states == 3

    asyncio.run(main())


def test_sessions_that_were_not_used_for_long_have_expired(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name, ttl_s in (("a", 10.0), ("b", 30.0), ("c", None), ("d", 5.0)):
                await store.create(replace(record(name), last_used_at=100.0, ttl_s=ttl_s))
            assert await store.expired(104.9, 10) == []
            assert await store.expired(110.0, 10) == ["d", "a"]
            assert await store.expired(1000.0, 2) == ["d", "a"]
            assert [found.id for found in await store.list("", 9, None, 110.0)] == ["c", "b"]
            await commit(store, "a", 5 - 4, b"used", keep=1)
            assert await store.expired(110.9, 10) == ["d"]
            assert await store.expired(111.0, 10) == ["d", "a"]

    asyncio.run(main())


def test_owners_see_their_own_and_accounts_are_exact(tmp_path: Path) -> None:
    async def main() -> None:
        chance = random.Random(5)
        sizes, blobs = dict[str, dict[int, int]](), dict[str, dict[int, int]]()
        owner_of = dict[str, str]()
        async with opened(tmp_path) as store:
            for step in range(250):
                name = f"{chance.randrange(8)}"
                turns = sizes.get(name)
                move = chance.random()
                if turns is None:
                    owner_of[name] = chance.choice(["", "x", "y"])
                    await store.create(replace(record(name), owner=owner_of[name]))
                    sizes[name], blobs[name] = {}, {}
                elif move < 0.1:
                    await store.delete(name)
                    del sizes[name], owner_of[name]
                elif move < 0.25:
                    turn = chance.choice([0, *turns])
                    assert await store.rewind(name, turn, 1.0) is not None
                    sizes[name] = {t: size for t, size in turns.items() if t <= turn}
                elif move < 0.4:
                    turn, copy = chance.choice([0, *turns]), f"copy {step}"
                    owner_of[copy] = owner_of[name]
                    await store.fork(name, replace(record(copy), owner=owner_of[name], turn=turn))
                    blobs[copy] = {turn: blobs[name][turn]} if turn else {}
                    sizes[copy] = dict(blobs[copy])  # the answer stays with the original
                    if turn and chance.random() < 0.5:
                        answerless = Turn(turn + 1, 1, 1.0, b"12345")
                        await store.commit(copy, answerless, 2)
                        sizes[copy][turn + 1] = blobs[copy][turn + 1] = 5
                else:
                    found = await store.get(name)
                    assert found is not None
                    turn, blob = found.turn + 1, bytes(chance.randrange(9000))
                    kept = KeptAnswer(f"{step}", "", "é" * chance.randrange(50))
                    await commit(store, name, turn, blob, keep=3, answer=kept)
                    blobs[name][turn] = len(blob)
                    turns[turn] = len(blob) + 2 * len(kept.answer)
                    sizes[name] = {t: size for t, size in turns.items() if t > turn - 3}
                for owner in ("", "x", "y"):
                    own = [sizes[n] for n in sizes if owner_of[n] == owner]
                    assert await store.usage(owner) == Usage(
                        len(own), sum(map(len, own)), sum(sum(t.values()) for t in own)
                    )
                    listed = {found.id for found in await store.list(owner, 1000, None, 0.0)}
                    assert listed == {n for n in sizes if owner_of[n] == owner}
            total = store.total
            assert await store.usage("nobody") == Usage()
        async with opened(tmp_path) as store:
            assert store.total == total

    asyncio.run(main())


def test_a_session_can_begin_with_a_state(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            made = replace(record("a"), turn=7, num_tokens=70, num_checkpoints=1)
            await store.create(made, b"state")
            assert await store.get("a") == made
            assert await kept(store, "a") == {7: b"state"}
            assert store.total == Usage(1, 1, 5)

    asyncio.run(main())


def test_whatever_waits_shares_one_transaction_also_with_forks_and_rewinds(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await with_turns(store, "a", 3, keep=3)
            await with_turns(store, "b", 3, keep=3)
            begun = list[str]()
            async with writer_held(store):
                asked = asyncio.gather(
                    commit(store, "a", 4, b"4", keep=3),
                    store.fork("a", replace(record("c"), turn=4)),
                    store.rewind("b", 2, 1.0),
                    commit(store, "b", 3, b"another 3", keep=3),
                )
                await asyncio.sleep(0)
                store._writer.db.set_trace_callback(
                    lambda sql: begun.append(sql) if sql.startswith("BEGIN") else None
                )
            await asked
            store._writer.db.set_trace_callback(None)
            assert len(begun) == 1
            assert await kept(store, "c") == {4: b"4"}
            assert await kept(store, "b") == {3: b"another 3", 2: b"2", 1: b"1"}

    asyncio.run(main())


@pytest.mark.parametrize(("durability", "synchronous"), [("sync", 2), ("async", 1)])
def test_durability_is_what_was_asked_for(
    tmp_path: Path, durability: str, synchronous: int
) -> None:
    async def main() -> None:
        store = SQLiteStore(tmp_path / "s", "async" if durability == "async" else "sync")
        assert store._writer.db.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        await store.close()

    asyncio.run(main())


def test_the_accounts_are_those_of_the_tables(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await with_turns(store, "a", 5, keep=2)
        db = sqlite3.connect(tmp_path / "sessions.sqlite3")
        assert db.execute("SELECT * FROM owners").fetchall() == [("", 1, 2, 2, 0)]
        db.close()

    asyncio.run(main())

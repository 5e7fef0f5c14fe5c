"""Responses in the SQLite store: each ends once, or is marked failed when interrupted."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import StorageFailed
from server.sessions.store import UNFINISHED, Entry, Status, StoreUsage
from tests.server.sessions.stores import (
    advanced,
    blob_of,
    insert,
    listed,
    new_state,
    opened,
    pending,
    response,
    session,
)


def test_what_is_inserted_is_found_again(tmp_path: Path) -> None:
    async def main() -> None:
        plain, whole = response("a"), replace(response("b", owner="x"), turn=1, expires_at=9.5)
        async with opened(tmp_path) as store:
            await store.insert(plain)
            whole = await insert(store, whole, b"state")
        async with opened(tmp_path) as store:
            assert await store.get("response", "a") == plain
            assert await store.get("response", "b") == whole
            assert await store.get("response", "c") is None
            assert [await store.load(name, 1) for name in "abc"] == [None, b"state", None]
            assert await store.usage("") == StoreUsage(0, 1, 0, len('{"é": 1}'.encode()))
            assert await store.usage("x") == StoreUsage(0, 1, 1, 9 + 5)
            assert store.total == StoreUsage(0, 2, 1, 9 + 9 + 5)
            assert await listed(store) == []

    asyncio.run(main())


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("status", UNFINISHED)
def test_only_what_is_unfinished_can_be_finished(
    tmp_path: Path, status: Status, has_state: bool
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            begun = replace(pending("a"), status=status)
            await store.insert(begun)
            state = new_state("a", 1, b"state") if has_state else None
            done = replace(begun, status="completed", body="[]")
            if has_state:
                done = replace(advanced(done, 1), body="[]")
            assert await store.advance(done, state, 8)
            if state is not None:
                done = replace(done, state_id=state.id, num_checkpoints=1)
            assert await store.get("response", "a") == done
            assert await blob_of(store, "a", "response") == (b"state" if has_state else None)
            for late in (replace(done, status="cancelled"), replace(done, turn=2)):
                assert not await store.advance(late, None, 8)
                assert not await store.advance(late, new_state("a", 2, b"late"), 8)
            assert await store.get("response", "a") == done
            assert store.total == StoreUsage(0, 1, int(has_state), 2 + 5 * has_state)
            await store.delete("response", "a")
            assert not await store.advance(done, state, 8)
            assert store.total == StoreUsage()

    asyncio.run(main())


def failed(found: Entry) -> Entry:
    return replace(found, status="failed", body=f"interrupted {found.body}")


def test_all_that_is_unfinished_is_rewritten_but_what_is_excepted(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "abc":
                await store.insert(pending(name))
            await store.insert(session("s"))
            done = await insert(store, replace(response("d"), turn=1), b"state")
            assert await store.rewrite_unfinished(failed, frozenset("b")) == 2
            for name, expected in (("a", failed(pending("a"))), ("b", pending("b")), ("d", done)):
                assert await store.get("response", name) == expected
            assert await store.get("session", "s") == session("s")
            assert await store.rewrite_unfinished(failed, frozenset()) == 1
            assert await store.rewrite_unfinished(failed, frozenset()) == 0
            assert store.total == StoreUsage(1, 4, 1, 3 * (9 + len("interrupted ")) + 9 + 5)

    asyncio.run(main())


def test_the_rewriting_is_of_all_or_of_none(tmp_path: Path) -> None:
    def fail_at_b(found: Entry) -> Entry:
        if found.id == "b":
            raise ValueError("its body is damaged")
        return failed(found)

    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "abc":
                await store.insert(pending(name))
            with pytest.raises(StorageFailed, match="damaged"):
                await store.rewrite_unfinished(fail_at_b, frozenset())
            found = [await store.get("response", name) for name in "abc"]
            assert found == [pending(name) for name in "abc"]

    asyncio.run(main())

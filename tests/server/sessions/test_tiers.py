"""Tiers: where a state is, what is counted, and that erased states are gone from all."""

import asyncio
from pathlib import Path

from tests.server.sessions.worlds import CACHED_BYTES, STATE_BYTES, state, world


def test_the_fastest_tier_is_reported(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes=2 * CACHED_BYTES) as w:
            names = [await w.new() for _ in range(3)]
            assert [await w.tier(name) for name in names] == [None] * 3
            assert w.held() == {"device": (0, 0), "host": (0, 0), "store": (3, 0)}
            first = await w.advance(names[0], state(b"a"), has_row=True)
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
            w.tiers.row_released("state of nobody", is_evicted=False)
            assert [w.evictions("device"), await w.tier(names[0])] == [0, "device"]
            assert first.state_id is not None
            w.tiers.row_released(first.state_id, is_evicted=True)
            assert [w.evictions("device"), await w.tier(names[0])] == [1, "store"]
            assert w.held()["device"] == (0, 0)
            await w.load(names[0])
            assert [await w.tier(name) for name in names] == ["host", "store", "host"]
            assert w.evictions("host") == 2
            assert w.value("session_state_bytes") == w.ledger.state_bytes == STATE_BYTES

    asyncio.run(main())


def test_a_row_that_a_turn_continues_in_is_no_eviction(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            before = await w.advance(name, state(b"a"), has_row=True)
            assert before.state_id is not None
            async with w.next_turn(name):
                w.tiers.row_released(before.state_id, is_evicted=False)
                assert await w.tier(name) == "device"  # it runs there
                assert w.held()["device"] == (0, 0)
            assert await w.tier(name) == "host"
            assert w.evictions("device") == 0
            await w.advance(name, state(b"b"), has_row=True)
            assert await w.tier(name) == "device"

    asyncio.run(main())


def test_a_fork_shares_the_state_wherever_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            name = await w.new()
            source = await w.advance(name, state(b"a"), has_row=True)
            fork = await w.ledger.fork("me", name, None)
            assert fork.state_id == source.state_id
            assert w.ledger.tier(fork) == "device"
            assert w.held()["host"] == (1, CACHED_BYTES)
            await w.delete(name)
            assert w.ledger.tier(fork) == "store"
            assert await w.load(fork.id) == state(b"a")

    asyncio.run(main())


def test_only_a_retained_row_is_released(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            w.tiers.row_retained("kept")
            w.tiers.cache("kept", state(), "")
            num_forgotten = w.tiers.num_forgotten
            for _ in range(2):
                w.tiers.release("other")
                w.tiers.release("kept")
            assert (w.released, w.tiers.num_forgotten) == (["kept"], num_forgotten)
            assert w.tiers.cached("kept") == state()
            w.tiers.row_retained("kept")
            w.tiers.forget("kept")
            w.tiers.forget(None)
            assert w.released == ["kept", "kept"]
            assert w.tiers.cached("kept") is None
            assert w.tiers.num_forgotten == num_forgotten + 2

    asyncio.run(main())


def test_a_cached_state_replaces_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, cache_bytes=2 * CACHED_BYTES) as w:
            w.tiers.cache("a", state(b"a"), "")
            w.tiers.cache("b", state(b"b"), "")
            w.tiers.cache("c", state(b"c"), "", replaced="b")
            assert [w.tiers.cached(name) for name in "abc"] == [state(b"a"), None, state(b"c")]
            assert w.evictions("host") == 0

    asyncio.run(main())

"""A ledger on a real store, with a tiny state, for tests."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from model.decoding.sampling import RecentTokens
from model.state import TensorSpec
from server.metrics import Metrics
from server.sessions.cache import HostCache
from server.sessions.codec import Codec, SessionState
from server.sessions.ledger import (
    AfterResponse,
    Ledger,
    NewResponse,
    NextTurn,
    SessionHead,
    Source,
    Target,
    new_state_id,
)
from server.sessions.ledger_turn import LedgerTurn
from server.sessions.quota import Quota, Quotas
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import Entry, EntryKind, StoredAnswer
from server.sessions.tiers import Tiers
from tests.server.sessions.stores import FILE

SPEC = (TensorSpec("m", (2, 3), "float32", 0.0), TensorSpec("h", (1, 8), "float32", 0.0))
STATE_BYTES = 24 + 32
RECENT_BYTES = len(RecentTokens().to_bytes())
CACHED_BYTES = STATE_BYTES + RECENT_BYTES
VOCAB = 300
ME = "me"
CODEC = Codec("f" * 64, SPEC, VOCAB, "float32 x float32")


def state(mark: bytes = b"-", position: int = 5, turn: int = 1) -> SessionState:
    """A distinct state for each one-byte mark."""
    recent = RecentTokens()
    recent.append(mark[0], generated=True)
    return SessionState(position, (3,), b"\xe2", recent.to_bytes(), mark * STATE_BYTES, turn)


def body(status: str = "completed", **facts: object) -> str:
    """A response object as JSON."""
    return json.dumps({"object": "response", "status": status} | facts)


@dataclass(frozen=True)
class World:
    """A ledger on a real store, and its parts."""

    ledger: Ledger
    tiers: Tiers
    released: list[str]
    """Ids of states whose rows the engine was asked to release."""

    store: SQLiteStore
    cache: HostCache
    metrics: Metrics

    @asynccontextmanager
    async def turn(
        self, source: Source, target: Target, owner: str = ME
    ) -> AsyncIterator[LedgerTurn]:
        """A turn that is not replayed."""
        async with self.ledger.begin(owner, source, target) as turn:
            assert not isinstance(turn, StoredAnswer)
            yield turn

    @asynccontextmanager
    async def next_turn(
        self, session_id: str, expected: int | None = None
    ) -> AsyncIterator[LedgerTurn]:
        async with self.turn(SessionHead(session_id, expected), NextTurn()) as turn:
            yield turn

    @asynccontextmanager
    async def making(
        self, name: str, previous: str | None = None, ttl_s: float | None = None
    ) -> AsyncIterator[LedgerTurn]:
        """The turn that makes a response."""
        source = None if previous is None else AfterResponse(previous)
        async with self.turn(source, NewResponse(name, ttl_s)) as turn:
            yield turn

    async def advance(
        self,
        session_id: str,
        after: SessionState,
        *,
        expected: int | None = None,
        has_row: bool = False,
    ) -> Entry:
        """One complete turn of a session; `has_row`: the engine retains its row."""
        async with self.next_turn(session_id, expected) as turn:
            await turn.commit(after, new_state_id(), None)
        return self._ended(turn, has_row)

    async def respond(
        self,
        name: str,
        mark: bytes,
        previous: str | None = None,
        *,
        ttl_s: float | None = None,
        has_row: bool = False,
    ) -> Entry:
        """One complete response."""
        async with self.making(name, previous, ttl_s) as turn:
            await turn.commit(state(mark), new_state_id(), body(mark=mark.decode()))
        return self._ended(turn, has_row)

    def _ended(self, turn: LedgerTurn, has_row: bool) -> Entry:
        assert turn.entry is not None
        if has_row:
            self.tiers.row_retained(turn.entry.state_id or "")
        return turn.entry

    async def load(self, session_id: str) -> SessionState | None:
        async with self.next_turn(session_id) as turn:
            return await turn.load()

    async def after(self, response_id: str, owner: str = ME) -> SessionState | None:
        """The state that an unstored turn continues from."""
        async with self.turn(AfterResponse(response_id), None, owner) as turn:
            return await turn.load()

    async def new(self, ttl_s: float | None = None) -> str:
        return (await self.ledger.create(ME, {}, ttl_s)).id

    async def made(self, kind: EntryKind, mark: bytes, *, has_row: bool = False) -> Entry:
        """A session after its first turn, or a response."""
        if kind == "response":
            return await self.respond(f"resp_{mark!r}", mark, has_row=has_row)
        return await self.advance(await self.new(), state(mark), has_row=has_row)

    async def state_of(self, entry: Entry) -> SessionState | None:
        return await (self.load if entry.kind == "session" else self.after)(entry.id)

    async def get(self, session_id: str) -> Entry:
        return await self.ledger.get(ME, "session", session_id)

    async def response(self, response_id: str) -> Entry:
        return await self.ledger.get(ME, "response", response_id)

    async def delete(self, session_id: str) -> None:
        await self.ledger.delete(ME, "session", session_id)

    async def delete_response(self, response_id: str) -> None:
        await self.ledger.delete(ME, "response", response_id)

    async def tier(self, session_id: str) -> str | None:
        return self.ledger.tier(await self.get(session_id))

    def is_cached(self, entry: Entry) -> bool:
        return entry.state_id is not None and entry.state_id in self.cache

    def value(self, metric: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"latentd_{metric}", labels)

    def held(self) -> dict[str, tuple[float | None, float | None]]:
        """Sessions and bytes by tier, as the metrics show them."""
        return {
            tier: (self.value("sessions", tier=tier), self.value("session_bytes", tier=tier))
            for tier in ("device", "host", "store")
        }

    def evictions(self, tier: str) -> float:
        return self.value("session_evictions_total", tier=tier) or 0.0


@asynccontextmanager
async def world(
    folder: Path,
    cache_bytes: int = 1 << 20,
    *,
    keep_turns: int = 8,
    quotas: Quotas | None = None,
    codec: Codec = CODEC,
    max_response_ttl_s: float | None = None,
) -> AsyncIterator[World]:
    store, cache, metrics = SQLiteStore(folder / FILE), HostCache(cache_bytes), Metrics()
    released = list[str]()

    def release(state_id: str) -> None:
        """Like the engine, which reports it a little later."""
        released.append(state_id)
        tiers.row_released(state_id, is_evicted=False)

    try:
        tiers = Tiers(cache, store, codec.state_bytes, metrics, release)
        ledger = Ledger(
            store,
            tiers,
            Quota(store, quotas or Quotas()),
            codec,
            metrics,
            keep_turns=keep_turns,
            max_response_ttl_s=max_response_ttl_s,
            session_wait_s=0,
        )
        yield World(ledger, tiers, released, store, cache, metrics)
    finally:
        await store.close()

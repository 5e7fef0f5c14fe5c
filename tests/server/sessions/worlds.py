"""Sessions and responses on a real store, with a tiny state, for tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from model.sampling import RecentTokens
from model.state import TensorSpec
from server.metrics import Metrics
from server.sessions.cache import HostCache
from server.sessions.codec import Codec, SessionState
from server.sessions.places import Places
from server.sessions.quota import Quota, Quotas
from server.sessions.responses import Responses
from server.sessions.sessions import Sessions
from server.sessions.sqlite.store import SQLiteStore
from server.sessions.store import SessionRecord
from server.sessions.turn import TurnCondition
from tests.server.sessions.stores import FILE

SPEC = (TensorSpec("m", (2, 3), "float32", 0.0), TensorSpec("h", (1, 4), "float64", 0.0))
STATE_BYTES = 24 + 32
RECENT_BYTES = len(RecentTokens().to_bytes())
CACHED_BYTES = STATE_BYTES + RECENT_BYTES
VOCAB = 300
ME = "me"
CODEC = Codec("f" * 64, SPEC, VOCAB)


def state(mark: bytes = b"-", position: int = 5, turn: int = 1) -> SessionState:
    """A state of its own for each one-byte mark."""
    recent = RecentTokens()
    recent.append(mark[0], generated=True)
    return SessionState(position, (3,), b"\xe2", recent.to_bytes(), mark * STATE_BYTES, turn)


@dataclass(frozen=True)
class World:
    """Sessions and responses on a real store, and what they are made of."""

    sessions: Sessions
    responses: Responses
    places: Places
    forgotten: list[str]
    """Rows that the engine was told to forget."""

    store: SQLiteStore
    cache: HostCache
    metrics: Metrics

    async def advance(
        self,
        session_id: str,
        after: SessionState,
        warm: str | None = None,
        condition: TurnCondition | None = None,
        answer: str | None = None,
    ) -> SessionRecord:
        """One whole turn."""
        async with self.sessions.turn(ME, session_id, condition) as turn:
            await turn.commit(after, warm, answer)
            return turn.record

    async def load(self, session_id: str) -> SessionState:
        async with self.sessions.turn(ME, session_id) as turn:
            return await turn.load()

    async def new(self, ttl_s: float | None = None) -> str:
        return (await self.sessions.create(ME, {}, ttl_s)).id

    async def get(self, session_id: str) -> SessionRecord:
        return await self.sessions.get(ME, session_id)

    async def delete(self, session_id: str) -> None:
        await self.sessions.delete(ME, session_id)

    async def tier(self, session_id: str) -> str | None:
        return self.sessions.tier(await self.get(session_id))

    def held(self) -> dict[str, tuple[float | None, float | None]]:
        """Sessions and bytes by tier, as the metrics tell them."""
        value = self.metrics.registry.get_sample_value
        return {
            tier: (
                value("latentd_sessions", {"tier": tier}),
                value("latentd_session_bytes", {"tier": tier}),
            )
            for tier in ("device", "host", "store")
        }

    def evictions(self, tier: str) -> float:
        name = "latentd_session_evictions_total"
        return self.metrics.registry.get_sample_value(name, {"tier": tier}) or 0.0


@asynccontextmanager
async def world(
    folder: Path,
    cache_bytes: int = 1 << 20,
    *,
    keep_turns: int = 8,
    quotas: Quotas | None = None,
    codec: Codec = CODEC,
    most_ttl_s: float | None = None,
) -> AsyncIterator[World]:
    store, cache, metrics = SQLiteStore(folder / FILE), HostCache(cache_bytes), Metrics()
    forgotten = list[str]()
    try:
        places = Places(cache, store, codec.state_bytes, metrics, forgotten.append)
        quota = Quota(store, quotas or Quotas())
        sessions = Sessions(store, places, quota, codec, metrics, keep_turns=keep_turns)
        responses = Responses(store.responses, places, quota, codec, metrics, most_ttl_s=most_ttl_s)
        yield World(sessions, responses, places, forgotten, store, cache, metrics)
    finally:
        await store.close()

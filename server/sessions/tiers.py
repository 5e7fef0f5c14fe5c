"""Tiers above the store: which states are on the device and in host memory.

Each state has a unique id, so a tier can never return the state of another turn. Evicting a state
from a tier loses nothing.
"""

from collections.abc import Callable
from typing import Literal

from server.metrics import Metrics
from server.sessions.cache import HostCache
from server.sessions.codec import SessionState
from server.sessions.store import Entry, Store

Tier = Literal["device", "host", "store"]


class Tiers:
    """Rows on the device and states in host memory, by state id. Belongs to the event loop."""

    def __init__(
        self,
        cache: HostCache,
        store: Store,
        state_bytes: int,
        metrics: Metrics,
        release_row: Callable[[str], None],
    ) -> None:
        """`release_row` frees the row that the engine retains under a state id."""
        self._cache = cache
        self._store = store
        self._state_bytes = state_bytes
        self._metrics = metrics
        self._release_row = release_row
        self._rows = set[str]()
        self.num_forgotten = 0
        """Counts erasures: a state read from the store may be cached only if this has not changed
        meanwhile."""

        metrics.session_state_bytes.set(state_bytes)
        self.report()

    def tier(self, entry: Entry) -> Tier | None:
        """The fastest tier with the entry's state; None if it has none."""
        if entry.state_id is None:
            return None
        if entry.state_id in self._rows:
            return "device"
        return "host" if entry.state_id in self._cache else "store"

    def row_retained(self, state_id: str) -> None:
        """The engine has retained a row with this state."""
        self._rows.add(state_id)
        self.report()

    def row_released(self, state_id: str, *, is_evicted: bool) -> None:
        """The row no longer holds the state."""
        self._rows.discard(state_id)
        if is_evicted:
            self._metrics.session_evictions_total.labels(tier="device").inc()
        self.report()

    def cached(self, state_id: str) -> SessionState | None:
        """The state, if it is in host memory."""
        return self._cache.get(state_id)

    def cache(
        self, state_id: str, state: SessionState, owner: str, replaced: str | None = None
    ) -> None:
        """Cache an owner's state in host memory, if there is space, replacing another one."""
        if replaced is not None:
            self._cache.remove(replaced)
        evicted = self._cache.put(state_id, state, owner)
        self._metrics.session_evictions_total.labels(tier="host").inc(evicted)
        self.report()

    def forget(self, state_id: str | None) -> None:
        """Erase the state from all tiers."""
        self.num_forgotten += 1
        if state_id is not None:
            self._cache.remove(state_id)
            self.release(state_id)
        self.report()

    def release(self, state_id: str) -> None:
        """Release the state's row on the device, if there is one."""
        if state_id in self._rows:
            self._release_row(state_id)

    def report(self) -> None:
        """Update the tiers' metrics."""
        total = self._store.total
        tiers = {
            "device": (len(self._rows), len(self._rows) * self._state_bytes),
            "host": (len(self._cache), self._cache.num_bytes),
            "store": (total.num_sessions, total.num_bytes),
        }
        self._metrics.session_checkpoints.set(total.num_states)
        self._metrics.responses.set(total.num_responses)
        for tier, (count, num_bytes) in tiers.items():
            self._metrics.sessions.labels(tier=tier).set(count)
            self._metrics.session_bytes.labels(tier=tier).set(num_bytes)

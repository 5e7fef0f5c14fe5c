"""Where states of sessions and responses are besides the store, and how much each place holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from server.metrics import Metrics
from server.sessions.cache import HostCache
from server.sessions.codec import SessionState
from server.sessions.store import SessionRecord, SessionStore

Tier = Literal["device", "host", "store"]


@dataclass(frozen=True)
class _Warm:
    """A row where the engine has the state after this turn."""

    name: str
    turn: int


class Places:
    """Rows on the device and states in host memory, by session or response. Forgetting there loses
    nothing.

    What is asked for names its turn, so that no place can answer with a state of another one.
    """

    def __init__(
        self,
        cache: HostCache,
        store: SessionStore,
        state_bytes: int,
        metrics: Metrics,
        forget_row: Callable[[str], None],
    ) -> None:
        """`forget_row` is told the names of warm rows that nobody will ask for any more."""
        self._cache = cache
        self._store = store
        self._state_bytes = state_bytes
        self._metrics = metrics
        self._forget_row = forget_row
        self._warm: dict[str, _Warm] = {}
        self._running = set[str]()
        self.num_forgotten = 0
        """How often anything was forgotten on demand: who reads a state from the store may only
        put it here if this has not changed meanwhile."""

        metrics.session_state_bytes.set(state_bytes)
        self.report()

    def tier(self, record: SessionRecord) -> Tier | None:
        """The fastest place that holds the session's state; None before its first turn."""
        if record.id in self._warm or record.id in self._running:
            return "device"
        if record.id in self._cache:
            return "host"
        return "store" if record.turn else None

    def is_running(self, session_id: str) -> bool:
        return session_id in self._running

    def enter(self, session_id: str) -> None:
        """A turn goes on with the session."""
        self._running.add(session_id)

    def leave(self, session_id: str) -> None:
        """The turn has ended."""
        self._running.discard(session_id)

    def warm(self, session_id: str, turn: int) -> str | None:
        """The name of the row where the engine has the state after this turn."""
        warm = self._warm.get(session_id)
        return None if warm is None or warm.turn != turn else warm.name

    def set_warm(self, session_id: str, turn: int, name: str) -> None:
        self._warm[session_id] = _Warm(name, turn)
        self.report()

    def take_warm(self, session_id: str, turn: int) -> str | None:
        """`warm`, for a turn that continues there: the row will hold that state no longer."""
        name = self.warm(session_id, turn)
        if name is not None:
            del self._warm[session_id]
            self.report()
        return name

    def row_evicted(self, name: str) -> None:
        """The engine gave a warm row to another sequence."""
        for session_id, warm in self._warm.items():
            if warm.name == name:
                del self._warm[session_id]
                self._metrics.session_evictions_total.labels(tier="device").inc()
                break
        self.report()

    def cached(self, session_id: str, turn: int) -> SessionState | None:
        """The state after this turn, if it is in host memory."""
        state = self._cache.get(session_id)
        return None if state is None or state.turn != turn else state

    def cache(self, session_id: str, state: SessionState) -> None:
        """Keep a state in host memory, as far as there is room."""
        evicted = self._cache.put(session_id, state)
        self._metrics.session_evictions_total.labels(tier="host").inc(evicted)
        self.report()

    def forget(self, session_id: str) -> None:
        """Hold nothing of the session any more."""
        self.num_forgotten += 1
        self._cache.remove(session_id)
        warm = self._warm.pop(session_id, None)
        if warm is not None:
            self._forget_row(warm.name)
        self.report()

    def report(self) -> None:
        """Tell the metrics what each tier holds."""
        total = self._store.total
        tiers = {
            "device": (len(self._warm), len(self._warm) * self._state_bytes),
            "host": (len(self._cache), self._cache.num_bytes),
            "store": (total.num_sessions, total.num_bytes),
        }
        self._metrics.session_checkpoints.set(total.num_states)
        self._metrics.responses.set(total.num_responses)
        for tier, (count, num_bytes) in tiers.items():
            self._metrics.sessions.labels(tier=tier).set(count)
            self._metrics.session_bytes.labels(tier=tier).set(num_bytes)

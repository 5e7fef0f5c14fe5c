"""States in host memory, evicted from the owner with the most, least recently used first."""

from model.shares import SharedCache
from server.sessions.codec import SessionState


class HostCache:
    """States by id, at most `max_bytes` in total."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._states = SharedCache[str, SessionState](max_bytes)

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, state_id: str) -> bool:
        return state_id in self._states

    @property
    def num_bytes(self) -> int:
        return self._states.size

    def get(self, state_id: str) -> SessionState | None:
        """The state, which becomes its owner's most recently used."""
        return self._states.get(state_id)

    def put(self, state_id: str, state: SessionState, owner: str = "") -> int:
        """Add a state, evicting others if necessary. Returns how many were evicted.

        A state larger than the whole cache is not added.
        """
        if state.num_bytes > self._max_bytes:
            self.remove(state_id)
            return 0
        return len(self._states.put(state_id, state, owner, state.num_bytes))

    def remove(self, state_id: str) -> None:
        """Remove a state, if present."""
        self._states.remove(state_id)

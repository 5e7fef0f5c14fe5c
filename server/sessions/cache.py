"""States in host memory: of the owner that has most the least recently used ones go first."""

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
        """The state, now the one that its owner used last."""
        return self._states.get(state_id)

    def put(self, state_id: str, state: SessionState, owner: str = "") -> int:
        """Keep a state, forget others for it. Returns how many were forgotten.

        A state larger than the whole cache is not added.
        """
        if state.num_bytes > self._max_bytes:
            self.remove(state_id)
            return 0
        return len(self._states.put(state_id, state, owner, state.num_bytes))

    def remove(self, state_id: str) -> None:
        """Forget a state if it is here."""
        self._states.remove(state_id)

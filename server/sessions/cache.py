"""Host memory cache of states, with LRU eviction."""

from collections import OrderedDict

from server.sessions.codec import SessionState


class HostCache:
    """States by id, at most `max_bytes` in total."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._states: OrderedDict[str, SessionState] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, state_id: str) -> bool:
        return state_id in self._states

    def get(self, state_id: str) -> SessionState | None:
        """Get a state and mark it as most recently used."""
        if state_id not in self._states:
            return None
        self._states.move_to_end(state_id)
        return self._states[state_id]

    def put(self, state_id: str, state: SessionState) -> int:
        """Add a state. Returns how many others were evicted.

        A state larger than the whole cache is not added.
        """
        self.remove(state_id)
        if state.num_bytes > self._max_bytes:
            return 0
        self._states[state_id] = state
        self.num_bytes += state.num_bytes
        evicted = 0
        while self.num_bytes > self._max_bytes:
            _, oldest = self._states.popitem(last=False)
            self.num_bytes -= oldest.num_bytes
            evicted += 1
        return evicted

    def remove(self, state_id: str) -> None:
        """Remove a state if present."""
        state = self._states.pop(state_id, None)
        if state is not None:
            self.num_bytes -= state.num_bytes

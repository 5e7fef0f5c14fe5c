"""Owners of the state pool's rows. Only bookkeeping; states are not touched here.

A sequence owns its row from its first token to its last. The state of a finished turn may be
retained there under its state id, until a sequence continues it or the row is needed. States never
move. Row 0 is never owned. Methods that free a row return it, and the caller must erase its state.
"""

from model.shares import SharedCache
from server.engine.messages import RowReleased


class Slots:
    """Rows of the pool by owner."""

    def __init__(self, num_rows: int) -> None:
        self._owner: dict[int, str | None] = dict.fromkeys(range(1, num_rows + 1))
        self._free = list(self._owner)
        self._row: dict[str, int] = {}
        self._retained = SharedCache[str, None](num_rows)
        self._released: list[RowReleased] = []

    @property
    def num_rows(self) -> int:
        return len(self._owner)

    @property
    def num_retained(self) -> int:
        """Rows with states of finished turns."""
        return len(self._retained)

    @property
    def num_active(self) -> int:
        """Rows of sequences in prefill or decoding."""
        return len(self._row) - len(self._retained)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def row(self, owner: str) -> int:
        """The row of a sequence or a retained state."""
        return self._row[owner]

    def acquire(self, owner: str) -> int:
        """A row for a new sequence: a free one, else that of the retained state to evict next.

        It may hold another's state: the caller must overwrite all of it.
        """
        if not self._free:
            self._release(next(iter(self._retained)), is_evicted=True)
        row = self._free.pop()
        self._set(row, owner)
        return row

    def drain_released(self) -> list[RowReleased]:
        """The retained states evicted since the last call."""
        released, self._released = self._released, []
        return released

    def adopt(self, state_id: str, owner: str) -> bool:
        """Transfer the row of a retained state to a sequence that continues it; False if there is
        none."""
        if state_id not in self._retained:
            return False
        self._retained.remove(state_id)
        self._set(self._row.pop(state_id), owner)
        self._released.append(RowReleased(state_id, is_evicted=False))
        return True

    def retain(self, owner: str, state_id: str, client: str = "") -> None:
        """Retain a finished sequence's row under its state id, until the row is needed. Evicts the
        oldest row of the client with the most. Raises ValueError for an id that is in use."""
        self._set(self._row.pop(owner), state_id)
        self._retained.put(state_id, None, client)

    def release(self, owner: str) -> int:
        """Free the row of a sequence or of a retained state."""
        return self._release(owner, is_evicted=False)

    def release_all(self) -> None:
        """Free every row after an error; the retained states count as evicted."""
        self._released += [RowReleased(state_id, is_evicted=True) for state_id in self._retained]
        self._retained.clear()
        self._row.clear()
        self._owner = dict.fromkeys(self._owner)
        self._free = list(self._owner)

    @property
    def retained(self) -> list[str]:
        """Ids of the retained states, in eviction order."""
        return list(self._retained)

    def is_retained(self, state_id: str) -> bool:
        return state_id in self._retained

    def check(self) -> None:
        """Verify that every row has at most one owner. Raises RuntimeError."""
        used = {row: owner for owner, row in self._row.items()}
        owned = {row: owner for row, owner in self._owner.items() if owner is not None}
        free = {row for row, owner in self._owner.items() if owner is None}
        if used != owned or free != set(self._free) or len(free) != self.num_free:
            raise RuntimeError(f"rows are not accounted for: {used} against {owned}")

    def _release(self, owner: str, *, is_evicted: bool) -> int:
        row = self._row.pop(owner)
        self._owner[row] = None
        self._free.append(row)
        if owner in self._retained:
            self._retained.remove(owner)
            self._released.append(RowReleased(owner, is_evicted))
        return row

    def _set(self, row: int, owner: str) -> None:
        if owner in self._row:
            raise ValueError(f"{owner!r} has a row already")
        self._owner[row] = owner
        self._row[owner] = row

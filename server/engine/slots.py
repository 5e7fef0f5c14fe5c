"""Who owns which row of the state pool. Counts only; no state is touched here.

A sequence keeps its row from its first token to its last; the state of a finished turn may stay
there, known by its state id, until a sequence continues it or the row is needed. States never move.
Row 0 is never owned. Where a row becomes free, the method returns the row whose state the caller
must erase.
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
        """Rows of sequences that read or decode."""
        return len(self._row) - len(self._retained)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def row(self, owner: str) -> int:
        """The row of a sequence or of a kept state."""
        return self._row[owner]

    def can_acquire(self) -> bool:
        """Whether a row is free or can be freed by giving up a kept state."""
        return self.num_active < self.num_rows

    def acquire(self, owner: str) -> int:
        """A row for a new sequence: a free one, else that of the kept state that is next to go.

        It may hold another's state: the caller overwrites all of it.
        """
        if not self._free:
            self._release(next(iter(self._retained)), is_evicted=True)
        row = self._free.pop()
        self._set(row, owner)
        return row

    def drain_released(self) -> list[RowReleased]:
        """The kept states that no row holds any more, since the last call."""
        released, self._released = self._released, []
        return released

    def adopt(self, state_id: str, owner: str) -> bool:
        """Give the row of a kept state to a sequence that continues it; False if there is none."""
        if state_id not in self._retained:
            return False
        self._retained.remove(state_id)
        self._set(self._row.pop(state_id), owner)
        self._released.append(RowReleased(state_id, is_evicted=False))
        return True

    def retain(self, owner: str, state_id: str, client: str = "") -> None:
        """Keep a finished sequence's row under its state's id, until the row is needed: the client
        that has most of them loses its oldest one. Raises ValueError for an id that is in use:
        nobody could say which state it names."""
        self._set(self._row.pop(owner), state_id)
        self._retained.put(state_id, None, client)

    def release(self, owner: str) -> int:
        """Free the row of a sequence or of a kept state."""
        return self._release(owner, is_evicted=False)

    def release_all(self) -> None:
        """Free every row, whatever went wrong before; the kept states count as evicted."""
        self._released += [RowReleased(state_id, is_evicted=True) for state_id in self._retained]
        self._retained.clear()
        self._row.clear()
        self._owner = dict.fromkeys(self._owner)
        self._free = list(self._owner)

    @property
    def retained(self) -> list[str]:
        """The ids of the kept states, in the order in which their rows will be needed."""
        return list(self._retained)

    def is_retained(self, state_id: str) -> bool:
        return state_id in self._retained

    def check(self) -> None:
        """Prove that every row has one owner or none. Raises RuntimeError."""
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

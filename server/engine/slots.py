"""Who owns which row of the state pool. Counts only; no state is touched here.

A sequence keeps its row from its first token to its last; the state of a finished turn may stay
there, known by its state id, until a sequence continues it or the row is needed. States never move.
Row 0 is never owned. Where a row becomes free, the method returns the row whose state the caller
must erase.
"""

from collections import OrderedDict

from server.engine.messages import RowGivenUp


class Slots:
    """Rows of the pool by owner."""

    def __init__(self, num_rows: int) -> None:
        self._owner: dict[int, str | None] = dict.fromkeys(range(1, num_rows + 1))
        self._free = list(self._owner)
        self._row: dict[str, int] = {}
        self._kept: OrderedDict[str, None] = OrderedDict()
        self._given_up: list[RowGivenUp] = []

    @property
    def num_rows(self) -> int:
        return len(self._owner)

    @property
    def num_kept(self) -> int:
        """Rows with states of finished turns."""
        return len(self._kept)

    @property
    def num_active(self) -> int:
        """Rows of sequences that read or decode."""
        return len(self._row) - len(self._kept)

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
        """A row for a new sequence: a free one, else that of the oldest kept state.

        It may hold another's state: the caller overwrites all of it.
        """
        if not self._free:
            self._release(next(iter(self._kept)), is_evicted=True)
        row = self._free.pop()
        self._set(row, owner)
        return row

    def drain_given_up(self) -> list[RowGivenUp]:
        """The kept states that no row holds any more, since the last call."""
        given_up, self._given_up = self._given_up, []
        return given_up

    def adopt(self, state_id: str, owner: str) -> bool:
        """Give the row of a kept state to a sequence that continues it; False if there is none."""
        if state_id not in self._kept:
            return False
        del self._kept[state_id]
        self._set(self._row.pop(state_id), owner)
        self._given_up.append(RowGivenUp(state_id, is_evicted=False))
        return True

    def keep(self, owner: str, state_id: str) -> None:
        """Keep a finished sequence's row under its state's id, until the row is needed. Raises
        ValueError for an id that is in use: nobody could say which state it names."""
        self._set(self._row.pop(owner), state_id)
        self._kept[state_id] = None

    def release(self, owner: str) -> int:
        """Free the row of a sequence or of a kept state."""
        return self._release(owner, is_evicted=False)

    def release_all(self) -> None:
        """Free every row, whatever went wrong before; the kept states count as evicted."""
        self._given_up += [RowGivenUp(state_id, is_evicted=True) for state_id in self._kept]
        self._kept.clear()
        self._row.clear()
        self._owner = dict.fromkeys(self._owner)
        self._free = list(self._owner)

    @property
    def kept(self) -> list[str]:
        """The ids of the kept states, in the order in which their rows will be needed."""
        return list(self._kept)

    def is_kept(self, state_id: str) -> bool:
        return state_id in self._kept

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
        if owner in self._kept:
            del self._kept[owner]
            self._given_up.append(RowGivenUp(owner, is_evicted))
        return row

    def _set(self, row: int, owner: str) -> None:
        if owner in self._row:
            raise ValueError(f"{owner!r} has a row already")
        self._owner[row] = owner
        self._row[owner] = row

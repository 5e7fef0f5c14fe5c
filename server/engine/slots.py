"""Who owns which row of the state pool. Counts only; no state is touched here.

A sequence keeps its row from its first token to its last, and a warm state the row of the turn that
left it: states never move. Row 0 is never owned. Where a row becomes free, the method answers with
the row whose state the caller must erase.
"""

from collections import OrderedDict


class Slots:
    """Rows of the pool by owner."""

    def __init__(self, num_rows: int) -> None:
        self._owner: dict[int, str | None] = dict.fromkeys(range(1, num_rows + 1))
        self._free = list(self._owner)
        self._row: dict[str, int] = {}
        self._warm: OrderedDict[str, None] = OrderedDict()
        self._evicted: list[str] = []

    @property
    def num_rows(self) -> int:
        return len(self._owner)

    @property
    def num_warm(self) -> int:
        return len(self._warm)

    @property
    def num_active(self) -> int:
        """Rows of sequences that read or decode."""
        return len(self._row) - len(self._warm)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def row(self, owner: str) -> int:
        """The row of a sequence or of a warm state."""
        return self._row[owner]

    def can_acquire(self) -> bool:
        """Whether a row is free or can be freed by forgetting a warm state."""
        return self.num_active < self.num_rows

    def acquire(self, owner: str) -> int:
        """A row for a new sequence: a free one, else that of the oldest warm state.

        It may hold another's state: the caller overwrites all of it.
        """
        if not self._free:
            oldest = next(iter(self._warm))
            self.release(oldest)
            self._evicted.append(oldest)
        row = self._free.pop()
        self._set(row, owner)
        return row

    def take_evicted(self) -> list[str]:
        """Names of the warm states that were forgotten for want of a row or after an error."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def adopt(self, warm: str, owner: str) -> bool:
        """Give the row of a warm state to a sequence that continues it; False if it is gone."""
        if warm not in self._warm:
            return False
        row = self._row.pop(warm)
        del self._warm[warm]
        self._set(row, owner)
        return True

    def keep_warm(self, owner: str, name: str) -> None:
        """Keep a finished sequence's row under a new name, until the row is needed."""
        self._set(self._row.pop(owner), name)
        self._warm[name] = None

    def release(self, owner: str) -> int:
        """Free the row of a sequence or of a warm state."""
        row = self._row.pop(owner)
        self._owner[row] = None
        self._free.append(row)
        self._warm.pop(owner, None)
        return row

    def release_all(self) -> None:
        """Free every row; the warm states count as evicted."""
        self._evicted.extend(self._warm)
        self._warm.clear()
        self._row.clear()
        self._owner = dict.fromkeys(self._owner)
        self._free = list(self._owner)

    def is_warm(self, name: str) -> bool:
        return name in self._warm

    def check(self) -> None:
        """Prove that every row has one owner or none. Raises RuntimeError."""
        used = {row: owner for owner, row in self._row.items()}
        owned = {row: owner for row, owner in self._owner.items() if owner is not None}
        free = {row for row, owner in self._owner.items() if owner is None}
        if used != owned or free != set(self._free) or len(free) != self.num_free:
            raise RuntimeError(f"rows are not accounted for: {used} against {owned}")

    def _set(self, row: int, owner: str) -> None:
        self._owner[row] = owner
        self._row[owner] = row

"""Sequences that wait, by owner: within an owner's the most urgent first."""

from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import Generic, TypeVar

from server.engine.sequence import EngineSequence

S = TypeVar("S", bound=EngineSequence)


class WaitingQueue(Generic[S]):
    """Of an owner's sequences those in the flexible tier come last, then the number of their
    priority counts, then who came first."""

    def __init__(self) -> None:
        self._by_owner: dict[str, list[S]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_owner.values()))

    def __iter__(self) -> Iterator[S]:
        for sequences in self._by_owner.values():
            yield from sequences

    def __contains__(self, sequence: object) -> bool:
        return any(each is sequence for each in self)

    @property
    def owners(self) -> List[str]:
        """Those that have sequences here."""
        return list(self._by_owner)

    def of(self, owner: str) -> List[S]:
        """An owner's, in their order."""
        return self._by_owner.get(owner, ())

    def append(self, sequence: S) -> None:
        """A sequence begins to wait."""
        sequences = self._by_owner.setdefault(sequence.request.owner, [])
        insort(sequences, sequence, key=_rank)

    def remove(self, sequence: S) -> None:
        """It does not wait any more."""
        owner = sequence.request.owner
        self._by_owner[owner].remove(sequence)
        if not self._by_owner[owner]:
            del self._by_owner[owner]

    def clear(self) -> None:
        """Nothing waits any more."""
        self._by_owner.clear()


def _rank(sequence: EngineSequence) -> tuple[bool, int]:
    return sequence.request.is_flexible, sequence.request.priority

"""Waiting sequences by owner, most urgent first."""

from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import Generic, TypeVar

from server.engine.sequence import EngineSequence

S = TypeVar("S", bound=EngineSequence)


class WaitingQueue(Generic[S]):
    """Orders each owner's sequences by service tier, then priority, then arrival."""

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
        """Owners with waiting sequences."""
        return list(self._by_owner)

    def of(self, owner: str) -> List[S]:
        """An owner's sequences, in order."""
        return self._by_owner.get(owner, ())

    def append(self, sequence: S) -> None:
        """Add a sequence."""
        sequences = self._by_owner.setdefault(sequence.request.owner, [])
        insort(sequences, sequence, key=_rank)

    def remove(self, sequence: S) -> None:
        """Remove a sequence."""
        owner = sequence.request.owner
        self._by_owner[owner].remove(sequence)
        if not self._by_owner[owner]:
            del self._by_owner[owner]

    def clear(self) -> None:
        """Remove all sequences."""
        self._by_owner.clear()


def _rank(sequence: EngineSequence) -> tuple[bool, int]:
    return sequence.request.is_flexible, sequence.request.priority

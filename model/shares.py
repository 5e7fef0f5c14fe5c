"""Shared space: who uses more than others makes space, and nobody's use keeps others out."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def has_space(own: int, total: int, new: int, most: int, num_owners: int) -> bool:
    """Whether an owner with `own` of `total` units may have `new` more, where there are `most`.

    As long as not all are used, anybody may. Then only who stays within an equal share of them,
    among `num_owners` with itself. So one owner alone gets everything, and the next ones still
    their shares: n owners together never have more than `most` times 1 + 1/2 + ... + 1/n.
    """
    return total + new <= most or own + new <= most // max(1, num_owners)


class SharedCache(Generic[K, V]):
    """Values of several owners, up to so many units of size. Not safe for threads.

    Whoever has most gives up the value that it has not used for longest: nobody's values push out
    those of somebody who has fewer.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._by_owner: dict[str, OrderedDict[K, V]] = {}
        self._sizes: dict[str, int] = {}
        self._found: dict[K, tuple[str, int]] = {}
        self.size = 0
        """Of all values."""

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def __iter__(self) -> Iterator[K]:
        """The keys in the order in which they would be given up if nothing else happened."""
        sizes = dict(self._sizes)
        rest = {owner: list(reversed(values)) for owner, values in self._by_owner.items()}
        while rest:
            owner = max(rest, key=lambda each: sizes[each])
            key = rest[owner].pop()
            sizes[owner] -= self._found[key][1]
            if not rest[owner]:
                del rest[owner]
            yield key

    def get(self, key: K) -> V | None:
        """The value, now the one that its owner used last."""
        if key not in self._found:
            return None
        values = self._by_owner[self._found[key][0]]
        values.move_to_end(key)
        return values[key]

    def put(self, key: K, value: V, owner: str, size: int = 1) -> list[V]:
        """Keep a value. Returns those that were given up for it, itself if it is too large."""
        self.remove(key)
        if size > self._most:
            return [value]
        self._by_owner.setdefault(owner, OrderedDict())[key] = value
        self._sizes[owner] = self._sizes.get(owner, 0) + size
        self._found[key] = owner, size
        self.size += size
        given_up = []
        while self.size > self._most:
            given_up.append(self.pop())
        return given_up

    def pop(self) -> V:
        """Give up the value that is next. Raises ValueError if there is none."""
        return self._remove(
            next(iter(self._by_owner[max(self._sizes, key=self._sizes.__getitem__)]))
        )

    def remove(self, key: K) -> V | None:
        """Give up a value if it is here; returns it."""
        return self._remove(key) if key in self._found else None

    def remove_all(self, owner: str) -> list[V]:
        """Give up all values of an owner; returns them."""
        return [self._remove(key) for key in list(self._by_owner.get(owner, ()))]

    def clear(self) -> None:
        """Give up all."""
        for container in (self._by_owner, self._sizes, self._found):
            container.clear()
        self.size = 0

    def _remove(self, key: K) -> V:
        owner, size = self._found.pop(key)
        values = self._by_owner[owner]
        value = values.pop(key)
        self._sizes[owner] -= size
        self.size -= size
        if not values:
            del self._by_owner[owner], self._sizes[owner]
        return value

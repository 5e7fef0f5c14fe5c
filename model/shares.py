"""Fair sharing of limited space between owners."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def has_space(own: int, total: int, new: int, most: int, num_owners: int) -> bool:
    """Whether an owner with `own` of `total` units in use may have `new` more, with a limit of
    `most`.

    While there is free space, every owner may. Beyond the limit, only an owner within an equal
    share of it, among `num_owners` including itself, may. One owner alone can thus use everything,
    and later ones still get their shares: n owners never use more than `most` times 1 + 1/2 + ... +
    1/n in total.
    """
    return total + new <= most or own + new <= most // max(1, num_owners)


class SharedCache(Generic[K, V]):
    """Least-recently-used cache of several owners, with a total size. Not thread-safe.

    Evicts from the owner with the largest size, so that no owner displaces the values of a smaller
    one.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._by_owner: dict[str, OrderedDict[K, V]] = {}
        self._sizes: dict[str, int] = {}
        self._found: dict[K, tuple[str, int]] = {}
        self.size = 0
        """Total size of all values."""

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def __iter__(self) -> Iterator[K]:
        """The keys in eviction order, assuming no further use."""
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
        """The value, which becomes its owner's most recently used."""
        if key not in self._found:
            return None
        values = self._by_owner[self._found[key][0]]
        values.move_to_end(key)
        return values[key]

    def put(self, key: K, value: V, owner: str, size: int = 1) -> list[V]:
        """Add a value. Returns the evicted ones, including itself if it is too large."""
        self.remove(key)
        if size > self._most:
            return [value]
        self._by_owner.setdefault(owner, OrderedDict())[key] = value
        self._sizes[owner] = self._sizes.get(owner, 0) + size
        self._found[key] = owner, size
        self.size += size
        evicted = []
        while self.size > self._most:
            evicted.append(self.pop())
        return evicted

    def pop(self) -> V:
        """Evict the next value. Raises ValueError if empty."""
        return self._remove(
            next(iter(self._by_owner[max(self._sizes, key=self._sizes.__getitem__)]))
        )

    def remove(self, key: K) -> V | None:
        """Remove and return a value, if present."""
        return self._remove(key) if key in self._found else None

    def remove_all(self, owner: str) -> list[V]:
        """Remove and return all values of an owner."""
        return [self._remove(key) for key in list(self._by_owner.get(owner, ()))]

    def clear(self) -> None:
        """Remove all values."""
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

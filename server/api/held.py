"""Memory held by requests that are not running yet: their bodies, and what was made of them."""

from collections import Counter
from contextvars import ContextVar

from model.shares import has_space
from server.errors import Overloaded


class HeldBytes:
    """Bytes held by all owners' requests, limited to `most`; each owner has an equal share."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._held = Counter[str]()

    def add(self, owner: str, count: int) -> None:
        """Raises Overloaded, except for a single request, which may exceed the limit."""
        total = self._held.total()
        num_owners = len(self._held.keys() | {owner})
        if total and not has_space(self._held[owner], total, count, self.most, num_owners):
            raise Overloaded(
                f"{self._held[owner]} bytes of your requests and {total} of all are being received "
                f"or wait, and only {self.most} may (--max-held-bytes); try again when some of "
                "them run",
                "held_bytes_full",
            )
        self._held[owner] += count

    def remove(self, owner: str, count: int) -> None:
        self._held[owner] -= count
        if self._held[owner] <= 0:
            del self._held[owner]

    def of(self, owner: str) -> int:
        """Bytes held by an owner."""
        return self._held[owner]


class Hold:
    """Bytes held by one request until it is released."""

    def __init__(self, held: HeldBytes, owner: str) -> None:
        self._held = held
        self._owner = owner
        self._count = 0
        self.is_handed_over = False
        """Whether a turn, which may outlive its request, releases it."""

    def add(self, count: int) -> None:
        """Raises Overloaded."""
        if count:
            self._held.add(self._owner, count)
            self._count += count

    def hand_over(self) -> "Hold":
        """Leave the release to the receiver."""
        self.is_handed_over = True
        return self

    def release(self) -> None:
        """Hold nothing from now on."""
        if self._count:
            self._held.remove(self._owner, self._count)
            self._count = 0


HOLD: ContextVar[Hold] = ContextVar("hold")
"""Bytes held by the current request."""


def hold(count: int) -> None:
    """Hold more bytes for the current request. Raises Overloaded."""
    HOLD.get().add(count)

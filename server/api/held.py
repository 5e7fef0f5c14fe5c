"""Memory of requests that have not begun to run: their bodies, and what they have become."""

from collections import Counter
from contextvars import ContextVar

from model.shares import has_space
from server.errors import Overloaded


class HeldBytes:
    """Bytes of all owners' requests, up to so many, of which each owner has an equal share."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._held = Counter[str]()

    def add(self, owner: str, count: int) -> None:
        """Raises Overloaded. A single request may have more than there is space for."""
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
        """What an owner holds."""
        return self._held[owner]


class Hold:
    """What one request holds, until it is released."""

    def __init__(self, held: HeldBytes, owner: str) -> None:
        self._held = held
        self._owner = owner
        self._count = 0
        self.is_handed_over = False
        """Whether a turn releases it, which may outlive its request."""

    def add(self, count: int) -> None:
        """Raises Overloaded."""
        if count:
            self._held.add(self._owner, count)
            self._count += count

    def hand_over(self) -> "Hold":
        """To be released by who gets it."""
        self.is_handed_over = True
        return self

    def release(self) -> None:
        """Nothing is held any more."""
        if self._count:
            self._held.remove(self._owner, self._count)
            self._count = 0


HOLD: ContextVar[Hold] = ContextVar("hold")
"""What the request that is being answered holds."""


def hold(count: int) -> None:
    """The request that is being answered holds so many bytes more. Raises Overloaded."""
    HOLD.get().add(count)

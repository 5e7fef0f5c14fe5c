"""Erasing all of an owner's data in a store."""

from collections import Counter
from typing import get_args

from server.sessions.store import Entry, EntryKind, Store

ERASED_TOGETHER = 256


async def entries_of(store: Store, owner: str) -> list[Entry]:
    """Some of an owner's entries, including expired ones; none if there are none."""
    for kind in get_args(EntryKind):
        if found := await store.list(kind, owner, ERASED_TOGETHER, None, 0.0):
            return found
    return []


async def erase_owner(store: Store, owner: str) -> Counter[EntryKind]:
    """Erase an owner's sessions and responses. Returns their numbers. Raises StorageFailed."""
    erased = Counter[EntryKind]()
    while found := await entries_of(store, owner):
        for entry in found:
            erased[entry.kind] += await store.delete(entry.kind, entry.id)
    return erased

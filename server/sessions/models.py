"""The models of the stored states: only the same model can continue a state."""

import re
from collections import Counter
from collections.abc import AsyncIterator

from server.sessions.store import EntryKind, Header, Store

READ_BATCH = 64
FINGERPRINT = re.compile(rb'"fingerprint":\s*"([0-9a-f]{64})"')
SHORT = 12
"""Digits shown of a fingerprint, enough to identify it."""


class ModelError(Exception):
    """The fingerprint matches no model or several; the message lists them."""


async def count_models(store: Store) -> dict[str, Counter[EntryKind]]:
    """Number of sessions and responses by fingerprint; "" if it is unreadable.

    Raises StorageFailed.
    """
    counts = dict[str, Counter[EntryKind]]()
    async for header in _headers(store):
        counts.setdefault(_fingerprint(header), Counter())[header.kind] += 1
    return counts


async def erase_model(store: Store, beginning: str) -> Counter[EntryKind]:
    """Erase the sessions and responses of the model whose fingerprint begins with `beginning`.

    Returns how many there were. Raises ModelError and StorageFailed.
    """
    known = sorted(name for name in await count_models(store) if name)
    meant = [name for name in known if name.startswith(beginning)]
    if len(meant) != 1 or len(beginning) < SHORT:
        there = ", ".join(name[:SHORT] for name in known) or "none"
        raise ModelError(f"{beginning!r} does not identify a model; stored are: {there}")
    erased = Counter[EntryKind]()
    async for header in _headers(store):
        if _fingerprint(header) == meant[0]:
            erased[header.kind] += await store.delete(header.kind, header.id)
    return erased


def describe_counts(counts: Counter[EntryKind]) -> str:
    """Format counts."""
    parts = (
        f"{count:,} {kind}{'' if count == 1 else 's'}" for kind, count in sorted(counts.items())
    )
    return " and ".join(parts)


async def _headers(store: Store) -> AsyncIterator[Header]:
    after = 0
    while headers := await store.headers(after, READ_BATCH):
        for header in headers:
            yield header
        after = headers[-1].number


def _fingerprint(header: Header) -> str:
    found = FINGERPRINT.search(header.beginning)
    return "" if found is None else found[1].decode()

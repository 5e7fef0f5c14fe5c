"""Tables of sessions and keys for the terminal."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime

from rich.console import Console, ConsoleDimensions
from rich.table import Table

from server.api.schemas.sessions import Checkpoint, Session
from server.keys import Key

MIN_WIDTH, WIDE = 110, 1000
"""Minimum table width on a terminal, and the width elsewhere: a truncated id is useless."""


def print_sessions(sessions: Iterable[Session]) -> None:
    table = _table("id", "turn", "tokens", "checkpoints", "tier", "status", "last used")
    table.add_column("metadata", overflow="fold")
    for session in sessions:
        table.add_row(
            session.id,
            str(session.turn),
            f"{session.tokens:,}",
            str(session.checkpoints),
            session.tier or "-",
            session.status,
            _age(time.time() - session.last_used_at),
            _metadata(session),
        )
    print_table(table)


def print_session(session: Session) -> None:
    parent = session.parent
    facts = {
        "id": session.id,
        "turn": str(session.turn),
        "tokens": f"{session.tokens:,}",
        "checkpoints": str(session.checkpoints),
        "state": f"{session.state_bytes:,} bytes",
        "tier": session.tier or "-",
        "status": session.status,
        "created": _time(session.created_at),
        "last used": _time(session.last_used_at),
        "expires": "never" if session.expires_at is None else _time(session.expires_at),
        "parent": "-" if parent is None else f"{parent.session_id} after turn {parent.turn}",
        "metadata": _metadata(session) or "-",
    }
    print_facts(facts)


def print_turns(turns: Iterable[Checkpoint]) -> None:
    table = _table("turn", "tokens", "created", "bytes")
    for turn in turns:
        table.add_row(str(turn.turn), f"{turn.tokens:,}", _time(turn.created_at), f"{turn.bytes:,}")
    print_table(table)


def print_keys(keys: Iterable[Key]) -> None:
    table = _table("name", "id", "created", "requests/min", "tokens/min", "concurrent", "sequences")
    for key in keys:
        limits = key.limits
        counts = (
            *(limits.requests_per_minute, limits.tokens_per_minute),
            *(limits.concurrent_requests, limits.concurrent_sequences),
        )
        shown = ("-" if count is None else f"{count:,}" for count in counts)
        table.add_row(key.name, key.id, _time(key.created_at), *shown)
    print_table(table)


def print_facts(facts: dict[str, str]) -> None:
    """Print names and values, one per line."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}".rstrip())


def print_table(table: Table) -> None:
    """Print without markup: cells may contain user text."""
    console = Console(markup=False, emoji=False, highlight=False)
    width = max(console.width, MIN_WIDTH if console.is_terminal else WIDE)
    console.size = ConsoleDimensions(width, console.height)
    console.print(table)


def plain(text: str) -> str:
    """The text on one line, without control characters."""
    return text if text.isprintable() else repr(text)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _metadata(session: Session) -> str:
    return ", ".join(f"{plain(key)}={plain(value)}" for key, value in session.metadata.items())


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")


def _age(seconds: float) -> str:
    """In whole units of the largest that fits; never negative, since clocks may disagree."""
    whole = max(int(seconds), 0)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if whole >= length:
            return f"{whole // length} {unit} ago"
    return f"{whole} s ago"

"""Checks the store's file after its server has exited: complete, and as the server accounted for
it."""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.chaos.look import INTERRUPTED, seen_response
from loadtest.chaos.player import Player
from loadtest.chaos.tally import Tally


@dataclass(frozen=True)
class Account:
    """Content of a store."""

    sessions: int
    responses: int
    states: int
    num_bytes: int
    checkpoints: list[tuple[int, int, int]]
    """Turn, tokens and bytes of each."""


def check_file(path: Path, expected: Account, players: Sequence[Player], tally: Tally) -> None:
    """Compare the file with the server's account, and each response with its expected value."""
    db = sqlite3.connect(path)
    try:
        [integrity] = db.execute("PRAGMA integrity_check").fetchone()
        dangling = db.execute("PRAGMA foreign_key_check").fetchall()
        account = _account(db)
        responses = db.execute(
            """SELECT id, body, EXISTS (SELECT 1 FROM checkpoints WHERE entry_number = number)
            FROM entries WHERE kind = 'response'"""
        ).fetchall()
    finally:
        db.close()
    if integrity != "ok" or dangling:
        tally.problems.append(("damaged file", f"{integrity}, {dangling}"))
    if account != expected:
        tally.problems.append(("wrong account", f"file {account}, server {expected}"))
    _check_responses(responses, players, tally)


def _check_responses(
    rows: Sequence[tuple[str, str, int]], players: Sequence[Player], tally: Tally
) -> None:
    """Includes responses whose ids nobody received because their server was killed first."""
    erased = {response_id for player in players for response_id in player.erased}
    seen_ids = {response_id for player in players for response_id in player.responses}
    answers = [player.answers() for player in players]
    for response_id, body, has_state in rows:
        found = json.loads(body)
        seen, notes = seen_response(found), found["metadata"]
        is_interrupted = found["background"] and seen == INTERRUPTED
        if response_id in erased:
            tally.problems.append(("came back", body))
        elif not is_interrupted and seen != answers[int(notes["client"])][notes["name"]]:
            tally.problems.append(("wrong text", body))
        elif bool(has_state) != seen.has_state:
            tally.problems.append(("half applied", f"state: {has_state}, {body}"))
        else:
            known = "acknowledged" if response_id in seen_ids else "not acknowledged"
            tally.verified[f"responses of the file that were {known}"] += 1


def _account(db: sqlite3.Connection) -> Account:
    counts = dict(db.execute("SELECT kind, count(*) FROM entries GROUP BY kind").fetchall())
    kept = db.execute(
        """SELECT kind, checkpoints.turn, checkpoints.num_tokens, coalesce(length(blob),
        checkpoints.num_bytes) FROM checkpoints JOIN entries ON number = entry_number"""
    ).fetchall()
    [other_bytes] = db.execute(
        """SELECT (SELECT coalesce(sum(length(CAST(answer AS BLOB))), 0) FROM answers)
        + (SELECT coalesce(sum(length(CAST(body AS BLOB))), 0) FROM entries)
        + (SELECT coalesce(sum(length(metadata)), 0) FROM entries WHERE metadata != '{}')"""
    ).fetchone()
    return Account(
        sessions=counts.get("session", 0),
        responses=counts.get("response", 0),
        states=len(kept),
        num_bytes=other_bytes + sum(size for *_, size in kept),
        checkpoints=sorted(tuple(each) for kind, *each in kept if kind == "session"),
    )

"""The clock for the lifetimes of sessions and responses.

The system clock may be set forward or back, which must neither expire entries nor keep them alive.
Time is therefore the machine's uptime, which only grows, plus the Unix time of its boot, which is
recorded next to the store: a restarted server continues the same clock. After a reboot the system
clock counts again, but never shows a time before the store's latest use.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from model.files import read_file, write_file

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MAX_BYTES = 4096
log = logging.getLogger(__name__)


class Clock:
    """Unix seconds that grow evenly. `started_at`: Unix time of the machine's boot."""

    def __init__(self, started_at: float) -> None:
        self.started_at = started_at

    def now(self) -> float:
        return self.started_at + _uptime()


def open_clock(path: Path, latest_use: Callable[[], float]) -> Clock:
    """The clock recorded in this file, if the machine has not rebooted since; otherwise a new one,
    which is recorded: it shows the system time, or what `latest_use` returns if that is later."""
    boot = _boot_id()
    started_at = _noted(path, boot)
    if started_at is not None:
        return Clock(started_at)
    clock = Clock(max(time.time(), latest_use()) - _uptime())
    try:
        write_file(path, json.dumps({"boot": boot, "started_at": clock.started_at}).encode(), 0o600)
    except OSError as error:
        log.warning(
            "the clock cannot be saved, so it may jump at the next start: %s: %s", path, error
        )
    return clock


def _noted(path: Path, boot: str) -> float | None:
    try:
        noted = json.loads(read_file(path, MAX_BYTES))
        return float(noted["started_at"]) if noted["boot"] == boot != "" else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _boot_id() -> str:
    """Id of the machine's boot; empty if unknown."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _uptime() -> float:
    """Seconds since boot, including sleep."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

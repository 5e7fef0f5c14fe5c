"""The time by which sessions and responses live.

The system's clock may be set, forward or back; nothing may expire by that, or live on. So time is
the machine's time since it started, which only grows, plus the Unix time of that start, which is
noted beside the store: a server that is started again goes on where time would be by now. After
another start of the machine the system's clock counts again, but never a time before the store's
latest use.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from model.files import read_file, write_file

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MOST_BYTES = 4096
log = logging.getLogger(__name__)


class Clock:
    """Unix seconds that grow evenly. `started_at`: what it showed when the machine started."""

    def __init__(self, started_at: float) -> None:
        self.started_at = started_at

    def now(self) -> float:
        return self.started_at + _uptime()


def open_clock(path: Path, latest_use: Callable[[], float]) -> Clock:
    """The clock noted in this file, if it is of this start of the machine; or a new one, which is
    noted there: it shows the system's time, or what `latest_use` returns if that is later."""
    boot = _boot_id()
    started_at = _noted(path, boot)
    if started_at is not None:
        return Clock(started_at)
    clock = Clock(max(time.time(), latest_use()) - _uptime())
    try:
        write_file(path, json.dumps({"boot": boot, "started_at": clock.started_at}).encode(), 0o600)
    except OSError as error:
        log.warning("the clock is not noted, so the next start may jump: %s: %s", path, error)
    return clock


def _noted(path: Path, boot: str) -> float | None:
    try:
        noted = json.loads(read_file(path, MOST_BYTES))
        return float(noted["started_at"]) if noted["boot"] == boot != "" else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _boot_id() -> str:
    """Names this start of the machine; empty where nothing does."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _uptime() -> float:
    """Seconds since the machine started, those that it slept included."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

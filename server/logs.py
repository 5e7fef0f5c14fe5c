"""Logging: one line per event, as JSON or for a terminal, through the standard library.

A line has a message and fields: `log.info("ready", extra={"fields": {"ready_s": 1.5}})`. Lines that
clients can cause in any number have `extra={"limited": kind}`: of each kind only some are written,
and the rest are counted.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

ENCODER = json.JSONEncoder(default=str)
LogFormat = Literal["json", "console"]

MAX_LINES = 10
"""Maximum lines per limited kind and period."""

PERIOD_S = 10.0
LIMITED_LOGGERS = ("asyncio", "opentelemetry", "urllib3")
"""Repetitive libraries, for example when sockets run out or a collector is down."""


def configure(level: str, format: LogFormat | None, stream: TextIO | None = None) -> None:
    """Log to stderr or `stream`; default format: console on a terminal, otherwise JSON."""
    stream = stream or sys.stderr
    chosen = format or ("console" if stream.isatty() else "json")
    handler = LogHandler(stream)
    handler.setFormatter(JSONFormatter() if chosen == "json" else ConsoleFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # The server logs startup, readiness and exit itself.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.root.level))


class JSONFormatter(logging.Formatter):
    """One object per line: time, level, logger, message, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return ENCODER.encode(line)


class ConsoleFormatter(logging.Formatter):
    """Time, level and message, then the fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname:7} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes log lines, at most MAX_LINES per limited kind and period."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._limit = LineLimiter()

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        self._report(self._limit.suppressed(now))
        if self._limit.admits(_kind(record), now):
            super().emit(record)

    def close(self) -> None:
        self._report(self._limit.suppressed(float("inf")))
        super().close()

    def _report(self, suppressed: Iterator[tuple[str, int]]) -> None:
        for kind, count in suppressed:
            fields = {"kind": kind, "count": count, "period_s": PERIOD_S}
            record = logging.LogRecord(
                __name__, logging.WARNING, __file__, 0, "lines suppressed", None, None
            )
            record.__dict__["fields"] = fields
            super().emit(record)


class LineLimiter:
    """Rate limiter of lines by kind."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        """End of a kind's current period."""

        self._counts: dict[str, int] = {}
        """Lines in the current period."""

    def admits(self, kind: str | None, now: float) -> bool:
        """Whether to write a line of this kind; None is unlimited."""
        if kind is None:
            return True
        if kind not in self._ends:
            self._ends[kind], self._counts[kind] = now + PERIOD_S, 0
        self._counts[kind] += 1
        return self._counts[kind] <= MAX_LINES

    def suppressed(self, now: float) -> Iterator[tuple[str, int]]:
        """Kinds with suppressed lines in a finished period, and their number."""
        for kind in [kind for kind, end in self._ends.items() if end <= now]:
            del self._ends[kind]
            count = self._counts.pop(kind) - MAX_LINES
            if count > 0:
                yield kind, count


def _kind(record: logging.LogRecord) -> str | None:
    kind: str | None = getattr(record, "limited", None)
    if kind is None and record.name.partition(".")[0] in LIMITED_LOGGERS:
        return record.name
    return kind


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, in UTC."""
    at = datetime.fromtimestamp(record.created, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")

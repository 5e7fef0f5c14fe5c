"""The log: its two formats, and lines that clients can cause in any number."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import logs
from server.logs import MAX_LINES, PERIOD_S, LineLimiter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def unconfigured() -> Iterator[None]:
    """Leaves the root logger as it was."""
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn")
    handlers, level, library_level = root.handlers[:], root.level, uvicorn.level
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)
    uvicorn.setLevel(library_level)


def logged(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_is_an_object_with_the_events_fields() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    log = logging.getLogger("server.x")
    log.info("ready", extra={"fields": {"ready_s": 1.5, "name": "ä\n\u2028"}})
    log.debug("nothing")
    log.warning("%d keys", 3)
    try:
        raise ValueError("wrong")
    except ValueError:
        log.exception("a step failed")
    assert stream.getvalue().count("\n") == 3
    ready, keys, failed = logged(stream.getvalue())
    assert str(ready.pop("time")).endswith("Z")
    assert ready == {
        "level": "info",
        "logger": "server.x",
        "message": "ready",
        "ready_s": 1.5,
        "name": "ä\n\u2028",
    }
    assert (keys["level"], keys["message"]) == ("warning", "3 keys")
    assert "ValueError: wrong" in str(failed["exception"])


def test_a_terminal_gets_lines_for_people() -> None:
    stream = Terminal()
    logs.configure("info", None, stream)
    logging.getLogger("server.x").info("ready", extra={"fields": {"ready_s": 1.5}})
    [line] = stream.getvalue().splitlines()
    assert line.endswith("Z INFO    ready ready_s=1.5")


def test_what_is_no_terminal_gets_json() -> None:
    stream = io.StringIO()
    logs.configure("info", None, stream)
    logging.getLogger("server.x").info("ready")
    assert logged(stream.getvalue())[0]["message"] == "ready"


def test_lines_of_uvicorn_have_the_same_form_and_its_chatter_is_left_out() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    log = logging.getLogger("uvicorn.error")
    log.info("Started server process [%d]", 5, extra={"color_message": "x"})
    log.warning("Invalid request")
    [line] = logged(stream.getvalue())
    assert (line["logger"], line["message"]) == ("uvicorn.error", "Invalid request")
    assert "color_message" not in line


def test_of_a_limited_kind_some_lines_are_written_and_the_others_counted() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    log = logging.getLogger("server.x")
    for _ in range(MAX_LINES + 7):
        log.info("refused", extra={"limited": "a"})
    log.info("refused", extra={"limited": "b"})
    for _ in range(MAX_LINES + 2):
        logging.getLogger("opentelemetry.exporter").error("no receiver")
        log.info("request")
    logging.getLogger().handlers[0].close()
    messages = [line["message"] for line in logged(stream.getvalue())]
    assert messages.count("refused") == MAX_LINES + 1
    assert messages.count("no receiver") == MAX_LINES
    assert messages.count("request") == MAX_LINES + 2
    suppressed = [
        line for line in logged(stream.getvalue()) if line["message"] == "lines suppressed"
    ]
    assert [(line["kind"], line["count"]) for line in suppressed] == [
        ("a", 7),
        ("opentelemetry.exporter", 2),
    ]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 3 * PERIOD_S))))
def test_every_line_is_written_or_counted_once(lines: list[tuple[str, float]]) -> None:
    limit, now = LineLimiter(), 0.0
    num_written, num_left_out = 0, 0
    for kind, pause in lines:
        now += pause
        num_left_out += sum(count for _, count in limit.suppressed(now))
        num_written += limit.admits(kind, now)
        assert limit.admits(None, now)
    num_left_out += sum(count for _, count in limit.suppressed(float("inf")))
    assert num_written + num_left_out == len(lines)
    assert num_left_out == 0 or len(lines) > MAX_LINES

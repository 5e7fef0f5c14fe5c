"""An event is one line of JSON, however a client splits lines."""

import json

import pytest

from server.api.schemas.completions import CompletionChoice
from server.api.sse import EventData, encode_event
from server.api.templates import TextTemplate

TEXT = "a\u2028b\u2029c\x85d\x0b\x0c\x1c\x1d\x1e\r\n\\u2028"


def choice(text: str) -> CompletionChoice:
    return CompletionChoice(index=0, text=text)


@pytest.mark.parametrize("number", [None, 7])
@pytest.mark.parametrize("name", [None, "response.created"])
@pytest.mark.parametrize("piece", [choice(TEXT), TextTemplate(choice).render(TEXT)])
def test_nothing_in_a_text_ends_a_line(
    piece: EventData, number: int | None, name: str | None
) -> None:
    event = encode_event(piece, number, name).decode()
    lines = event.splitlines()
    assert lines == event.split("\n")[:-1]
    fields = dict(line.split(": ", 1) for line in lines if line)
    assert json.loads(fields["data"])["text"] == TEXT
    assert fields.get("id") == (None if number is None else "7")
    assert fields.get("event") == name
    assert event.endswith("\n\n")
    assert event.count("\n\n") == 1

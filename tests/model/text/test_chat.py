"""Settings of templates, and splitting thoughts from answers."""

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.text.chat import ChatRules, Thinking, ThoughtSplitter, read_rules
from model.text.g1 import TEMPLATE

MARKS = Thinking("<think>", "</think>")


def rules(template: str) -> ChatRules:
    return read_rules(jinja2.Environment().parse(template))


def split(pieces: list[str], opening: str = "") -> tuple[str, str]:
    """All thoughts, and the whole answer."""
    splitter = ThoughtSplitter(MARKS, opening)
    found = [*map(splitter.push, pieces), splitter.flush()]
    return "".join(t for t, _ in found), "".join(a for _, a in found)


def test_a_template_sets_what_ends_an_answer_and_what_stands_around_thoughts() -> None:
    assert rules("{{ messages }}") == ChatRules()
    assert rules('{% set answer_stops = ["x", "y"] %}{% set other = f(1) %}') == ChatRules(
        ("x", "y")
    )
    assert rules(TEMPLATE) == ChatRules(("\n\nUser:",), MARKS)


@pytest.mark.parametrize(
    "value", ['"x"', "[1]", "[]", '["a"]', '["a", ""]', "f(1)", "messages", '["a", "b", "c"]']
)
def test_marks_are_two_texts(value: str) -> None:
    with pytest.raises(ValueError, match="thinking_marks must be"):
        rules("{% set thinking_marks = " + value + " %}")


@pytest.mark.parametrize(
    ("opening", "text", "expected"),
    [
        ("", "Hello", ("", "Hello")),
        ("", " <think>\nwho? </think>\n\nAda.", ("who?", "Ada.")),
        ("Assistant: <think", ">\nwho?\n</think>\n\nAda.\n", ("who?", "Ada.\n")),
        ("Assistant: <think>", "a < b</think>c</think>", ("a < b", "c</think>")),
        ("Assistant: <think>\n</think", ">\n\nAda.", ("", "Ada.")),
        ("Assistant: <think>\n</think>", "\n\nAda.", ("", "Ada.")),
        ("Assistant: <think", "ing about it", ("", "ing about it")),
        ("Assistant: <think>\n</think", "ing</think>x", ("", "ing</think>x")),
        ("Assistant: <think", ">never ends </thin", ("never ends </thin", "")),
        ("Assistant:", " <thin", ("", "<thin")),
        ("Assistant:", " Ada <think>", ("", "Ada <think>")),
        ("<think", "", ("", "")),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 7, 99])
def test_thoughts_come_apart_from_the_answer(
    opening: str, text: str, expected: tuple[str, str], size: int
) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert split(pieces, opening) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "think>", " ", "a", "</", "\n"])))
def test_pieces_change_nothing(pieces: list[str]) -> None:
    for opening in ("", "<think", "<think></think"):
        assert split(pieces, opening) == split(["".join(pieces)], opening)

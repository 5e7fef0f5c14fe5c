"""What a chat template says besides how messages are written.

At its top level a template may set

    {%- set answer_stops = ["\\n\\nUser:"] -%}            texts that end an answer, as end tokens do
    {%- set thinking_marks = ["<think>", "</think>"] -%}  what stands around thoughts before it

With marks it is given `enable_thinking`, if a request decides that, and may open the thoughts, or
close them at once, at the end of the prompt; the model's text then goes on within the mark.
"""

from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

STOPS, MARKS = "answer_stops", "thinking_marks"
SPACES = " \t\r\n"


@dataclass(frozen=True)
class Thinking:
    """The texts around thoughts."""

    open: str
    close: str


@dataclass(frozen=True)
class ChatRules:
    """What holds for every answer of a chat."""

    stops: tuple[str, ...] = ()
    """Texts that end an answer and are not part of it."""

    thinking: Thinking | None = None
    """None: the model does not think before it answers."""


def read_rules(template: nodes.Template) -> ChatRules:
    """What a parsed template sets. Raises ValueError for values that are no texts."""
    values = dict[str, list[str]]()
    for node in template.body:
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            name = node.target.name
            if name in (STOPS, MARKS):
                values[name] = _texts(name, node.node)
    marks = values.get(MARKS)
    if marks is not None and len(marks) != 2:
        raise ValueError(f"{MARKS} must be two texts, one before thoughts and one behind them")
    return ChatRules(tuple(values.get(STOPS, ())), None if marks is None else Thinking(*marks))


def _texts(name: str, node: nodes.Node) -> list[str]:
    value: Any
    try:
        value = node.as_const() if isinstance(node, nodes.Expr) else None
    except nodes.Impossible:
        value = None
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{name} must be a list of texts that are not empty")
    return list(value)


class ThoughtSplitter:
    """Parts an answer's text into thoughts and the answer proper, as it comes to be.

    Spaces and newlines between marks and texts are in neither part.
    """

    def __init__(self, thinking: Thinking, opening: str = "") -> None:
        """`opening`: what the prompt ends with; a mark in it, or half of one, is gone on from."""
        self._open, self._close = thinking.open, thinking.close
        self._part = "start"
        self._at_begin = True
        """Whether the part has no text yet."""

        self._has_thoughts = False
        self._held = ""
        """What may be of a mark, or of the spaces before one."""

        self._foreign = 0
        """Characters of `_held` that are the prompt's."""

        at = opening.rfind(self._open)
        if at < 0:
            at = len(opening) - overlap(opening, self._open)
        self.push(opening[at:])
        self._foreign = len(self._held)

    @property
    def has_thoughts(self) -> bool:
        """Whether thoughts have begun, if only to end at once."""
        return self._has_thoughts

    @property
    def has_answer(self) -> bool:
        """Whether any of the answer proper has come."""
        return self._part == "answer" and not self._at_begin

    def push(self, text: str) -> tuple[str, str]:
        """Text that follows. Returns what it adds to the thoughts, and to the answer."""
        text, thoughts = self._held + text, ""
        self._held = ""
        if self._part == "start":
            stripped = text.lstrip(SPACES)
            if stripped.startswith(self._open):
                self._enter("thoughts")
                text, self._foreign = stripped[len(self._open) :], 0
            elif self._open.startswith(stripped):
                self._held = text
                return "", ""
            else:
                self._enter("answer")
                text = self._own(text)
        if self._part == "thoughts":
            if self._at_begin:
                text = text.lstrip(SPACES)
            size = min(len(text), len(self._close))
            if self._foreign and text[:size] != self._close[:size]:
                self._enter("answer")  # the prompt had begun to close them
                return "", self._lstrip(self._own(text))
            end = text.find(self._close)
            if end < 0:
                certain = text[: len(text) - overlap(text, self._close)].rstrip(SPACES)
                self._held = text[len(certain) :]
                self._at_begin = self._at_begin and not certain
                return self._own(certain), ""
            thoughts = self._own(text[:end].rstrip(SPACES))
            text, self._foreign = text[end + len(self._close) :], 0
            self._enter("answer")
        return thoughts, self._lstrip(text)

    def flush(self) -> tuple[str, str]:
        """What was held back, now that nothing follows."""
        held, self._held = self._own(self._held), ""
        if self._part == "thoughts":
            return held.rstrip(SPACES), ""
        return "", held.lstrip(SPACES)

    @property
    def is_thinking(self) -> bool:
        """Whether thoughts have begun and not ended."""
        return self._part == "thoughts" and not self._foreign

    def _lstrip(self, text: str) -> str:
        """Without spaces, where the part begins."""
        if self._at_begin:
            text = text.lstrip(SPACES)
            self._at_begin = not text
        return text

    def _enter(self, part: str) -> None:
        self._part, self._at_begin = part, True
        self._has_thoughts = self._has_thoughts or part == "thoughts"

    def _own(self, text: str) -> str:
        """Without the prompt's characters."""
        own = text[self._foreign :]
        self._foreign = max(0, self._foreign - len(text))
        return own


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that is a beginning of the mark, but not all of it."""
    return next(
        (n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0
    )

"""Settings of a chat template beyond the format of messages.

At its top level a template may set

    {%- set answer_stops = ["\\n\\nUser:"] -%}            texts that end an answer, like end tokens
    {%- set thinking_marks = ["<think>", "</think>"] -%}  marks around the thoughts before it

A template with marks receives `enable_thinking` if the request sets it, and may end the prompt with
an opening mark or with empty thoughts; the model's text then continues inside the mark.
"""

from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

STOPS, MARKS = "answer_stops", "thinking_marks"
SPACES = " \t\r\n"


@dataclass(frozen=True)
class Thinking:
    """The marks around thoughts."""

    open: str
    close: str


@dataclass(frozen=True)
class ChatRules:
    """Settings for all answers of a chat."""

    stops: tuple[str, ...] = ()
    """Stop strings; not part of the answer."""

    thinking: Thinking | None = None
    """None: the model does not think before it answers."""


def read_rules(template: nodes.Template) -> ChatRules:
    """The settings of a parsed template. Raises ValueError for values that are not strings."""
    values = dict[str, list[str]]()
    for node in template.body:
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            name = node.target.name
            if name in (STOPS, MARKS):
                values[name] = _texts(name, node.node)
    marks = values.get(MARKS)
    if marks is not None and len(marks) != 2:
        raise ValueError(f"{MARKS} must be two texts, one before thoughts and one after them")
    return ChatRules(tuple(values.get(STOPS, ())), None if marks is None else Thinking(*marks))


def _texts(name: str, node: nodes.Node) -> list[str]:
    value: Any
    try:
        value = node.as_const() if isinstance(node, nodes.Expr) else None
    except nodes.Impossible:
        value = None
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{name} must be a list of non-empty texts")
    return list(value)


class ThoughtSplitter:
    """Splits the streamed text of an answer into thoughts and content.

    Whitespace between marks and texts belongs to neither part.
    """

    def __init__(self, thinking: Thinking, opening: str = "") -> None:
        """`opening`: the end of the prompt; a mark or part of a mark in it is continued."""
        self._open, self._close = thinking.open, thinking.close
        self._part = "start"
        self._at_begin = True
        """Whether the current part has no text yet."""

        self._has_thoughts = False
        self._held = ""
        """Text that may turn out to be a mark, or whitespace before one."""

        self._foreign = 0
        """Characters of `_held` that belong to the prompt."""

        at = opening.rfind(self._open)
        if at < 0:
            at = len(opening) - overlap(opening, self._open)
        self.push(opening[at:])
        self._foreign = len(self._held)

    @property
    def has_thoughts(self) -> bool:
        """Whether thoughts have begun, even if empty."""
        return self._has_thoughts

    @property
    def has_answer(self) -> bool:
        """Whether the content has begun."""
        return self._part == "answer" and not self._at_begin

    def push(self, text: str) -> tuple[str, str]:
        """Add text. Returns the new text of the thoughts, and of the content."""
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
                self._enter("answer")  # the prompt had begun the closing mark
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
        """The text held back, at the end of the stream."""
        held, self._held = self._own(self._held), ""
        if self._part == "thoughts":
            return held.rstrip(SPACES), ""
        return "", held.lstrip(SPACES)

    @property
    def is_thinking(self) -> bool:
        """Whether thoughts have begun and not ended."""
        return self._part == "thoughts" and not self._foreign

    def _lstrip(self, text: str) -> str:
        """Strip whitespace at the start of a part."""
        if self._at_begin:
            text = text.lstrip(SPACES)
            self._at_begin = not text
        return text

    def _enter(self, part: str) -> None:
        self._part, self._at_begin = part, True
        self._has_thoughts = self._has_thoughts or part == "thoughts"

    def _own(self, text: str) -> str:
        """Remove the prompt's characters."""
        own = text[self._foreign :]
        self._foreign = max(0, self._foreign - len(text))
        return own


def overlap(text: str, mark: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the mark."""
    return next(
        (n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0
    )

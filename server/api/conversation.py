"""Messages to prompt tokens, by the checkpoint's chat template in a sandbox.

A session ends with its last answer, without the template's end of message. So its next turn begins
with what the template puts between an answer and the following messages.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.text.chat import ChatRules, ThoughtSplitter, overlap, read_rules
from model.text.tokenizer import Tokenizer
from server.api.special_names import Marks, SpecialNames, random_digits


@dataclass(frozen=True)
class ChatMessage:
    """A chat message."""

    role: str
    text: str
    name: str | None = None
    """Name of the speaker, for templates that use it."""

    thoughts: str | None = None
    """The model's thoughts before the message, for templates that use them."""


class InvalidMessages(ValueError):
    """The template rejects these messages; the text of the error has the reason."""


class InvalidTemplate(ValueError):
    """The checkpoint's chat template is invalid."""


class Conversation:
    """A checkpoint's chat template."""

    def __init__(
        self, template: str, tokenizer: Tokenizer, bos: int | None, eos: int | None
    ) -> None:
        """Raises InvalidTemplate for an invalid template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(template)
            self.rules: ChatRules = read_rules(environment.parse(template))
        except jinja2.TemplateSyntaxError as error:
            raise InvalidTemplate(f"line {error.lineno}: {error.message}") from error
        except ValueError as error:
            raise InvalidTemplate(str(error)) from error
        self._tokenizer = tokenizer
        self._special = SpecialNames(tokenizer)
        self._names = {
            "bos_token": "" if bos is None else tokenizer.name_of(bos),
            "eos_token": "" if eos is None else tokenizer.name_of(eos),
        }

        self._openings = {thinks: self._opening(thinks) for thinks in (None, False, True)}

    def begin(
        self, messages: Sequence[ChatMessage], max_tokens: int, thinks: bool | None = None
    ) -> list[int]:
        """Tokens of a whole conversation, up to where the answer begins.

        `thinks`: whether the answer begins with thoughts; None for the template's default. Raises
        InvalidMessages, and TooManyTokens.
        """
        return self._encode(messages, max_tokens, thinks)

    def extend(
        self, messages: Sequence[ChatMessage], max_tokens: int, thinks: bool | None = None
    ) -> list[int]:
        """Tokens between the last answer and the next one. Raises InvalidMessages and
        TooManyTokens.

        Empty for no messages, so that the last answer continues.
        """
        if not messages:
            return []
        answer = random_digits()
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        return self._encode(messages, max_tokens, thinks, before, behind=answer)

    def answered(
        self,
        prompt_ids: Sequence[int],
        written: str,
        answer: str,
        max_tokens: int,
        thinks: bool | None = None,
    ) -> list[int] | None:
        """Tokens of a conversation with the answer to it, up to the next message, where they do not
        begin with those of its prompt and what the model has written: the template may leave out
        thoughts, or blank lines. None where they do, or where that cannot be known.

        `answer`: the message's text as the client has it. Raises TooManyTokens.
        """
        opening, marks = self._openings[thinks], Marks(random_digits(), random_digits())
        asked = {"role": "user", "content": "?"}
        said = {"role": "assistant", "content": self._special.mark(answer, marks)}
        try:
            before = self._render([asked], thinks, opens_answer=False)
            whole = self._render([asked, said], thinks, opens_answer=False)
            longer = self._render([asked, said, asked], thinks, opens_answer=False)
        except InvalidMessages:
            return None
        text = whole.removeprefix(before)
        num_opening = self._count_at_end(prompt_ids, opening)
        is_known = num_opening and whole.startswith(before) and longer.startswith(whole)
        if not is_known or text.startswith(opening + written):
            return None
        begun = prompt_ids[:-num_opening]
        return [*begun, *self._special.encode(text, marks, max_tokens - len(begun))]

    def _count_at_end(self, ids: Sequence[int], text: str) -> int:
        """How many of the last tokens are this text; 0 if no token begins with it."""
        for count in range(1, len(ids)):
            found = self._tokenizer.decode(ids[-count:], names=True)
            if found == text or len(found) > len(text):
                return count if found == text else 0
        return 0

    def splitter(self, thinks: bool | None) -> ThoughtSplitter | None:
        """Splits an answer into thoughts and content, for prompts with messages."""
        if self.rules.thinking is None:
            return None
        return ThoughtSplitter(self.rules.thinking, self._openings[thinks])

    def num_opening_bytes(self, thinks: bool | None) -> int:
        """Length of the opening mark at the end of a prompt in bytes, including spaces before
        it."""
        opening, thinking = self._openings[thinks], self.rules.thinking
        if thinking is None:
            return 0
        at = opening.rfind(thinking.open)
        if at < 0:
            at = len(opening) - overlap(opening, thinking.open)
        return len(opening[len(opening[:at].rstrip()) :].encode()) if at < len(opening) else 0

    def _opening(self, thinks: bool | None) -> str:
        """What a prompt ends with behind its last message, as far as that can be known."""
        messages = [{"role": "user", "content": "?"}]
        try:
            before = self._render(messages, thinks, opens_answer=False)
            whole = self._render(messages, thinks)
        except InvalidMessages:
            return ""
        return whole.removeprefix(before) if whole.startswith(before) else ""

    def _encode(
        self,
        messages: Sequence[ChatMessage],
        max_tokens: int,
        thinks: bool | None,
        before: Sequence[dict[str, str]] = (),
        behind: str = "",
    ) -> list[int]:
        """Encode rendered messages; only the template can produce special tokens.

        In user text, their names are plain text. Roles are not user text: templates turn them into
        special tokens.
        """
        self._tokenizer.check_length(sum(len(each.text) for each in messages), max_tokens)
        marks = Marks(random_digits(), random_digits())
        marked = [
            {
                part: text if part == "role" else self._special.mark(text, marks)
                for part, text in _facts(message).items()
            }
            for message in messages
        ]
        text = self._render([*before, *marked], thinks)
        if behind:
            _, found, text = text.partition(behind)
            if not found:
                raise InvalidMessages("it omits earlier answers, so that no chat can be continued")
        return self._special.encode(text, marks, max_tokens)

    def _render(
        self, messages: list[dict[str, str]], thinks: bool | None, *, opens_answer: bool = True
    ) -> str:
        given = {} if thinks is None else {"enable_thinking": thinks}
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=opens_answer,
                tools=None,
                **self._names,
                **given,
            )
        except Exception as error:  # templates are programs and may raise anything
            raise InvalidMessages(str(error)[:200] or type(error).__name__) from error


def _facts(message: ChatMessage) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}
    thought = {} if message.thoughts is None else {"reasoning_content": message.thoughts}
    return {"role": role, "content": message.text} | named | thought


def _refuse(message: str) -> NoReturn:
    raise InvalidMessages(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)

"""Prompts: a request's input as tokens, to follow what a turn continues from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from model.text.chat import ThoughtSplitter
from model.text.tokenizer import TooManyTokens
from server.api.conversation import ChatMessage, InvalidMessages
from server.api.generation.generation import check_ids, too_long
from server.api.schemas.chat import Message
from server.api.service import Service
from server.engine.messages import Continuation
from server.errors import InvalidRequest

MESSAGE_CHARACTERS = 64
"""Cost of rendering a message, in characters, in addition to its text."""


class PromptSource(Protocol):
    """The input of a turn."""

    def splitters(self, thinks: bool | None) -> Callable[[], ThoughtSplitter | None]:
        """Factory of the splitter between thoughts and content, if there is one."""

    async def read(self, start: Continuation, thinks: bool | None = None) -> list[tuple[int, ...]]:
        """The tokens of each prompt, to follow `start`; `thinks`: whether a chat's answer begins
        with thoughts. Raises InvalidRequest."""


@dataclass(frozen=True)
class TextPrompt:
    """Texts or token ids, each a separate prompt."""

    service: Service
    texts: Sequence[str | list[int]]

    def splitters(self, thinks: bool | None) -> Callable[[], ThoughtSplitter | None]:
        del thinks
        return lambda: None

    async def read(self, start: Continuation, thinks: bool | None = None) -> list[tuple[int, ...]]:
        del thinks
        return await self.service.texts.run(sum(map(len, self.texts)), self._read, start)

    def _read(self, start: Continuation) -> list[tuple[int, ...]]:
        bos = self.service.checkpoint.network.bos
        prefix = () if bos is None or start.position else (bos,)
        prompts = list[tuple[int, ...]]()
        for text in self.texts:
            if isinstance(text, str):
                most = self.service.settings.max_prompt_tokens
                prompts.append((*prefix, *encode(self.service, text, most)))
            else:
                check_ids(self.service, text, "prompt")
                prompts.append(tuple(text))
        return prompts


@dataclass(frozen=True)
class ChatPrompt:
    """Messages, rendered by the model's chat template."""

    service: Service
    messages: Sequence[ChatMessage]
    param: str
    """The parameter with the messages."""

    def splitters(self, thinks: bool | None) -> Callable[[], ThoughtSplitter | None]:
        """None if there are no messages: the last answer continues."""
        conversation = self.service.conversation
        if conversation is None or not self.messages:
            return lambda: None
        return partial(conversation.splitter, thinks)

    async def read(self, start: Continuation, thinks: bool | None = None) -> list[tuple[int, ...]]:
        conversation = self.service.conversation
        if conversation is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions", None, "no_chat_template"
            )
        if not self.messages and not start.position:
            raise InvalidRequest("a new conversation needs at least one message", self.param)
        render = conversation.extend if start.position else conversation.begin
        size = sum(MESSAGE_CHARACTERS + len(message.text) for message in self.messages)
        most = self.service.settings.max_prompt_tokens
        try:
            ids = await self.service.texts.run(size, render, self.messages, most, thinks)
        except TooManyTokens as error:
            raise too_long(error.num_tokens, most, self.param) from error
        except InvalidMessages as error:
            raise InvalidRequest(
                f"this model's chat template rejects these messages: {error}", self.param
            ) from error
        bos = self.service.checkpoint.network.bos
        if start.position or bos is None or ids[:1] == [bos]:
            return [tuple(ids)]
        return [(bos, *ids)]


def chat_messages(messages: Sequence[Message]) -> list[ChatMessage]:
    """A chat's messages, for the template."""
    return [
        ChatMessage(message.role, message.text, message.name, message.reasoning_content)
        for message in messages
    ]


def encode(service: Service, text: str, max_tokens: int) -> list[int]:
    """Tokens of a prompt. Raises InvalidRequest for more than `max_tokens`."""
    try:
        return service.checkpoint.tokenizer.encode(text, max_tokens)
    except TooManyTokens as error:
        raise too_long(error.num_tokens, max_tokens, "prompt") from error

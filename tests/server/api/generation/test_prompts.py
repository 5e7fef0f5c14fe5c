"""Prompts as tokens: where a conversation begins, and where one continues."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from server.api.conversation import ChatMessage
from server.api.generation.prompts import ChatPrompt, TextPrompt
from server.api.service import Service
from server.api.texts import SHORT
from server.engine.messages import Continuation
from server.errors import InvalidRequest
from tests.server.api.chats import STRICT, make_checkpoint
from tests.server.api.generation.services import running_service
from tests.server.live import tiny_settings

LATER = Continuation(position=9, pending=(7,))


def run(folder: Path, data: Path, main: Any) -> None:
    async def whole() -> None:
        async with running_service(tiny_settings(folder, data), data) as service:
            await main(service)

    asyncio.run(whole())


def texts(service: Service, *texts: str | list[int]) -> TextPrompt:
    return TextPrompt(service, texts)


def test_a_text_begins_with_the_models_first_token_and_continues_without(tmp_path: Path) -> None:
    async def main(service: Service) -> None:
        tokens = service.checkpoint.tokenizer.encode("the cat")
        [bos, *ids] = (await texts(service, "the cat").read(Continuation()))[0]
        assert bos == service.checkpoint.network.bos
        assert ids == list(tokens)
        assert await texts(service, "the cat").read(LATER) == [tuple(tokens)]
        several = await texts(service, "", [5, 6], []).read(Continuation())
        assert several == [(bos,), (5, 6), ()]  # tokens are as they were sent

    run(make_checkpoint(tmp_path / "model"), tmp_path, main)


def test_a_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    async def main(service: Service) -> None:
        with pytest.raises(
            InvalidRequest, match="310 is not below the vocabulary size 310"
        ) as caught:
            await texts(service, [5], [309, 310]).read(Continuation())
        assert caught.value.param == "prompt"

    run(make_checkpoint(tmp_path / "model"), tmp_path, main)


def test_a_long_text_has_the_tokens_that_it_would_have_in_short(tmp_path: Path) -> None:
    async def main(service: Service) -> None:
        text = "the cat sat on the mat " * SHORT
        [ids] = await texts(service, text).read(LATER)
        assert ids == tuple(service.checkpoint.tokenizer.encode(text))

    run(make_checkpoint(tmp_path / "model"), tmp_path, main)


def test_a_text_that_is_too_long_is_refused_before_it_is_tokenised(tmp_path: Path) -> None:
    async def main(service: Service) -> None:
        most = service.settings.max_prompt_tokens
        for text in ("x" * (100 * most), "the cat " * most):
            with pytest.raises(
                InvalidRequest, match=f"the maximum per request is {most}"
            ) as caught:
                await texts(service, text).read(Continuation())
            assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
            with pytest.raises(
                InvalidRequest, match=f"the maximum per request is {most}"
            ) as caught:
                await chat(service, [("user", text)], "input").read(Continuation())
            assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")

    run(make_checkpoint(tmp_path / "model"), tmp_path, main)


def chat(service: Service, messages: Sequence[tuple[str, str]], param: str) -> ChatPrompt:
    return ChatPrompt(service, [ChatMessage(role, text) for role, text in messages], param)


def test_a_chat_begins_and_continues_by_the_template(tmp_path: Path) -> None:
    async def main(service: Service) -> None:
        decode = service.checkpoint.tokenizer.decode
        first = chat(service, [("user", "the cat")], "messages")
        [ids] = await first.read(Continuation())
        expected = "<|endoftext|><|user|>the cat<|end|><|assistant|>"
        assert decode(ids, names=True) == expected
        [later] = await first.read(LATER)
        assert decode(later, names=True) == "<|end|><|user|>the cat<|end|><|assistant|>"

    run(make_checkpoint(tmp_path / "model"), tmp_path, main)


@pytest.mark.parametrize("param", ["messages", "input"])
@pytest.mark.parametrize("start", [Continuation(), LATER])
def test_what_the_template_refuses_is_the_requests_fault(
    tmp_path: Path, param: str, start: Continuation
) -> None:
    async def main(service: Service) -> None:
        with pytest.raises(InvalidRequest, match="not this") as caught:
            await chat(service, [("user", "no")], param).read(start)
        assert (caught.value.param, caught.value.status) == (param, 400)

    run(make_checkpoint(tmp_path / "model", STRICT), tmp_path, main)


def test_a_conversation_begins_with_a_message(tmp_path: Path) -> None:
    async def main(service: Service) -> None:
        with pytest.raises(InvalidRequest, match="at least one message") as caught:
            await chat(service, [], "messages").read(Continuation())
        assert caught.value.param == "messages"
        await chat(service, [], "messages").read(LATER)

    run(make_checkpoint(tmp_path / "model"), tmp_path, main)


def test_a_model_without_a_template_does_not_chat(tmp_path: Path) -> None:
    async def main(service: Service) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await chat(service, [("user", "a")], "messages").read(Continuation())
        assert caught.value.code == "no_chat_template"

    run(make_checkpoint(tmp_path / "model", None), tmp_path, main)

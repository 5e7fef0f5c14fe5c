"""Events from a template are those of the model, byte for byte."""

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from server.api.schemas.chat import ChatChunk, ChatChunkChoice, MessageDelta
from server.api.schemas.completions import Completion, CompletionChoice
from server.api.templates import TextTemplate

FACTS = {"id": 'a"b', "created": 1, "model": "é\\", "system_fingerprint": "fp_0"}


def completion(text: str) -> BaseModel:
    choice = CompletionChoice(index=3, text=text, logprobs=None, finish_reason=None)
    return Completion.model_validate(FACTS | {"choices": [choice], "usage": None})


def chunk(text: str) -> BaseModel:
    choice = ChatChunkChoice(
        index=0, delta=MessageDelta(content=text), logprobs=None, finish_reason=None
    )
    reported = {"object": "chat.completion.chunk", "choices": [choice], "session_id": "s"}
    return ChatChunk.model_validate(FACTS | reported)


TEMPLATES = [(make, TextTemplate(make)) for make in (completion, chunk)]


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("".join(map(chr, range(0x180))))
@example('"\\/</script>\r\n\u2028\u2029\ufeff\ufffd\U0001f98a\U0010ffff')
def test_a_rendered_text_is_what_the_model_writes(text: str) -> None:
    for make, template in TEMPLATES:
        assert template.render(text) == make(text).model_dump_json(exclude_unset=True).encode()
        assert not {b"\n", b"\r"} & {bytes([byte]) for byte in template.render(text)}


@pytest.mark.parametrize(("make", "template"), TEMPLATES)
def test_half_a_pair_of_surrogates_is_no_text(
    make: Callable[[str], BaseModel], template: TextTemplate
) -> None:
    for write in (template.render, lambda text: make(text).model_dump_json(exclude_unset=True)):
        with pytest.raises(PydanticSerializationError):
            write("\ud83e")

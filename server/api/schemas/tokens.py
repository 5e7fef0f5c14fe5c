"""`/tokenize` and `/detokenize`, in the shape that other servers gave them."""

from typing import Annotated

from pydantic import ConfigDict, Field

from server.api.schemas.base import AnswerModel, RequestModel, Text, TokenIds
from server.api.schemas.chat import Message


class TokenizeRequest(RequestModel):
    """`POST /tokenize`: a prompt or messages, one of them."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "The cat sat on"}]})

    model: Text | None = Field(None, examples=["latentd"])
    """The model's name; without it, the one that is served."""

    prompt: Text | None = Field(None, examples=["The cat sat on"])
    """Text as `/v1/completions` would read it."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    """A conversation as `/v1/chat/completions` would read it."""

    add_special_tokens: bool | None = None
    """Begin with the token that a fresh text begins with; true unless it is said otherwise."""

    return_token_strs: bool | None = None
    """Tell each token's name in the vocabulary, too."""


class Tokenized(AnswerModel):
    """A text as tokens."""

    count: int = Field(examples=[3])
    """How many there are."""

    tokens: list[int] = Field(examples=[[1, 71, 24]])
    """Their ids."""

    token_strs: list[str] | None = Field(examples=[["<|begin|>", "The", " cat"]])
    """Their names, if asked for."""

    max_model_len: None
    """Always null: a context has no longest length here."""


class DetokenizeRequest(RequestModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [1, 71, 24]}]})

    model: Text | None = Field(None, examples=["latentd"])
    """The model's name; without it, the one that is served."""

    tokens: TokenIds = Field(examples=[[1, 71, 24]])
    """Token ids."""


class Detokenized(AnswerModel):
    """Tokens as text."""

    prompt: str = Field(examples=["The cat"])
    """The text; special tokens are there by their names."""


class TokenizerInfo(AnswerModel):
    """What clients need to know that prepare prompts themselves."""

    bos_token: str | None = Field(examples=["<|begin|>"])
    """The token that a fresh text begins with."""

    eos_token: str | None = Field(examples=["<|end|>"])
    """The token that the model ends a text with; the first of several."""

    pad_token: None = None
    """Always null: nothing is padded."""

    vocab_size: int = Field(examples=[8192])
    """Token ids are below this."""

    chat_template: str | None = Field(
        examples=["{% for message in messages %}{{ message.content }}{% endfor %}"]
    )
    """The template that messages become a prompt by."""

"""`/tokenize` and `/detokenize`, in the shape that other servers gave them."""

from typing import Annotated

from pydantic import Field

from server.api.schemas.base import AnswerModel, RequestModel, Text, TokenIds
from server.api.schemas.chat import Message


class TokenizeRequest(RequestModel):
    """`POST /tokenize`: a prompt or messages, one of them."""

    model: Text | None = None
    """The model's name; without it, the one that is served."""

    prompt: Text | None = None
    """Text as `/v1/completions` would read it."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    """A conversation as `/v1/chat/completions` would read it."""

    add_special_tokens: bool | None = None
    """Begin with the token that a fresh text begins with; true unless it is said otherwise."""

    return_token_strs: bool | None = None
    """Tell each token's name in the vocabulary, too."""


class Tokenized(AnswerModel):
    """A text as tokens."""

    count: int
    """How many there are."""

    tokens: list[int]
    """Their ids."""

    token_strs: list[str] | None
    """Their names, if asked for."""

    max_model_len: None
    """Always null: a context has no longest length here."""


class DetokenizeRequest(RequestModel):
    """`POST /detokenize`."""

    model: Text | None = None
    """The model's name; without it, the one that is served."""

    tokens: TokenIds
    """Token ids."""


class Detokenized(AnswerModel):
    """Tokens as text."""

    prompt: str
    """The text; special tokens are there by their names."""


class TokenizerInfo(AnswerModel):
    """What clients need to know that prepare prompts themselves."""

    bos_token: str | None
    """The token that a fresh text begins with."""

    eos_token: str | None
    """The token that the model ends a text with; the first of several."""

    pad_token: None = None
    """Always null: nothing is padded."""

    vocab_size: int
    """Token ids are below this."""

    chat_template: str | None
    """The template that messages become a prompt by."""

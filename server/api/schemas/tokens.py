"""Models of `/tokenize` and `/detokenize`, compatible with other servers."""

from typing import Annotated

from pydantic import ConfigDict, Field

from server.api.schemas.base import RequestModel, ResponseModel, Text, TokenIds
from server.api.schemas.chat import Message


class TokenizeRequest(RequestModel):
    """`POST /tokenize`: either a prompt or messages."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "The cat sat on"}]})

    model: Text | None = Field(None, examples=["latentd"])
    """The model's name; default: the served one."""

    prompt: Text | None = Field(None, examples=["The cat sat on"])
    """A prompt, as for `/v1/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    """A conversation, as for `/v1/chat/completions`."""

    add_special_tokens: bool | None = None
    """Include the initial token of a new text; default true."""

    return_token_strs: bool | None = None
    """Also return each token's name in the vocabulary."""


class Tokenized(ResponseModel):
    """A text as tokens."""

    count: int = Field(examples=[3])
    """Number of tokens."""

    tokens: list[int] = Field(examples=[[1, 71, 24]])
    """Token ids."""

    token_strs: list[str] | None = Field(examples=[["<|begin|>", "The", " cat"]])
    """Their names, if requested."""

    max_model_len: None
    """Always null: the context length is unlimited."""


class DetokenizeRequest(RequestModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [1, 71, 24]}]})

    model: Text | None = Field(None, examples=["latentd"])
    """The model's name; default: the served one."""

    tokens: TokenIds = Field(examples=[[1, 71, 24]])
    """Token ids."""


class Detokenized(ResponseModel):
    """Tokens as text."""

    prompt: str = Field(examples=["The cat"])
    """The text; special tokens appear by name."""


class TokenizerInfo(ResponseModel):
    """Tokenizer details, for clients that prepare prompts themselves."""

    bos_token: str | None = Field(examples=["<|begin|>"])
    """The initial token of a new text."""

    eos_token: str | None = Field(examples=["<|end|>"])
    """The model's end token; the first of several."""

    pad_token: None = None
    """Always null."""

    vocab_size: int = Field(examples=[8192])
    """Token ids are below this."""

    chat_template: str | None = Field(
        examples=["{% for message in messages %}{{ message.content }}{% endfor %}"]
    )
    """The chat template."""

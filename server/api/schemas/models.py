"""`/v1/models` and the server's health."""

from typing import Literal

from pydantic import Field

from server.api.schemas.base import AnswerModel, UnixSecond


class Model(AnswerModel):
    """The model that is served, and what its sessions cost."""

    id: str = Field(examples=["latentd"])
    """Its name in requests."""

    object: Literal["model"] = "model"
    """The kind of object."""

    created: UnixSecond
    """Unix seconds when its checkpoint was written."""

    owned_by: str = "latentd"
    """Who serves it."""

    parameters: int = Field(examples=[30_142_976])
    """Numbers in its weights."""

    vocab_size: int = Field(examples=[8192])
    """Token ids are below this."""

    context: Literal["unbounded"] = "unbounded"
    """A session can have any number of tokens, each at the same cost."""

    state_bytes: int = Field(examples=[1_622_016])
    """Memory of one session, at any length of its context."""

    max_prompt_tokens: int = Field(examples=[131_072])
    """Most tokens that one request may add; a session can have any number of requests."""

    max_tokens: int = Field(examples=[65_536])
    """Most tokens that one request may generate."""

    chat: bool
    """Whether it has a chat template, which `/v1/chat/completions` needs."""


class ModelList(AnswerModel):
    """All models of the server: one."""

    object: Literal["list"] = "list"
    """The kind of object."""

    data: list[Model]
    """The models."""


class Health(AnswerModel):
    """The server is well."""

    status: Literal["ok"] = "ok"
    """It is well."""

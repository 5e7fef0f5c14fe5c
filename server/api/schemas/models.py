"""Models of `/v1/models` and of the health probes."""

from typing import Literal

from pydantic import Field

from server.api.schemas.base import ResponseModel, UnixSecond


class Model(ResponseModel):
    """The served model and the size of its sessions."""

    id: str = Field(examples=["latentd"])
    """Its name in requests."""

    object: Literal["model"] = "model"
    """The object type."""

    created: UnixSecond
    """When its checkpoint was written, in Unix seconds."""

    owned_by: str = "latentd"
    """The owner."""

    parameters: int = Field(examples=[30_142_976])
    """Number of parameters."""

    vocab_size: int = Field(examples=[8192])
    """Token ids are below this."""

    context: Literal["unbounded"] = "unbounded"
    """A session can have any number of tokens, at constant cost per token."""

    state_bytes: int = Field(examples=[1_622_016])
    """Memory per session, at any length."""

    max_prompt_tokens: int = Field(examples=[131_072])
    """Maximum prompt tokens per request; a session can have any number of requests."""

    max_tokens: int = Field(examples=[65_536])
    """Maximum generated tokens per request."""

    chat: bool
    """Whether it has a chat template, as `/v1/chat/completions` requires."""


class ModelList(ResponseModel):
    """The served models: one."""

    object: Literal["list"] = "list"
    """The object type."""

    data: list[Model]
    """The models."""


class Health(ResponseModel):
    """The server is healthy."""

    status: Literal["ok"] = "ok"
    """Always ok."""

"""`/v1/models` and the server's health."""

from typing import Literal

from server.api.schemas.base import AnswerModel


class Model(AnswerModel):
    """The model that is served, and what its sessions cost."""

    id: str
    """Its name in requests."""

    object: Literal["model"] = "model"
    """The kind of object."""

    created: int
    """Unix seconds when its checkpoint was written."""

    owned_by: str = "latentd"
    """Who serves it."""

    parameters: int
    """Numbers in its weights."""

    vocab_size: int
    """Token ids are below this."""

    context: Literal["unbounded"] = "unbounded"
    """A session can have any number of tokens, each at the same cost."""

    state_bytes: int
    """Memory of one session, at any length of its context."""

    max_prompt_tokens: int
    """Most tokens that one request may add; a session can have any number of requests."""

    max_tokens: int
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

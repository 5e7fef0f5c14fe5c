"""`/v1/streams`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class StreamInfo(BaseModel):
    """A stream that can be resumed."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """That of the answer that it delivers."""

    object: Literal["stream"] = "stream"
    created_at: float
    """Unix seconds."""

    status: Literal["in_progress", "completed", "failed", "cancelled"]
    """How its turn stands."""

    events: int
    """Events so far."""

    expires_at: float | None
    """Unix seconds when it is forgotten; null while it runs."""


class StreamDeleted(BaseModel):
    """A stream that is no more."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """What it was called."""

    object: Literal["stream.deleted"] = "stream.deleted"
    deleted: Literal[True] = True

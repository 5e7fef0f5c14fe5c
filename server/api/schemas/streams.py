"""`/v1/streams`."""

from typing import Literal

from server.api.schemas.base import AnswerModel


class StreamInfo(AnswerModel):
    """A stream that can be resumed."""

    id: str
    """That of the answer that it delivers."""

    object: Literal["stream"] = "stream"
    """The kind of object."""

    created_at: float
    """Unix seconds."""

    status: Literal["in_progress", "completed", "failed", "cancelled"]
    """How its turn stands."""

    events: int
    """Events so far."""

    expires_at: float | None
    """Unix seconds when it is forgotten; null while it runs."""


class StreamDeleted(AnswerModel):
    """A stream that is no more."""

    id: str
    """What it was called."""

    object: Literal["stream.deleted"] = "stream.deleted"
    """The kind of object."""

    deleted: Literal[True] = True
    """It is gone."""

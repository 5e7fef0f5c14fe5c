"""`/v1/streams`."""

from typing import Literal

from pydantic import Field

from server.api.schemas.base import EXAMPLE_STREAM, AnswerModel, UnixTime


class StreamInfo(AnswerModel):
    """A stream that can be resumed."""

    id: str = Field(examples=[EXAMPLE_STREAM])
    """That of the answer that it delivers."""

    object: Literal["stream"] = "stream"
    """The kind of object."""

    created_at: UnixTime
    """Unix seconds."""

    status: Literal["in_progress", "completed", "failed", "cancelled"] = Field(
        examples=["completed"]
    )
    """How its turn stands."""

    events: int = Field(examples=[5])
    """Events so far."""

    expires_at: float | None = Field(examples=[1_767_229_200.5])
    """Unix seconds when it is forgotten; null while it runs."""


class StreamDeleted(AnswerModel):
    """A stream that is no more."""

    id: str = Field(examples=[EXAMPLE_STREAM])
    """What it was called."""

    object: Literal["stream.deleted"] = "stream.deleted"
    """The kind of object."""

    deleted: Literal[True] = True
    """It is gone."""

"""Models of `/v1/streams`."""

from typing import Literal

from pydantic import Field

from server.api.schemas.base import EXAMPLE_STREAM, ResponseModel, UnixTime


class StreamInfo(ResponseModel):
    """A resumable stream."""

    id: str = Field(examples=[EXAMPLE_STREAM])
    """Its id, that of the answer."""

    object: Literal["stream"] = "stream"
    """The object type."""

    created_at: UnixTime
    """Unix seconds."""

    status: Literal["in_progress", "completed", "failed", "cancelled"] = Field(
        examples=["completed"]
    )
    """Status of its turn."""

    events: int = Field(examples=[5])
    """Number of events so far."""

    expires_at: float | None = Field(examples=[1_767_229_200.5])
    """When it expires, in Unix seconds; null while it runs."""


class StreamDeleted(ResponseModel):
    """A deleted stream."""

    id: str = Field(examples=[EXAMPLE_STREAM])
    """Its id."""

    object: Literal["stream.deleted"] = "stream.deleted"
    """The object type."""

    deleted: Literal[True] = True
    """Always true."""

"""`GET /v1/usage`: what a key has used and holds."""

from typing import Literal

from pydantic import Field

from server.api.schemas.base import ResponseModel, UnixSecond


class KeyUsage(ResponseModel):
    """What your key has used since the server started, and what it holds."""

    object: Literal["usage"] = "usage"
    """The kind of object."""

    since: UnixSecond
    """Unix seconds when the server began to count."""

    requests: int = Field(examples=[12])
    """Requests that counted."""

    prompt_tokens: int = Field(examples=[360])
    """Tokens read."""

    completion_tokens: int = Field(examples=[240])
    """Tokens generated."""

    sessions: int = Field(examples=[2])
    """Sessions held."""

    responses: int = Field(examples=[1])
    """Stored responses held."""

    states: int = Field(examples=[9])
    """States held: those of the last turns of each session, and of each response."""

    bytes: int = Field(examples=[2_419_200])
    """Of states, kept answers, stored responses and metadata."""

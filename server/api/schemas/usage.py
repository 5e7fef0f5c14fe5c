"""`GET /v1/usage`: a key's usage."""

from typing import Literal

from pydantic import Field

from server.api.schemas.base import ResponseModel, UnixSecond


class KeyUsage(ResponseModel):
    """Your key's usage since the server started, and what it stores now."""

    object: Literal["usage"] = "usage"
    """The object type."""

    since: UnixSecond
    """When counting started, in Unix seconds."""

    requests: int = Field(examples=[12])
    """Requests that were charged."""

    prompt_tokens: int = Field(examples=[360])
    """Tokens read."""

    completion_tokens: int = Field(examples=[240])
    """Tokens generated."""

    sessions: int = Field(examples=[2])
    """Sessions held."""

    responses: int = Field(examples=[1])
    """Stored responses."""

    states: int = Field(examples=[9])
    """Stored states: those of each session's last turns, and of each response."""

    bytes: int = Field(examples=[2_419_200])
    """Size of states, stored answers, stored responses and metadata."""

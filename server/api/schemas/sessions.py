"""Models of `/v1/sessions`."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from server.api.schemas.base import (
    EXAMPLE_RESPONSE,
    EXAMPLE_SESSION,
    LARGEST,
    WHOLE,
    Prompt,
    RequestModel,
    ResponseModel,
    Text,
    UnixTime,
)

Metadata = Annotated[
    dict[
        Annotated[Text, Field(min_length=1, max_length=64)],
        Annotated[Text, Field(max_length=512)],
    ],
    Field(max_length=16, fail_fast=True, examples=[{"topic": "cats"}]),
]
Ttl = Annotated[float, Field(gt=0, le=10**9, examples=[3600.0])]
TurnNumber = Annotated[int, Field(ge=0, le=LARGEST, examples=[1]), WHOLE]


class CreateSessionRequest(RequestModel):
    """`POST /v1/sessions`; the body is optional."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"metadata": {"topic": "cats"}, "ttl": 3600.0, "prompt": "Once upon a time"}
            ]
        }
    )

    metadata: Metadata | None = None
    """Metadata stored with the session."""

    ttl: Ttl | None = None
    """Seconds without use after which the session expires."""

    prompt: Prompt | None = Field(None, examples=["Once upon a time"])
    """Initial text or token ids, read as the first turn."""

    initial_state: Text | None = Field(None, examples=["poet"])
    """Start from this initial state of the server, by name."""

    response_id: Text | None = Field(None, examples=[EXAMPLE_RESPONSE])
    """Start from the state after this stored response, instead of a prompt."""


class ForkRequest(RequestModel):
    """`POST /v1/sessions/{id}/fork`; the body is optional."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"metadata": {"topic": "dogs"}, "ttl": 3600.0}]}
    )

    turn: TurnNumber | None = None
    """The checkpoint to start from; default: the last. 0 is the empty beginning."""

    metadata: Metadata | None = None
    """Default: the session's."""

    ttl: Ttl | None = None
    """Default: the session's."""


class RewindRequest(RequestModel):
    """`POST /v1/sessions/{id}/rewind`."""

    turn: TurnNumber
    """The checkpoint to go back to; later ones are erased. 0 is the empty beginning."""


class Parent(ResponseModel):
    """A checkpoint of another session, which may have been deleted."""

    session_id: str = Field(examples=["sess_w8Rk3TzB5nQ0yVj6XcLmHd1sPaGfEu9o"])
    """Its id."""

    turn: int = Field(examples=[2])
    """The turn after which it was forked."""


class Session(ResponseModel):
    """A conversation stored as one state of fixed size. Times are Unix seconds."""

    id: str = Field(examples=[EXAMPLE_SESSION])
    """Its unguessable id."""

    object: Literal["session"] = "session"
    """The object type."""

    created_at: UnixTime
    """When it was created."""

    last_used_at: UnixTime
    """When its last turn was committed, or when it was created."""

    expires_at: float | None = Field(examples=[1_767_229_200.5])
    """When it expires unless used; null: never."""

    ttl: float | None = Field(examples=[3600.0])
    """Seconds without use after which it expires."""

    turn: int = Field(examples=[3])
    """Number of committed turns."""

    checkpoints: int = Field(examples=[3])
    """Number of checkpoints, of the last turns."""

    tokens: int = Field(examples=[412])
    """Tokens read and generated."""

    state_bytes: int = Field(examples=[1_622_016])
    """Size of its state, at any length."""

    tier: Literal["device", "host", "store"] | None
    """The fastest tier with its state; null before the first turn."""

    status: Literal["idle", "busy"]
    """busy: a turn is running, and another would be rejected."""

    parent: Parent | None
    """The checkpoint that it was forked from."""

    metadata: dict[str, str] = Field(examples=[{"topic": "cats"}])
    """Metadata."""


class ImportedSession(Session):
    """A session imported from an exported state."""

    arithmetic: str = Field(examples=["int8 x int8"])
    """Arithmetic of this server's matrix products: weights x inputs."""

    arithmetic_before: str | None = Field(examples=["float32 x float32"])
    """The same for the server that computed the state; null if the blob does not say."""


class Checkpoint(ResponseModel):
    """A turn whose state is stored."""

    object: Literal["session.turn"] = "session.turn"
    """The object type."""

    turn: int = Field(examples=[3])
    """Its number."""

    tokens: int = Field(examples=[412])
    """Tokens of the session after the turn."""

    created_at: UnixTime
    """When it was committed, in Unix seconds."""

    bytes: int = Field(examples=[1_623_104])
    """Size in the store."""


class CheckpointList(ResponseModel):
    """A session's checkpoints, newest first."""

    object: Literal["list"] = "list"
    """The object type."""

    data: list[Checkpoint]
    """The checkpoints."""


class SessionList(ResponseModel):
    """A page of sessions, newest first."""

    object: Literal["list"] = "list"
    """The object type."""

    data: list[Session]
    """The sessions."""

    first_id: str | None = Field(examples=[EXAMPLE_SESSION])
    """The page's first session; null if there is none."""

    last_id: str | None = Field(examples=[EXAMPLE_SESSION])
    """Pass it as `after` for the next page."""

    has_more: bool
    """Whether there is a next page."""


class SessionDeleted(ResponseModel):
    """A deleted session."""

    id: str = Field(examples=[EXAMPLE_SESSION])
    """Its id."""

    object: Literal["session.deleted"] = "session.deleted"
    """The object type."""

    deleted: Literal[True] = True
    """Always true."""

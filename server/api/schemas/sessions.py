"""`/v1/sessions`."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from server.api.schemas.base import (
    EXAMPLE_RESPONSE,
    EXAMPLE_SESSION,
    LARGEST,
    WHOLE,
    AnswerModel,
    Prompt,
    RequestModel,
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
    """`POST /v1/sessions`; the body may be left out."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"metadata": {"topic": "cats"}, "ttl": 3600.0, "prompt": "Once upon a time"}
            ]
        }
    )

    metadata: Metadata | None = None
    """Your notes, kept with the session."""

    ttl: Ttl | None = None
    """Seconds without use after which the session is erased."""

    prompt: Prompt | None = Field(None, examples=["Once upon a time"])
    """Text or token ids that the session begins with, read as its first turn."""

    initial_state: Text | None = Field(None, examples=["poet"])
    """Begin with this tuned state of the server's, by its name."""

    response_id: Text | None = Field(None, examples=[EXAMPLE_RESPONSE])
    """Begin with a copy of the state after this stored response, instead of a prompt."""


class ForkRequest(RequestModel):
    """`POST /v1/sessions/{id}/fork`; the body may be left out."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"metadata": {"topic": "dogs"}, "ttl": 3600.0}]}
    )

    turn: TurnNumber | None = None
    """The checkpoint to begin with; the last one if not given. 0 is the empty beginning."""

    metadata: Metadata | None = None
    """Those of the session if not given."""

    ttl: Ttl | None = None
    """That of the session if not given."""


class RewindRequest(RequestModel):
    """`POST /v1/sessions/{id}/rewind`."""

    turn: TurnNumber
    """The checkpoint to go back to; later ones are erased. 0 is the empty beginning."""


class Parent(AnswerModel):
    """A checkpoint of another session, which may not exist any more."""

    session_id: str = Field(examples=["sess_w8Rk3TzB5nQ0yVj6XcLmHd1sPaGfEu9o"])
    """Its id."""

    turn: int = Field(examples=[2])
    """The turn after which it was forked."""


class Session(AnswerModel):
    """A conversation that the server keeps as one state of fixed size. Times are Unix seconds."""

    id: str = Field(examples=[EXAMPLE_SESSION])
    """Its id, which cannot be guessed."""

    object: Literal["session"] = "session"
    """The kind of object."""

    created_at: UnixTime
    """When it was made."""

    last_used_at: UnixTime
    """When its last turn was committed, or when it was made."""

    expires_at: float | None = Field(examples=[1_767_229_200.5])
    """When it is erased if nobody uses it; null: never."""

    ttl: float | None = Field(examples=[3600.0])
    """Seconds without use after which it expires."""

    turn: int = Field(examples=[3])
    """Turns committed."""

    checkpoints: int = Field(examples=[3])
    """How many of its last turns can be forked or rewound to."""

    tokens: int = Field(examples=[412])
    """Tokens that the session has read and written."""

    state_bytes: int = Field(examples=[1_622_016])
    """Memory of its state, whatever its length."""

    tier: Literal["device", "host", "store"] | None
    """The fastest place that has its state; null before the first turn."""

    status: Literal["idle", "busy"]
    """busy: a turn is running, and another one would be refused."""

    parent: Parent | None
    """Where it was forked from."""

    metadata: dict[str, str] = Field(examples=[{"topic": "cats"}])
    """Your notes."""


class ImportedSession(Session):
    """A session that goes on from an exported state."""

    arithmetic: str = Field(examples=["int8 x int8"])
    """What this server's products multiply: weights x inputs."""

    arithmetic_before: str | None = Field(examples=["float32 x float32"])
    """The same of the server that computed the state; null in blobs that do not say it."""


class Checkpoint(AnswerModel):
    """A turn whose state is kept."""

    object: Literal["session.turn"] = "session.turn"
    """The kind of object."""

    turn: int = Field(examples=[3])
    """Its number."""

    tokens: int = Field(examples=[412])
    """Tokens of the session after it."""

    created_at: UnixTime
    """When it was committed, in Unix seconds."""

    bytes: int = Field(examples=[1_623_104])
    """What it takes in the store."""


class CheckpointList(AnswerModel):
    """A session's checkpoints, newest first."""

    object: Literal["list"] = "list"
    """The kind of object."""

    data: list[Checkpoint]
    """The checkpoints."""


class SessionList(AnswerModel):
    """A page of sessions, newest first."""

    object: Literal["list"] = "list"
    """The kind of object."""

    data: list[Session]
    """The sessions."""

    first_id: str | None = Field(examples=[EXAMPLE_SESSION])
    """The page's first session; null if there is none."""

    last_id: str | None = Field(examples=[EXAMPLE_SESSION])
    """Pass as `after` for the next page."""

    has_more: bool
    """Whether there is a page after this one."""


class SessionDeleted(AnswerModel):
    """A session that is no more."""

    id: str = Field(examples=[EXAMPLE_SESSION])
    """What it was called."""

    object: Literal["session.deleted"] = "session.deleted"
    """The kind of object."""

    deleted: Literal[True] = True
    """It is gone."""

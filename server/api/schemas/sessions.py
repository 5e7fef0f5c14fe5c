"""`/v1/sessions`."""

from typing import Annotated, Literal

from pydantic import Field

from server.api.schemas.base import LARGEST, WHOLE, AnswerModel, Prompt, RequestModel, Text

Metadata = Annotated[
    dict[
        Annotated[Text, Field(min_length=1, max_length=64)],
        Annotated[Text, Field(max_length=512)],
    ],
    Field(max_length=16),
]
Ttl = Annotated[float, Field(gt=0, le=10**9)]
TurnNumber = Annotated[int, Field(ge=0, le=LARGEST), WHOLE]


class CreateSessionRequest(RequestModel):
    """`POST /v1/sessions`; the body may be left out."""

    metadata: Metadata | None = None
    """Your notes, kept with the session."""

    ttl: Ttl | None = None
    """Seconds without use after which the session is erased."""

    prompt: Prompt | None = None
    """Text or token ids that the session begins with, read as its first turn."""

    response_id: Text | None = None
    """Begin with a copy of the state after this stored response, instead of a prompt."""


class ForkRequest(RequestModel):
    """`POST /v1/sessions/{id}/fork`; the body may be left out."""

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

    session_id: str
    """Its id."""

    turn: int
    """The turn after which it was forked."""


class Session(AnswerModel):
    """A conversation that the server keeps as one state of fixed size. Times are Unix seconds."""

    id: str
    """Its id, which cannot be guessed."""

    object: Literal["session"] = "session"
    """The kind of object."""

    created_at: float
    """When it was made."""

    last_used_at: float
    """When its last turn was committed, or when it was made."""

    expires_at: float | None
    """When it is erased if nobody uses it; null: never."""

    ttl: float | None
    """Seconds without use after which it expires."""

    turn: int
    """Turns committed."""

    checkpoints: int
    """How many of its last turns can be forked or rewound to."""

    tokens: int
    """Tokens that the session has read and written."""

    state_bytes: int
    """Memory of its state, whatever its length."""

    tier: Literal["device", "host", "store"] | None
    """The fastest place that has its state; null before the first turn."""

    status: Literal["idle", "busy"]
    """busy: a turn is running, and another one would be refused."""

    parent: Parent | None
    """Where it was forked from."""

    metadata: dict[str, str]
    """Your notes."""


class Checkpoint(AnswerModel):
    """A turn whose state is kept."""

    object: Literal["session.turn"] = "session.turn"
    """The kind of object."""

    turn: int
    """Its number."""

    tokens: int
    """Tokens of the session after it."""

    created_at: float
    """When it was committed, in Unix seconds."""

    bytes: int
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

    first_id: str | None
    """The page's first session; null if there is none."""

    last_id: str | None
    """Pass as `after` for the next page."""

    has_more: bool
    """Whether there is a page after this one."""


class SessionDeleted(AnswerModel):
    """A session that is no more."""

    id: str
    """What it was called."""

    object: Literal["session.deleted"] = "session.deleted"
    """The kind of object."""

    deleted: Literal[True] = True
    """It is gone."""

"""Path, query and header parameters, with their documentation."""

from typing import Annotated

from fastapi import Header, Path, Query

from server.api.schemas.base import EXAMPLE_RESPONSE, EXAMPLE_SESSION, EXAMPLE_STREAM, LARGEST, Text
from server.api.schemas.sessions import Ttl, TurnNumber

SessionId = Annotated[str, Path(description="The session's id.", examples=[EXAMPLE_SESSION])]
ResponseId = Annotated[str, Path(description="The response's id.", examples=[EXAMPLE_RESPONSE])]
StreamId = Annotated[
    str,
    Path(description="The stream's id, which is that of the answer.", examples=[EXAMPLE_STREAM]),
]
ModelName = Annotated[str, Path(description="The model's name.", examples=["latentd"])]

SessionHeader = Annotated[
    str | None,
    Header(
        alias="X-Session-ID",
        description="The same as `session_id` in the body.",
        examples=[EXAMPLE_SESSION],
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern="^[ -~]*$",
        description="With a session: your key for this turn, in printable ASCII. Repeating the "
        "request with it returns the answer of the committed turn.",
        examples=["turn-4-of-cats"],
    ),
]
LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        description="The number of the last event received; later ones follow.",
        examples=["41"],
    ),
]
AfterEvent = Annotated[
    str | None,
    Query(
        description="The same as `Last-Event-ID`, for clients that cannot set headers.",
        examples=["41"],
    ),
]

PageLimit = Annotated[
    int, Query(ge=1, le=100, description="Maximum sessions per page.", examples=[20])
]
AfterSession = Annotated[
    str | None,
    Query(description="The `last_id` of the previous page.", examples=[EXAMPLE_SESSION]),
]
MetadataQuery = Annotated[
    Text | None,
    Query(
        description="Metadata stored with the session: a JSON object of strings.",
        examples=['{"topic": "cats"}'],
    ),
]
TtlQuery = Annotated[
    Ttl | None,
    Query(description="Seconds without use after which the session expires.", examples=[3600.0]),
]
TurnQuery = Annotated[
    TurnNumber | None,
    Query(description="The turn; default: the last.", examples=[3]),
]
WantsStream = Annotated[
    bool, Query(description="Stream the events of a background response.", examples=[True])
]
IncludeObfuscation = Annotated[
    bool,
    Query(
        description="Not supported: events are not padded.",
        examples=[False],
        json_schema_extra={"const": False},
    ),
]
StartingAfter = Annotated[
    int | None,
    Query(
        ge=0,
        le=LARGEST,
        description="With `stream`: the `sequence_number` of the last event received.",
        examples=[7],
    ),
]

"""What the API reads and writes, in OpenAI's shapes. Unknown parameters are errors."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1


def _kind_of_prompt(value: Any) -> str:
    """Which form of a prompt the first element shows, so that only that form is checked."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else 0
    if isinstance(first, list):
        return "token_lists"
    return "tokens" if isinstance(first, int) else "texts"


def _check_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no encoding of text has a place for."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("text", "Text must not contain an unpaired surrogate")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("texts")]
    | Annotated[TokenIds, Tag("tokens")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("token_lists")],
    Discriminator(_kind_of_prompt),
]
StopString = Annotated[Text, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopString, Tag("text")]
    | Annotated[list[StopString], Field(fail_fast=True), Tag("texts")],
    Discriminator(lambda value: "texts" if isinstance(value, list) else "text"),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class RequestModel(BaseModel):
    """Strict about types and names; an explicit null means the default."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    """End the stream with an event that has no choices but the usage."""

    continuous_usage_stats: bool | None = None
    """Put the usage so far into every event."""


class CompletionRequest(RequestModel):
    """`POST /v1/completions`."""

    prompt: Prompt | None
    """Text, token ids, or a list of either. null: nothing, to go on with a session."""

    model: Text | None = None
    session_id: Text | None = None
    expected_turn: Annotated[int, Field(ge=0)] | None = None
    """The turn that the session must be at; otherwise the answer is 409 `turn_mismatch`."""

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 and -1: no limit."""

    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """By token id, which JSON writes as a string."""

    seed: Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX)] | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds from the request's arrival in which it must end. One that does not is dropped where
    it is, a session's turn rolled back: status 504, or an error event in a stream, with the code
    `deadline_exceeded`."""

    user: Text | None = None
    logprobs: None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def num_choices_per_prompt(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt of the request, each a text or token ids."""
        prompt = self.prompt
        if prompt is None or isinstance(prompt, str):
            return [prompt or ""]
        several = [item for item in prompt if not isinstance(item, int)]
        return several or [[item for item in prompt if isinstance(item, int)]]


Metadata = Annotated[
    dict[
        Annotated[Text, Field(min_length=1, max_length=64)],
        Annotated[Text, Field(max_length=512)],
    ],
    Field(max_length=16),
]
Ttl = Annotated[float, Field(gt=0, le=10**9)]
TurnNumber = Annotated[int, Field(ge=0, le=2**53)]


class CreateSessionRequest(RequestModel):
    """`POST /v1/sessions`; the body may be left out."""

    metadata: Metadata | None = None
    ttl: Ttl | None = None
    """Seconds without use after which the session is erased."""

    prompt: Prompt | None = None
    """Text or token ids that the session begins with, read as its first turn."""


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


class PromptTokensDetails(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    cached_tokens: int
    """Prompt tokens that did not need to be read: those that the session held already, or the
    beginning of a prompt that the server has read before. In a stream a prompt's beginning counts
    from the end of its choices."""


class Usage(BaseModel):
    """Tokens of a request. Those that a session held already count as prompt tokens, too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """The answer of `POST /v1/completions`, and each event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    session_id: str | None = None
    session_turn: int | None = None
    """The session's turn that this is, once it is committed."""


class Parent(BaseModel):
    """A checkpoint of another session, which may not exist any more."""

    session_id: str
    turn: int


class Session(BaseModel):
    """A conversation that the server keeps as one state of fixed size. Times are Unix seconds."""

    id: str
    object: Literal["session"] = "session"
    created_at: float
    last_used_at: float
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
    tier: Literal["device", "host", "store"] | None
    """The fastest place that has its state; null before the first turn."""

    status: Literal["idle", "busy"]
    parent: Parent | None
    """Where it was forked from."""

    metadata: dict[str, str]


class Checkpoint(BaseModel):
    """A turn whose state is kept."""

    object: Literal["session.turn"] = "session.turn"
    turn: int
    tokens: int
    """Tokens of the session after it."""

    created_at: float
    bytes: int
    """What it takes in the store."""


class CheckpointList(BaseModel):
    """A session's checkpoints, newest first."""

    object: Literal["list"] = "list"
    data: list[Checkpoint]


class SessionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Session]
    first_id: str | None
    last_id: str | None
    """Pass as `after` for the next page."""

    has_more: bool


class SessionDeleted(BaseModel):
    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: Literal[True] = True


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "latentd"
    parameters: int
    state_bytes: int
    """Memory of one session, at any length of its context."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The shape of every error."""

    error: ErrorDetail

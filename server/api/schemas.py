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


class CreateSessionRequest(RequestModel):
    """`POST /v1/sessions`; the body may be left out."""

    metadata: (
        Annotated[
            dict[
                Annotated[Text, Field(min_length=1, max_length=64)],
                Annotated[Text, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None


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


class Session(BaseModel):
    """A conversation that the server keeps as one state of fixed size. Times are Unix seconds."""

    id: str
    object: Literal["session"] = "session"
    created_at: float
    last_used_at: float
    turn: int
    """Turns committed."""

    tokens: int
    """Tokens that the session has read and written."""

    state_bytes: int
    tier: Literal["device", "host", "store"] | None
    """The fastest place that has its state; null before the first turn."""

    status: Literal["idle", "busy"]
    metadata: dict[str, str]


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

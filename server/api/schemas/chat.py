"""Models of `/v1/chat/completions`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, PlainSerializer, Tag

from server.api.schemas.base import (
    EXAMPLE_SESSION,
    EXAMPLE_STREAM,
    LARGEST,
    WHOLE,
    Ignored,
    RequestModel,
    ResponseModel,
    ResponseTokenIds,
    Text,
    UnixSecond,
    Unsupported,
)
from server.api.schemas.generation import (
    ConversationRequest,
    Effort,
    GenerationRequest,
    Timings,
    Usage,
)

NO_TOOLS = "this server's models call no tools"
TEXT_ONLY = "this server's models read and write text only"
NO_MODERATION = "this server moderates nothing"


def echoed_field(example: Any) -> Ignored:
    """A field of an earlier answer that is sent back as a message."""
    return Ignored("A field of an earlier answer", example)


def cache_hint(example: Any) -> Ignored:
    """OpenAI's hints on prompt caching."""
    return Ignored("A prompt caching hint, which is not needed", example)


class TextPart(RequestModel):
    """A part of a message."""

    type: Literal["text"]
    """Other types are not supported."""

    text: Text = Field(examples=["Who sat on the mat?"])
    """The text."""

    prompt_cache_breakpoint: Annotated[None, cache_hint({"mode": "explicit"})] = None


def kind_of_content(value: Any) -> str:
    """Choose the form of a message's content."""
    return "(parts)" if isinstance(value, list) else "(text)"


Content = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("(parts)")],
    Discriminator(kind_of_content),
]


class Message(RequestModel):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"] = Field(examples=["user"])
    """developer means the same as system."""

    content: Content | None = Field(examples=["Who sat on the mat?"])
    """A text, or a list of text parts, which are joined. null for an answer without text."""

    name: Text | None = Field(None, examples=["Ada"])
    """Name of the speaker, if the model's template uses it."""

    reasoning_content: Text | None = Field(None, examples=["They ask who sat there."])
    """An answer's preceding thoughts, for models whose template uses them."""

    refusal: Annotated[None, Unsupported("messages have no refusals here")] = None
    tool_calls: Annotated[None, Unsupported(NO_TOOLS, [])] = None
    tool_call_id: Annotated[None, Unsupported(NO_TOOLS)] = None
    function_call: Annotated[None, Unsupported(NO_TOOLS)] = None
    audio: Annotated[None, Unsupported(TEXT_ONLY)] = None
    annotations: Annotated[None, echoed_field([])] = None
    parsed: Annotated[None, echoed_field({"name": "Ada"})] = None

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class PromptCacheOptions(RequestModel):
    """OpenAI's prompt cache options."""

    mode: Annotated[None, cache_hint("implicit")] = None
    ttl: Annotated[None, cache_hint("30m")] = None
    prewarm: Annotated[None, Unsupported("prewarming is not supported", False)] = None
    comparison_response_id: Annotated[None, Unsupported("cache diagnostics are not supported")] = (
        None
    )


class ChatRequest(ConversationRequest, GenerationRequest):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"max_completion_tokens": 16}]})

    limit_names: ClassVar[tuple[str, ...]] = (
        "max_completion_tokens",
        *GenerationRequest.limit_names,
    )

    messages: Annotated[list[Message], Field(fail_fast=True)]
    """The conversation; with a session, only the messages since its last turn. An empty list
    continues the last message."""

    max_completion_tokens: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(
        None, examples=[16]
    )
    """Maximum tokens to generate; the newer name of max_tokens."""

    logprobs: bool | None = None
    """Return the log-probability of each token: the model's own, before penalties, temperature and
    filters."""

    top_logprobs: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[2])
    """Number of most probable tokens to return per position; needs `logprobs`."""

    reasoning_effort: Effort | None = Field(None, examples=["none"])
    """How much a thinking model thinks before it answers. none: not at all; minimal, low and
    medium: up to 128, 1,024 and 4,096 tokens; high, xhigh and max: without limit."""

    metadata: Annotated[dict[Text, Text], Field(fail_fast=True)] | None = Field(
        None, examples=[{"topic": "cats"}]
    )
    """Ignored."""

    safety_identifier: Text | None = Field(None, examples=["user-17"])
    """Ignored."""

    prompt_cache_key: Text | None = Field(None, examples=["cats"])
    """Ignored: shared prefixes are found automatically."""

    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    """Ignored."""

    prompt_cache_options: PromptCacheOptions | None = None
    """Ignored."""

    store: Annotated[
        None, Unsupported("chats are stored as sessions: send a session_id", False)
    ] = None
    modalities: Annotated[None, Unsupported(TEXT_ONLY, ["text"])] = None
    audio: Annotated[None, Unsupported(TEXT_ONLY)] = None
    tools: Annotated[None, Unsupported(NO_TOOLS, [])] = None
    tool_choice: Annotated[None, Unsupported(NO_TOOLS, "none", "auto")] = None
    parallel_tool_calls: Annotated[None, Unsupported(NO_TOOLS, False, True)] = None
    functions: Annotated[None, Unsupported(NO_TOOLS, [])] = None
    function_call: Annotated[None, Unsupported(NO_TOOLS, "none", "auto")] = None
    prediction: Annotated[None, Unsupported("this server predicts no outputs")] = None
    verbosity: Annotated[None, Unsupported("verbosity is not supported", "medium")] = None
    moderation: Annotated[None, Unsupported(NO_MODERATION)] = None
    web_search_options: Annotated[None, Unsupported("web search is not supported")] = None

    @property
    def effort(self) -> Effort | None:
        return self.reasoning_effort

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def logprobs_name(self) -> str:
        return "top_logprobs"

    @property
    def prompt_name(self) -> str:
        return "messages"


def _same(text: str) -> str:
    """Called for every token, so that other threads can have the GIL during serialization."""
    return text


class TopLogprob(ResponseModel):
    """A possible token and its log-probability."""

    token: Annotated[str, PlainSerializer(_same)] = Field(examples=[" cat"])
    """Its text, with replacement characters for incomplete ones; the name of a token without
    text."""

    logprob: float = Field(examples=[-0.31])
    """Natural logarithm of its probability."""

    bytes: list[int] = Field(examples=[[32, 99, 97, 116]])
    """Its UTF-8 bytes; empty for tokens without text."""


class TokenLogprob(TopLogprob):
    """A generated token and its log-probability."""

    top_logprobs: list[TopLogprob]
    """The most probable tokens at its position."""


class ChatLogprobs(ResponseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob] | None
    """One entry per token."""

    refusal: None = None
    """Always null."""


class AssistantMessage(ResponseModel):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    """The role."""

    content: str = Field(examples=["The cat."])
    """The text."""

    reasoning_content: str | None = Field(None, examples=["They ask who sat there."])
    """The model's thoughts before the answer; omitted if there are none."""

    refusal: None = None
    """Always null."""

    annotations: list[Any] = Field(default_factory=list, examples=[[]])
    """Always empty."""


class ChatChoice(ResponseModel):
    """One of the answers."""

    index: int
    """Its index."""

    message: AssistantMessage
    """The answer."""

    logprobs: ChatLogprobs | None = None
    """Only if requested."""

    finish_reason: Literal["stop", "length"]
    """stop: ended by the model, a stop string or a stop token; length: ended by the token limit."""

    stop_reason: str | int | None = Field(None, examples=["\n\n"])
    """The stop string or stop token that ended it."""

    token_ids: ResponseTokenIds | None = None
    """The text's tokens, if requested."""


class ChatAnswer(ResponseModel):
    """Fields common to a chat completion and its events."""

    id: str = Field(examples=[EXAMPLE_STREAM])
    """The answer's id, also that of a resumable stream."""

    created: UnixSecond
    """Unix seconds."""

    model: str = Field(examples=["latentd"])
    """The model's name."""

    system_fingerprint: str = Field(examples=["fp_3b1c9a7d52e0"])
    """Identifies weights and tokenizer."""

    service_tier: Literal["default", "flex"] = "default"
    """The requested service tier."""

    usage: Usage | None = None
    """Token usage; in a stream only if requested."""

    session_id: str | None = Field(None, examples=[EXAMPLE_SESSION])
    """The session that the turn belongs to."""

    session_turn: int | None = Field(None, examples=[4])
    """The number of the session's turn, once committed."""

    timings: Timings | None = None
    """If requested, in the last choice's final event."""

    prompt_token_ids: ResponseTokenIds | None = None
    """The prompt's tokens, if requested; in a stream, in the first event."""


class ChatCompletion(ChatAnswer):
    """Response of `POST /v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    """The object type."""

    choices: list[ChatChoice]
    """All choices."""


class MessageDelta(ResponseModel):
    """New content of a message."""

    role: Literal["assistant"] | None = None
    """In a choice's first event only."""

    content: str | None = Field(None, examples=[" cat"])
    """Text to append."""

    reasoning_content: str | None = Field(None, examples=[" who"])
    """Thoughts to append."""


class ChatChunkChoice(ResponseModel):
    """New content of a choice."""

    index: int
    """The choice's index."""

    delta: MessageDelta
    """The new content."""

    logprobs: ChatLogprobs | None = None
    """Tokens whose text begins here, if requested."""

    finish_reason: Literal["stop", "length"] | None = None
    """null until the choice ends."""

    stop_reason: str | int | None = Field(None, examples=["\n\n"])
    """The stop string or stop token that ended it."""

    token_ids: ResponseTokenIds | None = None
    """Tokens whose text begins here, if requested."""


class ChatChunk(ChatAnswer):
    """An event of a chat's stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    """The object type."""

    choices: list[ChatChunkChoice]
    """The updated choice; empty in the usage event."""

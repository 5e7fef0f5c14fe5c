"""`/v1/chat/completions` in OpenAI's shapes."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, PlainSerializer, Tag

from server.api.schemas.base import (
    EXAMPLE_SESSION,
    EXAMPLE_STREAM,
    LARGEST,
    WHOLE,
    AnswerModel,
    AnswerTokenIds,
    Neutral,
    Refused,
    RequestModel,
    Text,
    UnixSecond,
)
from server.api.schemas.generation import (
    Effort,
    GenerationRequest,
    TemplateOptions,
    Timings,
    Usage,
)

NO_TOOLS = "this server's models call no tools"
TEXT_ONLY = "this server's models read and write text only"
NO_MODERATION = "this server moderates nothing"


def as_it_came(example: Any) -> Neutral:
    """Part of an earlier answer, which is sent back whole."""
    return Neutral("As it came with an earlier answer", example)


def cache_hint(example: Any) -> Neutral:
    """Where a beginning that prompts have in common ends, and how long to keep it."""
    return Neutral("A hint on beginnings of prompts, which are found without it", example)


class TextPart(RequestModel):
    """A piece of a message."""

    type: Literal["text"]
    """Other kinds of content are not supported."""

    text: Text = Field(examples=["Who sat on the mat?"])
    """What it says."""

    prompt_cache_breakpoint: Annotated[None, cache_hint({"mode": "explicit"})] = None


def kind_of_content(value: Any) -> str:
    """Which form of a message's content it is."""
    return "(parts)" if isinstance(value, list) else "(text)"


Content = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("(parts)")],
    Discriminator(kind_of_content),
]


class Message(RequestModel):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"] = Field(examples=["user"])
    """developer means the same as system."""

    content: Content | None = Field(examples=["Who sat on the mat?"])
    """A text, or a list of text parts, which are joined. null, of an answer: it has no text."""

    name: Text | None = Field(None, examples=["Ada"])
    """Who speaks, for models whose template has a place for it."""

    reasoning_content: Text | None = Field(None, examples=["They ask who sat there."])
    """Of an answer: what the model thought before, for models whose template has a place for it."""

    refusal: Annotated[None, Refused("messages have no refusals here")] = None
    tool_calls: Annotated[None, Refused(NO_TOOLS, [])] = None
    tool_call_id: Annotated[None, Refused(NO_TOOLS)] = None
    function_call: Annotated[None, Refused(NO_TOOLS)] = None
    audio: Annotated[None, Refused(TEXT_ONLY)] = None
    annotations: Annotated[None, as_it_came([])] = None
    parsed: Annotated[None, as_it_came({"name": "Ada"})] = None

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class PromptCacheOptions(RequestModel):
    """How OpenAI is to keep beginnings of prompts."""

    mode: Annotated[None, cache_hint("implicit")] = None
    ttl: Annotated[None, cache_hint("30m")] = None
    prewarm: Annotated[None, Refused("an answer is generated in any case", False)] = None
    comparison_response_id: Annotated[None, Refused("there are no cache diagnostics")] = None


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"max_completion_tokens": 16}]})

    limit_names: ClassVar[tuple[str, ...]] = (
        "max_completion_tokens",
        *GenerationRequest.limit_names,
    )

    messages: Annotated[list[Message], Field(fail_fast=True)]
    """The conversation; with a session, only what was said since its last turn, and nothing at all
    to let the model go on with its last message."""

    max_completion_tokens: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(
        None, examples=[16]
    )
    """Tokens to generate at most; the newer name of max_tokens."""

    logprobs: bool | None = None
    """Tell the log-probability of each token: the model's, before penalties, temperature and
    filters."""

    top_logprobs: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[2])
    """So many of the most probable tokens beside each; needs `logprobs`."""

    reasoning_effort: Effort | None = Field(None, examples=["none"])
    """How much a model that can think is to think before it answers. none: not at all; minimal, low
    and medium: up to 128, 1,024 and 4,096 tokens; high and xhigh: as much as it likes."""

    chat_template_kwargs: TemplateOptions | None = Field(
        None, examples=[{"enable_thinking": False}]
    )
    """What the chat template is given."""

    thinking_token_budget: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(
        None, examples=[0]
    )
    """Most tokens of thoughts; where there are more, they are closed. 0: none."""

    metadata: Annotated[dict[Text, Text], Field(fail_fast=True)] | None = Field(
        None, examples=[{"topic": "cats"}]
    )
    """Your notes on the request; they change nothing."""

    safety_identifier: Text | None = Field(None, examples=["user-17"])
    """Your name for who asks; it changes nothing."""

    prompt_cache_key: Text | None = Field(None, examples=["cats"])
    """A hint that this server does not need: common beginnings are found without it."""

    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    """A hint that this server does not need."""

    prompt_cache_options: PromptCacheOptions | None = None
    """Hints that this server does not need."""

    store: Annotated[None, Refused("chats are kept in sessions: send a session_id", False)] = None
    modalities: Annotated[None, Refused(TEXT_ONLY, ["text"])] = None
    audio: Annotated[None, Refused(TEXT_ONLY)] = None
    tools: Annotated[None, Refused(NO_TOOLS, [])] = None
    tool_choice: Annotated[None, Refused(NO_TOOLS, "none", "auto")] = None
    parallel_tool_calls: Annotated[None, Refused(NO_TOOLS, False, True)] = None
    functions: Annotated[None, Refused(NO_TOOLS, [])] = None
    function_call: Annotated[None, Refused(NO_TOOLS, "none", "auto")] = None
    prediction: Annotated[None, Refused("this server predicts no outputs")] = None
    verbosity: Annotated[None, Refused("this server's models know no verbosity", "medium")] = None
    moderation: Annotated[None, Refused(NO_MODERATION)] = None
    web_search_options: Annotated[None, Refused("this server searches nothing")] = None

    @property
    def is_chat(self) -> bool:
        return True

    @property
    def enables_thinking(self) -> bool | None:
        options = self.chat_template_kwargs
        return None if options is None else options.enable_thinking

    @property
    def thinking_budget(self) -> int | None:
        return self.thinking_token_budget

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
    """Called for each token, so that other threads can have the GIL while many are written."""
    return text


class TopLogprob(AnswerModel):
    """A token that could have come, and how probable it was."""

    token: Annotated[str, PlainSerializer(_same)] = Field(examples=[" cat"])
    """Its text, with replacement characters where it is not whole characters; the name of a token
    without text."""

    logprob: float = Field(examples=[-0.31])
    """Natural logarithm of its probability."""

    bytes: list[int] = Field(examples=[[32, 99, 97, 116]])
    """Its text in UTF-8; nothing for tokens without text."""


class TokenLogprob(TopLogprob):
    """A token of the answer, and how probable it was."""

    top_logprobs: list[TopLogprob]
    """The most probable tokens in its place."""


class ChatLogprobs(AnswerModel):
    """Probabilities of an answer's tokens."""

    content: list[TokenLogprob] | None
    """An entry a token."""

    refusal: None = None
    """Always null."""


class AssistantMessage(AnswerModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    """Who said it."""

    content: str = Field(examples=["The cat."])
    """The text."""

    reasoning_content: str | None = Field(None, examples=["They ask who sat there."])
    """What a model that can think thought before; not there, if nothing."""

    refusal: None = None
    """Always null."""

    annotations: list[Any] = Field(default_factory=list, examples=[[]])
    """Always empty."""


class ChatChoice(AnswerModel):
    """One answer to the conversation."""

    index: int
    """Its number."""

    message: AssistantMessage
    """The answer."""

    logprobs: ChatLogprobs | None = None
    """If asked for."""

    finish_reason: Literal["stop", "length"]
    """stop: the model, a stop string or a stop token ended it; length: the token limit did."""

    stop_reason: str | int | None = Field(None, examples=["\n\n"])
    """The stop string or stop token that ended it."""

    token_ids: AnswerTokenIds | None = None
    """The text's tokens, if asked for."""


class ChatAnswer(AnswerModel):
    """What a chat's answer and each of its events have in common."""

    id: str = Field(examples=[EXAMPLE_STREAM])
    """The answer's id, which is also that of a resumable stream."""

    created: UnixSecond
    """Unix seconds."""

    model: str = Field(examples=["latentd"])
    """The model's name."""

    system_fingerprint: str = Field(examples=["fp_3b1c9a7d52e0"])
    """Which weights and tokenizer they were."""

    service_tier: Literal["default", "flex"] = "default"
    """The tier that was asked for."""

    usage: Usage | None = None
    """Tokens; in a stream only where asked for."""

    session_id: str | None = Field(None, examples=[EXAMPLE_SESSION])
    """The session of which this is a turn."""

    session_turn: int | None = Field(None, examples=[4])
    """The session's turn that this is, once it is committed."""

    timings: Timings | None = None
    """If asked for, with the end of the last choice."""

    prompt_token_ids: AnswerTokenIds | None = None
    """The prompt's tokens, if asked for; in a stream, in the first event."""


class ChatCompletion(ChatAnswer):
    """The answer of `POST /v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    """The kind of object."""

    choices: list[ChatChoice]
    """All choices."""


class Delta(AnswerModel):
    """What is new of a message."""

    role: Literal["assistant"] | None = None
    """In a choice's first event."""

    content: str | None = Field(None, examples=[" cat"])
    """Text that follows the text so far."""

    reasoning_content: str | None = Field(None, examples=[" who"])
    """Text that follows the thoughts so far."""


class ChatChunkChoice(AnswerModel):
    """What is new of a choice."""

    index: int
    """The choice's number."""

    delta: Delta
    """What is new."""

    logprobs: ChatLogprobs | None = None
    """If asked for, of the tokens whose text begins here."""

    finish_reason: Literal["stop", "length"] | None = None
    """null until the choice ends."""

    stop_reason: str | int | None = Field(None, examples=["\n\n"])
    """The stop string or stop token that ended it."""

    token_ids: AnswerTokenIds | None = None
    """The tokens whose text begins here, if asked for."""


class ChatChunk(ChatAnswer):
    """An event of a chat's stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    """The kind of object."""

    choices: list[ChatChunkChoice]
    """What is new of one choice; none in the event for the usage."""

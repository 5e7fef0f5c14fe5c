"""Models of `/v1/responses`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from server.api.schemas.base import (
    EXAMPLE_MESSAGE,
    EXAMPLE_RESPONSE,
    LARGEST,
    WHOLE,
    Ignored,
    RequestModel,
    ResponseModel,
    Text,
    UnixSecond,
    Unsupported,
)
from server.api.schemas.chat import (
    NO_MODERATION,
    NO_TOOLS,
    TEXT_ONLY,
    PromptCacheOptions,
    TokenLogprob,
    cache_hint,
    echoed_field,
    kind_of_content,
)
from server.api.schemas.generation import (
    NO_PADDING,
    ConversationRequest,
    Effort,
    Timings,
)
from server.api.schemas.sessions import Metadata, Ttl
from server.api.schemas.structure import (
    FORMAT,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedSchema,
    ResponseFormat,
    TextFormat,
)

LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class InputPart(RequestModel):
    """A part of an input message."""

    type: Literal["input_text", "output_text"]
    """Other types are not supported."""

    text: Text = Field(examples=["Who sat on the mat?"])
    """The text."""

    annotations: Annotated[None, echoed_field([])] = None
    logprobs: Annotated[None, echoed_field([])] = None
    parsed: Annotated[None, echoed_field({"name": "Ada"})] = None
    prompt_cache_breakpoint: Annotated[None, cache_hint({"mode": "explicit"})] = None


class InputMessage(RequestModel):
    """An input message; may be an output item of an earlier response."""

    type: Literal["message"] | None = None
    """Other types are not supported."""

    role: Literal["system", "developer", "user", "assistant"] = Field(examples=["user"])
    """developer means the same as system."""

    content: Annotated[
        Annotated[Text, Tag("(text)")]
        | Annotated[list[InputPart], Field(min_length=1, fail_fast=True), Tag("(parts)")],
        Discriminator(kind_of_content),
    ] = Field(examples=["Who sat on the mat?"])
    """A text, or a list of text parts, which are joined."""

    id: Annotated[None, echoed_field(EXAMPLE_MESSAGE)] = None
    status: Annotated[None, echoed_field("completed")] = None
    phase: Annotated[None, echoed_field("final_answer")] = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ReasoningText(RequestModel):
    """A piece of thoughts."""

    type: Literal["reasoning_text"]
    """The kind of part."""

    text: Text = Field(examples=["They ask who sat there."])
    """The thoughts."""


class InputReasoning(RequestModel):
    """The model's thoughts before the message that follows: an output item of an earlier
    response."""

    type: Literal["reasoning"]
    """Thoughts."""

    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = Field(
        None, examples=[[]]
    )
    """The thoughts, for models whose template uses them."""

    id: Annotated[None, echoed_field("rs_7d1f0a52c8e94b63a1f2d3c4b5a69788")] = None
    summary: Annotated[None, echoed_field([])] = None
    encrypted_content: Annotated[None, echoed_field("gAAAAABo")] = None
    status: Annotated[None, echoed_field("completed")] = None


def _kind_of_item(value: Any) -> str:
    is_reasoning = isinstance(value, dict) and value.get("type") == "reasoning"
    return "(reasoning)" if is_reasoning else "(message)"


InputItem = Annotated[
    Annotated[InputMessage, Tag("(message)")] | Annotated[InputReasoning, Tag("(reasoning)")],
    Discriminator(_kind_of_item),
]


def _kind_of_input(value: Any) -> str:
    return "(items)" if isinstance(value, list) else "(text)"


Input = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[InputItem], Field(fail_fast=True), Tag("(items)")],
    Discriminator(_kind_of_input),
]


class JsonSchemaText(NamedSchema):
    """JSON described by a schema."""

    type: Literal["json_schema"]
    """JSON described by a schema."""


TextStructure = Annotated[
    Annotated[TextFormat, Tag("(text)")]
    | Annotated[JsonObjectFormat, Tag("(json_object)")]
    | Annotated[JsonSchemaText, Tag("(json_schema)")],
    FORMAT,
]


class TextOptions(RequestModel):
    """Options of the text."""

    format: TextStructure | None = None
    """Its structure."""

    verbosity: Annotated[None, Unsupported("verbosity is not supported", "medium")] = None


class ResponseStreamOptions(RequestModel):
    """Options of a stream."""

    include_obfuscation: Annotated[None, Unsupported(NO_PADDING, False)] = None


def reasoning_option(example: str) -> Ignored:
    """Which part of the thoughts to show."""
    return Ignored("Thoughts are always shown in full", example)


class Reasoning(RequestModel):
    """Thinking before the answer."""

    effort: Effort | None = Field(None, examples=["none"])
    """As `reasoning_effort` of a chat."""

    mode: Annotated[None, Unsupported("this server's models do not reason", "standard")] = None
    context: Annotated[None, reasoning_option("auto")] = None
    summary: Annotated[None, reasoning_option("auto")] = None
    generate_summary: Annotated[None, reasoning_option("auto")] = None


class ResponseRequest(ConversationRequest):
    """`POST /v1/responses`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": "Who sat on the mat?", "max_output_tokens": 16}]}
    )

    limit_names: ClassVar[tuple[str, ...]] = ("max_output_tokens", "n_predict")

    input: Input | None = Field(None, examples=["Who sat on the mat?"])
    """A user's text, or messages; with `previous_response_id`, only new ones."""

    instructions: Text | None = Field(None, examples=["Answer in one word."])
    """A system message before the input. A response's state includes earlier instructions: they
    cannot be removed, only extended."""

    previous_response_id: Text | None = Field(None, examples=[EXAMPLE_RESPONSE])
    """Continue this response, even if it was continued before."""

    store: bool | None = None
    """Store the response and the state after it; default true."""

    background: bool | None = None
    """Return immediately and run detached from the connection; needs `store`."""

    max_output_tokens: Annotated[int, Field(ge=1, le=LARGEST), WHOLE] | None = Field(
        None, examples=[16]
    )
    """Maximum tokens to generate."""

    metadata: Metadata | None = None
    """Metadata stored with the response."""

    ttl: Ttl | None = None
    """Seconds until a stored response expires."""

    top_logprobs: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[2])
    """Number of most probable tokens to return per position; needs the include below."""

    include: Annotated[list[Includable], Field(max_length=16, fail_fast=True)] | None = None
    """Additional output: log-probabilities. The other values concern reasoning and tools and have
    no effect."""

    text: TextOptions | None = None
    """Options of the text."""

    stream_options: ResponseStreamOptions | None = None
    """Needs `stream`."""

    truncation: Literal["auto", "disabled"] | None = None
    """No effect: the context length is unlimited."""

    safety_identifier: Text | None = Field(None, examples=["user-17"])
    """Ignored."""

    prompt_cache_key: Text | None = Field(None, examples=["cats"])
    """Ignored: shared prefixes are found automatically."""

    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    """Ignored."""

    prompt_cache_options: PromptCacheOptions | None = None
    """Ignored."""

    reasoning: Reasoning | None = None
    """Thinking before the answer."""

    tools: Annotated[None, Unsupported(NO_TOOLS, [])] = None
    tool_choice: Annotated[None, Unsupported(NO_TOOLS, "none", "auto")] = None
    parallel_tool_calls: Annotated[None, Unsupported(NO_TOOLS, False, True)] = None
    max_tool_calls: Annotated[None, Unsupported(NO_TOOLS)] = None
    prompt: Annotated[None, Unsupported("stored prompt templates are not supported")] = None
    conversation: Annotated[
        None, Unsupported("use previous_response_id, or chat with a session_id")
    ] = None
    context_management: Annotated[None, Unsupported("the context length is unlimited", [])] = None
    background_options: Annotated[
        None,
        Unsupported("background options are not supported", {}, {"completion_window": "soonest"}),
    ] = None
    moderation: Annotated[None, Unsupported(NO_MODERATION)] = None
    access_programs: Annotated[None, Unsupported("access programs are not supported", {})] = None
    image: Annotated[None, Unsupported(TEXT_ONLY, {})] = None

    @property
    def effort(self) -> Effort | None:
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def effort_name(self) -> str:
        return "reasoning.effort"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.includes_logprobs else None

    @property
    def includes_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def logprobs_name(self) -> str:
        return "top_logprobs"

    @property
    def format_name(self) -> str:
        return "text.format"

    @property
    def prompt_name(self) -> str:
        return "input"

    @property
    def stores(self) -> bool:
        return self.store is None or self.store

    @property
    def reported_format(self) -> dict[str, Any]:
        """The text's format, as reported in the response."""
        asked = None if self.text is None else self.text.format
        if asked is None:
            return {"type": "text"}
        return asked.model_dump(by_alias=True, exclude_unset=True)

    @property
    def requested_format(self) -> ResponseFormat | None:
        asked = None if self.text is None else self.text.format
        if not isinstance(asked, JsonSchemaText):
            return asked
        named = asked.model_dump(by_alias=True, exclude_unset=True, exclude={"type"})
        return JsonSchemaFormat(type="json_schema", json_schema=NamedSchema.model_validate(named))

    @property
    def messages(self) -> list[tuple[str, str, str | None]]:
        """Roles, texts and thoughts of the new messages, the instructions first."""
        messages = list[tuple[str, str, str | None]]()
        if self.instructions is not None:
            messages.append(("system", self.instructions, None))
        if isinstance(self.input, str):
            return [*messages, ("user", self.input, None)]
        thoughts: str | None = None
        for item in self.input or []:
            if isinstance(item, InputReasoning):
                thoughts = "".join(part.text for part in item.content or [])
            else:
                of_answer = thoughts if item.role == "assistant" else None
                messages.append((item.role, item.text, of_answer))
                thoughts = None
        return messages


class OutputText(ResponseModel):
    """Generated text."""

    type: Literal["output_text"] = "output_text"
    """The part type."""

    text: str = Field(examples=["The cat."])
    """The text."""

    annotations: list[Any] = Field(default_factory=list, examples=[[]])
    """Always empty."""

    logprobs: list[TokenLogprob] = Field(default_factory=list)
    """Its tokens, if requested."""


class OutputThoughts(ResponseModel):
    """Text of the model's thoughts."""

    type: Literal["reasoning_text"] = "reasoning_text"
    """The kind of part."""

    text: str = Field(examples=["They ask who sat there."])
    """The text."""


class OutputReasoning(ResponseModel):
    """The model's thoughts before the answer."""

    id: str = Field(examples=["rs_7d1f0a52c8e94b63a1f2d3c4b5a69788"])
    """Its id."""

    type: Literal["reasoning"] = "reasoning"
    """The kind of item."""

    summary: list[Any] = Field(default_factory=list, examples=[[]])
    """Always empty: thoughts are shown in full."""

    content: list[OutputThoughts]
    """One text."""

    status: Literal["in_progress", "completed", "incomplete"] = Field(examples=["completed"])
    """incomplete: the token limit ended it."""


class OutputMessage(ResponseModel):
    """The generated message."""

    id: str = Field(examples=[EXAMPLE_MESSAGE])
    """Its id."""

    type: Literal["message"] = "message"
    """The item type."""

    status: Literal["in_progress", "completed", "incomplete"] = Field(examples=["completed"])
    """incomplete: the token limit ended it."""

    role: Literal["assistant"] = "assistant"
    """The role."""

    content: list[OutputText]
    """One text part."""


class InputTokensDetails(ResponseModel):
    """Details of the input tokens."""

    cached_tokens: int = Field(examples=[2])
    """Tokens that did not have to be read: those of earlier responses, and a cached prefix."""

    cache_write_tokens: int = 0
    """Always 0."""


class OutputTokensDetails(ResponseModel):
    """Details of the output tokens."""

    reasoning_tokens: int = 0
    """Tokens of thoughts, their marks included."""


class ResponseUsage(ResponseModel):
    """Token usage. Earlier responses count as input."""

    input_tokens: int = Field(examples=[6])
    """Input tokens, including those of earlier responses."""

    input_tokens_details: InputTokensDetails
    """Cached input tokens."""

    output_tokens: int = Field(examples=[3])
    """Generated tokens."""

    output_tokens_details: OutputTokensDetails
    """Breakdown of the generated tokens."""

    total_tokens: int = Field(examples=[9])
    """The sum of both."""


class ResponseError(ResponseModel):
    """Why a response failed."""

    code: str = Field(examples=["internal_error"])
    """The error code."""

    message: str = Field(examples=["internal server error; see the server's log"])
    """The description."""


class IncompleteDetails(ResponseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]
    """Ended by the token limit."""


class ResponseTextConfig(ResponseModel):
    """The requested text format."""

    format: dict[str, Any] = Field(examples=[{"type": "text"}])
    """As requested."""


class ReasoningConfig(ResponseModel):
    """The reasoning options in effect."""

    effort: str | None = Field(examples=["low"])
    """As requested."""

    summary: None = None
    """Always null: thoughts are shown in full."""


class ResponseObject(ResponseModel):
    """A response. Once stored it is immutable and can be continued any number of times."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"error": None, "incomplete_details": None}]}
    )

    id: str = Field(examples=[EXAMPLE_RESPONSE])
    """Its id, for `previous_response_id` and all operations under `/v1/responses`."""

    object: Literal["response"] = "response"
    """The object type."""

    created_at: UnixSecond
    """Unix seconds."""

    completed_at: UnixSecond | None
    """When it ended, in Unix seconds; null before."""

    status: Status = Field(examples=["completed"])
    """The status."""

    background: bool = Field(examples=[False])
    """Whether it runs detached from the connection."""

    error: ResponseError | None
    """Why it failed."""

    incomplete_details: IncompleteDetails | None
    """Why it is incomplete."""

    instructions: str | None = Field(examples=["Answer in one word."])
    """As requested."""

    max_output_tokens: int | None = Field(examples=[16])
    """As requested."""

    model: str = Field(examples=["latentd"])
    """The model's name."""

    output: list[OutputReasoning | OutputMessage]
    """One message, after the thoughts if there are any; empty until the end."""

    parallel_tool_calls: bool = True
    """No effect: tool calls are not supported."""

    previous_response_id: str | None = Field(examples=["resp_Zc81Lw0uYb4NqEsVtKx6RmJaPgDhOi2f"])
    """The response that it continues."""

    service_tier: Literal["default", "flex"] = "default"
    """The requested service tier."""

    store: bool
    """Whether it is stored."""

    temperature: float = Field(examples=[1.0])
    """The temperature."""

    text: ResponseTextConfig
    """The text's format."""

    tool_choice: Literal["auto"] = "auto"
    """No effect: tool calls are not supported."""

    tools: list[Any] = Field(default_factory=list, examples=[[]])
    """No effect: tool calls are not supported."""

    top_logprobs: int
    """Most probable tokens returned per position."""

    top_p: float = Field(examples=[1.0])
    """The top_p."""

    presence_penalty: float = 0.0
    """The presence_penalty."""

    frequency_penalty: float = 0.0
    """The frequency_penalty."""

    reasoning: ReasoningConfig | None = None
    """As requested."""

    max_tool_calls: None = None
    """No effect: tool calls are not supported."""

    safety_identifier: str | None = Field(None, examples=["user-17"])
    """As requested."""

    prompt_cache_key: str | None = Field(None, examples=["cats"])
    """As requested."""

    truncation: Literal["disabled"] = "disabled"
    """Always disabled."""

    usage: ResponseUsage | None
    """Token usage; null before the end."""

    user: str | None = Field(examples=["user-17"])
    """As requested."""

    metadata: dict[str, str] = Field(examples=[{"topic": "cats"}])
    """As requested."""

    timings: Timings | None = None
    """Only if requested."""


class ResponseDeleted(ResponseModel):
    """A deleted response."""

    id: str = Field(examples=[EXAMPLE_RESPONSE])
    """Its id."""

    object: Literal["response"] = "response"
    """The object type."""

    deleted: Literal[True] = True
    """Always true."""


class ResponseEvent(ResponseModel):
    """An event of a response's stream. Its fields depend on its type."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"output_index": 0, "item_id": EXAMPLE_MESSAGE, "content_index": 0, "delta": " cat"}
            ]
        }
    )

    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ] = Field(examples=["response.output_text.delta"])
    """The description."""

    sequence_number: int = Field(examples=[4])
    """Its number in the stream, from 0."""

    response: ResponseObject | None = None
    """The current response."""

    output_index: int | None = None
    """The item's place in the output."""

    item: OutputReasoning | OutputMessage | None = None
    """The item as it is now."""

    item_id: str | None = Field(None, examples=[EXAMPLE_MESSAGE])
    """The item's id."""

    content_index: int | None = None
    """Always 0: an item has one text."""

    part: OutputText | OutputThoughts | None = None
    """The text as it is now."""

    delta: str | None = Field(None, examples=[" cat"])
    """Text to append."""

    text: str | None = Field(None, examples=["The cat."])
    """The complete text."""

    logprobs: list[TokenLogprob] | None = None
    """Tokens whose text begins here, if requested."""

"""`/v1/responses` in OpenAI's shapes."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from server.api.schemas.base import (
    EXAMPLE_MESSAGE,
    EXAMPLE_RESPONSE,
    LARGEST,
    WHOLE,
    AnswerModel,
    Neutral,
    Refused,
    RequestModel,
    Text,
    UnixSecond,
)
from server.api.schemas.chat import (
    NO_MODERATION,
    NO_TOOLS,
    TEXT_ONLY,
    PromptCacheOptions,
    TokenLogprob,
    as_it_came,
    cache_hint,
    kind_of_content,
)
from server.api.schemas.generation import (
    NO_PADDING,
    Effort,
    SamplingRequest,
    TemplateOptions,
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
    """A piece of an input message."""

    type: Literal["input_text", "output_text"]
    """Other kinds of content are not supported."""

    text: Text = Field(examples=["Who sat on the mat?"])
    """What it says."""

    annotations: Annotated[None, as_it_came([])] = None
    logprobs: Annotated[None, as_it_came([])] = None
    parsed: Annotated[None, as_it_came({"name": "Ada"})] = None
    prompt_cache_breakpoint: Annotated[None, cache_hint({"mode": "explicit"})] = None


class InputMessage(RequestModel):
    """A message; an earlier response's output item is one, too."""

    type: Literal["message"] | None = None
    """Other kinds of items are not supported."""

    role: Literal["system", "developer", "user", "assistant"] = Field(examples=["user"])
    """developer means the same as system."""

    content: Annotated[
        Annotated[Text, Tag("(text)")]
        | Annotated[list[InputPart], Field(min_length=1, fail_fast=True), Tag("(parts)")],
        Discriminator(kind_of_content),
    ] = Field(examples=["Who sat on the mat?"])
    """A text, or a list of text parts, which are joined."""

    id: Annotated[None, as_it_came(EXAMPLE_MESSAGE)] = None
    status: Annotated[None, as_it_came("completed")] = None
    phase: Annotated[None, as_it_came("final_answer")] = None

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
    """What was thought."""


class InputReasoning(RequestModel):
    """What the model thought before the message that follows: an earlier response's output item."""

    type: Literal["reasoning"]
    """Thoughts."""

    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = Field(
        None, examples=[[]]
    )
    """The thoughts, for models whose template has a place for them."""

    id: Annotated[None, as_it_came("rs_7d1f0a52c8e94b63a1f2d3c4b5a69788")] = None
    summary: Annotated[None, as_it_came([])] = None
    encrypted_content: Annotated[None, as_it_came("gAAAAABo")] = None
    status: Annotated[None, as_it_came("completed")] = None


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
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    """JSON by a schema."""


TextStructure = Annotated[
    Annotated[TextFormat, Tag("(text)")]
    | Annotated[JsonObjectFormat, Tag("(json_object)")]
    | Annotated[JsonSchemaText, Tag("(json_schema)")],
    FORMAT,
]


class TextOptions(RequestModel):
    """What the text is to be like."""

    format: TextStructure | None = None
    """Its structure."""

    verbosity: Annotated[None, Refused("this server's models know no verbosity", "medium")] = None


class ResponseStreamOptions(RequestModel):
    """How a stream tells."""

    include_obfuscation: Annotated[None, Refused(NO_PADDING, False)] = None


def of_reasoning(example: str) -> Neutral:
    """What is to be shown of reasoning."""
    return Neutral("Thoughts are shown whole", example)


class Reasoning(RequestModel):
    """What a model that can think is to do before it answers."""

    effort: Effort | None = Field(None, examples=["none"])
    """As `reasoning_effort` of a chat."""

    mode: Annotated[None, Refused("this server's models do not reason", "standard")] = None
    context: Annotated[None, of_reasoning("auto")] = None
    summary: Annotated[None, of_reasoning("auto")] = None
    generate_summary: Annotated[None, of_reasoning("auto")] = None


class ResponseRequest(SamplingRequest):
    """`POST /v1/responses`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": "Who sat on the mat?", "max_output_tokens": 16}]}
    )

    limit_names: ClassVar[tuple[str, ...]] = ("max_output_tokens", "n_predict")

    input: Input | None = Field(None, examples=["Who sat on the mat?"])
    """A user's text, or messages. Only what is new, with `previous_response_id`."""

    instructions: Text | None = Field(None, examples=["Answer in one word."])
    """A system message before the input. The state of a response includes the instructions that
    came before it: they cannot be taken back, only added to."""

    previous_response_id: Text | None = Field(None, examples=[EXAMPLE_RESPONSE])
    """Go on from the end of this response, whatever has gone on from there already."""

    store: bool | None = None
    """Keep the response and the state after it; true unless it is said otherwise."""

    background: bool | None = None
    """Answer at once and go on without the connection; needs `store`."""

    max_output_tokens: Annotated[int, Field(ge=1, le=LARGEST), WHOLE] | None = Field(
        None, examples=[16]
    )
    """Tokens to generate at most."""

    metadata: Metadata | None = None
    """Your notes, kept with the response."""

    ttl: Ttl | None = None
    """Seconds after which a stored response is erased."""

    top_logprobs: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[2])
    """So many of the most probable tokens beside each; needs the include below."""

    include: Annotated[list[Includable], Field(max_length=16, fail_fast=True)] | None = None
    """What else to tell: the log-probability of each token. The others are of reasoning and tools,
    which are not there."""

    text: TextOptions | None = None
    """What the text is to be like."""

    stream_options: ResponseStreamOptions | None = None
    """Needs `stream`."""

    truncation: Literal["auto", "disabled"] | None = None
    """Nothing needs to be cut off: a context has no longest length here."""

    safety_identifier: Text | None = Field(None, examples=["user-17"])
    """Your name for who asks; it changes nothing."""

    prompt_cache_key: Text | None = Field(None, examples=["cats"])
    """A hint that this server does not need: common beginnings are found without it."""

    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    """A hint that this server does not need."""

    prompt_cache_options: PromptCacheOptions | None = None
    """Hints that this server does not need."""

    reasoning: Reasoning | None = None
    """What a model that can think is to do before it answers."""

    chat_template_kwargs: TemplateOptions | None = Field(
        None, examples=[{"enable_thinking": False}]
    )
    """What the chat template is given."""

    thinking_token_budget: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(
        None, examples=[0]
    )
    """Most tokens of thoughts; where there are more, they are closed. 0: none."""

    tools: Annotated[None, Refused(NO_TOOLS, [])] = None
    tool_choice: Annotated[None, Refused(NO_TOOLS, "none", "auto")] = None
    parallel_tool_calls: Annotated[None, Refused(NO_TOOLS, False, True)] = None
    max_tool_calls: Annotated[None, Refused(NO_TOOLS)] = None
    prompt: Annotated[None, Refused("this server keeps no prompt templates")] = None
    conversation: Annotated[
        None, Refused("go on with previous_response_id, or chat with a session_id")
    ] = None
    context_management: Annotated[None, Refused("a context has no longest length here", [])] = None
    background_options: Annotated[
        None, Refused("there is one kind of background", {}, {"completion_window": "soonest"})
    ] = None
    moderation: Annotated[None, Refused(NO_MODERATION)] = None
    access_programs: Annotated[None, Refused("this server has no access programs", {})] = None
    image: Annotated[None, Refused(TEXT_ONLY, {})] = None

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
    def told_format(self) -> dict[str, Any]:
        """The structure of the text, as the response tells it."""
        asked = None if self.text is None else self.text.format
        if asked is None:
            return {"type": "text"}
        return asked.model_dump(by_alias=True, exclude_unset=True)

    @property
    def asked_format(self) -> ResponseFormat | None:
        asked = None if self.text is None else self.text.format
        if not isinstance(asked, JsonSchemaText):
            return asked
        named = asked.model_dump(by_alias=True, exclude_unset=True, exclude={"type"})
        return JsonSchemaFormat(type="json_schema", json_schema=NamedSchema.model_validate(named))

    @property
    def messages(self) -> list[tuple[str, str, str | None]]:
        """Roles, texts and thoughts of what is new, the instructions first."""
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


class OutputText(AnswerModel):
    """A text that the model wrote."""

    type: Literal["output_text"] = "output_text"
    """The kind of part."""

    text: str = Field(examples=["The cat."])
    """The text."""

    annotations: list[Any] = Field(default_factory=list, examples=[[]])
    """Always empty."""

    logprobs: list[TokenLogprob] = Field(default_factory=list)
    """Its tokens, if asked for."""


class OutputThoughts(AnswerModel):
    """A text that the model thought."""

    type: Literal["reasoning_text"] = "reasoning_text"
    """The kind of part."""

    text: str = Field(examples=["They ask who sat there."])
    """The text."""


class OutputReasoning(AnswerModel):
    """What the model thought before it answered."""

    id: str = Field(examples=["rs_7d1f0a52c8e94b63a1f2d3c4b5a69788"])
    """Its id."""

    type: Literal["reasoning"] = "reasoning"
    """The kind of item."""

    summary: list[Any] = Field(default_factory=list, examples=[[]])
    """Always empty: thoughts are shown whole."""

    content: list[OutputThoughts]
    """One text."""

    status: Literal["in_progress", "completed", "incomplete"] = Field(examples=["completed"])
    """incomplete: the token limit ended it."""


class OutputMessage(AnswerModel):
    """A message that the model wrote."""

    id: str = Field(examples=[EXAMPLE_MESSAGE])
    """Its id."""

    type: Literal["message"] = "message"
    """The kind of item."""

    status: Literal["in_progress", "completed", "incomplete"] = Field(examples=["completed"])
    """incomplete: the token limit ended it."""

    role: Literal["assistant"] = "assistant"
    """Who said it."""

    content: list[OutputText]
    """One text."""


class InputTokensDetails(AnswerModel):
    """Of the input's tokens."""

    cached_tokens: int = Field(examples=[2])
    """Tokens that did not need to be read: those of earlier responses, or a beginning that the
    server has read before."""

    cache_write_tokens: int = 0
    """Always 0: what is kept for others is not counted."""


class OutputTokensDetails(AnswerModel):
    """Of the output's tokens."""

    reasoning_tokens: int = 0
    """Tokens of thoughts, their marks included."""


class ResponseUsage(AnswerModel):
    """Tokens of a response. Those of earlier responses count as input, too."""

    input_tokens: int = Field(examples=[6])
    """Tokens before the output, those of earlier responses included."""

    input_tokens_details: InputTokensDetails
    """Which of them cost nothing."""

    output_tokens: int = Field(examples=[3])
    """Tokens generated."""

    output_tokens_details: OutputTokensDetails
    """Of those generated."""

    total_tokens: int = Field(examples=[9])
    """All together."""


class ResponseError(AnswerModel):
    """Why a response failed."""

    code: str = Field(examples=["internal_error"])
    """The kind of fault."""

    message: str = Field(examples=["the server failed; its log tells more"])
    """What happened."""


class IncompleteDetails(AnswerModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]
    """The token limit ended it."""


class ToldFormat(AnswerModel):
    """What the text was to be like."""

    format: dict[str, Any] = Field(examples=[{"type": "text"}])
    """As it was asked for."""


class ToldReasoning(AnswerModel):
    """What the model was to do before it answered."""

    effort: str | None = Field(examples=["low"])
    """As it was given."""

    summary: None = None
    """Always null: thoughts are shown whole."""


class ResponseObject(AnswerModel):
    """A response. Once stored it does not change, and any number of others can go on from it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"error": None, "incomplete_details": None}]}
    )

    id: str = Field(examples=[EXAMPLE_RESPONSE])
    """Its id, for `previous_response_id` and all calls under `/v1/responses`."""

    object: Literal["response"] = "response"
    """The kind of object."""

    created_at: UnixSecond
    """Unix seconds."""

    completed_at: UnixSecond | None
    """Unix seconds of its end; null before."""

    status: Status = Field(examples=["completed"])
    """How it stands."""

    background: bool = Field(examples=[False])
    """Whether it goes on without a connection."""

    error: ResponseError | None
    """Why it failed."""

    incomplete_details: IncompleteDetails | None
    """Why it is incomplete."""

    instructions: str | None = Field(examples=["Answer in one word."])
    """As they were given."""

    max_output_tokens: int | None = Field(examples=[16])
    """As it was given."""

    model: str = Field(examples=["latentd"])
    """The model's name."""

    output: list[OutputReasoning | OutputMessage]
    """One message, behind the thoughts if there are any; nothing before the end."""

    parallel_tool_calls: bool = True
    """No model here calls tools."""

    previous_response_id: str | None = Field(examples=["resp_Zc81Lw0uYb4NqEsVtKx6RmJaPgDhOi2f"])
    """The response that it went on from."""

    service_tier: Literal["default", "flex"] = "default"
    """The tier that was asked for."""

    store: bool
    """Whether it is kept."""

    temperature: float = Field(examples=[1.0])
    """The temperature."""

    text: ToldFormat
    """The text's structure."""

    tool_choice: Literal["auto"] = "auto"
    """No model here calls tools."""

    tools: list[Any] = Field(default_factory=list, examples=[[]])
    """No model here calls tools."""

    top_logprobs: int
    """Most probable tokens beside each."""

    top_p: float = Field(examples=[1.0])
    """The top_p."""

    presence_penalty: float = 0.0
    """The presence_penalty."""

    frequency_penalty: float = 0.0
    """The frequency_penalty."""

    reasoning: ToldReasoning | None = None
    """As it was asked for."""

    max_tool_calls: None = None
    """No model here calls tools."""

    safety_identifier: str | None = Field(None, examples=["user-17"])
    """As it was given."""

    prompt_cache_key: str | None = Field(None, examples=["cats"])
    """As it was given."""

    truncation: Literal["disabled"] = "disabled"
    """Nothing is ever cut off."""

    usage: ResponseUsage | None
    """Tokens; null before the end."""

    user: str | None = Field(examples=["user-17"])
    """As it was given."""

    metadata: dict[str, str] = Field(examples=[{"topic": "cats"}])
    """Your notes."""

    timings: Timings | None = None
    """If asked for."""


class ResponseDeleted(AnswerModel):
    """A response that is no more."""

    id: str = Field(examples=[EXAMPLE_RESPONSE])
    """What it was called."""

    object: Literal["response"] = "response"
    """The kind of object."""

    deleted: Literal[True] = True
    """It is gone."""


class ResponseEvent(AnswerModel):
    """An event of a response's stream. Which fields it has depends on its type."""

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
    """What happened."""

    sequence_number: int = Field(examples=[4])
    """Its place in the stream, from 0 on."""

    response: ResponseObject | None = None
    """The response as it is now."""

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
    """Text that follows the text so far."""

    text: str | None = Field(None, examples=["The cat."])
    """The whole text."""

    logprobs: list[TokenLogprob] | None = None
    """The tokens whose text begins here, if asked for."""

"""Parameters common to completions, chats and responses: sampling and delivery."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from server.api.schemas.base import (
    EXAMPLE_SESSION,
    LARGEST,
    WHOLE,
    RequestModel,
    ResponseModel,
    StopStrings,
    Text,
    TokenIds,
    Unsupported,
)
from server.api.schemas.structure import (
    PERSON,
    Choices,
    GrammarText,
    JsonSchema,
    ResponseFormat,
    StructuredOutputs,
)

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
NO_PADDING = "events are not padded"
SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1
Penalty = Annotated[float, Field(ge=-2, le=2)]
Probability = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=10)]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(fail_fast=True, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
]


class StreamOptions(RequestModel):
    """Options of a stream."""

    include_usage: bool | None = None
    """End the stream with an event that contains only the usage."""

    continuous_usage_stats: bool | None = None
    """Include the usage so far in every event."""

    include_obfuscation: Annotated[None, Unsupported(NO_PADDING, False)] = None


class TemplateOptions(RequestModel):
    """Options of the chat template."""

    enable_thinking: bool | None = None
    """Whether the model thinks before it answers."""


class SamplingRequest(RequestModel):
    """Parameters of every request that generates text."""

    limit_names: ClassVar[tuple[str, ...]] = ("max_tokens", "n_predict")
    """Names of the token limit; the first one given applies."""

    model: Text | None = Field(None, examples=["latentd"])
    """The model's name; default: the served one."""

    min_tokens: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[1])
    """Number of tokens before which nothing ends the text: no end token, stop token or stop
    string."""

    temperature: Annotated[float, Field(ge=0, le=10)] | None = Field(None, examples=[0.7])
    """0: greedy. Default 1."""

    top_p: Probability | None = Field(None, examples=[0.95])
    """Sample from the most probable tokens that together have this probability. 0: greedy."""

    top_k: Annotated[int, Field(ge=-1, le=LARGEST), WHOLE] | None = Field(None, examples=[40])
    """Sample from this many most probable tokens. 0 and -1: no limit."""

    min_p: Probability | None = Field(None, examples=[0.05])
    """Sample from tokens with at least this fraction of the largest probability."""

    repetition_penalty: RepetitionPenalty | None = Field(None, examples=[1.1])
    """Divides positive logits of the last 1,024 tokens and multiplies negative ones."""

    repeat_penalty: RepetitionPenalty | None = Field(None, examples=[1.1])
    """llama.cpp's name for `repetition_penalty`."""

    frequency_penalty: Penalty | None = Field(None, examples=[0.2])
    """Subtracted from a token's logit for each recent occurrence in the generated text."""

    presence_penalty: Penalty | None = Field(None, examples=[0.1])
    """Subtracted once from the logit of a recently generated token."""

    penalty_decay: Probability | None = Field(None, examples=[0.996])
    """With `frequency_penalty`: weight of an occurrence, per token since it was generated. Default
    1."""

    logit_bias: LogitBias | None = Field(None, examples=[{"42": -100.0}])
    """Added to logits, by token id (a string in JSON)."""

    seed: Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX), WHOLE] | None = Field(None, examples=[7])
    """The same request with the same seed gives the same text."""

    stop: StopStrings | None = Field(None, examples=[["\n\n"]])
    """Strings that end the text; they are not included."""

    stop_token_ids: Annotated[TokenIds, Field(max_length=256)] | None = Field(None, examples=[[2]])
    """Tokens that end the text, even with `ignore_eos`; they are not included."""

    include_stop_str_in_output: bool | None = None
    """Include the stop string or stop token that ends the text."""

    ignore_eos: bool | None = None
    """Continue after the model's end token."""

    stream: bool | None = None
    """Stream the text as server-sent events."""

    timings: bool | None = None
    """Return timings."""

    timeout: Annotated[float, Field(gt=0)] | None = Field(None, examples=[5.0])
    """Time limit in seconds from the request's arrival. A request that exceeds it is aborted and a
    session's turn rolled back: status 504, or an error event in a stream, with the code
    `deadline_exceeded`."""

    user: Text | None = Field(None, examples=["user-17"])
    """Ignored."""

    priority: Annotated[int, Field(ge=-LARGEST, le=LARGEST), WHOLE] | None = Field(
        None, examples=[10]
    )
    """Among your waiting requests, smaller numbers go first. Default 0. Does not affect other keys'
    requests."""

    service_tier: (
        Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None
    ) = Field(None, examples=["flex"])
    """flex: this request waits for all your others. All other tiers are served as the default one,
    which the answer names."""

    initial_state: Text | None = Field(None, examples=["poet"])
    """Start from this initial state of the server, by name; only for new conversations."""

    structured_outputs: StructuredOutputs | None = None
    """Constrains the text."""

    guided_json: JsonSchema | Text | None = Field(None, examples=[PERSON])
    """An older name of `structured_outputs.json`."""

    guided_regex: GrammarText | None = Field(None, examples=["[0-9]{4}"])
    """An older name of `structured_outputs.regex`."""

    guided_grammar: GrammarText | None = Field(None, examples=['root ::= "yes" | "no"'])
    """An older name of `structured_outputs.grammar`."""

    guided_choice: Choices | None = Field(None, examples=[["yes", "no"]])
    """An older name of `structured_outputs.choice`."""

    n_predict: Annotated[int, Field(ge=-1, le=LARGEST), WHOLE] | None = Field(None, examples=[16])
    """llama.cpp's name for the token limit; -1: the server's default."""

    cache_prompt: bool | None = None
    """Ignored: shared prefixes are found automatically."""

    @property
    def reported_tier(self) -> Literal["default", "flex"]:
        """The service tier of the request."""
        return "flex" if self.service_tier == "flex" else "default"

    @property
    def is_chat(self) -> bool:
        """Whether the prompt uses the chat template."""
        return False

    @property
    def effort(self) -> Effort | None:
        """The requested thinking effort."""
        return None

    @property
    def effort_name(self) -> str:
        """The parameter that `effort` comes from."""
        return "reasoning_effort"

    @property
    def enables_thinking(self) -> bool | None:
        """Whether the model should think at all."""
        return None

    @property
    def thinking_budget(self) -> int | None:
        """Maximum tokens of thoughts."""
        return None

    @property
    def requested_format(self) -> ResponseFormat | None:
        """The constraint in OpenAI's format."""
        return None

    @property
    def format_name(self) -> str:
        """The parameter of `requested_format`."""
        return "response_format"

    @property
    def num_choices_per_prompt(self) -> int:
        """Choices returned per prompt."""
        return 1

    @property
    def num_generated_per_prompt(self) -> int:
        """Choices generated per prompt, including those not returned."""
        return self.num_choices_per_prompt

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def num_logprobs(self) -> int | None:
        """Number of most probable tokens to return per position; None: no log-probabilities."""
        return None

    @property
    def logprobs_name(self) -> str:
        """The parameter of `num_logprobs`."""
        return "logprobs"

    @property
    def token_limit(self) -> int | None:
        """Maximum tokens to generate, if given."""
        limit: int | None = getattr(self, self.limit_name)
        return None if limit == -1 else limit

    @property
    def limit_name(self) -> str:
        """The parameter of `token_limit`."""
        given = (name for name in self.limit_names if getattr(self, name) is not None)
        return next(given, self.limit_names[0])

    @property
    def prompt_name(self) -> str:
        """The parameter of the prompt."""
        return "prompt"

    @property
    def scores_prompt(self) -> bool:
        """Whether to return the prompt's log-probabilities."""
        return False

    @property
    def returns_tokens(self) -> bool:
        """Whether to return token ids."""
        return False

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ConversationRequest(SamplingRequest):
    """Parameters of requests that use the chat template."""

    chat_template_kwargs: TemplateOptions | None = Field(
        None, examples=[{"enable_thinking": False}]
    )
    """Options of the chat template."""

    thinking_token_budget: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(
        None, examples=[0]
    )
    """Maximum tokens of thoughts; longer thoughts are closed. 0: none."""

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


class GenerationRequest(SamplingRequest):
    """Parameters of completions and chats."""

    session_id: Text | None = Field(None, examples=[EXAMPLE_SESSION])
    """Run the session's next turn; send only new input."""

    expected_turn: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[3])
    """The turn that the session must be at, else 409 `turn_mismatch`."""

    max_tokens: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[16])
    """Maximum tokens to generate. 0: only read the prompt."""

    n: Annotated[int, Field(ge=1, le=LARGEST), WHOLE] | None = None
    """Choices per prompt."""

    stream_options: StreamOptions | None = None
    """Needs `stream`."""

    resumable: bool | None = None
    """With `stream`: the turn survives a lost connection. Resume it with `GET /v1/streams/{id}`,
    using the answer's id."""

    response_format: ResponseFormat | None = None
    """Constrains the text to a JSON schema or any JSON object."""

    return_token_ids: bool | None = None
    """Return token ids."""

    @property
    def num_choices_per_prompt(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def returns_tokens(self) -> bool:
        return bool(self.return_token_ids)

    @property
    def requested_format(self) -> ResponseFormat | None:
        return self.response_format

    @property
    def wants_usage_event(self) -> bool:
        """Whether the stream ends with a usage event."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_in_events(self) -> bool:
        options = self.stream_options
        return options is not None and bool(options.continuous_usage_stats)


class PromptTokensDetails(ResponseModel):
    """Details of the prompt's tokens."""

    cached_tokens: int = Field(examples=[2])
    """Prompt tokens that did not have to be read: the session's history, and a cached prefix. In a
    stream, a cached prefix is counted once the choices have ended."""


class CompletionTokensDetails(ResponseModel):
    """Details of the generated tokens."""

    reasoning_tokens: int = Field(examples=[0])
    """Tokens of thoughts, their marks included."""


class Usage(ResponseModel):
    """Token usage. A session's history counts as prompt tokens."""

    prompt_tokens: int = Field(examples=[6])
    """Prompt tokens, including the session's history."""

    completion_tokens: int = Field(examples=[3])
    """Generated tokens, including those of choices not returned."""

    total_tokens: int = Field(examples=[9])
    """The sum of both."""

    prompt_tokens_details: PromptTokensDetails
    """Cached prompt tokens."""

    completion_tokens_details: CompletionTokensDetails | None = None
    """For models that think before they answer."""


class Timings(ResponseModel):
    """Timings in seconds; of several choices, those of the slowest."""

    queue_s: float = Field(examples=[0.0004])
    """Until the request got a row."""

    prefill_s: float = Field(examples=[0.0031])
    """Prefill, from then on."""

    first_token_s: float | None = Field(examples=[0.0042])
    """From submission to the first token; null if none was generated."""

    per_token_s: float | None = Field(examples=[0.0011])
    """Between tokens, on average; null for fewer than two."""

    total_s: float = Field(examples=[0.0064])
    """From submission to the last token."""

    cached_tokens: int = Field(examples=[2])
    """Prompt tokens found in the prefix cache."""

    resumed_tokens: int
    """Tokens of the session's history."""

"""What completions and chats have in common: how to choose tokens, how to deliver them."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from server.api.schemas.base import (
    EXAMPLE_SESSION,
    LARGEST,
    WHOLE,
    AnswerModel,
    Refused,
    RequestModel,
    Stop,
    Text,
    TokenIds,
)
from server.api.schemas.structure import (
    PERSON,
    Choices,
    JsonSchema,
    ResponseFormat,
    Source,
    StructuredOutputs,
)

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
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
    """How a stream tells more than text."""

    include_usage: bool | None = None
    """End the stream with an event that has no choices but the usage."""

    continuous_usage_stats: bool | None = None
    """Put the usage so far into every event."""

    include_obfuscation: Annotated[None, Refused(NO_PADDING, False)] = None


class TemplateOptions(RequestModel):
    """What the chat template is given."""

    enable_thinking: bool | None = None
    """Whether the model thinks before it answers."""


class SamplingRequest(RequestModel):
    """Parameters of every request that generates text."""

    limit_names: ClassVar[tuple[str, ...]] = ("max_tokens", "n_predict")
    """Parameters that bound the tokens to generate; the first one that is given counts."""

    model: Text | None = Field(None, examples=["latentd"])
    """The model's name; without it, the one that is served."""

    min_tokens: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[1])
    """Before so many tokens nothing ends the text: no end token, no stop token, no stop string."""

    temperature: Annotated[float, Field(ge=0, le=10)] | None = Field(None, examples=[0.7])
    """0: always the most probable token. Default 1."""

    top_p: Probability | None = Field(None, examples=[0.95])
    """Choose among the most probable tokens that together have this probability. 0: always the
    most probable token."""

    top_k: Annotated[int, Field(ge=-1, le=LARGEST), WHOLE] | None = Field(None, examples=[40])
    """Choose among so many of the most probable tokens. 0 and -1: no limit."""

    min_p: Probability | None = Field(None, examples=[0.05])
    """Choose among tokens with at least this fraction of the largest probability."""

    repetition_penalty: RepetitionPenalty | None = Field(None, examples=[1.1])
    """Divides the positive logits of the last 1,024 tokens and multiplies negative ones."""

    repeat_penalty: RepetitionPenalty | None = Field(None, examples=[1.1])
    """llama.cpp's name of `repetition_penalty`."""

    frequency_penalty: Penalty | None = Field(None, examples=[0.2])
    """Subtracted from a logit for each time that its token was generated lately."""

    presence_penalty: Penalty | None = Field(None, examples=[0.1])
    """Subtracted once from the logit of a token that was generated lately."""

    penalty_decay: Probability | None = Field(None, examples=[0.996])
    """With `frequency_penalty`: what a time counts is multiplied by this for each token since.
    Default 1."""

    logit_bias: LogitBias | None = Field(None, examples=[{"42": -100.0}])
    """Added to logits, by token id, which JSON writes as a string."""

    seed: Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX), WHOLE] | None = Field(None, examples=[7])
    """The same seed gives the same text for the same request."""

    stop: Stop | None = Field(None, examples=[["\n\n"]])
    """Strings that end the text; they are not part of it."""

    stop_token_ids: Annotated[TokenIds, Field(max_length=256)] | None = Field(None, examples=[[2]])
    """Tokens that end the text, also with `ignore_eos`; they are not part of it."""

    include_stop_str_in_output: bool | None = None
    """What ends the text, a stop string or a stop token, is part of it."""

    ignore_eos: bool | None = None
    """Go on behind the model's end token."""

    stream: bool | None = None
    """Send server-sent events as the text comes to be."""

    timings: bool | None = None
    """Tell how long the parts of the work took."""

    timeout: Annotated[float, Field(gt=0)] | None = Field(None, examples=[5.0])
    """Seconds from the request's arrival in which it must end. One that does not is dropped where
    it is, a session's turn rolled back: status 504, or an error event in a stream, with the code
    `deadline_exceeded`."""

    user: Text | None = Field(None, examples=["user-17"])
    """Your name for who asks; it changes nothing."""

    priority: Annotated[int, Field(ge=-LARGEST, le=LARGEST), WHOLE] | None = Field(
        None, examples=[10]
    )
    """Of your requests that wait, those with smaller numbers are first. Default 0. Other keys'
    requests are not concerned."""

    service_tier: Literal["auto", "default", "flex"] | None = Field(None, examples=["flex"])
    """flex: this request waits for all of your others."""

    initial_state: Text | None = Field(None, examples=["poet"])
    """Begin with this tuned state of the server's, by its name: only where nothing came before."""

    structured_outputs: StructuredOutputs | None = None
    """What the text has to keep to."""

    guided_json: JsonSchema | Text | None = Field(None, examples=[PERSON])
    """An older name of `structured_outputs.json`."""

    guided_regex: Source | None = Field(None, examples=["[0-9]{4}"])
    """An older name of `structured_outputs.regex`."""

    guided_grammar: Source | None = Field(None, examples=['root ::= "yes" | "no"'])
    """An older name of `structured_outputs.grammar`."""

    guided_choice: Choices | None = Field(None, examples=[["yes", "no"]])
    """An older name of `structured_outputs.choice`."""

    n_predict: Annotated[int, Field(ge=-1, le=LARGEST), WHOLE] | None = Field(None, examples=[16])
    """llama.cpp's name of the token limit; -1: the server's default."""

    cache_prompt: bool | None = None
    """A hint that this server does not need: common beginnings are found without it."""

    @property
    def told_tier(self) -> Literal["default", "flex"]:
        """The tier that it was served in."""
        return "flex" if self.service_tier == "flex" else "default"

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is written by the chat template."""
        return False

    @property
    def effort(self) -> Effort | None:
        """How much the model is to think."""
        return None

    @property
    def effort_name(self) -> str:
        """The parameter that `effort` comes from."""
        return "reasoning_effort"

    @property
    def enables_thinking(self) -> bool | None:
        """Whether the model is to think at all."""
        return None

    @property
    def thinking_budget(self) -> int | None:
        """Most tokens of thoughts."""
        return None

    @property
    def asked_format(self) -> ResponseFormat | None:
        """What the text has to keep to, said in OpenAI's way."""
        return None

    @property
    def format_name(self) -> str:
        """The parameter that `asked_format` comes from."""
        return "response_format"

    @property
    def num_choices_per_prompt(self) -> int:
        """Choices that an answer has for each prompt."""
        return 1

    @property
    def num_generated_per_prompt(self) -> int:
        """Choices that are generated for each prompt, those that no answer has included."""
        return self.num_choices_per_prompt

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def num_logprobs(self) -> int | None:
        """The most probable tokens to tell beside each token; None: no probabilities at all."""
        return None

    @property
    def logprobs_name(self) -> str:
        """The parameter that `num_logprobs` comes from."""
        return "logprobs"

    @property
    def token_limit(self) -> int | None:
        """Tokens to generate at most, if the request says it."""
        limit: int | None = getattr(self, self.limit_name)
        return None if limit == -1 else limit

    @property
    def limit_name(self) -> str:
        """The parameter that `token_limit` comes from."""
        given = (name for name in self.limit_names if getattr(self, name) is not None)
        return next(given, self.limit_names[0])

    @property
    def prompt_name(self) -> str:
        """The parameter that the prompt comes from."""
        return "prompt"

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens are to be told with their probabilities."""
        return False

    @property
    def returns_tokens(self) -> bool:
        """Whether token ids are to be told without probabilities."""
        return False

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class GenerationRequest(SamplingRequest):
    """Parameters of completions and chats."""

    session_id: Text | None = Field(None, examples=[EXAMPLE_SESSION])
    """Take the session's next turn: send only what is new."""

    expected_turn: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[3])
    """The turn that the session must be at; otherwise the answer is 409 `turn_mismatch`."""

    max_tokens: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[16])
    """Tokens to generate at most. 0 only reads the prompt."""

    n: Annotated[int, Field(ge=1, le=LARGEST), WHOLE] | None = None
    """Choices to generate for each prompt."""

    stream_options: StreamOptions | None = None
    """Needs `stream`."""

    resumable: bool | None = None
    """With `stream`: a client that loses its connection does not end the turn.
    `GET /v1/streams/{id}` goes on, where the id is that of the answer."""

    response_format: ResponseFormat | None = None
    """What the text has to keep to: JSON of some schema, any JSON object, or nothing."""

    return_token_ids: bool | None = None
    """Put token ids beside the text."""

    @property
    def num_choices_per_prompt(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def returns_tokens(self) -> bool:
        return bool(self.return_token_ids)

    @property
    def asked_format(self) -> ResponseFormat | None:
        return self.response_format

    @property
    def wants_usage_event(self) -> bool:
        """Whether the stream ends with an event for the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_in_events(self) -> bool:
        options = self.stream_options
        return options is not None and bool(options.continuous_usage_stats)


class PromptTokensDetails(AnswerModel):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(examples=[2])
    """Prompt tokens that did not need to be read: those that the session held already, or the
    beginning of a prompt that the server has read before. In a stream a prompt's beginning counts
    from the end of its choices."""


class CompletionTokensDetails(AnswerModel):
    """Of the tokens generated."""

    reasoning_tokens: int = Field(examples=[0])
    """Tokens of thoughts, their marks included."""


class Usage(AnswerModel):
    """Tokens of a request. Those that a session held already count as prompt tokens, too."""

    prompt_tokens: int = Field(examples=[6])
    """Tokens before the answer, those of the session's past included."""

    completion_tokens: int = Field(examples=[3])
    """Tokens generated, those of choices that are not in the answer included."""

    total_tokens: int = Field(examples=[9])
    """Both together."""

    prompt_tokens_details: PromptTokensDetails
    """Which of the prompt's tokens cost nothing."""

    completion_tokens_details: CompletionTokensDetails | None = None
    """Of a model that thinks before it answers."""


class Timings(AnswerModel):
    """Where the time went, in seconds; of several choices, that of the slowest."""

    queue_s: float = Field(examples=[0.0004])
    """Until the request had a row of the engine."""

    prefill_s: float = Field(examples=[0.0031])
    """Reading the prompt, from then on."""

    first_token_s: float | None = Field(examples=[0.0042])
    """From the request's submission to its first token; null if none was generated."""

    per_token_s: float | None = Field(examples=[0.0011])
    """Between two tokens, on average; null with fewer than two."""

    total_s: float = Field(examples=[0.0064])
    """From the submission to the last token."""

    cached_tokens: int = Field(examples=[2])
    """Prompt tokens that were not read, since the server had read them before."""

    resumed_tokens: int
    """Tokens of the session's past, which did not need to be read."""

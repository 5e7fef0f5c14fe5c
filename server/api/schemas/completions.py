"""`/v1/completions` in OpenAI's shapes."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.schemas.base import Prompt, RequestModel, Stop, Text

SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1
Penalty = Annotated[float, Field(ge=-2, le=2)]


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

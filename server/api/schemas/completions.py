"""Models of `/v1/completions`."""

from functools import cached_property
from typing import Annotated, Literal, cast

from pydantic import ConfigDict, Field

from server.api.schemas.base import (
    EXAMPLE_SESSION,
    LARGEST,
    WHOLE,
    Prompt,
    ResponseModel,
    ResponseTokenIds,
    UnixSecond,
    Unsupported,
)
from server.api.schemas.generation import GenerationRequest, Timings, Usage


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"max_tokens": 16}]})

    prompt: Prompt | None = Field(examples=["The cat sat on"])
    """Text, token ids, or a list of either. null: continue a session without a prompt."""

    echo: bool | None = None
    """Include the prompt in the text; with `logprobs`, also its log-probabilities."""

    logprobs: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[2])
    """Return the log-probability of each token and of that many alternatives: the model's own,
    before penalties, temperature and filters."""

    best_of: Annotated[int, Field(ge=1, le=LARGEST), WHOLE] | None = Field(None, examples=[2])
    """Generate this many choices and return the `n` with the highest mean log-probability."""

    suffix: Annotated[None, Unsupported("insertion before a suffix is not supported", "")] = None

    @property
    def num_generated_per_prompt(self) -> int:
        return max(self.num_choices_per_prompt, self.best_of or 0)

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def num_logprobs(self) -> int | None:
        if self.logprobs is None and self.num_generated_per_prompt > self.num_choices_per_prompt:
            return 0
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    @cached_property
    def prompts(self) -> list[str | list[int]]:
        """All prompts, each a text or token ids."""
        prompt = self.prompt
        if prompt is None or isinstance(prompt, str):
            return [prompt or ""]
        if prompt and isinstance(prompt[0], str | list):
            return cast(list[str | list[int]], prompt)
        return [cast(list[int], prompt)]


class CompletionLogprobs(ResponseModel):
    """Four lists with one entry per token."""

    tokens: list[str] = Field(examples=[[" the"]])
    """The token's text; `bytes:\\x..` if it is not complete characters."""

    token_logprobs: list[float | None] = Field(examples=[[-0.27]])
    """null for a prompt's first token, which has no context."""

    top_logprobs: list[dict[str, float] | None] | None = Field(
        examples=[[{" the": -0.27, " a": -2.05}]]
    )
    """The most probable tokens and the token itself; null if not requested."""

    text_offset: list[int] = Field(examples=[[14]])
    """Character offset of the token in the choice's text."""


class CompletionChoice(ResponseModel):
    """A completion of a prompt, or a piece of it."""

    index: int
    """Its index among all choices, ordered by prompt."""

    text: str = Field(examples=[" the mat."])
    """The text."""

    logprobs: CompletionLogprobs | None = None
    """Only if requested."""

    finish_reason: Literal["stop", "length"] | None = None
    """stop: ended by the model, a stop string or a stop token; length: ended by max_tokens; null:
    not finished."""

    stop_reason: str | int | None = Field(None, examples=["\n\n"])
    """The stop string or stop token that ended it."""

    token_ids: ResponseTokenIds | None = None
    """The text's tokens, if requested."""

    prompt_token_ids: ResponseTokenIds | None = None
    """The prompt's tokens, if requested."""


class Completion(ResponseModel):
    """Response of `POST /v1/completions`, and each event of a stream."""

    id: str = Field(examples=["cmpl-0a6d3e91f7c24b58a3e6d90b17f4c2d8"])
    """The answer's id, also that of a resumable stream."""

    object: Literal["text_completion"] = "text_completion"
    """The object type."""

    created: UnixSecond
    """Unix seconds."""

    model: str = Field(examples=["latentd"])
    """The model's name."""

    system_fingerprint: str = Field(examples=["fp_3b1c9a7d52e0"])
    """Identifies weights and tokenizer."""

    choices: list[CompletionChoice]
    """All choices; in a stream, the updated one."""

    usage: Usage | None = None
    """Token usage; in a stream only if requested."""

    session_id: str | None = Field(None, examples=[EXAMPLE_SESSION])
    """The session that the turn belongs to."""

    session_turn: int | None = Field(None, examples=[4])
    """The number of the session's turn, once committed."""

    timings: Timings | None = None
    """If requested, in the last choice's final event."""

"""`/v1/completions` in OpenAI's shapes."""

from functools import cached_property
from typing import Annotated, Literal, cast

from pydantic import ConfigDict, Field

from server.api.schemas.base import (
    EXAMPLE_SESSION,
    LARGEST,
    WHOLE,
    AnswerModel,
    AnswerTokenIds,
    Prompt,
    Refused,
    UnixSecond,
)
from server.api.schemas.generation import GenerationRequest, Timings, Usage


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"max_tokens": 16}]})

    prompt: Prompt | None = Field(examples=["The cat sat on"])
    """Text, token ids, or a list of either. null: nothing, to go on with a session."""

    echo: bool | None = None
    """Begin the text with the prompt; with `logprobs`, tell the prompt's probabilities, too."""

    logprobs: Annotated[int, Field(ge=0, le=LARGEST), WHOLE] | None = Field(None, examples=[2])
    """Tell the log-probability of each token and of so many of the most probable ones. They are
    the model's, before penalties, temperature and filters."""

    best_of: Annotated[int, Field(ge=1, le=LARGEST), WHOLE] | None = Field(None, examples=[2])
    """Generate so many choices and answer with the `n` of the highest log-probability a token."""

    suffix: Annotated[None, Refused("this model cannot write what comes before a text", "")] = None

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
        """Every prompt of the request, each a text or token ids."""
        prompt = self.prompt
        if prompt is None or isinstance(prompt, str):
            return [prompt or ""]
        if prompt and isinstance(prompt[0], str | list):
            return cast(list[str | list[int]], prompt)
        return [cast(list[int], prompt)]


class CompletionLogprobs(AnswerModel):
    """Four lists of one length: an entry a token."""

    tokens: list[str] = Field(examples=[[" the"]])
    """A token's text; `bytes:\\x..` where it is not whole characters."""

    token_logprobs: list[float | None] = Field(examples=[[-0.27]])
    """null for a prompt's first token, before which there is nothing."""

    top_logprobs: list[dict[str, float] | None] | None = Field(
        examples=[[{" the": -0.27, " a": -2.05}]]
    )
    """The most probable tokens, and the token itself; null if none were asked for."""

    text_offset: list[int] = Field(examples=[[14]])
    """Where in the choice's text the token begins, in characters."""


class CompletionChoice(AnswerModel):
    """One text that continues a prompt, or a piece of it."""

    index: int
    """Its number among all choices: those of the first prompt first."""

    text: str = Field(examples=[" the mat."])
    """The text."""

    logprobs: CompletionLogprobs | None = None
    """If asked for."""

    finish_reason: Literal["stop", "length"] | None = None
    """stop: the model, a stop string or a stop token ended it; length: max_tokens did; null: more
    is to come."""

    stop_reason: str | int | None = Field(None, examples=["\n\n"])
    """The stop string or stop token that ended it."""

    token_ids: AnswerTokenIds | None = None
    """The text's tokens, if asked for."""

    prompt_token_ids: AnswerTokenIds | None = None
    """The prompt's tokens, if asked for."""


class Completion(AnswerModel):
    """The answer of `POST /v1/completions`, and each event of a stream."""

    id: str = Field(examples=["cmpl-0a6d3e91f7c24b58a3e6d90b17f4c2d8"])
    """The answer's id, which is also that of a resumable stream."""

    object: Literal["text_completion"] = "text_completion"
    """The kind of object."""

    created: UnixSecond
    """Unix seconds."""

    model: str = Field(examples=["latentd"])
    """The model's name."""

    system_fingerprint: str = Field(examples=["fp_3b1c9a7d52e0"])
    """Which weights and tokenizer they were."""

    choices: list[CompletionChoice]
    """All choices; in a stream, what is new of one."""

    usage: Usage | None = None
    """Tokens; in a stream only where asked for."""

    session_id: str | None = Field(None, examples=[EXAMPLE_SESSION])
    """The session of which this is a turn."""

    session_turn: int | None = Field(None, examples=[4])
    """The session's turn that this is, once it is committed."""

    timings: Timings | None = None
    """If asked for, with the end of the last choice."""

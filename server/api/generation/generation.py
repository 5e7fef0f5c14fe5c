"""Generation parameters, derived from the request's body and the settings alone."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.decoding.sampling import SamplingParams, derive_seed
from server.api.auth import ANONYMOUS_CALLER, Caller
from server.api.schemas.completions import CompletionRequest
from server.api.schemas.generation import SamplingRequest
from server.api.service import Service
from server.api.structure import read_grammar
from server.api.thinking import read_thinking
from server.engine.messages import Continuation, EngineRequest, StoredState, num_to_read
from server.errors import InvalidRequest, NotFound
from server.settings import Settings


@dataclass(frozen=True)
class Generation:
    """How to generate text, independent of what it continues."""

    template: EngineRequest
    """The engine request without its prompt and state."""

    initial: StoredState | None
    """Initial state of a conversation, other than the default."""

    num_per_prompt: int
    """Choices to generate per prompt."""

    timeout_s: float | None
    is_detached: bool
    """Whether the turn outlives its connection."""

    is_chat: bool
    """Whether the prompt is a conversation that may be sent again with its answer and more."""

    thinks: bool | None
    """Whether a chat's answer begins with thoughts; None: the template's default."""

    prompt_name: str
    """The parameter with the prompt, for error messages."""

    logprobs_name: str

    def requests(
        self,
        prompts: Sequence[tuple[int, ...]],
        start: Continuation,
        source: StoredState | None,
        *,
        owner: str,
        retain_as: str | None,
        deadline: float | None,
        client_id: str = "",
    ) -> list[EngineRequest]:
        """One engine request per choice, prompt by prompt."""
        template = self.template
        caches_answer = (
            self.is_chat
            and retain_as is None
            and (source is None or source.is_initial)
            and self.num_per_prompt == 1
        )
        seed = template.sampling.seed
        return [
            replace(
                template,
                request_id=secrets.token_hex(12),
                token_ids=ids,
                sampling=replace(template.sampling, seed=derive_seed(seed, index)),
                source=source,
                # An incomplete character only matters if the text continues without a prompt.
                continuation=replace(start, undecoded=b"") if ids else start,
                owner=owner,
                caches_answer=caches_answer,
                retain_as=retain_as,
                deadline=deadline,
                client_id=client_id,
            )
            for ids in prompts
            for index in range(self.num_per_prompt)
        ]

    def check_prompts(
        self, settings: Settings, prompts: Sequence[tuple[int, ...]], start: Continuation
    ) -> None:
        """Raises InvalidRequest for prompts that are empty or too long, individually or in
        total."""
        for ids in prompts:
            self._check_prompt(settings, ids, start)
        num_tokens = self.num_per_prompt * sum(num_to_read(ids, start) for ids in prompts)
        if num_tokens > settings.max_waiting_tokens:
            raise InvalidRequest(
                f"n times the prompt tokens is {num_tokens}, the maximum is "
                f"{settings.max_waiting_tokens}",
                self.prompt_name,
                "context_length_exceeded",
            )
        if self.template.num_logprobs is None:
            return
        num_choices = self.num_per_prompt * len(prompts)
        num_scored = num_choices * self.template.max_tokens
        num_scored += num_tokens if self.template.score_prompt else 0
        num_logprobs = num_scored * (1 + self.template.num_logprobs)
        if num_logprobs > settings.max_response_logprobs:
            raise InvalidRequest(
                f"the answer could have {num_logprobs} log-probabilities, the maximum is "
                f"{settings.max_response_logprobs}: request fewer tokens or fewer alternatives",
                self.logprobs_name,
            )

    def _check_prompt(self, settings: Settings, ids: tuple[int, ...], start: Continuation) -> None:
        limit = settings.max_prompt_tokens
        if (num_tokens := num_to_read(ids, start)) > limit:
            raise too_long(num_tokens, limit, self.prompt_name)
        if not ids and not start.position and self.template.max_tokens > 0:
            raise InvalidRequest(
                "the prompt is empty and there is nothing to continue: it needs at least one token",
                self.prompt_name,
            )


async def read_generation(
    service: Service,
    body: SamplingRequest,
    *,
    caller: Caller = ANONYMOUS_CALLER,
    is_detached: bool = False,
) -> Generation:
    """Validate the parameters and compile the grammar.

    Raises NotFound for a model that is not served here, InvalidRequest, Overloaded when too many
    grammars are being compiled, and RateLimited.
    """
    check_model(service, body.model)
    _check_aliases(body)
    settings = service.settings
    max_tokens = _max_tokens(settings, body)
    _check_limits(settings, body, max_tokens)
    check_ids(service, body.stop_token_ids or (), "stop_token_ids")
    grammar = await read_grammar(service, caller, body)
    thinks, budget = read_thinking(service, body, has_grammar=grammar is not None)
    chat = service.conversation if body.is_chat else None
    template = EngineRequest(
        request_id="",
        source=None,
        continuation=Continuation(),
        token_ids=(),
        max_tokens=max_tokens,
        sampling=_sampling(service, body),
        stop=body.stops,
        end_texts=() if chat is None or body.ignore_eos else chat.rules.stops,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        num_logprobs=body.num_logprobs,
        return_tokens=body.returns_tokens,
        score_prompt=body.scores_prompt,
        grammar=grammar,
        thinking_budget=budget,
        opening_bytes=0 if chat is None else chat.num_opening_bytes(thinks),
        priority=body.priority or 0,
        is_flexible=body.service_tier == "flex",
    )
    return Generation(
        template=template,
        initial=find_initial(service, body.initial_state),
        num_per_prompt=body.num_generated_per_prompt,
        timeout_s=settings.request_timeout_s if body.timeout is None else body.timeout,
        is_detached=is_detached,
        is_chat=body.is_chat,
        thinks=thinks,
        prompt_name=body.prompt_name,
        logprobs_name=body.logprobs_name,
    )


def find_initial(service: Service, name: str | None) -> StoredState | None:
    """A named initial state. Raises InvalidRequest."""
    if name is None:
        return None
    found = service.initial_states.get(name)
    if found is None:
        known = ", ".join(service.initial_states) or "none"
        raise InvalidRequest(
            f"there is no initial state {name[:80]!r}; this server has: {known}", "initial_state"
        )
    return found


def _check_aliases(body: SamplingRequest) -> None:
    """Raises InvalidRequest if a parameter and its alias differ."""
    for name, alias in (("repetition_penalty", "repeat_penalty"), (body.limit_name, "n_predict")):
        values = {getattr(body, name), getattr(body, alias)} - {None}
        if len(values) > 1:
            raise InvalidRequest(f"{name} and its alias {alias} have different values", alias)


def check_model(service: Service, name: str | None) -> None:
    """Raises NotFound for a model other than the served one."""
    if name is not None and name != service.model_name:
        raise NotFound(
            f"unknown model {name[:80]!r}; this server serves {service.model_name!r}",
            "model",
            "model_not_found",
        )


def check_ids(service: Service, token_ids: Sequence[int], param: str) -> None:
    """Raises InvalidRequest for a token id outside the vocabulary."""
    vocab_sz = service.checkpoint.network.vocab_size
    largest = max(token_ids, default=0)
    if largest >= vocab_sz:
        raise InvalidRequest(
            f"token id {largest} is not below the vocabulary size {vocab_sz}", param
        )


def too_long(num_tokens: int, most: int, param: str) -> InvalidRequest:
    """The error for a prompt that is too long for one request."""
    return InvalidRequest(
        f"the prompt has {num_tokens} tokens, the maximum per request is {most}; a session can "
        "read any number in several requests",
        param,
        "context_length_exceeded",
    )


def _max_tokens(settings: Settings, body: SamplingRequest) -> int:
    if body.token_limit is not None:
        return body.token_limit
    is_completion = isinstance(body, CompletionRequest)
    usual = settings.default_max_tokens if is_completion else settings.default_chat_max_tokens
    return min(usual, settings.max_tokens_limit)


def _check_limits(settings: Settings, body: SamplingRequest, max_tokens: int) -> None:
    """Raises InvalidRequest for parameters above the configured limits."""
    num_made, n = body.num_generated_per_prompt, body.num_choices_per_prompt
    num_waiting = num_made * body.num_prompts
    num_biased, num_stops = len(body.logit_bias or {}), len(body.stops)
    made_name = "n" if num_made == n else "best_of"
    checks: list[tuple[str, float, float | None, str]] = [
        (body.limit_name, max_tokens, settings.max_tokens_limit, f"{body.limit_name} is"),
        (made_name, num_made, settings.max_n, f"{made_name} is"),
        ("stop", num_stops, settings.max_stop, "the number of stop strings is"),
        ("logit_bias", num_biased, settings.max_logit_bias, "the number of biased tokens is"),
        (
            body.prompt_name,
            num_waiting,
            settings.max_waiting,
            "n times the number of prompts is",
        ),
        ("timeout", body.timeout or 0, settings.request_timeout_s, "timeout is"),
        (
            body.logprobs_name,
            body.num_logprobs or 0,
            settings.max_logprobs,
            "the number of most probable tokens is",
        ),
    ]
    for param, asked, most, what in checks:
        if most is not None and asked > most:
            raise InvalidRequest(f"{what} {asked:.15g}, the maximum is {most:.15g}", param)
    if body.min_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {body.min_tokens}, which is more than {body.limit_name}, {max_tokens}",
            "min_tokens",
        )


def _sampling(service: Service, body: SamplingRequest) -> SamplingParams:
    given = {
        name: value
        for name in (
            *("temperature", "top_p", "min_p"),
            *("repetition_penalty", "frequency_penalty", "presence_penalty"),
            "penalty_decay",
        )
        if (value := getattr(body, name)) is not None
    }
    if body.repeat_penalty is not None:
        given["repetition_penalty"] = body.repeat_penalty
    if body.top_p == 0:
        given["temperature"] = 0
    return SamplingParams(
        **given,
        top_k=max(0, body.top_k or 0),
        logit_bias=_logit_bias(service, body.logit_bias or {}),
        seed=secrets.randbits(64) if body.seed is None else body.seed,
    )


def _logit_bias(service: Service, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    vocab_sz = service.checkpoint.network.vocab_size
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_sz):
            raise InvalidRequest(
                f"{key[:40]!r} is not a token id from 0 to {vocab_sz - 1}", "logit_bias"
            )
    return tuple((int(key), float(bias)) for key, bias in biases.items())

"""From a request's body to what the engine is asked to do; everything wrong is named here."""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import replace

from model.sampling import SamplingParams, derive_seed
from server.api.conversation import Said, UnfitMessages
from server.api.schemas.chat import Message
from server.api.schemas.completions import CompletionRequest
from server.api.schemas.generation import SamplingRequest
from server.api.service import Service
from server.api.structure import read_grammar
from server.api.turns import ChoiceSpec
from server.engine.messages import Continuation
from server.errors import InvalidRequest, NotFound

SHORT_TEXT = 2048
"""Characters that are tokenised faster than a thread is asked to do it."""


def check_model(service: Service, name: str | None) -> None:
    """Raises NotFound for a model that is not served here."""
    if name is not None and name != service.model_name:
        raise NotFound(
            f"there is no model {name[:80]!r}; this server has {service.model_name!r}",
            "model",
            "model_not_found",
        )


def check_limits(service: Service, body: SamplingRequest) -> None:
    """Raises InvalidRequest for what exceeds this server's settings or goes ill together."""
    settings = service.settings
    most = max_tokens(service, body)
    if most > settings.max_tokens_limit:
        raise InvalidRequest(
            f"{body.limit_name} is {most}, the most is {settings.max_tokens_limit}",
            body.limit_name,
        )
    if body.min_tokens is not None and body.min_tokens > most:
        raise InvalidRequest(
            f"min_tokens is {body.min_tokens}, which is more than {body.limit_name}, {most}",
            "min_tokens",
        )
    num_made, n = body.num_generated_per_prompt, body.num_choices_per_prompt
    if num_made > settings.max_n:
        wrong = "n" if num_made == n else "best_of"
        raise InvalidRequest(f"{wrong} is {num_made}, the most is {settings.max_n}", wrong)
    if len(body.stops) > settings.max_stop:
        raise InvalidRequest(
            f"{len(body.stops)} stop strings, the most is {settings.max_stop}", "stop"
        )
    if len(body.logit_bias or {}) > settings.max_logit_bias:
        raise InvalidRequest(
            f"{len(body.logit_bias or {})} tokens have a bias, the most is "
            f"{settings.max_logit_bias}",
            "logit_bias",
        )
    if num_made * body.num_prompts > settings.max_waiting:
        raise InvalidRequest(
            f"n times the number of prompts is {num_made * body.num_prompts}, the most is "
            f"{settings.max_waiting}",
            body.prompt_name,
        )
    most_s = settings.request_timeout_s
    if body.timeout is not None and most_s is not None and body.timeout > most_s:
        raise InvalidRequest(f"timeout is {body.timeout:g}, the most is {most_s:g}", "timeout")
    if (body.num_logprobs or 0) > settings.max_logprobs:
        raise InvalidRequest(
            f"{body.num_logprobs} most probable tokens, the most is {settings.max_logprobs}",
            body.logprobs_name,
        )


def timeout_s(service: Service, body: SamplingRequest) -> float | None:
    """Seconds in which the request must end."""
    return service.settings.request_timeout_s if body.timeout is None else body.timeout


def max_tokens(service: Service, body: SamplingRequest) -> int:
    """Tokens to generate at most."""
    if body.token_limit is not None:
        return body.token_limit
    settings = service.settings
    is_completion = isinstance(body, CompletionRequest)
    usual = settings.default_max_tokens if is_completion else settings.default_chat_max_tokens
    return min(usual, settings.max_tokens_limit)


async def read_prompts(
    service: Service, body: CompletionRequest, start: Continuation
) -> list[tuple[int, ...]]:
    """Token ids of every prompt, to be read after `start`. Raises InvalidRequest."""
    prompts = [await _tokens(service, prompt) for prompt in body.prompts]
    bos = service.checkpoint.network.config.bos_token_id
    if start.position == 0 and bos is not None:
        texts = [isinstance(prompt, str) for prompt in body.prompts]
        prompts = [
            (bos, *ids) if is_text else ids for ids, is_text in zip(prompts, texts, strict=True)
        ]
    check_lengths(service, body, prompts, start)
    return prompts


def said(messages: Sequence[Message]) -> list[Said]:
    """A chat's messages, for the template."""
    return [Said(message.role, message.text, message.name) for message in messages]


async def read_messages(
    service: Service, messages: Sequence[Said], start: Continuation, param: str
) -> tuple[int, ...]:
    """Tokens of the messages, which `param` named, to be read after `start`.

    Raises InvalidRequest.
    """
    conversation = service.conversation
    if conversation is None:
        raise InvalidRequest(
            "this model has no chat template: use /v1/completions", None, "no_chat_template"
        )
    if not messages and not start.position:
        raise InvalidRequest("a conversation begins with at least one message", param)
    render = conversation.go_on if start.position else conversation.begin
    try:
        ids = await asyncio.to_thread(render, messages)
    except UnfitMessages as error:
        raise InvalidRequest(
            f"this model's chat template does not take these messages: {error}", param
        ) from error
    if start.position:
        return tuple(ids)
    bos = service.checkpoint.network.config.bos_token_id
    return tuple(ids) if bos is None or ids[:1] == [bos] else (bos, *ids)


def check_lengths(
    service: Service,
    body: SamplingRequest,
    prompts: Sequence[tuple[int, ...]],
    start: Continuation,
) -> None:
    """Raises InvalidRequest for prompts that are empty or too long, each or together."""
    for ids in prompts:
        _check_length(service, body, ids, start)
    num_tokens = body.num_generated_per_prompt * sum(map(len, prompts))
    if num_tokens > service.settings.max_waiting_tokens:
        raise InvalidRequest(
            f"n times the tokens of the prompts is {num_tokens}, the most is "
            f"{service.settings.max_waiting_tokens}",
            body.prompt_name,
            "context_length_exceeded",
        )
    _check_probabilities(service, body, num_tokens)


def _check_probabilities(service: Service, body: SamplingRequest, num_read: int) -> None:
    """Raises InvalidRequest when an answer would be larger than anybody wants to hold."""
    if body.num_logprobs is None:
        return
    num_choices = body.num_generated_per_prompt * body.num_prompts
    num_tokens = num_choices * max_tokens(service, body) + (num_read if body.scores_prompt else 0)
    num_told = num_tokens * (1 + body.num_logprobs)
    most = service.settings.max_told_logprobs
    if num_told > most:
        raise InvalidRequest(
            f"the answer could have {num_told} log-probabilities, the most is {most}: ask for "
            "fewer tokens, or fewer of the most probable ones",
            body.logprobs_name,
        )


async def choices(
    service: Service, body: SamplingRequest, prompts: Sequence[tuple[int, ...]]
) -> list[ChoiceSpec]:
    """All choices of an answer, prompt by prompt. Raises InvalidRequest."""
    sampling, grammar = _sampling(service, body), await read_grammar(service, body)
    check_ids(service, body.stop_token_ids or (), "stop_token_ids")
    return [
        ChoiceSpec(
            token_ids=ids,
            max_tokens=max_tokens(service, body),
            sampling=replace(sampling, seed=derive_seed(sampling.seed, index)),
            stop=body.stops,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            include_stop=bool(body.include_stop_str_in_output),
            ignore_eos=bool(body.ignore_eos),
            min_tokens=body.min_tokens or 0,
            num_logprobs=body.num_logprobs,
            return_tokens=body.returns_tokens,
            score_prompt=body.scores_prompt,
            grammar=grammar,
        )
        for ids in prompts
        for index in range(body.num_generated_per_prompt)
    ]


def check_ids(service: Service, token_ids: Sequence[int], param: str) -> None:
    """Raises InvalidRequest for a token that the model does not have."""
    vocab_sz = service.checkpoint.network.config.vocab_sz
    outside = next((token_id for token_id in token_ids if token_id >= vocab_sz), None)
    if outside is not None:
        raise InvalidRequest(f"token id {outside} is not below {vocab_sz}", param)


async def encode(service: Service, text: str) -> tuple[int, ...]:
    """Tokens of a text; a long one does not hold up the event loop."""
    words = service.checkpoint.tokenizer
    if len(text) <= SHORT_TEXT:
        return tuple(words.encode(text))
    return tuple(await asyncio.to_thread(words.encode, text))


async def _tokens(service: Service, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await encode(service, prompt)
    check_ids(service, prompt, "prompt")
    return tuple(prompt)


def _check_length(
    service: Service, body: SamplingRequest, ids: tuple[int, ...], start: Continuation
) -> None:
    limit = service.settings.max_prompt_tokens
    if len(ids) > limit:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens, the most in one request is {limit}; a session can "
            "read any number in several requests",
            body.prompt_name,
            "context_length_exceeded",
        )
    if not ids and not start.pending and max_tokens(service, body) > 0:
        raise InvalidRequest(
            "the prompt is empty and there is nothing to continue: it needs at least one token",
            body.prompt_name,
        )


def _sampling(service: Service, body: SamplingRequest) -> SamplingParams:
    default = SamplingParams()
    top_k = default.top_k if body.top_k is None else max(0, body.top_k)
    seed = secrets.randbits(64) if body.seed is None else body.seed
    return SamplingParams(
        temperature=_given(body.temperature, default.temperature),
        top_k=top_k,
        top_p=_given(body.top_p, default.top_p),
        min_p=_given(body.min_p, default.min_p),
        repetition_penalty=_given(body.repetition_penalty, default.repetition_penalty),
        frequency_penalty=_given(body.frequency_penalty, default.frequency_penalty),
        presence_penalty=_given(body.presence_penalty, default.presence_penalty),
        logit_bias=_logit_bias(service, body.logit_bias or {}),
        seed=seed,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(service: Service, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    vocab_sz = service.checkpoint.network.config.vocab_sz
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_sz):
            raise InvalidRequest(
                f"{key[:40]!r} is not a token id from 0 to {vocab_sz - 1}", "logit_bias"
            )
    return tuple((int(key), float(bias)) for key, bias in biases.items())

"""Generation parameters from a request's body and the settings."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.api.generation.generation import Generation, read_generation
from server.api.schemas.chat import ChatRequest
from server.api.schemas.completions import CompletionRequest
from server.api.schemas.generation import SamplingRequest
from server.api.schemas.responses import ResponseRequest
from server.engine.messages import Continuation
from server.errors import InvalidRequest, LatentdError, NotFound
from tests.server.api.generation.services import running_service
from tests.server.live import tiny_settings

LIMITS = {
    "max_tokens_limit": 100,
    "default_max_tokens": 16,
    "default_chat_max_tokens": 500,
    "max_n": 4,
    "max_stop": 2,
    "max_logit_bias": 2,
    "max_logprobs": 5,
    "max_waiting": 8,
    "max_waiting_tokens": 60,
    "max_prompt_tokens": 50,
    "max_response_logprobs": 100,
    "request_timeout_s": 30.0,
}
MESSAGES = [{"role": "user", "content": "a"}]


def asked(**changes: object) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "a"} | changes)


@pytest.fixture(scope="module")
def read(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Parameters read from each body, or the error that rejects it."""
    data = tmp_path_factory.mktemp("data")
    settings = tiny_settings(tiny_checkpoint, data, **LIMITS, model_name="tiny")

    def read_all(*bodies: SamplingRequest) -> list[Generation | LatentdError]:
        async def main() -> list[Generation | LatentdError]:
            found = list[Generation | LatentdError]()
            async with running_service(settings, data) as service:
                for body in bodies:
                    try:
                        found.append(await read_generation(service, body))
                    except LatentdError as error:
                        found.append(error)
            return found

        return asyncio.run(main())

    return read_all


def test_what_is_not_asked_for_is_the_servers(read: Any) -> None:
    completion, chat, response, own = read(
        asked(),
        ChatRequest.model_validate({"messages": MESSAGES}),
        ResponseRequest.model_validate({"input": "a"}),
        asked(max_tokens=7, timeout=2.5, seed=3, n=2, best_of=3, stop=["x"], min_tokens=2),
    )
    assert completion.template.max_tokens == 16
    assert chat.template.max_tokens == response.template.max_tokens == 100  # of 500
    assert completion.timeout_s == 30
    assert (completion.num_per_prompt, completion.template.stop) == (1, ())
    assert completion.template.sampling.seed != chat.template.sampling.seed
    assert (own.template.max_tokens, own.timeout_s, own.template.sampling.seed) == (7, 2.5, 3)
    assert (own.num_per_prompt, own.template.stop, own.template.min_tokens) == (3, ("x",), 2)
    names = [(g.prompt_name, g.is_detached) for g in (completion, chat, response)]
    assert names == [("prompt", False), ("messages", False), ("input", False)]


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"max_tokens": 101}, "max_tokens", "max_tokens is 101, the maximum is 100"),
        ({"n": 5}, "n", "n is 5"),
        ({"n": 1, "best_of": 5}, "best_of", "best_of is 5"),
        ({"stop": ["a", "b", "c"]}, "stop", "stop strings is 3"),
        ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias", "biased tokens is 3"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "'300' is not a token id from 0 to 299"),
        ({"prompt": ["a"] * 3, "n": 3}, "prompt", "n times the number of prompts is 9"),
        ({"timeout": 30.5}, "timeout", "timeout is 30.5, the maximum is 30"),
        ({"logprobs": 6}, "logprobs", "most probable tokens is 6"),
        ({"min_tokens": 8, "max_tokens": 7}, "min_tokens", "more than max_tokens, 7"),
        (
            {"stop_token_ids": [300]},
            "stop_token_ids",
            "token id 300 is not below the vocabulary size 300",
        ),
    ],
)
def test_what_exceeds_the_settings_is_named(
    read: Any, changes: dict[str, Any], param: str, message: str
) -> None:
    [error] = read(asked(**changes))
    assert isinstance(error, InvalidRequest)
    assert (error.param, error.status) == (param, 400)
    assert message in error.message


def test_the_model_is_this_one_or_none(read: Any) -> None:
    none, this, other = read(asked(), asked(model="tiny"), asked(model="x" * 100))
    assert isinstance(none, Generation)
    assert isinstance(this, Generation)
    assert isinstance(other, NotFound)
    assert (other.code, other.param) == ("model_not_found", "model")
    assert len(other.message) < 200


@pytest.mark.parametrize(
    ("changes", "prompts", "start", "code"),
    [
        ({}, [(1,) * 50], Continuation(), None),
        ({}, [(1,) * 51], Continuation(), "context_length_exceeded"),
        ({}, [()], Continuation(), "invalid_value"),
        ({"max_tokens": 0}, [()], Continuation(), None),
        ({}, [()], Continuation(position=3, pending=(7,)), None),
        ({}, [()], Continuation(position=3), None),
        ({"n": 2}, [(1,) * 15] * 2, Continuation(), None),
        ({"n": 2}, [(1,) * 15, (1,) * 16], Continuation(), "context_length_exceeded"),
        ({"logprobs": 4, "max_tokens": 20}, [(1,)], Continuation(), None),
        ({"logprobs": 4, "max_tokens": 21}, [(1,)], Continuation(), "invalid_value"),
        ({"logprobs": 4, "max_tokens": 20, "echo": True}, [(1,)], Continuation(), "invalid_value"),
    ],
)
def test_prompts_fit_alone_and_together(
    read: Any,
    tmp_path: Path,
    changes: dict[str, Any],
    prompts: list[tuple[int, ...]],
    start: Continuation,
    code: str | None,
) -> None:
    [generation] = read(asked(**changes))
    settings = tiny_settings(tmp_path, tmp_path, **LIMITS)
    if code is None:
        generation.check_prompts(settings, prompts, start)
        return
    with pytest.raises(InvalidRequest) as caught:
        generation.check_prompts(settings, prompts, start)
    assert caught.value.code == code
    assert caught.value.param == ("logprobs" if "logprobs" in changes else "prompt")

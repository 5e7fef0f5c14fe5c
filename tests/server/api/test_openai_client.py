"""The official client is the first customer."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.patience import wait_until
from tests.server.api.chats import make_checkpoint
from tests.server.live import LiveServer, live_server, tiny_settings


@pytest.fixture
def openai_client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


def test_completion_and_stream(openai_client: openai.OpenAI) -> None:
    ask = openai_client.completions.create
    whole = ask(model="tiny", prompt="the cat", max_tokens=20, seed=1, extra_body={"top_k": 5})
    events = ask(
        model="tiny",
        prompt="the cat",
        max_tokens=20,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 5},
    )
    text, usage = "", None
    for event in events:
        text += "".join(choice.text for choice in event.choices)
        usage = event.usage or usage
    assert text == whole.choices[0].text
    assert usage == whole.usage


def test_models(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    assert openai_client.models.retrieve("tiny").owned_by == "latentd"


def test_errors_become_the_clients_exceptions(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="unknown model") as not_found:
        openai_client.completions.create(model="other", prompt="a")
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        openai_client.completions.create(model="tiny", prompt="a", max_tokens=-1)


def test_a_conflict_is_not_repeated(openai_client: openai.OpenAI, server: LiveServer) -> None:
    with server.client() as client:
        session = {"session_id": client.post("/v1/sessions").json()["id"]}
        running = openai_client.completions.create(
            model="tiny",
            prompt="a",
            max_tokens=50_000,
            stream=True,
            extra_body=session | {"ignore_eos": True},
        )
        next(iter(running))
        before = server.num_answered("client_error")
        with pytest.raises(openai.ConflictError):
            openai_client.completions.create(model="tiny", prompt="a", extra_body=session)
        wait_until(lambda: server.num_answered("client_error") == before + 1)
        running.close()
    server.wait_until_idle()


def test_comments_between_events_do_not_disturb_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, stream_keepalive_s=0.0001)
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with live_server(settings) as impatient, impatient.client() as client:

        def has_comments() -> bool:
            blocks = client.post("/v1/completions", json=body).text.split("\n\n")
            return any(block.startswith(": keep-alive") for block in blocks[1:])

        wait_until(has_comments)
        with openai.OpenAI(base_url=f"{impatient.url}/v1", api_key="none") as official:
            events = official.completions.create(
                model="tiny", prompt="a", max_tokens=200, stream=True
            )
            reasons = [event.choices[0].finish_reason for event in events]
    assert reasons[-1] is not None


def test_many_asynchronous_streams(server: LiveServer) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        events = await client.completions.create(
            model="tiny", prompt="the", max_tokens=30, seed=seed, stream=True
        )
        return "".join([choice.text async for event in events for choice in event.choices])

    async def several(seeds: list[int]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return list(await asyncio.gather(*(one(client, seed) for seed in seeds)))

    together = asyncio.run(several(list(range(12))))
    assert len(set(together)) == 12
    assert asyncio.run(several([7])) == [together[7]]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = make_checkpoint(tmp_path_factory.mktemp("chat") / "model")
    settings = tiny_settings(
        folder,
        tmp_path_factory.mktemp("data"),
        api_key=("alpha", "beta"),
        model_name="latentd",
    )
    with live_server(settings) as running:
        yield running


@pytest.fixture
def alpha(talker: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{talker.url}/v1", api_key="alpha") as client:
        yield client


def test_chats(alpha: openai.OpenAI) -> None:
    history: list[ChatCompletionMessageParam] = [{"role": "user", "content": "the cat"}]
    create = alpha.chat.completions.create
    whole = create(
        model="latentd", messages=history, max_completion_tokens=16, seed=1, logprobs=True
    )
    content, logprobs = whole.choices[0].message.content, whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    chunks = create(
        model="latentd", messages=history, max_completion_tokens=16, seed=1, stream=True
    )
    reported = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(reported) == content
    with alpha.chat.completions.stream(
        model="latentd", messages=history, max_completion_tokens=16, seed=1
    ) as helped:
        deltas = [event.delta for event in helped if event.type == "content.delta"]
    assert "".join(deltas) == content


ENDS = {"structured_outputs": {"choice": ["the mat"]}}


class Person(pydantic.BaseModel):
    """A schema for structured output."""

    age: Literal[7]


def test_what_it_dumps_of_an_answer_is_a_message(alpha: openai.OpenAI) -> None:
    history: Any = [{"role": "user", "content": "the cat"}]
    chats = alpha.chat.completions
    asked: Any = {"model": "latentd", "messages": history, "max_completion_tokens": 30}
    with chats.stream(**asked, extra_body=ENDS) as events:
        streamed = events.get_final_completion()
    parsed = chats.parse(**asked, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(age=7)
    for answer in (chats.create(**asked), streamed, parsed):
        message = answer.choices[0].message.model_dump(warnings=False)
        then = chats.create(**asked | {"messages": [*history, message, *history]})
        assert then.choices[0].message.role == "assistant"


def test_what_it_dumps_of_a_response_is_input(alpha: openai.OpenAI) -> None:
    history: Any = [{"role": "user", "content": "the cat"}]
    asked: Any = {"model": "latentd", "max_output_tokens": 30, "store": False}
    responses = alpha.responses
    with responses.stream(**asked, input=history, extra_body=ENDS) as events:
        streamed = events.get_final_response()
    parsed = responses.parse(**asked, input=history, text_format=Person)
    assert parsed.output_parsed == Person(age=7)
    include: Any = ["message.output_text.logprobs"]
    for answer in (responses.create(**asked, input=history, include=include), streamed, parsed):
        items: Any = [item.model_dump(warnings=False) for item in answer.output]
        assert responses.create(**asked, input=history + items + history).output


def test_responses_continue_one_another(alpha: openai.OpenAI) -> None:
    # An end-of-text token would count as generated, but is never read into the state.
    create, on = alpha.responses.create, {"ignore_eos": True}
    first = create(model="latentd", input="the cat", max_output_tokens=8, extra_body=on)
    second = create(
        model="latentd", input="sat", previous_response_id=first.id, max_output_tokens=8
    )
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens
    assert alpha.responses.retrieve(second.id).output_text == second.output_text
    with alpha.responses.stream(
        model="latentd", input="sat", previous_response_id=first.id, max_output_tokens=8
    ) as events:
        reported = list(events)
    assert reported[0].type == "response.created"
    assert reported[-1].type in ("response.completed", "response.incomplete")
    assert reported[-1].response.previous_response_id == first.id
    alpha.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        alpha.responses.retrieve(first.id)


def test_a_background_response_is_followed_and_cancelled(alpha: openai.OpenAI) -> None:
    made = alpha.responses.create(
        model="latentd",
        input="the cat",
        max_output_tokens=60_000,
        background=True,
        extra_body={"ignore_eos": True},
    )
    events = alpha.responses.retrieve(made.id, stream=True, starting_after=3)
    assert next(iter(events)).sequence_number == 4
    events.close()
    assert alpha.responses.cancel(made.id).status == "cancelled"


def test_a_wrong_key_is_an_authentication_error(talker: LiveServer) -> None:
    with (
        openai.OpenAI(base_url=f"{talker.url}/v1", api_key="gamma") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


@pytest.mark.long
def test_repeating_never_advances_a_session_twice(talker: LiveServer) -> None:
    """The client times out and retries, while the first turn runs and after it ended."""
    with talker.client() as plain:
        plain.headers["Authorization"] = "Bearer alpha"
        session_id = plain.post("/v1/sessions").json()["id"]
        with (
            openai.OpenAI(
                base_url=f"{talker.url}/v1", api_key="alpha", timeout=0.05, max_retries=3
            ) as hasty,
            suppress(openai.APITimeoutError, openai.ConflictError),
        ):
            hasty.chat.completions.create(
                model="latentd",
                messages=[{"role": "user", "content": "the cat"}],
                max_completion_tokens=3000,
                extra_body={"session_id": session_id, "ignore_eos": True},
                extra_headers={"Idempotency-Key": "once"},
            )
        talker.wait_until_idle()
        assert plain.get(f"/v1/sessions/{session_id}").json()["turn"] <= 1


def test_asynchronous_chats_and_responses(talker: LiveServer) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> tuple[str, str]:
        chunks = await client.chat.completions.create(
            model="latentd",
            messages=[{"role": "user", "content": "the cat"}],
            max_completion_tokens=20,
            seed=seed,
            stream=True,
        )
        chat = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        events = await client.responses.create(
            model="latentd",
            input="the cat",
            max_output_tokens=20,
            stream=True,
            extra_body={"seed": seed},
        )
        deltas = [e.delta async for e in events if e.type == "response.output_text.delta"]
        return chat, "".join(deltas)

    async def several() -> list[tuple[str, str]]:
        url = f"{talker.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="alpha") as client:
            return list(await asyncio.gather(*(one(client, seed) for seed in range(8))))

    pairs = asyncio.run(several())
    assert len(set(pairs)) == 8
    assert all(chat == response for chat, response in pairs)

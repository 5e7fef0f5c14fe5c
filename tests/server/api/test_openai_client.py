"""The official client is the first customer."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

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
    with pytest.raises(openai.NotFoundError, match="no model") as not_found:
        openai_client.completions.create(model="other", prompt="a")
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        openai_client.completions.create(model="tiny", prompt="a", max_tokens=-1)


def test_a_conflict_is_not_repeated(openai_client: openai.OpenAI, server: LiveServer) -> None:
    with server.client() as client:
        session = {"session_id": client.post("/v1/sessions").json()["id"]}
        count = 'latentd_requests_total{endpoint="/v1/completions",outcome="client_error"}'
        running = openai_client.completions.create(
            model="tiny",
            prompt="a",
            max_tokens=50_000,
            stream=True,
            extra_body=session | {"ignore_eos": True},
        )
        next(iter(running))
        before = client.get("/metrics").text.partition(count)[2].partition("\n")[0]
        with pytest.raises(openai.ConflictError):
            openai_client.completions.create(model="tiny", prompt="a", extra_body=session)
        after = client.get("/metrics").text.partition(count)[2].partition("\n")[0]
        assert float(after) == float(before or 0) + 1
        running.close()
    server.wait_until_idle()


def test_comments_between_events_do_not_disturb_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, keepalive_s=0.0001)
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with live_server(settings) as impatient, impatient.client() as client:
        blocks = client.post("/v1/completions", json=body).text.split("\n\n")
        assert any(block.startswith(": keep-alive") for block in blocks[1:])
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

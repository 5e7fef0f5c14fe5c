"""A model that thinks before it answers, through a real server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.api.chats import THINKING, make_checkpoint
from tests.server.live import LiveServer, live_server, tiny_settings

CHATS, RESPONSES = "/v1/chat/completions", "/v1/responses"
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "the cat"}],
    "max_tokens": 40,
    "seed": 3,
    "ignore_eos": True,
    "thinking_token_budget": 9,
    "logit_bias": {str(i): -100.0 for i in range(5)},  # special tokens, which are no text
}
OF_RESPONSE: dict[str, Any] = {
    "input": "the cat",
    "max_output_tokens": 40,
    "seed": 3,
    "ignore_eos": True,
    "thinking_token_budget": 9,
    "logit_bias": BODY["logit_bias"],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = make_checkpoint(tmp_path_factory.mktemp("thinker") / "model", THINKING)
    settings = tiny_settings(folder, tmp_path_factory.mktemp("data"), model_name="thinker")
    with live_server(settings) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def post(client: httpx.Client, path: str, **body: object) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.is_success, answer.text
    return dict(answer.json())


def events(client: httpx.Client, path: str, **body: object) -> list[dict[str, Any]]:
    answer = client.post(path, json=body | {"stream": True})
    assert answer.is_success, answer.text
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


def raw_text(client: httpx.Client, answer: dict[str, Any]) -> str:
    """The generated text, including marks."""
    ids = answer["choices"][0]["token_ids"]
    return str(post(client, "/detokenize", tokens=ids)["prompt"])


def test_thoughts_are_closed_after_their_budget_and_are_no_content(client: httpx.Client) -> None:
    answer = post(client, CHATS, **BODY, return_token_ids=True)
    message, raw = answer["choices"][0]["message"], raw_text(client, answer)
    thoughts, _, text = raw.partition("\n</think>")
    assert message["reasoning_content"] == thoughts.strip()
    assert message["content"] == text.lstrip()
    assert "think" not in message["content"]
    forced = len(post(client, "/tokenize", prompt="\n</think>", add_special_tokens=False)["tokens"])
    details = answer["usage"]["completion_tokens_details"]
    assert 9 + forced <= details["reasoning_tokens"] < answer["usage"]["completion_tokens"]
    assert post(client, CHATS, **BODY)["choices"][0]["message"] == message


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stream_has_thoughts_before_text(client: httpx.Client, logprobs: bool) -> None:
    message = post(client, CHATS, **BODY)["choices"][0]["message"]
    reported = events(client, CHATS, **BODY, logprobs=logprobs)
    deltas = [choice["delta"] for event in reported for choice in event["choices"]]
    for part in ("content", "reasoning_content"):
        assert "".join(delta.get(part) or "" for delta in deltas) == message[part]
    kinds = [
        name for delta in deltas for name in ("content", "reasoning_content") if delta.get(name)
    ]
    assert kinds == sorted(kinds, reverse=True)


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, "<|assistant|>"),
        ({"reasoning_effort": "none"}, "<think>\n</think"),
        ({"reasoning_effort": "high"}, "<think>"),
        ({"reasoning_effort": "minimal"}, "<think>"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "<think>"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<think>\n</think"),
        ({"chat_template_kwargs": {"enable_thinking": None}}, "<|assistant|>"),
        ({"thinking_token_budget": 0}, "<think>\n</think"),
        ({"thinking_token_budget": 3}, "<think>"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "<|assistant|>"),
        ({"structured_outputs": {"choice": ["a"]}, "reasoning_effort": "none"}, "<|assistant|>"),
    ],
)
def test_a_request_says_whether_the_model_thinks(
    client: httpx.Client, changes: dict[str, Any], end: str
) -> None:
    body = BODY | {"max_tokens": 3, "return_token_ids": True}
    del body["thinking_token_budget"]
    answer = post(client, CHATS, **body | changes)
    prompt = post(client, "/detokenize", tokens=answer["prompt_token_ids"])["prompt"]
    assert prompt.endswith(end)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"reasoning_effort": "none"}, "thinking_token_budget"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "thinking_token_budget"),
        ({"reasoning_effort": "high", "thinking_token_budget": 0}, "reasoning_effort"),
        ({"structured_outputs": {"choice": ["a"]}}, "thinking_token_budget"),
        ({"chat_template_kwargs": {"colour": 1}}, "chat_template_kwargs.colour"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ],
)
def test_wishes_that_contradict_are_refused(
    client: httpx.Client, changes: dict[str, Any], param: str
) -> None:
    answer = client.post(CHATS, json=BODY | changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_session_continues_after_thoughts_and_replays_its_answer(
    client: httpx.Client,
) -> None:
    session_id = client.post("/v1/sessions").json()["id"]
    headers = {"Idempotency-Key": "first"}
    body = BODY | {"session_id": session_id}
    first, again = (client.post(CHATS, json=body, headers=headers).json() for _ in range(2))
    assert first == again
    assert first["choices"][0]["message"]["reasoning_content"]
    replayed = client.post(CHATS, json=body | {"stream": True}, headers=headers).text
    assert "reasoning_content" in replayed
    second = post(client, CHATS, **body)
    assert second["session_turn"] == 2


def test_thoughts_may_come_back_with_the_history(client: httpx.Client) -> None:
    answer = {"role": "assistant", "content": "the mat", "reasoning_content": "where?"}
    messages = [*BODY["messages"], answer, {"role": "user", "content": "then"}]
    assert post(client, CHATS, **BODY | {"messages": messages})["choices"]


def test_a_text_of_the_template_ends_an_answer(client: httpx.Client) -> None:
    """The template's stop string is the name of a token here, and the first one possible."""
    body = BODY | {"logit_bias": {"2": 100.0}, "temperature": 0, "thinking_token_budget": 5}
    del body["ignore_eos"]
    answer = post(client, CHATS, **body)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] is None
    assert answer["usage"]["completion_tokens"] == 1
    assert post(client, CHATS, **body | {"ignore_eos": True})["usage"]["completion_tokens"] == 40


def test_a_response_has_an_item_of_thoughts(client: httpx.Client) -> None:
    message = post(client, CHATS, **BODY)["choices"][0]["message"]
    response = post(client, RESPONSES, **OF_RESPONSE, include=["message.output_text.logprobs"])
    reasoning, answer = response["output"]
    assert reasoning["type"] == "reasoning"
    assert reasoning["content"] == [
        {"type": "reasoning_text", "text": message["reasoning_content"]}
    ]
    assert answer["content"][0]["text"] == message["content"]
    logprobs = answer["content"][0]["logprobs"]
    assert "".join(each["token"] for each in logprobs).strip() == message["content"].strip()
    details = response["usage"]["output_tokens_details"]
    assert len(logprobs) + details["reasoning_tokens"] == response["usage"]["output_tokens"]
    assert post(client, RESPONSES, input=[*response["output"], {"role": "user", "content": "a"}])


def test_events_of_a_response_cover_both_items(client: httpx.Client) -> None:
    whole = post(client, RESPONSES, **OF_RESPONSE)
    reported = events(client, RESPONSES, **OF_RESPONSE)
    kinds = [event["type"] for event in reported]
    order = list(dict.fromkeys(kinds))
    assert order == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.incomplete",
    ]
    for kind, item in (("reasoning_text", 0), ("output_text", 1)):
        text = whole["output"][item]["content"][0]["text"]
        deltas = [event for event in reported if event["type"] == f"response.{kind}.delta"]
        assert "".join(event["delta"] for event in deltas) == text
        [done] = [event for event in reported if event["type"] == f"response.{kind}.done"]
        assert done["text"] == text
        assert {event["output_index"] for event in (*deltas, done)} == {item}
    assert [item["type"] for item in reported[-1]["response"]["output"]] == ["reasoning", "message"]


def test_thoughts_that_never_end_leave_no_content(client: httpx.Client) -> None:
    body = OF_RESPONSE | {"max_output_tokens": 4}
    response = post(client, RESPONSES, **body)
    reasoning, answer = response["output"]
    assert reasoning["status"] == response["status"] == "incomplete"
    assert answer["content"][0]["text"] == ""
    assert (
        events(client, RESPONSES, **body)[-1]["response"]["output"][0]["content"]
        == (reasoning["content"])
    )


def test_the_official_client_reads_thoughts(server: LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
    extra = {
        "logit_bias": BODY["logit_bias"],
        "ignore_eos": True,
        "seed": 3,
        "thinking_token_budget": 9,
    }
    response = client.responses.create(input="the cat", max_output_tokens=40, extra_body=extra)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    with client.responses.stream(
        model="thinker", input="the cat", max_output_tokens=40, extra_body=extra
    ) as stream:
        thoughts = [e.delta for e in stream if e.type == "response.reasoning_text.delta"]
    assert "".join(thoughts) == response.output[0].content[0].text  # type: ignore[union-attr,index]


def test_a_template_with_wrong_rules_is_named(tmp_path: Path) -> None:
    from server.api.conversation import InvalidTemplate

    folder = make_checkpoint(tmp_path / "model", '{%- set answer_stops = "x" -%}')
    with (
        pytest.raises(InvalidTemplate, match="answer_stops must be a list of non-empty texts"),
        live_server(tiny_settings(folder, tmp_path)),
    ):
        pass

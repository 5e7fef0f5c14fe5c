"""The content of an answer for each set of options: tables of edge cases."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.api.calls import BODY, complete, stream, streamed_text

TOKENS = 24


def choice_of(client: httpx.Client, **changes: object) -> dict[str, Any]:
    return dict(complete(client, **changes)["choices"][0])


def choices_in(events: list[Any], index: int = 0) -> Iterator[dict[str, Any]]:
    for event in events[:-1]:
        yield from (choice for choice in event["choices"] if choice["index"] == index)


@pytest.mark.parametrize("start", range(0, 12, 2))
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_wherever_its_tokens_are(
    client: httpx.Client, start: int, length: int, include: bool
) -> None:
    whole = choice_of(client)["text"]
    stop = whole[start : start + length]
    at = whole.index(stop)
    expected = whole[: at + length] if include else whole[:at]
    how = {"stop": stop, "include_stop_str_in_output": include}
    choice = choice_of(client, **how)
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
    assert choice["stop_reason"] == stop
    events = stream(client, **how)
    assert streamed_text(events) == expected
    assert list(choices_in(events))[-1]["stop_reason"] == stop


@pytest.mark.parametrize(
    ("prompt", "status"),
    [
        ("", 200),  # the token that a text begins with is there
        ([], 400),
        ([0], 200),
        ([5], 200),
        ("é", 200),
        ("漢字 🦊", 200),
        ([5] * 2000, 200),
        ([5] * 2001, 400),
        (["a", "b"], 200),
        ([[5], [6, 7]], 200),
        ([[5], []], 400),
    ],
)
def test_prompts_at_the_edges(client: httpx.Client, prompt: Any, status: int) -> None:
    response = client.post("/v1/completions", json=BODY | {"prompt": prompt, "max_tokens": 2})
    assert response.status_code == status, response.text
    if status == 400:
        assert response.json()["error"]["param"] == "prompt"
        return
    answer = response.json()
    several = isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt)
    assert len(answer["choices"]) == (len(prompt) if several else 1)
    echoed = complete(client, prompt=prompt, max_tokens=0, echo=True)["choices"]
    if isinstance(prompt, str):
        assert echoed[0]["text"] == prompt


@pytest.mark.parametrize("how", [{}, {"stream": True}])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 2])
def test_few_tokens(
    client: httpx.Client, how: dict[str, object], echo: bool, max_tokens: int
) -> None:
    asked = {"max_tokens": max_tokens, "echo": echo}
    expected = ("the cat" if echo else "") + "".join(
        choice_of(client, max_tokens=max_tokens)["text"] if max_tokens else ""
    )
    if how:
        assert streamed_text(stream(client, **asked)) == expected
    else:
        answer = complete(client, **asked)
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["completion_tokens"] == max_tokens


def test_choices_of_a_seed(client: httpx.Client) -> None:
    three = complete(client, n=3)["choices"]
    assert [choice["index"] for choice in three] == [0, 1, 2]
    assert len({choice["text"] for choice in three}) == 3
    assert complete(client, n=3)["choices"] == three
    assert choice_of(client)["text"] == three[0]["text"]
    events = stream(client, n=3)
    assert [streamed_text(events, i) for i in range(3)] == [c["text"] for c in three]


def check_lists(logprobs: dict[str, Any], text: str, num_top: int) -> None:
    """The lists are consistent with each other and the text."""
    lengths = {len(logprobs[name]) for name in ("tokens", "token_logprobs", "text_offset")}
    assert len(lengths) == 1
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<|")):
            behind = text[offset:].lstrip("\ufffd")  # of bytes before it that are no character
            assert behind.startswith(token) or token.startswith(behind)
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        if logprob is None:
            assert top is None
            continue
        assert logprob <= 0
        assert num_top <= len(top) <= num_top + 1
        assert top[token] == pytest.approx(logprob)
        assert max(top.values()) >= logprob


@pytest.mark.parametrize("changes", [{}, {"stop": " "}, {"echo": True}, {"ignore_eos": False}])
def test_logprobs_belong_to_the_text(client: httpx.Client, changes: dict[str, object]) -> None:
    changes = {"logprobs": 3} | changes
    choice = choice_of(client, **changes)
    check_lists(choice["logprobs"], choice["text"], 3)
    events = stream(client, **changes)
    assert streamed_text(events) == choice["text"]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        reported = [
            entry for c in choices_in(events) for entry in (c["logprobs"] or {}).get(name, [])
        ]
        assert reported == choice["logprobs"][name]


def test_a_stop_string_cuts_the_logprobs_too(client: httpx.Client) -> None:
    whole = choice_of(client, logprobs=1)
    stop = whole["text"][6:9]
    cut = choice_of(client, logprobs=1, stop=stop)
    kept = len(cut["logprobs"]["tokens"])
    assert kept < len(whole["logprobs"]["tokens"])
    assert cut["logprobs"]["tokens"] == whole["logprobs"]["tokens"][:kept]
    assert all(offset < max(1, len(cut["text"])) for offset in cut["logprobs"]["text_offset"])


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_batched_prompts_are_scored(client: httpx.Client, max_tokens: int) -> None:
    """The request of lm-eval: echo, logprobs, at most one token, several lists of tokens."""
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8]]
    asked = {"prompt": prompts, "max_tokens": max_tokens, "echo": True, "logprobs": 1}
    choices = complete(client, **asked)["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(prompt) + max_tokens
        assert found["token_logprobs"][0] is None
        assert all(value is not None for value in found["token_logprobs"][1:])
        check_lists(found, choice["text"], 1)
    alone = choice_of(client, **asked | {"prompt": prompts[0]})
    assert alone["logprobs"] == choices[0]["logprobs"]


def test_scores_of_a_prompt_are_those_of_writing_it(client: httpx.Client) -> None:
    written = choice_of(client, prompt=[1, 2, 3], logprobs=0, return_token_ids=True)
    both = [1, 2, 3, *written["token_ids"]]
    read = choice_of(client, prompt=both, max_tokens=0, echo=True, logprobs=0)
    expected = written["logprobs"]["token_logprobs"]
    assert read["logprobs"]["token_logprobs"][3:] == pytest.approx(expected, abs=1e-6)


def test_the_best_of_several(client: httpx.Client) -> None:
    asked = {"temperature": 2.0, "logprobs": 0}
    all_of_them = complete(client, n=5, **asked)["choices"]

    def mean(choice: dict[str, Any]) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return float(sum(logprobs) / len(logprobs))

    ranked = sorted(all_of_them, key=mean, reverse=True)
    answer = complete(client, n=2, best_of=5, **asked)
    assert [c["text"] for c in answer["choices"]] == [c["text"] for c in ranked[:2]]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 5 * TOKENS
    plain = complete(client, n=2, best_of=5, temperature=2.0)
    assert [c["text"] for c in plain["choices"]] == [c["text"] for c in ranked[:2]]
    assert plain["choices"][0]["logprobs"] is None


def test_token_ids(client: httpx.Client) -> None:
    answer = choice_of(client, prompt=[1, 2], return_token_ids=True)
    assert answer["prompt_token_ids"] == [1, 2]
    assert len(answer["token_ids"]) == TOKENS
    events = stream(client, prompt=[1, 2], return_token_ids=True)
    reported = list(choices_in(events))
    assert reported[0]["prompt_token_ids"] == [1, 2]
    assert [i for c in reported for i in c.get("token_ids", [])] == answer["token_ids"]
    stop = answer["token_ids"][5]
    first = answer["token_ids"].index(stop)
    ended = choice_of(client, prompt=[1, 2], return_token_ids=True, stop_token_ids=[stop])
    assert ended["token_ids"] == answer["token_ids"][:first]
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", stop)
    later = choice_of(
        client, prompt=[1, 2], return_token_ids=True, stop_token_ids=[stop], min_tokens=10
    )
    assert len(later["token_ids"]) >= 10
    assert stop not in later["token_ids"][:10]


def test_explicit_nulls_are_defaults(client: httpx.Client) -> None:
    fields = client.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    nulls = {name: None for name in fields["properties"] if name != "prompt"}
    response = client.post("/v1/completions", json={"prompt": [1]} | nulls)
    assert response.status_code == 200, response.text


def test_timings_on_request(client: httpx.Client, session_id: str) -> None:
    response = client.post(
        "/v1/completions", json=BODY | {"timings": True, "session_id": session_id}
    )
    timings = response.json()["timings"]
    assert 0 <= timings["queue_s"] <= timings["first_token_s"] <= timings["total_s"]
    assert timings["per_token_s"] > 0
    assert float(response.headers["X-Time-To-First-Token"]) == pytest.approx(
        timings["first_token_s"], abs=1e-6
    )
    tokens = response.json()["usage"]["total_tokens"]
    again = complete(client, timings=True, session_id=session_id)["timings"]
    assert again["resumed_tokens"] == tokens
    events = stream(client, timings=True)
    assert [("timings" in event) for event in events[:-1]].count(True) == 1
    assert "timings" in events[-2]
    assert "timings" not in complete(client)
    json.dumps(timings)


def test_a_whole_number_may_be_written_as_a_float(client: httpx.Client) -> None:
    """As in JSON Schema, and as some languages write all numbers."""
    body = BODY | {"prompt": [1, 2, 3], "stop_token_ids": [299]}
    floats = {"prompt": [1.0, 2, 3.0], "max_tokens": 24.0, "seed": 7.0, "stop_token_ids": [299.0]}
    answers = [client.post("/v1/completions", json=b).json() for b in (body, body | floats)]
    assert answers[0]["choices"] == answers[1]["choices"]

"""`POST /v1/completions` without a session."""

import json

import httpx
import pytest

from tests.server.api.calls import BODY, complete, stream, streamed_text, text_of
from tests.server.live import LiveServer


def test_answers_in_openais_shape(client: httpx.Client, server: LiveServer) -> None:
    answer = complete(client)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    prompt = 1 + len(server.service.checkpoint.tokenizer.encode("the cat"))
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 24,
        "total_tokens": prompt + 24,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_seed_makes_the_text_and_no_seed_makes_another(client: httpx.Client) -> None:
    assert text_of(client) == text_of(client)
    assert text_of(client, seed=None) != text_of(client, seed=None)


def test_a_stream_has_the_same_text_and_done(client: httpx.Client) -> None:
    events = stream(client)
    assert streamed_text(events) == text_of(client)
    assert events[-1] == "[DONE]"
    reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_stream_options_report_usage(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(client, stream_options=options)[:-1]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == complete(client)["usage"]
    generated = [event["usage"]["completion_tokens"] for event in events]
    assert generated == sorted(generated)
    assert generated[0] < 24
    plain = stream(client)[:-1]
    assert all("usage" not in event for event in plain)


def test_n_gives_different_choices_and_the_first_is_that_of_n_1(client: httpx.Client) -> None:
    texts = [choice["text"] for choice in complete(client, n=3)["choices"]]
    assert len(set(texts)) == 3
    assert texts[0] == text_of(client)
    events = stream(client, n=3)
    assert [streamed_text(events, index) for index in range(3)] == texts


def test_each_prompt_gets_its_answer(client: httpx.Client, server: LiveServer) -> None:
    prompts = ["the cat", "on the mat"]
    both = complete(client, prompt=prompts, n=2)["choices"]
    assert [choice["index"] for choice in both] == [0, 1, 2, 3]
    alone = [text_of(client, prompt=prompt) for prompt in prompts]
    assert [both[0]["text"], both[2]["text"]] == alone
    bos = server.service.checkpoint.network.bos
    ids = [[bos, *server.service.checkpoint.tokenizer.encode(prompt)] for prompt in prompts]
    assert text_of(client, prompt=ids[0]) == alone[0]
    by_ids = complete(client, prompt=ids)["choices"]
    assert [choice["text"] for choice in by_ids] == alone


def test_echo_puts_the_prompt_first(client: httpx.Client) -> None:
    assert text_of(client, echo=True) == "the cat" + text_of(client)
    assert streamed_text(stream(client, echo=True)) == "the cat" + text_of(client)
    nothing = complete(client, echo=True, max_tokens=0)
    assert nothing["choices"][0]["text"] == "the cat"
    assert nothing["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_ends_the_text_before_it(client: httpx.Client, streamed: bool) -> None:
    whole = text_of(client, max_tokens=60)
    stop = whole[30:33]
    cut = whole[: whole.index(stop)]
    if streamed:
        events = stream(client, max_tokens=60, stop=["\0never", stop])
        assert streamed_text(events) == cut
        assert events[-2]["choices"][0]["finish_reason"] == "stop"
    else:
        [choice] = complete(client, max_tokens=60, stop=stop)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (cut, "stop")


def test_logit_bias_and_temperature_choose_tokens(client: httpx.Client, server: LiveServer) -> None:
    [token_id] = server.service.checkpoint.tokenizer.encode("z")
    assert text_of(client, logit_bias={str(token_id): 100}, max_tokens=5) == "zzzzz"
    greedy = text_of(client, temperature=0)
    assert greedy == text_of(client, top_k=1, seed=3) == text_of(client, top_p=1e-9, seed=4)
    assert greedy == text_of(client, min_p=1.0, seed=5)
    assert greedy != text_of(client, temperature=0, presence_penalty=2.0)


def test_the_end_token_ends_the_text(client: httpx.Client, server: LiveServer) -> None:
    [end] = server.service.checkpoint.network.eos
    bias = {str(end): 100}
    [choice] = complete(client, ignore_eos=None, logit_bias=bias)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert complete(client, logit_bias=bias)["usage"]["completion_tokens"] == 24


def test_explicit_nulls_mean_the_defaults(client: httpx.Client) -> None:
    nulls = dict.fromkeys(
        ("stop", "n", "stream", "stream_options", "logit_bias", "user", "top_p", "model", "suffix")
    )
    assert text_of(client, **nulls) == text_of(client)
    assert complete(client, max_tokens=None)["usage"]["completion_tokens"] == 16


def test_usage_reports_cached_prompt_tokens(client: httpx.Client) -> None:
    prompt = [i % 299 + 1 for i in range(200)]

    def cached(**changes: object) -> int:
        usage = complete(client, **changes)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    text = text_of(client, prompt=prompt, max_tokens=5)
    assert text_of(client, prompt=prompt, max_tokens=5) == text
    assert cached(prompt=prompt, n=3) == 192
    assert cached(prompt=[prompt, prompt[::-1]], n=2) == 192  # the second is read, though once
    assert cached(prompt=[prompt, [*prompt[::-1], 3]]) == 384
    options = {"include_usage": True}
    *_, last, _ = stream(client, prompt=prompt, stream_options=options)
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 192


def test_a_long_wait_is_filled_with_comments(server: LiveServer) -> None:
    others = {"prompt": ["the"] * 32, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    body = BODY | {"stream": True, "max_tokens": 1}
    with (
        server.client() as busy,
        busy.stream("POST", "/v1/completions", json=others),
        server.client() as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        assert [next(lines), next(lines)] == [": keep-alive", ""]  # a block of its own
    server.wait_until_idle()


def test_an_event_that_is_plain_has_what_a_full_one_has(client: httpx.Client) -> None:
    plain, full = stream(client), stream(client, stream_options={"continuous_usage_stats": True})
    assert streamed_text(plain) == streamed_text(full)
    first, second = plain[0], full[0]
    assert second.pop("usage")["completion_tokens"] > 0
    first |= {name: second[name] for name in ("id", "created")}
    first["choices"][0]["text"] = second["choices"][0]["text"]
    assert json.dumps(first) == json.dumps(second)

"""`/tokenize` and `/detokenize`."""

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.server.api.calls import complete


def tokenize(client: httpx.Client, **body: object) -> dict[str, Any]:
    response = client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


@settings(
    max_examples=40,
    phases=[Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.just("a<|endoftext|>b"))
def test_a_text_survives_tokenisation(client: httpx.Client, text: str) -> None:
    tokens = tokenize(client, prompt=text, add_special_tokens=False)["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


def test_tokens_are_those_that_a_completion_reads(client: httpx.Client) -> None:
    found = tokenize(client, prompt="the cat sat", return_token_strs=True)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["token_strs"][0] == "<|endoftext|>"
    assert found["max_model_len"] is None
    usage = complete(client, prompt="the cat sat")["usage"]
    assert usage["prompt_tokens"] == found["count"]
    same = complete(client, prompt=found["tokens"])["choices"]
    assert same == complete(client, prompt="the cat sat")["choices"]


def test_messages_need_a_template(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hello"}]
    response = client.post("/tokenize", json={"messages": messages})
    assert response.json()["error"]["code"] == "no_chat_template"


def test_the_tokenizer_lists_its_special_tokens(client: httpx.Client) -> None:
    assert client.get("/tokenizer_info").json() == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": None,
        "vocab_size": 300,
        "chat_template": None,
    }


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(
    client: httpx.Client, path: str, body: dict[str, object], param: str
) -> None:
    response = client.post(path, json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param

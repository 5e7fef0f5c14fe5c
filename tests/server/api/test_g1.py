"""A model with the World vocabulary and G1's chat template, through a real server."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from model import checkpoint
from model.text.g1 import TEMPLATE
from model.text.world import END
from server.api.conversation import ChatMessage, Conversation
from tests.model import toy
from tests.model.text.worlds import WORDS
from tests.patience import PATIENCE_S
from tests.server.live import LiveServer, live_server, tiny_settings

CHAT = Conversation(TEMPLATE, WORDS, 0, 0)
CHATS = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "the cat"}],
    "max_tokens": 24,
    "seed": 3,
}


def begun(*messages: tuple[str, str], thinks: bool | None = None) -> str:
    ids = CHAT.begin([ChatMessage(*message) for message in messages], 1000, thinks)
    return WORDS.decode(ids, names=True)


def test_a_blank_line_ends_a_turn_and_is_in_none() -> None:
    user = "  hi\r\n\r\n    there\n \n!"
    text = begun(("system", "Be\n\n\nkind. "), ("user", user), ("assistant", "Ho\n\nho"))
    assert text == (
        "System: Be\nkind.\n\nUser: hi\n    there\n!\n\nAssistant: Ho\nho\n\nAssistant:"
    )
    assert begun(("user", "")) == "User:\n\nAssistant:"


def test_the_prompt_opens_thoughts_or_closes_them() -> None:
    assert begun(("user", "hi"), thinks=True).endswith("\n\nAssistant: <think")
    assert begun(("user", "hi"), thinks=False).endswith("\n\nAssistant: <think>\n</think")
    splitter = CHAT.splitter(True)
    assert splitter is not None
    assert splitter.push(">\nhm\n</think>\n\nyes") == ("hm", "yes")


def test_earlier_thoughts_are_no_history() -> None:
    text = begun(("user", "hi"), ("assistant", "<think>\nwho?\n</think>\n\nHo"), ("user", "a"))
    assert text == "User: hi\n\nAssistant: Ho\n\nUser: a\n\nAssistant:"


@pytest.mark.parametrize(
    ("written", "thinks", "history"),
    [
        (" Ho", None, None),
        (" Ho ", None, "Assistant: Ho\n\n"),
        ("Ho", None, "Assistant: Ho\n\n"),
        (" Ho\n\nho\n", None, "Assistant: Ho\nho\n\n"),
        (">\nhm\n</think>\n\nHo", True, "Assistant: Ho\n\n"),
        (">\nHo\n\n\nho", False, "Assistant: Ho\nho\n\n"),
        (f" {END} <think>\n\n", None, f"Assistant: {END} <think>\n\n"),
    ],
)
def test_an_answer_is_read_again_if_it_comes_back_otherwise(
    written: str, thinks: bool | None, history: str | None
) -> None:
    splitter = CHAT.splitter(thinks)
    assert splitter is not None
    answer = splitter.push(written)[1] + splitter.flush()[1]
    prompt = CHAT.begin([ChatMessage("user", "hi")], 1000, thinks)
    found = CHAT.answered(prompt, written, answer, 1000, thinks)
    if history is None:
        assert found is None
        return
    assert found is not None
    messages = [ChatMessage("user", "hi"), ChatMessage("assistant", answer)]
    assert found == CHAT.begin([*messages, ChatMessage("user", "")], 1000)[: len(found)]
    assert WORDS.decode(found) == f"User: hi\n\n{history}"
    assert 0 not in found


def test_a_session_goes_on_behind_its_answer() -> None:
    ids = CHAT.extend([ChatMessage("user", "a")], 1000)
    assert WORDS.decode(ids) == "\n\nUser: a\n\nAssistant:"


def test_special_texts_of_users_stay_text() -> None:
    ids = CHAT.begin([ChatMessage("user", f"{END} <think> {END[:5]}")], 1000)
    assert 0 not in ids
    assert WORDS.decode(ids) == f"User: {END} <think> {END[:5]}\n\nAssistant:"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = toy.save(tmp_path_factory.mktemp("g1") / "model", WORDS, TEMPLATE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "FAMILIES", (*checkpoint.FAMILIES, toy))
        with live_server(
            tiny_settings(folder, tmp_path_factory.mktemp("data"), grammar_timeout_s=PATIENCE_S)
        ) as running:
            yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def post(client: httpx.Client, path: str, **body: object) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.is_success, answer.text
    return dict(answer.json())


def test_texts_of_half_characters_come_whole(client: httpx.Client) -> None:
    answer = post(client, CHATS, **BODY, return_token_ids=True, logprobs=True)
    [choice] = answer["choices"]
    raw = b"".join(WORDS.bytes_of(i) for i in choice["token_ids"])
    assert choice["message"]["content"] == raw.decode("utf-8", "replace").lstrip(" \t\r\n")
    reported = [bytes(each["bytes"]) for each in choice["logprobs"]["content"]]
    assert b"".join(reported) == raw
    streamed = client.post(CHATS, json=BODY | {"stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    deltas = [e["choices"][0]["delta"].get("content") or "" for e in events]
    assert "".join(deltas) == choice["message"]["content"]


def test_a_blank_line_and_user_end_an_answer(client: httpx.Client) -> None:
    """The grammar forces what the model might generate."""
    written = {"structured_outputs": {"regex": "a日b\n\nUser: no"}, "max_tokens": 40}
    session_id = client.post("/v1/sessions").json()["id"]
    answer = post(client, CHATS, **BODY | written | {"session_id": session_id})
    [choice] = answer["choices"]
    assert choice["message"]["content"] == "a日b"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert post(client, CHATS, **BODY | {"session_id": session_id})["session_turn"] == 2


def test_structure_and_scores_know_the_vocabulary(client: httpx.Client) -> None:
    choice = {"structured_outputs": {"choice": ["日本é", "the cat"]}}
    text = post(client, CHATS, **BODY | choice)["choices"][0]["message"]["content"]
    assert text in ("日本é", "the cat")
    asked = {"echo": True, "logprobs": 1, "max_tokens": 0}
    scored = post(client, "/v1/completions", prompt="the cat日", **asked)
    assert scored["choices"][0]["text"] == "the cat日"
    stops = {"stop": ["a", "e", "i"], "max_tokens": 60, "seed": 1}
    stopped = post(client, "/v1/completions", prompt="a", **stops)
    assert not set("aei") & set(stopped["choices"][0]["text"])


def test_text_becomes_the_tokens_of_the_vocabulary(client: httpx.Client) -> None:
    text = "User: the cat日本"
    found = post(client, "/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True)
    assert found["tokens"] == WORDS.encode(text)
    assert "".join(found["token_strs"]) == text
    assert post(client, "/detokenize", tokens=[*found["tokens"], 0])["prompt"] == text + END

"""Every parameter of OpenAI's specification is honoured, ignored or rejected as unsupported, never
unknown."""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Required, Union, get_args, get_origin, get_type_hints

import httpx
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from tests.server.api.chats import make_checkpoint
from tests.server.live import LiveServer, live_server, tiny_settings

COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "the cat", "max_tokens": 2},
    CHATS: {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2},
    RESPONSES: {"input": "the cat", "max_output_tokens": 2, "store": False},
}
PARAMS = {COMPLETIONS: CompletionParams, CHATS: ChatParams, RESPONSES: ResponseCreateParamsBase}
NAMES = [(path, name) for path, params in PARAMS.items() for name in params.__annotations__]
STRANGE = {"what": ["nobody", {"knows": 1}]}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = make_checkpoint(tmp_path_factory.mktemp("talker"))
    settings = tiny_settings(folder, tmp_path_factory.mktemp("data"), model_name="tiny")
    with live_server(settings) as running:
        yield running


@pytest.fixture
def client(talker: LiveServer) -> Iterator[httpx.Client]:
    with talker.client() as client:
        yield client


def ask(client: httpx.Client, path: str, **changes: object) -> tuple[int, dict[str, Any]]:
    """Status, and the answer or its error."""
    response = client.post(path, json=BODIES[path] | changes)
    body = response.json()
    return response.status_code, body.get("error") or body


def text(path: str, answer: dict[str, Any]) -> str:
    if path == RESPONSES:
        return str(answer["output"][0]["content"][0]["text"])
    choice = answer["choices"][0]
    return str(choice["text"] if path == COMPLETIONS else choice["message"]["content"])


@pytest.mark.long
@pytest.mark.parametrize(("path", "name"), NAMES)
def test_every_name_is_known(client: httpx.Client, path: str, name: str) -> None:
    values: list[Any] = [STRANGE, "strange", 10**6, [], {}, True]
    for value in values:
        status, error = ask(client, path, **{name: value})
        assert status in (200, 400, 404), error
        assert error.get("code") != "unknown_parameter" or error["param"].startswith(f"{name}.")


def literals(kind: Any) -> list[str]:
    """The strings that a parameter of this type may be."""
    if get_origin(kind) is Literal:
        return [value for value in get_args(kind) if isinstance(value, str)]
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType, Required) else ()
    return [value for part in parts for value in literals(part)]


@pytest.mark.long
@pytest.mark.parametrize("path", PARAMS)
def test_every_word_is_known(client: httpx.Client, path: str) -> None:
    hints = get_type_hints(PARAMS[path], include_extras=True)
    words = [(name, word) for name, kind in hints.items() for word in literals(kind)]
    for name, word in words:
        status, answer = ask(client, path, **{name: word})
        assert status == 200 or name == "model" or answer["code"] == "unsupported_parameter"
    assert ("service_tier", "fast") in words or path == COMPLETIONS


@pytest.mark.long
@pytest.mark.parametrize(("path", "name"), NAMES)
def test_null_asks_for_nothing(client: httpx.Client, path: str, name: str) -> None:
    if name not in ("messages", "prompt", "input"):
        status, answer = ask(client, path, **{name: None})
        assert status == 200, answer


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        (path, changes)
        for path in (CHATS, RESPONSES)
        for changes in (
            {"service_tier": "auto"},
            {"service_tier": "flex"},
            {"service_tier": "priority"},
            {"priority": -3},
            {"moderation": None},
            {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
            {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "s"},
            {"stream": True, "stream_options": {"include_obfuscation": False}},
            {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        )
    ]
    + [
        (COMPLETIONS, {"stream": True, "stream_options": {"include_obfuscation": False}}),
        (CHATS, {"reasoning_effort": "none", "modalities": ["text"], "verbosity": "medium"}),
        (RESPONSES, {"reasoning": {"effort": "none", "summary": "auto"}}),
        (RESPONSES, {"reasoning": {}, "context_management": [], "background_options": {}}),
        (RESPONSES, {"include": ["reasoning.encrypted_content", "web_search_call.results"]}),
    ],
)
def test_what_asks_for_nothing_is_accepted(
    client: httpx.Client, path: str, changes: dict[str, Any]
) -> None:
    response = client.post(path, json=BODIES[path] | changes)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        *((p, {"moderation": {"model": "m"}}, "moderation") for p in (CHATS, RESPONSES)),
        (CHATS, {"reasoning_effort": "low"}, "reasoning_effort"),
        (RESPONSES, {"reasoning": {"effort": "low"}}, "reasoning.effort"),
        (RESPONSES, {"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        (RESPONSES, {"background_options": {"completion_window": "2h"}}, "background_options"),
        (RESPONSES, {"access_programs": {"cyber": "daybreak_red"}}, "access_programs"),
        *(
            (
                path,
                {"stream": True, "stream_options": {"include_obfuscation": True}},
                "stream_options.include_obfuscation",
            )
            for path in BODIES
        ),
        (CHATS, {"messages": [{"role": "user", "content": "a", "tool_call_id": "c"}]}, None),
    ],
)
def test_what_cannot_be_honoured_is_refused_as_such(
    client: httpx.Client, path: str, changes: dict[str, Any], param: str | None
) -> None:
    status, error = ask(client, path, **changes)
    assert (status, error.get("code")) == (400, "unsupported_parameter"), error
    assert error["param"] == (param or "messages[0].tool_call_id")


@pytest.mark.parametrize("path", BODIES)
def test_null_in_an_unknown_name_asks_for_nothing(client: httpx.Client, path: str) -> None:
    strange = {"provider_specific_fields": None, "structured_outputs": {"choice": ["a"], "x": None}}
    status, answer = ask(client, path, **strange)
    assert status == 200, answer
    for changes, param in (({"nobody": 0}, "nobody"), ({"metadata_": {}}, "metadata_")):
        status, error = ask(client, path, **changes)
        assert (status, error["param"], error["code"]) == (400, param, "unknown_parameter")


@pytest.mark.parametrize("path", BODIES)
def test_top_p_0_is_greedy(client: httpx.Client, path: str) -> None:
    more = {next(n for n in BODIES[path] if n.startswith("max")): 20}
    texts = {
        text(path, ask(client, path, **more, **changes)[1])
        for changes in ({"temperature": 0}, *({"top_p": 0, "seed": seed} for seed in range(5)))
    }
    assert len(texts) == 1


def test_best_of_is_at_least_n(client: httpx.Client) -> None:
    status, error = ask(client, COMPLETIONS, n=3, best_of=2)
    assert (status, error["param"], error["code"]) == (400, "best_of", "invalid_value")
    status, answer = ask(client, COMPLETIONS, n=2, best_of=2)
    assert (status, len(answer["choices"])) == (200, 2)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("alias", "value", "pattern"),
    [
        ("guided_json", {"const": "x"}, '"x"'),
        ("guided_json", '{"const": "x"}', '"x"'),
        ("guided_regex", "xyx", "xyx"),
        ("guided_choice", ["xyz"], "xyz"),
        ("guided_grammar", 'root ::= "zyx"', "zyx"),
    ],
)
def test_older_names_of_structures(
    client: httpx.Client, path: str, alias: str, value: object, pattern: str
) -> None:
    limit = next(name for name in BODIES[path] if name.startswith("max"))
    status, answer = ask(client, path, **{alias: value, limit: 50})
    assert status == 200, answer
    assert text(path, answer).strip() == pattern
    structured = {"structured_outputs": {"choice": ["a"]}}
    status, error = ask(client, path, **{alias: value}, **structured)
    assert (status, error["param"]) == (400, alias)


def test_an_invalid_older_name_is_the_one_reported(client: httpx.Client) -> None:
    status, error = ask(client, CHATS, guided_regex="(")
    assert (status, error["param"], error["code"]) == (400, "guided_regex", "invalid_grammar")


@pytest.mark.parametrize("path", BODIES)
def test_llama_cpp_names(client: httpx.Client, path: str) -> None:
    [limit] = [name for name in BODIES[path] if name.startswith("max")]
    unlimited = {name: value for name, value in BODIES[path].items() if name != limit}

    def reported(**changes: object) -> str:
        response = client.post(path, json=unlimited | {"temperature": 0} | changes)
        assert response.status_code == 200, response.text
        return text(path, response.json())

    strong = reported(n_predict=12, repetition_penalty=5.0)
    assert strong == reported(**{limit: 12}, repeat_penalty=5.0, cache_prompt=False)
    assert strong != reported(**{limit: 12})
    assert reported(n_predict=-1) == reported()
    for changes, param in (
        ({"repeat_penalty": 1.5, "repetition_penalty": 1.2}, "repeat_penalty"),
        ({limit: 2, "n_predict": 3}, "n_predict"),
        ({"n_predict": 70_000}, "n_predict"),
    ):
        response = client.post(path, json=unlimited | changes)
        assert response.json()["error"]["param"] == param


def test_unknown_names_are_ignored_where_the_operator_says_so(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, unknown_parameters="ignore")
    with live_server(settings) as server, server.client() as client:
        for _ in range(3):
            status, answer = ask(client, COMPLETIONS, nobody=1, guided_whitespace_pattern="x")
            assert status == 200, answer
        nested = {"structured_outputs": {"choice": ["a"], "backend": "x"}}
        assert ask(client, COMPLETIONS, **nested)[0] == 200
        assert ask(client, COMPLETIONS, suffix="x")[1]["code"] == "unsupported_parameter"
    reported = [r.getMessage() for r in caplog.records if "unknown parameter" in r.getMessage()]
    assert sorted(reported) == [
        f"unknown parameter '{name}' is ignored"
        for name in ("backend", "guided_whitespace_pattern", "nobody")
    ]

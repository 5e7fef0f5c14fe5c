"""Values of a large body are counted before it is parsed."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.bodies import (
    MAX_CONTAINERS,
    MAX_DEEP_VALUES,
    MAX_NAMES,
    MAX_STRINGS,
    check_shape,
    parse,
)
from server.api.schemas.base import ResponseModel
from server.api.sessions import METADATA
from server.errors import InvalidRequest
from tests.server.api.test_problems import check

MANY = MAX_NAMES + 1
MAX_VALUES = 100_000
TOO_MUCH: list[tuple[Any, str | None, str]] = [
    ({"a": 1, "b": {str(i): i for i in range(MANY)}, "c": 2}, "b", "names"),
    ({"a": 1, "b": [[]] * MANY, "c": {}}, "b", "objects and lists"),
    ({"a": {"x": [1, {}]}, "b": {"c": [[{}]] * MANY}}, "b", "objects and lists"),
    ({"a": "x", "b": ["", '",'] * (MAX_STRINGS // 2), "c": 1}, "b", "strings"),
    ({"a": 1, "b": {"c": {"d": [0] * (MAX_DEEP_VALUES + 1)}}}, "b", "values in values"),
    ({"a": [[0] * MAX_VALUES] * 2}, "a", "values"),
    ({"a": [0] * (MAX_VALUES + 1)}, "a", "values"),
    ({f"a{i}": 1 for i in range(MANY)}, f"a{MAX_NAMES}", "names"),
    ([0] * (MAX_VALUES + 2), None, "values"),
    ({f"\ud800{i}": 1 for i in range(MANY)}, f"?{MAX_NAMES}", "names"),
    ({'{"[,:\\': [0] * (MAX_VALUES + 1)}, '{"[,:\\', "values"),
]


@pytest.mark.parametrize(("body", "param", "what"), TOO_MUCH)
@pytest.mark.parametrize("indent", [None, 1])
def test_what_is_too_much_is_named(
    body: Any, param: str | None, what: str, indent: int | None
) -> None:
    with pytest.raises(InvalidRequest, match=f"{what}, the maximum is") as caught:
        check_shape(json.dumps(body, indent=indent).encode(), MAX_VALUES)
    assert caught.value.param == param


values = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('a"\\[]{},:é') | st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('a"\\,:[')), inner),
)


@pytest.mark.long
@given(values)
def test_marks_within_strings_do_not_count(value: Any) -> None:
    text = json.dumps(value).encode()
    num_values = count(value)
    check_shape(text, num_values)
    if num_values:
        with pytest.raises(InvalidRequest, match="values, the maximum is"):
            check_shape(text, num_values - 1)


def test_as_many_strings_as_there_may_be() -> None:
    check_shape(json.dumps(["a"] * MAX_STRINGS).encode(), MAX_VALUES)
    with pytest.raises(InvalidRequest, match=f"{MAX_STRINGS + 1} strings"):
        check_shape(json.dumps(["a"] * (MAX_STRINGS + 1)).encode(), MAX_VALUES)


def count(value: Any) -> int:
    """Commas and containers."""
    if not isinstance(value, dict | list):
        return 0
    inner = value if isinstance(value, list) else list(value.values())
    return 1 + max(0, len(inner) - 1) + sum(map(count, inner))


@given(st.binary())
def test_any_bytes_can_be_counted(content: bytes) -> None:
    check_shape(content, len(content))


def test_a_large_body_in_another_encoding_is_read_as_well(client: httpx.Client) -> None:
    body = json.dumps({"prompt": "the cat " * 1000, "max_tokens": 1, "é": 1}, ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32-be"):
        content, headers = body.encode(encoding), {"Content-Type": "application/json"}
        response = client.post("/v1/completions", content=content, headers=headers)
        check(response, 400, "é", "unknown_parameter")


@pytest.mark.parametrize("kind", ["containers", "half a pair", "infinite", "deep", "huge"])
@pytest.mark.parametrize("delivery", ["plain", "background", "idempotent"])
def test_json_that_cannot_be_written_is_refused(
    client: httpx.Client, session_id: str, kind: str, delivery: str
) -> None:
    schema = {
        "containers": '{"x": [' + "[]," * MAX_CONTAINERS + "[]]}",
        "half a pair": '{"description": ["\\ud800"]}',
        "infinite": '{"default": 1e999}',
        "deep": '{"not":' * 300 + "{}" + "}" * 300,
        "huge": '{"minimum": ' + "9" * 5000 + "}",
    }[kind]
    headers = {"Content-Type": "application/json"}
    path, body = "/v1/completions", f'{{"prompt": "a", "structured_outputs": {{"json": {schema}}}}}'
    if delivery == "idempotent":
        headers |= {"Idempotency-Key": kind, "X-Session-ID": session_id}
    if delivery == "background":
        path, form = "/v1/responses", f'{{"type": "json_schema", "name": "x", "schema": {schema}}}'
        body = f'{{"input": "a", "background": true, "text": {{"format": {form}}}}}'
    response = client.post(path, content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] in ("invalid_value", "invalid_body")


class Answer(ResponseModel):
    text: str


TEXT = json.dumps({"text": "what a client wrote"}).encode()


@pytest.mark.parametrize(
    "read",
    [
        lambda: parse(TEXT, pydantic.TypeAdapter(dict[str, str]), MAX_VALUES)["text"],
        lambda: Answer.model_validate_json(TEXT).text,
        lambda: METADATA.validate_json(TEXT)["text"],
    ],
    ids=["body", "response", "metadata"],
)
def test_no_text_is_kept_once_it_is_parsed(read: Callable[[], str]) -> None:
    first, second = read(), read()
    assert first == second
    assert first is not second

"""Web pages of the listed origins may use the server, and read its errors."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.api.calls import BODY
from tests.server.live import LiveServer, live_server, tiny_settings

PAGE = "https://page.example"
ASKS_FROM_OUTSIDE = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Private-Network": "true",
}
KEY = {"Authorization": "Bearer alpha"}


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings = tiny_settings(
        tiny_checkpoint,
        tmp_path_factory.mktemp("data"),
        api_key=("alpha",),
        cors_origins=(PAGE,),
        max_body_bytes=2000,
        key_requests_per_minute=1000,
    )
    with live_server(settings) as running:
        yield running


@pytest.fixture
def page(shared: LiveServer) -> Iterator[httpx.Client]:
    with shared.client() as client:
        client.headers["Origin"] = PAGE
        yield client


def names(response: httpx.Response, header: str) -> set[str]:
    return {name.strip().lower() for name in response.headers[header].split(",")}


def test_a_preflight_needs_no_key(page: httpx.Client) -> None:
    wanted = (
        "authorization,content-type,idempotency-key,last-event-id,x-session-id,x-request-id,"
        "x-stainless-lang,x-stainless-retry-count,openai-organization,user-agent,x-what-comes-next"
    )
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
    for path in ("/v1/completions", "/v1/sessions"):
        response = page.options(path, headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == PAGE
        assert names(response, "access-control-allow-headers") >= set(wanted.split(","))
        assert names(response, "access-control-allow-methods") == {"get", "post", "delete"}
        assert "access-control-allow-private-network" not in response.headers


def test_a_public_page_may_ask_a_private_address(page: httpx.Client) -> None:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Private-Network": "true",
    }
    response = page.options("/v1/completions", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-private-network"] == "true"


def test_a_method_that_nothing_has_is_refused(page: httpx.Client) -> None:
    response = page.options("/v1/models", headers={"Access-Control-Request-Method": "PUT"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "cors_refused"


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status"),
    [
        ("GET", "/v1/models", KEY, b"", 200),
        ("GET", "/v1/models", {}, b"", 401),
        ("GET", "/v1/none", KEY, b"", 404),
        ("PUT", "/v1/models", KEY, b"", 405),
        ("POST", "/v1/completions", KEY, b"x" * 3000, 413),
        ("POST", "/v1/completions", KEY, b"{}", 400),
    ],
)
def test_every_answer_may_be_read(
    page: httpx.Client,
    method: str,
    path: str,
    headers: dict[str, str],
    content: bytes,
    status: int,
) -> None:
    kind = {"Content-Type": "application/json"}
    response = page.request(method, path, headers=headers | kind, content=content)
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == PAGE
    exposed = names(response, "access-control-expose-headers")
    assert exposed >= {"x-request-id", "x-session-id", "retry-after", "x-should-retry"}
    assert {name for name in response.headers if name.startswith("x-ratelimit")} <= exposed


def test_a_stream_may_be_read(page: httpx.Client) -> None:
    response = page.post("/v1/completions", json=BODY | {"stream": True}, headers=KEY)
    assert response.headers["access-control-allow-origin"] == PAGE
    assert "x-ratelimit-remaining-requests" in response.headers


def test_other_pages_may_not(page: httpx.Client) -> None:
    page.headers["Origin"] = "https://other.example"
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Private-Network": "true",
    }
    refused = page.options("/v1/completions", headers=asked)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "cors_refused"
    for response in (refused, page.get("/v1/models", headers=KEY), page.get("/v1/models")):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_no_page_may_by_default(client: httpx.Client) -> None:
    response = client.get("/v1/models", headers={"Origin": PAGE})
    assert not [name for name in response.headers if name.startswith("access-control")]

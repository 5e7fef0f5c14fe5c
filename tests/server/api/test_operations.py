"""Models, health and metrics."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.patience import wait_until
from tests.server.api.calls import complete, stream
from tests.server.live import LiveServer
from tests.server.test_metrics import DESIGN


def sample(client: httpx.Client, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for found in family.samples:
            if found.name == f"latentd_{name}" and found.labels == labels:
                return float(found.value)
    return 0.0


def test_the_model_object_is_complete(client: httpx.Client, server: LiveServer) -> None:
    [model] = client.get("/v1/models").json()["data"]
    network = server.service.checkpoint.network
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert model["parameters"] == network.num_parameters
    assert model["state_bytes"] == network.state_spec.num_bytes
    assert model["context"] == "unbounded"
    assert (model["vocab_size"], model["chat"]) == (300, False)
    settings = server.service.settings
    limits = (settings.max_prompt_tokens, settings.max_tokens_limit)
    assert (model["max_prompt_tokens"], model["max_tokens"]) == limits
    assert client.get("/v1/models/tiny").json() == model


def test_health(client: httpx.Client) -> None:
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").json() == {"status": "ok"}
    assert client.get("/health").json() == {"status": "ok"}  # where many clients look


def test_every_metric_of_the_design_is_there(client: httpx.Client) -> None:
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    names = {family.name.removeprefix("latentd_") for family in families}
    assert names >= {name.removesuffix("_total") for name in DESIGN}
    assert "process_resident_memory_bytes" in names
    per_session = [f for f in families for s in f.samples if "session_id" in s.labels]
    assert not per_session


def test_metrics_count_what_happened(client: httpx.Client, session_id: str) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "resumed_tokens_total")
    before = [sample(client, name) for name in names]
    commits = sample(client, "session_commit_seconds_count")
    stored = [sample(client, "sessions", tier="store"), sample(client, "session_checkpoints")]
    first = complete(client, prompt=[1, 2, 3], max_tokens=5, session_id=session_id)
    assert first["usage"]["total_tokens"] == 8
    stream(client, prompt=[4], max_tokens=6, session_id=session_id)
    after = [sample(client, name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 11, 8]
    assert sample(client, "session_commit_seconds_count") == commits + 2
    assert sample(client, "sessions", tier="store") == stored[0]
    assert sample(client, "session_checkpoints") == stored[1] + 2
    held = sample(client, "session_bytes", tier="device")
    rows = sample(client, "slots", state="warm")
    assert held == rows * sample(client, "session_state_bytes")
    assert sample(client, "slots", state="running") == 0


def test_outcomes_are_counted(client: httpx.Client, server: LiveServer) -> None:
    endpoint = "/v1/completions"
    kinds = ("ok", "client_error", "cancelled")

    def counts() -> list[float]:
        return [sample(client, "requests_total", endpoint=endpoint, outcome=k) for k in kinds]

    before = counts()
    complete(client)
    client.post(endpoint, json={"prompt": 1})
    endless = {"prompt": "the", "max_tokens": 50_000, "ignore_eos": True, "stream": True}
    with server.client() as leaving, leaving.stream("POST", endpoint, json=endless) as running:
        next(running.iter_lines())
    wait_until(lambda: counts() == [count + 1 for count in before])


def test_the_schema_is_served(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    paths, models = schema["paths"], schema["components"]["schemas"]
    assert {"/v1/completions", "/v1/sessions", "/v1/sessions/{session_id}"} <= paths.keys()
    assert "504" in paths["/v1/completions"]["post"]["responses"]
    for model, field in (
        ("CompletionRequest", "timeout"),
        ("PromptTokensDetails", "cached_tokens"),
    ):
        assert models[model]["properties"][field]["description"]

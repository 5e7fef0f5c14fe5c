"""Metrics: the documented names, in base units, and none that grows with sessions."""

import ast
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

import server
from server.metrics import OUTCOMES, REJECTIONS, GatewayMetrics, Metrics, exemplar

DESIGN = {
    **dict.fromkeys(
        [
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "request_duration_seconds",
            "queue_time_seconds",
            "prefill_time_seconds",
            "step_duration_seconds",
            "session_commit_seconds",
            "session_load_seconds",
            "event_loop_lag_seconds",
        ],
        ("histogram", ()),
    ),
    "requests_total": ("counter", ("endpoint", "outcome")),
    "prompt_tokens_total": ("counter", ()),
    "generation_tokens_total": ("counter", ()),
    "answer_tokens_total": ("counter", ()),
    "resumed_tokens_total": ("counter", ()),
    "admission_rejections_total": ("counter", ("reason",)),
    "session_evictions_total": ("counter", ("tier",)),
    "prefix_cache_hits_total": ("counter", ()),
    "prefix_cached_tokens_total": ("counter", ()),
    "prefix_cache_bytes": ("gauge", ()),
    "requests_running": ("gauge", ()),
    "requests_waiting": ("gauge", ()),
    "batch_size": ("gauge", ()),
    "slots": ("gauge", ("state",)),
    "sessions": ("gauge", ("tier",)),
    "sessions_expired_total": ("counter", ()),
    "responses": ("gauge", ()),
    "session_checkpoints": ("gauge", ()),
    "session_state_bytes": ("gauge", ()),
    "session_bytes": ("gauge", ("tier",)),
    "model_info": ("gauge", ("model", "fingerprint", "device")),
    "ready": ("gauge", ()),
    "running_step_seconds": ("gauge", ()),
    "damaged_states_total": ("counter", ("found",)),
    "state_magnitude": ("gauge", ()),
    "state_position": ("gauge", ()),
    "session_commit_failures_total": ("counter", ()),
    "store_bytes": ("gauge", ()),
    "store_free_bytes": ("gauge", ()),
}


def test_the_metrics_are_those_of_the_design() -> None:
    metrics = Metrics()
    for name, (kind, labels) in DESIGN.items():
        metric = getattr(metrics, name)
        [family, *_] = metric.collect()
        assert (family.type, getattr(metric, "_labelnames", ())) == (kind, labels), name
        assert f"latentd_{name}".removesuffix("_total") == family.name
    attributes = {name for name in vars(metrics) if name != "registry"}
    assert attributes == DESIGN.keys()


def test_what_is_scraped_can_be_parsed_and_has_our_prefix() -> None:
    metrics = Metrics()
    for name, (_, labels) in DESIGN.items():
        if labels:
            getattr(metrics, name).labels(*labels)
    families = {
        family.name: family
        for family in text_string_to_metric_families(metrics.exposition()[0].decode())
    }
    ours = {name for name in families if not name.startswith("process_")}
    assert {name.removesuffix("_created") for name in ours} == {
        f"latentd_{name}".removesuffix("_total") for name in DESIGN
    }
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6
    assert not [name for name in families if ":" in name]
    assert all(families[name].documentation for name in ours)


def test_values_come_out_as_they_went_in() -> None:
    metrics = Metrics()
    metrics.step_duration_seconds.observe(0.0004)
    metrics.step_duration_seconds.observe(1000.0)
    metrics.requests_total.labels(endpoint="/v1/completions", outcome="ok").inc()
    value = metrics.registry.get_sample_value
    assert value("latentd_step_duration_seconds_sum") == 1000.0004
    assert value("latentd_step_duration_seconds_bucket", {"le": "0.001"}) == 1
    assert value("latentd_step_duration_seconds_bucket", {"le": "300.0"}) == 1
    assert value("latentd_step_duration_seconds_bucket", {"le": "+Inf"}) == 2
    labels = {"endpoint": "/v1/completions", "outcome": "ok"}
    assert value("latentd_requests_total", labels) == 1


def test_equal_values_are_observed_together() -> None:
    metrics = Metrics()
    for number, count in ((0.001, 3), (0.0011, 2), (400.0, 1)):
        metrics.inter_token_latency_seconds.observe(number, count)
    value = metrics.registry.get_sample_value
    name = "latentd_inter_token_latency_seconds"
    expected = {"0.001": 3, "0.002": 5, "300.0": 5, "+Inf": 6}
    assert {le: value(f"{name}_bucket", {"le": le}) for le in expected} == expected
    assert value(f"{name}_count") == 6
    assert value(f"{name}_sum") == pytest.approx(400.0052)


def test_servers_in_one_process_count_for_themselves() -> None:
    first, second = Metrics(), Metrics()
    first.prompt_tokens_total.inc(5)
    assert second.registry.get_sample_value("latentd_prompt_tokens_total") == 0


OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2"


def test_every_known_label_begins_at_zero() -> None:
    metrics = Metrics()
    metrics.add_endpoints(["/v1/completions"])
    value = metrics.registry.get_sample_value
    for reason in REJECTIONS:
        assert value("latentd_admission_rejections_total", {"reason": reason}) == 0
    for endpoint in ("/v1/completions", "unknown"):
        for outcome in OUTCOMES:
            labels = {"endpoint": endpoint, "outcome": outcome}
            assert value("latentd_requests_total", labels) == 0
    for tier in ("device", "host"):
        assert value("latentd_session_evictions_total", {"tier": tier}) == 0


def test_the_known_rejections_are_those_of_the_source() -> None:
    refusals = {"Overloaded", "QuotaExceeded", "RateLimited", "ShuttingDown"}
    codes = {"shutting_down"} | {f"{kind}_per_minute" for kind in ("requests", "tokens")}
    for path in Path(server.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in refusals:
                given = [arg.value for arg in node.args[1:] if isinstance(arg, ast.Constant)]
                codes |= {code for code in given if isinstance(code, str)}
    inbox = Path(server.__file__).parent / "engine" / "inbox.py"  # makes them elsewhere
    codes |= set(re.findall(r'"(queue_\w+)"', inbox.read_text()))
    assert codes == set(REJECTIONS)


def test_openmetrics_has_exemplars_that_name_requests() -> None:
    metrics = Metrics()
    metrics.time_to_first_token_seconds.observe(0.003, exemplar("req_1"))
    metrics.time_to_first_token_seconds.observe(0.7, exemplar("x" * 200))
    GatewayMetrics(metrics, "tiny", 4)
    text, content_type = metrics.exposition(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    parse: Callable[[str], Iterable[Metric]] = openmetrics.text_string_to_metric_families
    families = {family.name: family for family in parse(text.decode())}
    found = [
        (sample.labels["le"], sample.exemplar.labels)
        for sample in families["latentd_time_to_first_token_seconds"].samples
        if sample.exemplar is not None
    ]
    assert found == [("0.005", {"request_id": "req_1"})]
    assert "vllm:num_requests_running" in families
    plain, content_type = metrics.exposition("text/plain")
    assert (content_type, b"req_1" in plain) == ("text/plain; version=0.0.4; charset=utf-8", False)


@pytest.mark.parametrize(
    ("request_id", "expected"),
    [("", None), ("r" * 118, {"request_id": "r" * 118}), ("r" * 119, None)],
)
def test_an_exemplar_is_not_too_long(request_id: str, expected: object) -> None:
    metrics = Metrics()
    assert exemplar(request_id) == expected
    metrics.time_to_first_token_seconds.observe(1, exemplar(request_id))


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_gateways_find_the_names_that_they_know(accept: str) -> None:
    metrics = Metrics()
    GatewayMetrics(metrics, "tiny", 4)
    metrics.requests_waiting.set(7)
    metrics.requests_running.set(3)
    lines = metrics.exposition(accept)[0].decode().splitlines()
    for name, value in (
        ("num_requests_waiting", 7.0),
        ("num_requests_running", 3.0),
        ("kv_cache_usage_perc", 0.75),
    ):
        assert f'vllm:{name}{{model_name="tiny"}} {value}' in lines
        assert f"# TYPE vllm:{name} gauge" in lines


def test_the_largest_value_stays() -> None:
    metrics = Metrics()
    value = metrics.registry.get_sample_value
    found = []
    for number in (0.5, 3.0, 2.0):
        metrics.state_magnitude.observe(number)
        found.append(value("latentd_state_magnitude"))
    assert found == [0.5, 3.0, 3.0]
    assert value("latentd_state_position") == 0

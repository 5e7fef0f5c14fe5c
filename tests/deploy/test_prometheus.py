"""Every query we ship, evaluated by Debian's Prometheus on a server with clients."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from tests.deploy.monitored import Monitored, Query, dashboard_queries, monitored, rule_queries
from tests.deploy.programs import program
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.external

QUERIES = [*dashboard_queries(), *rule_queries()]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    """Waits for a result of every query, with a time limit."""
    with monitored(tmp_path_factory.mktemp("monitored")) as whole:
        missing = list(QUERIES)

        def is_complete() -> bool:
            missing[:] = [each for each in missing if not whole.prometheus.series(each)]
            return not missing

        with suppress(TimeoutError):  # the tests say which are missing
            wait_until(is_complete)
        yield whole


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_every_query_has_an_answer(running: Monitored, query: Query) -> None:
    assert running.prometheus.series(query), query.expr


def test_prometheus_scrapes_the_server_and_evaluates_every_rule(running: Monitored) -> None:
    def is_scraped() -> bool:
        [target] = running.prometheus.get("/targets")["activeTargets"]
        return bool(target["health"] == "up")

    wait_until(is_scraped)
    groups = running.prometheus.get("/rules")["groups"]
    unhealthy = [rule for group in groups for rule in group["rules"] if rule["health"] != "ok"]
    assert unhealthy == []


def test_no_alert_is_about_a_server_that_is_well(running: Monitored) -> None:
    """Its clients may be rejected more often than usual, as intended, and may be slow.

    promtool's tests check that each alert fires when it should.
    """
    alerts = running.prometheus.get("/alerts")["alerts"]
    firing = {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}
    busy = {"LatentdSlowFirstTokens", "LatentdCommitsSlow", "LatentdEventLoopSaturated"}
    assert firing <= {"LatentdNoCapacity"} | busy


def test_promtool_finds_no_fault_in_the_metrics(running: Monitored) -> None:
    text = httpx.get(running.metrics_url, timeout=PATIENCE_S).text
    assert "latentd_requests_total" in text
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_totals_are_what_clients_received(running: Monitored) -> None:
    """Runs last, since it ends the load."""
    running.load.stop()
    received = running.load.received
    assert received["429"] > 0
    expected = {
        'latentd_requests_total{endpoint="/v1/completions",outcome="ok"}': received["200"],
        'latentd_requests_total{endpoint="/v1/completions",outcome="client_error"}': received[
            "429"
        ],
        'latentd_admission_rejections_total{reason="queue_full"}': received["429"],
        "latentd_prompt_tokens_total + latentd_resumed_tokens_total": received["in"],
        "latentd_generation_tokens_total": received["out"],
    }

    def totals() -> dict[str, float]:
        """Of the last scrape."""
        answers = {expr: running.prometheus.get("/query", query=expr) for expr in expected}
        return {expr: float(data["result"][0]["value"][1]) for expr, data in answers.items()}

    with suppress(TimeoutError):
        wait_until(lambda: totals() == expected)
    assert totals() == expected

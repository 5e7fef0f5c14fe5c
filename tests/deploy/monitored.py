"""A server of the default model with clients, and Debian's Prometheus with our rules."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from model import PRETRAINED
from tests.deploy.programs import DEPLOY, daemon, free_port
from tests.patience import PATIENCE_S
from tests.server.processes import server_process

INTERVAL_S = 1
"""Interval of scrapes and rule evaluations."""

FLAGS = (
    *("--max-running", "4", "--max-waiting", "4"),  # so that some requests are rejected
    *("--warm-sessions", "1", "--host-cache-bytes", "1000000"),  # and states are loaded
)
STORY = "Once upon a time there was a little girl who lived in a house by the sea. " * 8
MACROS = {"$__rate_interval": "15s", "$instance": ".*"}
"""Values of Grafana's variables in queries."""


@dataclass(frozen=True)
class Query:
    """A query of the dashboard or the rules."""

    where: str
    expr: str
    legend: str = ""
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.where} {self.legend}".strip()


def dashboard_queries() -> list[Query]:
    panels = json.loads((DEPLOY / "grafana" / "latentd.json").read_text())["panels"]
    queries = []
    for panel in panels:
        for target in panel.get("targets", ()):
            expr = target["expr"]
            for macro, value in MACROS.items():
                expr = expr.replace(macro, value)
            unit = panel["fieldConfig"]["defaults"]["unit"]
            queries.append(Query(panel["title"], expr, target["legendFormat"], unit))
    return queries


def rule_queries() -> list[Query]:
    """A comparison with a number returns 0 instead of nothing if it is false."""
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    return [
        Query(
            rule.get("alert") or rule["record"],
            re.sub(r" (==|<|>) (?=[\d.]+)", r" \1 bool ", rule["expr"]),
        )
        for group in groups
        for rule in group["rules"]
    ]


class Prometheus:
    """A running Prometheus."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._started = time.time()

    def get(self, path: str, **parameters: str | float) -> Any:
        """The `data` of a response. Raises AssertionError if it is an error."""
        answer = self._client.get(path, params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def series(self, query: Query) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Labels, and times with values, of all numeric results since the start."""
        times = {"start": self._started, "end": time.time(), "step": INTERVAL_S}
        found = []
        for each in self.get("/query_range", query=query.expr, **times)["result"]:
            points = [(when, float(value)) for when, value in each["values"] if value != "NaN"]
            if points:
                found.append((each["metric"], points))
        return found


class Load:
    """Clients of all kinds, until `stop`; `received` counts their responses."""

    def __init__(self, url: str) -> None:
        self.received = Counter[str]()
        self._url = url
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(12)
        work = (self._sessions, *[self._stories] * 3, *[self._floods] * 8)
        self._clients = [self._pool.submit(each) for each in work]

    def stop(self) -> None:
        """Raises what a client raised."""
        self._stopped.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()

    def _count(self, response: httpx.Response) -> None:
        usage = response.json()["usage"] if response.status_code == 200 else {}
        with self._lock:
            self.received[str(response.status_code)] += 1
            self.received["out"] += usage.get("completion_tokens", 0)
            self.received["in"] += usage.get("prompt_tokens", 0)

    def _complete(self, client: httpx.Client, **body: object) -> None:
        self._count(client.post("/v1/completions", json=body))

    def _sessions(self) -> None:
        """Each turn loads its state, since only one stays on the device and few in host memory."""
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
            ids = [client.post("/v1/sessions").json()["id"] for _ in range(8)]
            while not self._stopped.is_set():
                for session_id in ids:
                    self._complete(client, session_id=session_id, prompt=" And", max_tokens=20)

    def _stories(self) -> None:
        """Prompts with a shared prefix."""
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
            while not self._stopped.is_set():
                self._complete(client, prompt=STORY, max_tokens=60)

    def _floods(self) -> None:
        """Occasionally more concurrent requests than may wait."""
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
            while not self._stopped.wait(3 - time.time() % 3):
                self._complete(client, prompt="The cat", max_tokens=200, ignore_eos=True)


@dataclass(frozen=True)
class Monitored:
    metrics_url: str
    prometheus: Prometheus
    load: Load


@contextmanager
def monitored(folder: Path) -> Iterator[Monitored]:
    """A server under load, scraped from before the first request."""
    metrics = f"127.0.0.1:{free_port()}"
    with (
        server_process(PRETRAINED, folder / "data", *FLAGS, "--metrics-address", metrics) as server,
        prometheus(metrics, folder) as watching,
    ):
        load = Load(server.url)
        try:
            yield Monitored(f"http://{metrics}/metrics", watching, load)
        finally:
            load.stop()


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus configured by deploy/prometheus, for another target and shorter intervals."""
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    interval = f"{INTERVAL_S}s"
    configuration["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    configuration["rule_files"] = [str(DEPLOY / "prometheus" / "rules.yml")]
    [job] = configuration["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    flags = (
        *(f"--config.file={file}", f"--storage.tsdb.path={folder / 'series'}"),
        *(f"--web.listen-address={address}", "--log.level=warn"),
    )
    with (
        daemon(f"http://{address}/-/ready", "prometheus", *flags),
        httpx.Client(base_url=f"http://{address}/api/v1", timeout=PATIENCE_S) as client,
    ):
        yield Prometheus(client)

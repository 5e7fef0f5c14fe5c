"""Prometheus metrics: base units, prefix `latentd_`, never a label per session."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)


OUTCOMES = ("ok", "client_error", "server_error", "cancelled", "deadline_exceeded")
"""Outcomes of requests."""

REJECTIONS = (
    *("requests_per_minute", "tokens_per_minute"),
    *("concurrent_requests", "concurrent_sequences", "too_many_requests"),
    *("queue_full", "queue_tokens_full", "queue_states_full", "held_bytes_full"),
    *("grammar_queue_full", "too_many_streams"),
    *("session_quota_exceeded", "response_quota_exceeded", "session_bytes_quota_exceeded"),
    "shutting_down",
)
"""Reasons for rejections: error codes."""

METRICS = "/metrics"
"""Path of the metrics endpoint."""

OPENMETRICS = openmetrics.CONTENT_TYPE_LATEST
MAX_EXEMPLAR_CHARACTERS = 128
"""OpenMetrics' limit for an exemplar's names and values together."""


class GroupedHistogram(Collector):
    """A histogram with bulk observations from a single thread."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._bounds = (*SECONDS, inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, count: int = 1) -> None:
        """Observe a value `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry."""
        totals = accumulate(self._counts)
        buckets = zip(map(floatToGoString, self._bounds), totals, strict=True)
        yield HistogramMetricFamily(self._name, self._text, list(buckets), self._sum)


class LargestGauge(Collector):
    """The largest value observed since startup."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._largest = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._largest = max(self._largest, value)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """For the registry."""
        yield GaugeMetricFamily(self._name, self._text, self._largest)


class Metrics:
    """All metrics of one server; each attribute has the metric's name without the prefix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        self.time_to_first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self.inter_token_latency_seconds = GroupedHistogram(
            "latentd_inter_token_latency_seconds",
            "Between two tokens of a sequence.",
            self.registry,
        )
        self.request_duration_seconds = self._histogram(
            "request_duration_seconds", "From a request's arrival to the end of its answer."
        )
        self.queue_time_seconds = self._histogram(
            "queue_time_seconds", "From a request's arrival until it gets a row."
        )
        self.prefill_time_seconds = self._histogram(
            "prefill_time_seconds", "From getting a row until the prompt is read."
        )
        self.step_duration_seconds = self._histogram(
            "step_duration_seconds", "One decoding step of all running sequences."
        )
        self.session_commit_seconds = self._histogram(
            "session_commit_seconds", "Making a turn durable."
        )
        self.session_load_seconds = self._histogram(
            "session_load_seconds", "Loading a parked state from host memory or the store."
        )
        self.requests_total = self._counter(
            "requests_total", "Answered requests.", "endpoint", "outcome"
        )
        self.prompt_tokens_total = self._counter(
            "prompt_tokens_total", "Prompt tokens, including those in the prefix cache."
        )
        self.generation_tokens_total = self._counter("generation_tokens_total", "Tokens generated.")
        self.resumed_tokens_total = self._counter(
            "resumed_tokens_total", "Tokens of session histories that did not need to be read."
        )
        self.prefix_cache_hits_total = self._counter(
            "prefix_cache_hits_total", "Prompts with a cached prefix."
        )
        self.prefix_cached_tokens_total = self._counter(
            "prefix_cached_tokens_total", "Prompt tokens found in the prefix cache."
        )
        self.prefix_cache_bytes = self._gauge(
            "prefix_cache_bytes", "Bytes of states in the prefix cache."
        )
        self.admission_rejections_total = self._counter(
            "admission_rejections_total", "Requests rejected before any work.", "reason"
        )
        self.session_evictions_total = self._counter(
            "session_evictions_total", "States evicted from a tier.", "tier"
        )
        self.sessions_expired_total = self._counter(
            "sessions_expired_total", "Sessions erased after their ttl."
        )
        self.requests_running = self._gauge("requests_running", "Sequences in prefill or decoding.")
        self.requests_waiting = self._gauge("requests_waiting", "Sequences waiting for a row.")
        self.batch_size = self._gauge("batch_size", "Sequences in the last decoding step.")
        self.slots = self._gauge("slots", "Rows of the state pool.", "state")
        self.sessions = self._gauge(
            "sessions",
            "Sessions in this tier: warm on the device between turns, in host memory (both "
            "including stored responses), in the store.",
            "tier",
        )
        self.responses = self._gauge("responses", "Responses in the store.")
        self.session_checkpoints = self._gauge(
            "session_checkpoints",
            "States in the store, of all stored turns and responses.",
        )
        self.session_state_bytes = self._gauge(
            "session_state_bytes", "Size of one session's state, at any length."
        )
        self.session_bytes = self._gauge(
            "session_bytes", "Bytes of sessions and stored responses.", "tier"
        )
        self.model_info = self._gauge(
            "model_info", "The model being served.", "model", "fingerprint", "device"
        )

        self.answer_tokens_total = self._counter(
            "answer_tokens_total",
            "Generated tokens of complete answers: the sum of their completion_tokens.",
        )
        self.event_loop_lag_seconds = self._histogram(
            "event_loop_lag_seconds", "Delay of the event loop's timers."
        )
        self.ready = self._gauge("ready", "1 while /health/ready succeeds, else 0.")
        self.running_step_seconds = self._gauge(
            "running_step_seconds", "How long the engine's current step has run; 0 between steps."
        )
        self.damaged_states_total = self._counter(
            "damaged_states_total",
            "Damaged states: in a turn, in a retained row on the device, in the store.",
            "found",
        )
        self.state_magnitude = LargestGauge(
            "latentd_state_magnitude",
            "Largest absolute value in the checked states, after turns and when idle.",
            self.registry,
        )
        self.state_position = LargestGauge(
            "latentd_state_position", "Most tokens read by a checked state.", self.registry
        )
        self.session_commit_failures_total = self._counter(
            "session_commit_failures_total", "Turns that could not be made durable."
        )
        self.store_bytes = self._gauge("store_bytes", "Bytes of the store's files.")
        self.store_free_bytes = self._gauge("store_free_bytes", "Bytes free on the store's disk.")
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Initialize labels, so that rates and alerts work from the first event."""
        for reason in REJECTIONS:
            self.admission_rejections_total.labels(reason=reason)
        for tier in ("device", "host"):
            self.session_evictions_total.labels(tier=tier)
        for found in ("turn", "idle", "store"):
            self.damaged_states_total.labels(found=found)

    def add_endpoints(self, endpoints: Iterable[str]) -> None:
        """Initialize the request counters of these endpoints."""
        for endpoint in (*endpoints, "unknown"):
            for outcome in OUTCOMES:
                self.requests_total.labels(endpoint=endpoint, outcome=outcome)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics in the format that the Accept header requests, and its content type."""
        if "application/openmetrics-text" in accept:
            # Keep the names unchanged: other escaping schemes of the library replace colons.
            encode: Callable[..., bytes] = openmetrics.generate_latest
            return encode(self.registry, openmetrics.ALLOWUTF8), OPENMETRICS
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"latentd_{name}", text, buckets=SECONDS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"latentd_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"latentd_{name}", text, labels, registry=self.registry)


class GatewayMetrics(Collector):
    """vLLM-compatible metrics for load-balancing gateways."""

    def __init__(self, metrics: Metrics, model_name: str, max_running: int) -> None:
        self._model_name = model_name
        self._values: tuple[tuple[str, str, Gauge, int], ...] = (
            ("num_requests_waiting", "Sequences waiting for a row.", metrics.requests_waiting, 1),
            ("num_requests_running", "Sequences with a row.", metrics.requests_running, 1),
            (
                "kv_cache_usage_perc",
                "Rows in use, divided by the maximum of running sequences.",
                metrics.requests_running,
                max_running,
            ),
        )
        metrics.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """For the registry."""
        for name, text, gauge, most in self._values:
            [family] = gauge.collect()
            value = family.samples[0].value / most
            found = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            found.add_metric([self._model_name], value)
            yield found


def exemplar(request_id: str) -> dict[str, str] | None:
    """Exemplar with the request's id, if the id is not too long."""
    found = {"request_id": request_id}
    is_short = len("".join([*found, request_id])) <= MAX_EXEMPLAR_CHARACTERS
    return found if request_id and is_short else None

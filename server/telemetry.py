"""OpenTelemetry: a server span per request and duration metrics, exported by OTLP over HTTP.

The only module that imports OpenTelemetry, itself imported only if enabled. The OTEL_* variables of
the specification configure destination, sampling and names. Spans are created from a request's
record when it has ended; an SDK thread sends them and drops what it cannot send.
"""

import threading
import time
from collections.abc import Callable

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import Histogram
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import (
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.util.types import AttributeValue

from server.records import RequestRecord, TurnRecord

PROVIDER = "latentd"
CHATS = ("/v1/chat/completions", "/v1/responses")
"""Endpoints with the operation `chat`; others are `text_completion`."""

FAULTS = ("server_error", "deadline_exceeded")
"""Outcomes that mark a span as an error: caused by the server, not the client."""

CLOSING_S = 2.0
"""Time limit for the final export; the SDK would wait longer for a dead collector."""

CLOSING = "closing telemetry"
"""Name of the closing threads."""

DURATION_S = tuple(0.01 * 2**i for i in range(14))
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08),
    *(0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""Histogram bounds recommended by the conventions."""


class Telemetry:
    """Exports records of requests. Thread-safe."""

    def __init__(self, version: str, model_name: str) -> None:
        self._model_name = model_name
        named = Resource({SERVICE_NAME: PROVIDER, SERVICE_VERSION: version})
        resource = Resource.create().merge(named).merge(OTELResourceDetector().detect())
        self._traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._traces.get_tracer(PROVIDER, version)
        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        self._metrics = MeterProvider([reader], resource, shutdown_on_exit=False)
        self._duration = self._histogram(
            "request.duration", "From a request's arrival to the end of its answer.", DURATION_S
        )
        self._first_token = self._histogram(
            "time_to_first_token", "For complete answers.", FIRST_TOKEN_S
        )
        self._per_token = self._histogram(
            "time_per_output_token",
            "After the first one, for complete answers.",
            PER_TOKEN_S,
        )

    def record(self, request: RequestRecord) -> None:
        """Record a finished request."""
        at = _clock()
        name = f"{request.method} {request.endpoint}"
        if request.turn is not None:
            name = f"{_operation(request)} {self._model_name}"
        attributes = {**_http_attributes(request), **self._turn_attributes(request)}
        parent = propagate.extract(request.trace_headers)
        span = self._tracer.start_span(
            name, parent, SpanKind.SERVER, attributes, start_time=at(request.started)
        )
        if request.outcome in FAULTS:
            span.set_status(Status(StatusCode.ERROR, request.error))
        if request.turn is not None:
            context = set_span_in_context(span)
            for phase, start, end in _phases(request.turn):
                child = self._tracer.start_span(phase, context, start_time=at(start))
                child.end(at(end))
            self._measure(request, request.turn)
        span.end(at(request.ended))

    def close(self) -> None:
        """Flush within a time limit, in daemon threads."""
        providers = (self._traces, self._metrics)
        threads = [
            threading.Thread(target=each.shutdown, name=CLOSING, daemon=True) for each in providers
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + CLOSING_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _measure(self, request: RequestRecord, turn: TurnRecord) -> None:
        attributes = self._model_attributes(request)
        if request.outcome != "ok":
            attributes["error.type"] = request.error or request.outcome
        self._duration.record(request.ended - request.started, attributes)
        first_s, decoded_s = turn.first_token_s, turn.decoded_s
        if request.outcome == "ok" and first_s is not None and decoded_s is not None:
            self._first_token.record(first_s, attributes)
            num_after = turn.generated_tokens // turn.num_choices - 1
            if num_after > 0:
                self._per_token.record((decoded_s - first_s) / num_after, attributes)

    def _model_attributes(self, request: RequestRecord) -> dict[str, AttributeValue]:
        return {
            "gen_ai.operation.name": _operation(request),
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
        }

    def _turn_attributes(self, request: RequestRecord) -> dict[str, AttributeValue]:
        attributes: dict[str, AttributeValue] = {}
        if request.session_id is not None:
            attributes["gen_ai.conversation.id"] = request.session_id
        turn = request.turn
        if turn is None:
            return attributes
        return {
            **attributes,
            **self._model_attributes(request),
            "gen_ai.request.max_tokens": turn.max_tokens,
            "gen_ai.request.choice.count": turn.num_choices,
            "gen_ai.request.stream": request.streams,
            "gen_ai.response.id": turn.answer_id,
            "gen_ai.response.finish_reasons": turn.reasons,
            "gen_ai.usage.input_tokens": turn.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": turn.cached_tokens,
            "gen_ai.usage.output_tokens": turn.generated_tokens,
        }

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return self._metrics.get_meter(PROVIDER).create_histogram(
            f"gen_ai.server.{name}", "s", text, explicit_bucket_boundaries_advisory=bounds
        )


def _clock() -> Callable[[float], int]:
    """Converter from `time.monotonic` seconds to Unix nanoseconds."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    return lambda moment: offset_ns + round(moment * 1e9)


def _operation(request: RequestRecord) -> str:
    return "chat" if request.endpoint in CHATS else "text_completion"


def _http_attributes(request: RequestRecord) -> dict[str, AttributeValue]:
    """Without the path, which contains ids."""
    attributes: dict[str, AttributeValue] = {
        "http.request.method": request.method,
        "http.route": request.endpoint,
        "latentd.request.id": request.request_id,
    }
    if request.status:
        attributes["http.response.status_code"] = request.status
    if request.outcome != "ok":
        attributes["error.type"] = request.error or request.outcome
    return attributes


def _phases(turn: TurnRecord) -> list[tuple[str, float, float]]:
    """Known phases of a turn: names, starts and ends."""
    phases = []
    if turn.queue_s is not None and turn.prefill_s is not None and turn.decoded_s is not None:
        row_at = turn.started + turn.queue_s
        read_at = row_at + turn.prefill_s
        phases = [
            ("queue", turn.started, row_at),
            ("prefill", row_at, read_at),
            ("decode", read_at, turn.started + turn.decoded_s),
        ]
    if turn.committing is not None:
        phases.append(("commit", *turn.committing))
    return phases

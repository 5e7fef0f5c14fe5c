"""A receiver of OTLP over HTTP on the loopback, which decodes what it receives."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import HistogramDataPoint
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """The data received so far."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Span] = []
        self.histograms: dict[str, HistogramDataPoint] = {}
        """The last data point of each."""

        self.resource: dict[str, object] = {}
        self.bodies: list[bytes] = []
        """Raw requests, decompressed."""

        self.num_asked = 0
        self.answers = threading.Event()
        """If cleared, requests are not answered."""

        self.answers.set()

    def receive(self, path: str, body: bytes) -> None:
        self.bodies.append(body)
        if path == "/v1/traces":
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resource = attributes(of_resource.resource.attributes)
                for scope in of_resource.scope_spans:
                    self.spans.extend(scope.spans)
            return
        for resource_metrics in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            for scope_metrics in resource_metrics.scope_metrics:
                for metric in scope_metrics.metrics:
                    if metric.WhichOneof("data") == "histogram":
                        self.histograms[metric.name] = metric.histogram.data_points[0]

    def find(self, name: str) -> Span:
        [span] = [span for span in self.spans if span.name == name]
        return span


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector that listens until the context ends."""
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.num_asked += 1
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            found.answers.wait()
            found.receive(self.path, body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield found
        finally:
            found.answers.set()
            server.shutdown()
            thread.join()


def attributes(given: Any) -> dict[str, object]:
    """Attributes as plain values."""
    pairs: list[KeyValue] = list(given)
    return {pair.key: _plain(pair.value) for pair in pairs}


def _plain(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(each) for each in value.array_value.values]
    return None if kind is None else getattr(value, kind)

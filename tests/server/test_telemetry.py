"""OpenTelemetry: what a receiver on the loopback gets, and a receiver that does not respond."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from server import serve, telemetry
from server.records import RequestRecord
from server.serve import ServeError
from server.settings import Settings
from server.telemetry import Telemetry
from tests.patience import wait_until
from tests.server.api.calls import complete
from tests.server.collector import Collector, attributes, collector
from tests.server.live import LiveServer, live_server, tiny_settings
from tests.server.processes import server_process

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
PATH = "/v1/completions"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collector() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        yield found


@pytest.fixture
def sender(receiver: Collector) -> Iterator[Telemetry]:
    del receiver
    sender = Telemetry("1.2.3", "tiny")
    yield sender
    for provider in (sender._traces, sender._metrics):
        provider.shutdown()


@pytest.fixture
def traced(sender: Telemetry, tiny_checkpoint: Path, tmp_path: Path) -> Iterator[LiveServer]:
    settings = tiny_settings(tiny_checkpoint, tmp_path, model_name="tiny")
    with live_server(settings, trace=sender.record) as server:
        yield server


def flush(sender: Telemetry, receiver: Collector, num_spans: int) -> None:
    """Send the records once there are enough: a client may finish before the server records it."""

    def has_come() -> bool:
        return bool(sender._traces.force_flush()) and len(receiver.spans) >= num_spans

    wait_until(has_come)
    assert len(receiver.spans) == num_spans
    assert sender._metrics.force_flush()


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_turn_is_a_span_with_its_phases(
    traced: LiveServer, sender: Telemetry, receiver: Collector
) -> None:
    with traced.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
        complete(client, session_id=session_id, prompt=[1, 2])
        response = client.post(
            PATH,
            json={
                "prompt": "unmistakable words",
                "max_tokens": 6,
                "ignore_eos": True,
                "session_id": session_id,
                "timings": True,
            },
            headers={"traceparent": TRACEPARENT, "X-Request-ID": "req-1"},
        )
        answer = response.json()
    flush(sender, receiver, 1 + 5 + 5)
    spans = {s.name: s for s in receiver.spans if s.trace_id.hex() == TRACE_ID}
    assert set(spans) == {"text_completion tiny", "queue", "prefill", "decode", "commit"}
    parent = spans.pop("text_completion tiny")
    assert parent.parent_span_id.hex() == PARENT_ID
    assert parent.kind == Span.SPAN_KIND_SERVER
    usage = answer["usage"]
    found = attributes(parent.attributes)
    assert found == {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "latentd.request.id": "req-1",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "latentd",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.stream": False,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.conversation.id": session_id,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "gen_ai.usage.output_tokens": 6,
    }
    for span in spans.values():
        assert span.parent_span_id == parent.span_id
        assert parent.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= parent.end_time_unix_nano
    timings = answer["timings"]
    assert seconds(spans["queue"]) == pytest.approx(timings["queue_s"], abs=1e-5)
    assert seconds(spans["prefill"]) == pytest.approx(timings["prefill_s"], abs=1e-5)
    assert spans["prefill"].start_time_unix_nano == spans["queue"].end_time_unix_nano
    assert spans["decode"].end_time_unix_nano <= spans["commit"].start_time_unix_nano
    for histogram in ("request.duration", "time_to_first_token", "time_per_output_token"):
        point = receiver.histograms[f"gen_ai.server.{histogram}"]
        assert point.count == 2
        assert attributes(point.attributes)["gen_ai.request.model"] == "tiny"
    first = receiver.histograms["gen_ai.server.time_to_first_token"]
    assert (first.explicit_bounds[0], first.explicit_bounds[-1]) == (0.001, 10.0)
    assert first.sum > timings["first_token_s"]
    assert receiver.resource["service.name"] == "latentd"
    assert receiver.resource["service.version"] == "1.2.3"
    assert not [body for body in receiver.bodies if b"unmistakable" in body]


def test_requests_without_a_turn_have_a_span_and_probes_have_none(
    traced: LiveServer, sender: Telemetry, receiver: Collector
) -> None:
    with traced.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
        client.get("/health/live")
        client.get("/metrics")
        client.get(f"/v1/sessions/{session_id}")
        client.post(PATH, json={"prompt": 5, "traceparent": "x"})
    flush(sender, receiver, 3)
    assert {span.name for span in receiver.spans} == {
        *("POST /v1/sessions", "GET /v1/sessions/{session_id}"),
        f"POST {PATH}",
    }
    shown = attributes(receiver.find("GET /v1/sessions/{session_id}").attributes)
    assert shown["gen_ai.conversation.id"] == session_id
    refused = receiver.find(f"POST {PATH}")
    assert attributes(refused.attributes)["error.type"] == "invalid_value"
    assert refused.status.code == Status.STATUS_CODE_UNSET  # the client's fault
    assert not receiver.histograms


def test_a_client_that_leaves_is_no_fault_of_the_server(
    traced: LiveServer, sender: Telemetry, receiver: Collector
) -> None:
    endless = {"prompt": "a", "max_tokens": 60_000, "ignore_eos": True, "stream": True}
    with traced.client() as client, client.stream("POST", PATH, json=endless) as running:
        next(running.iter_lines())
    flush(sender, receiver, 1)
    [span] = receiver.spans
    assert span.status.code == Status.STATUS_CODE_UNSET
    found = attributes(span.attributes)
    assert (found["error.type"], found["gen_ai.request.stream"]) == ("cancelled", True)
    assert int(str(found["gen_ai.usage.output_tokens"])) > 0
    duration = receiver.histograms["gen_ai.server.request.duration"]
    assert attributes(duration.attributes)["error.type"] == "cancelled"
    assert "gen_ai.server.time_to_first_token" not in receiver.histograms


def test_a_turn_that_is_too_late_is_an_error(
    traced: LiveServer, sender: Telemetry, receiver: Collector
) -> None:
    late = {"prompt": "a", "max_tokens": 60_000, "ignore_eos": True, "timeout": 0.01}
    with traced.client() as client:
        assert client.post(PATH, json=late).status_code == 504
    flush(sender, receiver, 1)
    [span] = receiver.spans
    assert (span.status.code, span.status.message) == (
        Status.STATUS_CODE_ERROR,
        "deadline_exceeded",
    )


def test_a_receiver_that_does_not_answer_delays_nothing(
    traced: LiveServer,
    sender: Telemetry,
    receiver: Collector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receiver.answers.clear()
    monkeypatch.setattr(telemetry, "CLOSING_S", 0.01)
    with traced.client() as client:
        for _ in range(3):
            complete(client)
    sender.record(RequestRecord("req-1", "GET"))
    sender.close()
    wait_until(lambda: receiver.num_asked)
    closing = [t for t in threading.enumerate() if t.name == telemetry.CLOSING]
    assert closing
    assert all(thread.daemon for thread in closing)  # they do not keep the process
    receiver.answers.set()
    for thread in closing:
        thread.join()
    wait_until(lambda: receiver.spans)


def test_without_the_extra_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve._telemetry(Settings()) is None
    monkeypatch.delitem(sys.modules, "server.telemetry")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ServeError, match=r"latentd\[otel\]"):
        serve._telemetry(Settings(otel=True))


@pytest.mark.long
def test_nothing_of_it_is_imported_while_it_is_off() -> None:
    script = "import sys, server.serve; print(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    loaded = shown.stdout.split()
    assert "server.api.middleware" in loaded
    ours = ("server.telemetry", "opentelemetry.sdk", "opentelemetry.exporter", "requests")
    assert not [name for name in loaded if name.startswith(ours)]


@pytest.mark.long
def test_a_server_sends_what_is_left_when_it_stops(
    receiver: Collector,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # would add spans of its own
    with server_process(tiny_checkpoint, tmp_path, "--otel", "--api-workers", "2") as server:
        with server.client() as client:
            complete(client)
        assert server.stop() == 0
    names = {span.name for span in receiver.spans}
    assert names == {"text_completion tiny", "queue", "prefill", "decode"}
    assert receiver.resource["service.name"] == "mine"
    assert receiver.histograms["gen_ai.server.request.duration"].count == 1


@pytest.mark.long
def test_a_server_ends_without_a_receiver(
    receiver: Collector, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    receiver.answers.clear()
    with server_process(tiny_checkpoint, tmp_path, "--otel") as server:
        with server.client() as client:
            complete(client)
        assert server.stop() == 0
        assert not receiver.spans
        [line] = server.lines("exit")
    assert json.dumps(line["drain_s"])
    assert httpx.get(f"{receiver.url}/").status_code == 501  # it was there all the time

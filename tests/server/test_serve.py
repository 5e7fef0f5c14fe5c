"""A server's lifecycle: its output, its exit, and what survives."""

import re
import resource
import signal
import threading
from pathlib import Path

import httpx
import pytest

from server.serve import _warn_if_open
from tests.patience import PROGRAM_S, wait_until
from tests.server.api.calls import complete, text_of
from tests.server.processes import server_process

LONG_DRAIN = ("--drain-timeout-s", str(PROGRAM_S))


def test_it_prints_its_configuration_and_exits_with_status_0(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with server_process(tiny_checkpoint, tmp_path / "data") as server:
        facts = {line.split()[0]: line for line in server.facts}
        with server.client() as client:
            [model] = client.get("/v1/models").json()["data"]
        assert f"{model['parameters']:,} parameters" in facts["model"]
        assert f"{model['state_bytes']:,} bytes" in facts["session"]
        assert "cpu" in facts["device"]
        assert re.fullmatch(r"backend +compiled for \w+( with [\w-]+)?", facts["backend"])
        assert facts["arithmetic"] == "arithmetic float32 x float32"
        assert re.fullmatch(r"listening +http:\S+ +\(ready in \d+\.\d s\)", server.facts[-1])
        assert "64 on the device" in facts["fits"]
        data = tmp_path / "data"
        assert (data / "sessions.sqlite3").exists()
        modes = {path: path.stat().st_mode & 0o077 for path in (data, *data.rglob("*"))}
        assert set(modes.values()) == {0}
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("address", "warns"),
    [("127.0.0.1", False), ("127.9.0.1", False), ("::1", False), ("0.0.0.0", True), ("::", True)],
)
def test_a_server_without_keys_that_others_can_reach_says_so(
    caplog: pytest.LogCaptureFixture, address: str, warns: bool
) -> None:
    _warn_if_open(address)
    assert [address in record.getMessage() for record in caplog.records] == [True] * warns


@pytest.mark.long
def test_its_life_is_a_line_for_each_step(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with (
        server_process(tiny_checkpoint, tmp_path, *LONG_DRAIN) as server,
        server.client() as client,
    ):
        endless = {"prompt": "a", "max_tokens": 20_000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=endless) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert "data: [DONE]" in list(lines)
        assert server.wait() == 0
    [start], [ready], [drain], [end] = map(server.lines, ("start", "ready", "drain", "exit"))
    assert start["pid"] == server.process.pid
    assert (ready["url"], drain["timeout_s"]) == (server.url, PROGRAM_S)
    assert drain["turns"] == 1
    assert 0 < start["load_s"] < ready["ready_s"] < end["uptime_s"]
    assert 0 < end["drain_s"] < end["uptime_s"]
    [request] = server.lines("request")
    assert (request["tokens_out"], request["outcome"]) == (20_000, "ok")


@pytest.mark.long
def test_only_a_first_start_compiles_and_says_so(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "machine code"))
    with server_process(tiny_checkpoint, tmp_path) as server:
        loading, compiling, compiled = server.facts[:3]
        assert server.stop() == 0
    assert loading == f"loading    {tiny_checkpoint}"
    assert compiling.startswith("compiling  machine code for ")
    seconds = re.fullmatch(r"compiled   in ([\d.]+) s, cached for the next start", compiled)
    ready = re.search(r"ready in ([\d.]+) s", server.facts[-1])
    assert seconds is not None
    assert ready is not None
    assert 0 < float(seconds[1]) < float(ready[1])
    with server_process(tiny_checkpoint, tmp_path) as server, server.client() as client:
        assert text_of(client)
        assert not [line for line in server.facts if "compil" in line.split()[0]]


@pytest.mark.long
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_session_continues_in_the_next_process(
    tiny_checkpoint: Path, tmp_path: Path, end: str
) -> None:
    fading = {"presence_penalty": 0.5, "frequency_penalty": 0.8, "penalty_decay": 0.9}
    with server_process(tiny_checkpoint, tmp_path) as server, server.client() as client:
        whole = text_of(client, max_tokens=60, **fading)
        session_id = client.post("/v1/sessions", json={"metadata": {"k": "v"}}).json()["id"]
        settings = {"session_id": session_id} | fading
        text = text_of(client, max_tokens=20, **settings)
        if end == "stop":
            assert server.stop() == 0
        else:
            server.kill()
    with server_process(tiny_checkpoint, tmp_path) as server, server.client() as client:
        session = client.get(f"/v1/sessions/{session_id}").json()
        assert session["tier"] == "store"
        assert (session["turn"], session["metadata"]) == (1, {"k": "v"})
        second = complete(client, prompt="", max_tokens=40, **settings)
        assert text + second["choices"][0]["text"] == whole
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == session["tokens"]


@pytest.mark.long
def test_a_killed_turn_never_happened(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with server_process(tiny_checkpoint, tmp_path) as server, server.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
        complete(client, session_id=session_id)
        before = client.get(f"/v1/sessions/{session_id}").json()
        endless = {"prompt": "a", "max_tokens": 50_000, "stream": True, "ignore_eos": True}
        running = client.stream(
            "POST", "/v1/completions", json=endless | {"session_id": session_id}
        )
        with running as response:
            lines = response.iter_lines()
            for _ in range(30):
                next(lines)
            server.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
    with server_process(tiny_checkpoint, tmp_path) as server, server.client() as client:
        after = client.get(f"/v1/sessions/{session_id}").json()
        assert after | {"tier": "device"} == before
        assert text_of(client, session_id=session_id)


@pytest.mark.long
def test_a_stopping_server_finishes_what_runs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with (
        server_process(tiny_checkpoint, tmp_path, *LONG_DRAIN) as server,
        server.client() as client,
    ):
        session_id = client.post("/v1/sessions").json()["id"]
        body = {"prompt": "a", "max_tokens": 10_000, "ignore_eos": True, "session_id": session_id}
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(client.post("/v1/completions", json=body))
        )
        thread.start()
        with server.client() as other:
            path = f"/v1/sessions/{session_id}"
            wait_until(lambda: other.get(path).json()["status"] == "busy")
        assert server.stop() == 0
        thread.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 10_000
    with server_process(tiny_checkpoint, tmp_path) as server, server.client() as client:
        assert client.get(f"/v1/sessions/{session_id}").json()["turn"] == 1


@pytest.mark.long
def test_while_draining_it_reports_why_it_rejects_turns(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with (
        server_process(tiny_checkpoint, tmp_path, *LONG_DRAIN) as server,
        server.client() as client,
    ):
        session_id = client.post("/v1/sessions").json()["id"]
        body = {"prompt": "a", "max_tokens": 20_000, "ignore_eos": True, "session_id": session_id}
        turn = client.stream("POST", "/v1/completions", json=body | {"stream": True})
        with turn as response, server.client() as other:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while (ready := other.get("/health/ready")).status_code == 200:
                pass
            assert ready.status_code == 503
            with server.client() as newcomer:
                for path in ("/v1/completions", "/v1/sessions"):
                    refused = newcomer.post(path, json={"prompt": "a"})
                    assert refused.status_code == 503
                    assert refused.json()["error"]["code"] == "shutting_down"
                    assert int(refused.headers["Retry-After"]) > 0
                assert newcomer.get(f"/v1/sessions/{session_id}").json()["status"] == "busy"
                assert newcomer.get("/health/live").status_code == 200
            assert "data: [DONE]" in list(lines)
        assert server.wait() == 0
    with server_process(tiny_checkpoint, tmp_path) as server, server.client() as client:
        assert client.get(f"/v1/sessions/{session_id}").json()["turn"] == 1


@pytest.mark.long
def test_a_second_signal_ends_it_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with (
        server_process(tiny_checkpoint, tmp_path, *LONG_DRAIN) as server,
        server.client() as client,
    ):
        session_id = client.post("/v1/sessions").json()["id"]
        complete(client, session_id=session_id)
        before = client.get(f"/v1/sessions/{session_id}").json()
        body = {"prompt": "a", "max_tokens": 60_000, "ignore_eos": True, "session_id": session_id}
        turn = client.stream("POST", "/v1/completions", json=body | {"stream": True})
        with turn as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            with server.client() as other:
                while other.get("/health/ready").status_code == 200:
                    pass
            server.process.send_signal(signal.SIGTERM)
            assert server.wait() == 128 + signal.SIGTERM
    with server_process(tiny_checkpoint, tmp_path) as server, server.client() as client:
        after = client.get(f"/v1/sessions/{session_id}").json()
        assert after | {"tier": "device"} == before
        assert text_of(client, session_id=session_id)


@pytest.mark.long
def test_a_turn_that_outlasts_the_drain_is_rolled_back_with_an_error(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    flags = ("--drain-timeout-s", "0.2")
    with server_process(tiny_checkpoint, tmp_path, *flags) as server, server.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
        body = {"prompt": "a", "max_tokens": 60_000, "ignore_eos": True, "session_id": session_id}
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert [line for line in rest if "shutting_down" in line]
        assert "data: [DONE]" in rest
        assert server.wait() == 0
    with server_process(tiny_checkpoint, tmp_path) as server, server.client() as client:
        assert client.get(f"/v1/sessions/{session_id}").json()["turn"] == 0

"""A server with front processes, by the real command: same behaviour as one process, and
lifecycle."""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from model.heinsen import checkpoint
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.text import byte_level
from tests.patience import PATIENCE_S, PROGRAM_S, wait_until
from tests.server.api.calls import BODY, complete, send, stream, streamed_text, text_of
from tests.server.processes import ServerProcess, server_process

pytestmark = pytest.mark.long

FLAGS = (
    *("--api-workers", "2", "--max-body-bytes", "4000000", "--stall-timeout-s", "1"),
    *("--max-response-logprobs", "2000000"),
)
ENDLESS = {"prompt": "a", "max_tokens": 60_000, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network whose state has more than two megabytes."""
    words = byte_level.train(["the cat sat on the mat and then"], 300, ["<|endoftext|>"])
    end = words.special_tokens["<|endoftext|>"]
    config = ModelConfig(
        vocab_sz=300,
        d_emb=32,
        n_layers=2,
        n_heads=64,
        d_key=64,
        d_val=64,
        bos_token_id=end,
        eos_token_ids=(end,),
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    checkpoint.save(folder, config, LanguageModel(config).state_dict(), words, None)
    return folder


@pytest.fixture(scope="module")
def fronted(
    wide_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with server_process(wide_checkpoint, tmp_path_factory.mktemp("data"), *FLAGS) as server:
        yield server


def fronts(server: ServerProcess) -> list[int]:
    """The process ids of its fronts."""
    tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def connect(server: ServerProcess) -> socket.socket:
    where = urlsplit(server.url)
    return socket.create_connection((where.hostname, where.port or 0), PATIENCE_S)


def rest(connection: socket.socket) -> bytes:
    """The rest of the data until the connection ends."""
    last = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            last = piece
    return last


def owner(server: ServerProcess, connection: socket.socket) -> int:
    """The front that owns the connection, from the kernel's socket tables."""
    port = f":{connection.getsockname()[1]:04X}"
    inodes = {
        fields[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if (fields := line.split())[2].endswith(port)
    }
    [found] = [
        pid
        for pid in fronts(server)
        if inodes & {os.readlink(fd)[8:-1] for fd in Path(f"/proc/{pid}/fd").iterdir()}
    ]
    return found


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def running(client: httpx.Client) -> float:
    return metric(client, "latentd_requests_running")


def wait_until_running(client: httpx.Client, count: int) -> None:
    wait_until(lambda: running(client) == count)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)))


def test_an_answer_is_the_same_whole_and_as_a_stream(fronted: ServerProcess) -> None:
    assert len(fronts(fronted)) == 2
    with fronted.client() as client:
        events = stream(client, max_tokens=200, stream_options={"include_usage": True})
        assert streamed_text(events) == text_of(client, max_tokens=200)
        assert events[-2]["usage"]["completion_tokens"] == 200


def test_many_requests_share_a_connection(fronted: ServerProcess) -> None:
    with fronted.client() as client:
        for _ in range(20):
            response = client.get("/v1/models", headers={"X-Request-ID": "mine"})
            assert response.status_code == 200
            assert response.headers["X-Request-ID"] == "mine"
        assert client.head("/v1/models").content == b""
        assert client.get("/nothing").json()["error"]["code"] == "not_found"


def test_a_session_continues_over_any_connection(fronted: ServerProcess) -> None:
    with fronted.client() as client:
        whole = text_of(client, max_tokens=60)
        session_id = client.post("/v1/sessions").json()["id"]
    text, prompt = "", "the cat"
    for _ in range(6):
        with fronted.client() as client:
            text += text_of(client, session_id=session_id, prompt=prompt, max_tokens=10)
        prompt = ""
    assert text == whole


def test_a_resumable_stream_continues_over_another_connection(fronted: ServerProcess) -> None:
    body = BODY | {"stream": True, "resumable": True, "max_tokens": 500}
    with fronted.client() as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            stream_id, lines = response.headers["X-Stream-ID"], response.iter_lines()
            seen = int(next(line for line in lines if line.startswith("id: "))[4:])
        after = {"Last-Event-ID": str(seen)}
    with fronted.client() as client:
        rest = client.get(f"/v1/streams/{stream_id}", headers=after).text
    ids = [int(line[4:]) for line in rest.split("\n") if line.startswith("id: ")]
    assert ids == list(range(seen + 1, seen + 1 + len(ids)))
    assert rest.endswith(f"data: [DONE]\nid: {ids[-1]}\n\n")


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_sends_no_more_is_answered(fronted: ServerProcess, is_stream: bool) -> None:
    """Also one that requested an upgrade."""
    body = json.dumps(BODY | {"max_tokens": 500, "ignore_eos": True, "stream": is_stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    offer = b"connection: upgrade\r\nupgrade: h2c\r\n"
    with closing(connect(fronted)) as connection:
        connection.sendall(head + offer + b"content-length: %d\r\n\r\n" % len(body) + body)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            raw = answer.read()
    assert raw.startswith(b"HTTP/1.1 200 OK\r\n")
    assert raw.count(b"HTTP/1.1") == 1
    assert (b"data: [DONE]\n\n" if is_stream else b'"completion_tokens":500') in raw


def test_a_client_that_goes_frees_its_row(fronted: ServerProcess) -> None:
    with fronted.client() as client:
        with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
            lines = response.iter_lines()  # which ends the request when it is let go
            next(lines)
            wait_until_running(client, 1)
        wait_until_running(client, 0)
        whole = ENDLESS | {"stream": False}
        with closing(send(fronted.url, whole)):
            wait_until_running(client, 1)
        wait_until_running(client, 0)


def test_megabytes_of_state_go_out_and_in(fronted: ServerProcess) -> None:
    with fronted.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
        complete(client, session_id=session_id)
        blob = client.get(f"/v1/sessions/{session_id}/state").content
        assert len(blob) > 2_000_000
        imported = client.post("/v1/sessions/import", content=blob)
        assert imported.status_code == 201, imported.text
        again = {"session_id": imported.json()["id"], "prompt": ""}
        assert text_of(client, **again) == text_of(client, session_id=session_id, prompt="")
        padded = json.dumps(BODY).encode() + b" " * 3_900_000
        granted = {"content-type": "application/json"}
        assert client.post("/v1/completions", content=padded, headers=granted).status_code == 200
        too_much = client.post("/v1/completions", content=padded + b" " * 200_000, headers=granted)
        assert too_much.status_code == 413


def test_what_is_not_http_and_what_is_too_large_are_refused(fronted: ServerProcess) -> None:
    asking = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n"
    cases = {
        b"hello\r\n\r\n": (b"400", b"invalid_http"),
        asking + b"content-length: 5000000\r\n\r\n": (b"413", b"too_large"),
        b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000 + b"\r\n\r\n": (b"431", b"headers_too_large"),
    }
    for logged, (status, code) in cases.items():
        with closing(connect(fronted)) as connection:
            connection.sendall(logged)
            answer = b""
            while code not in answer:
                piece = connection.recv(65536)
                assert piece, answer
                answer += piece
            assert answer.startswith(b"HTTP/1.1 " + status)


def test_a_client_that_does_not_read_is_let_go(fronted: ServerProcess) -> None:
    content = json.dumps(ENDLESS | {"logprobs": 20, "n": 16, "max_tokens": 5000}).encode()
    with closing(socket.socket()) as stalled, fronted.client() as client:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        where = urlsplit(fronted.url)
        stalled.connect((where.hostname, where.port))
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        head += b"content-type: application/json\r\n"
        stalled.sendall(head + b"content-length: %d\r\n\r\n" % len(content) + content)
        wait_until_running(client, 16)
        generated = metric(client, "latentd_generation_tokens_total")
        wait_until_running(client, 0)
        generated = metric(client, "latentd_generation_tokens_total") - generated
    assert generated < 16 * 5000 * 0.9  # long before all its tokens are there


def test_a_front_that_is_killed_is_replaced_and_its_turns_roll_back(
    fronted: ServerProcess,
) -> None:
    before = fronts(fronted)
    with fronted.client() as client:
        session_id = client.post("/v1/sessions").json()["id"]
    with closing(send(fronted.url, ENDLESS | {"session_id": session_id})) as connection:
        connection.recv(100)
        killed = owner(fronted, connection)
        os.kill(killed, signal.SIGKILL)
        assert b"[DONE]" not in rest(connection)
    wait_until(lambda: len(fronts(fronted)) == 2 and killed not in fronts(fronted))
    assert set(before) - {killed} < set(fronts(fronted))
    with fronted.client() as client:
        wait_until_running(client, 0)
        path = f"/v1/sessions/{session_id}"
        wait_until(lambda: client.get(path).json()["status"] == "idle")
    for _ in range(10):  # by the new one, too
        with fronted.client() as client:
            session = client.get(f"/v1/sessions/{session_id}").json()
            assert (session["turn"], session["status"]) == (0, "idle")
    with fronted.client() as client:
        assert text_of(client, session_id=session_id)


def test_signals_drain_and_then_all_processes_exit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--drain-timeout-s", str(PROGRAM_S))
    with server_process(tiny_checkpoint, tmp_path, *flags) as server, server.client() as client:
        pids = fronts(server)
        session_id = client.post("/v1/sessions").json()["id"]
        body = ENDLESS | {"max_tokens": 20_000, "session_id": session_id}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            for pid in (server.process.pid, *pids):  # as Ctrl-C does
                os.kill(pid, signal.SIGINT)
            with server.client() as other:
                while (ready := other.get("/health/ready")).status_code == 200:
                    pass
                assert ready.status_code == 503
                with server.client() as newcomer:
                    refused = newcomer.post("/v1/completions", json=BODY)
                assert refused.json()["error"]["code"] == "shutting_down"
            *_, end = (line for line in lines if line.startswith("data: {"))
            assert json.loads(end[6:])["session_turn"] == 1
        assert server.wait() == 0
        wait_until_gone(pids)


def test_without_its_core_no_front_stays(fronted: ServerProcess) -> None:
    """The last test of its server, which it kills."""
    pids, ended = fronts(fronted), list[Exception]()
    with fronted.client() as client, fronted.client() as other:

        def read() -> None:
            try:
                client.post("/v1/completions", json=ENDLESS)
            except httpx.HTTPError as error:
                ended.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        wait_until_running(other, 1)
        fronted.kill()
        reader.join(PATIENCE_S)
        assert ended
        wait_until_gone(pids)


def test_a_front_that_hangs_is_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with server_process(tiny_checkpoint, tmp_path, *FLAGS) as server:
        first, second = fronts(server)
        os.kill(first, signal.SIGSTOP)
        wait_until(lambda: not is_alive(first))
        wait_until(lambda: len(fronts(server)) == 2)
        assert second in fronts(server)
        with server.client() as client:
            complete(client)
        assert server.stop() == 0


def test_fronts_log_as_the_core_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with server_process(tiny_checkpoint, tmp_path, *FLAGS) as server, server.client() as client:
        complete(client)
        with connect(server) as connection:
            connection.sendall(b"NONSENSE\r\n\r\n")
            assert rest(connection).startswith(b"HTTP/1.1 400")
        assert server.stop() == 0
    [request], [refused] = server.lines("request"), server.lines("connection refused")
    assert (request["client"], request["tokens_out"]) == ("127.0.0.1", BODY["max_tokens"])
    assert (refused["client"], refused["error"]) == ("127.0.0.1", "invalid_http")

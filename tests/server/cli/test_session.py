"""`latentd session`, each command as a user would call it, against a live server."""

import json
import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli import client as client_module
from server.settings import Settings, read_settings
from tests.server.api.calls import complete, text_of
from tests.server.cli import commands
from tests.server.cli.conftest import KEY, OTHER
from tests.server.live import LiveServer


def stdout_of(server: LiveServer, *arguments: object, stdin: bytes = b"") -> str:
    return commands.stdout_of(
        "session", *arguments, stdin=stdin, LATENT_URL=server.url, LATENT_KEY=KEY
    )


def refused(server: LiveServer, *arguments: object, stdin: bytes = b"") -> str:
    return commands.refused(
        "session", *arguments, stdin=stdin, LATENT_URL=server.url, LATENT_KEY=KEY
    )


@pytest.fixture
def session_id(client: httpx.Client) -> str:
    """A session of two turns."""
    session = client.post("/v1/sessions", json={"metadata": {"topic": "cats", "user": "7"}}).json()
    for _ in range(2):
        complete(client, session_id=session["id"])
    return str(session["id"])


def get(client: httpx.Client, path: str = "") -> dict[str, Any]:
    response = client.get(f"/v1/sessions{path and f'/{path}'}")
    assert response.status_code == 200
    return dict(response.json())


def state(client: httpx.Client, session_id: str) -> bytes:
    return client.get(f"/v1/sessions/{session_id}/state").content


def objects(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


def fields(shown: str) -> dict[str, str]:
    return {line[:13].rstrip(): line[13:] for line in shown.splitlines()}


def test_list_shows_a_line_of_each_session(
    server: LiveServer, client: httpx.Client, session_id: str
) -> None:
    empty = client.post("/v1/sessions").json()["id"]
    head, first, second = stdout_of(server, "list").splitlines()
    assert head.split("  ")[0].strip() == "id"
    assert first.split()[:6] == [empty, "0", "0", "0", "-", "idle"]
    tokens = str(get(client, session_id)["tokens"])
    assert second.split()[:6] == [session_id, "2", tokens, "2", "device", "idle"]
    assert " s ago " in second
    assert second.rstrip().endswith("topic=cats, user=7")


def test_list_asks_for_all_pages(
    server: LiveServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PAGE", 2)
    assert stdout_of(server, "list", "--json") == ""
    made = [client.post("/v1/sessions").json()["id"] for _ in range(5)][::-1]
    for limit, expected in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 5)):
        listed = objects(stdout_of(server, "list", "--json", "--limit", limit))
        assert [session["id"] for session in listed] == made[:expected]
    listed = objects(stdout_of(server, "list", "--json"))
    assert listed == client.get("/v1/sessions").json()["data"]


def test_what_others_wrote_gives_the_terminal_no_orders(
    server: LiveServer, client: httpx.Client
) -> None:
    metadata = {"a": "[/b] :cat: [red]x", "b": "one\n\x1b[31mtwo"}
    session_id = client.post("/v1/sessions", json={"metadata": metadata}).json()["id"]
    for command in (["list"], ["show", session_id]):
        shown = stdout_of(server, *command)
        assert r"a=[/b] :cat: [red]x, b='one\n\x1b[31mtwo'" in shown
        assert "\x1b" not in shown


def test_show_and_turns(server: LiveServer, client: httpx.Client, session_id: str) -> None:
    session = get(client, session_id)
    shown = fields(stdout_of(server, "show", session_id))
    assert (shown["id"], shown["turn"], shown["tier"]) == (session_id, "2", "device")
    assert shown["state"] == f"{session['state_bytes']:,} bytes"
    assert (shown["expires"], shown["parent"]) == ("never", "-")
    assert json.loads(stdout_of(server, "show", session_id, "--json")) == session
    kept = get(client, f"{session_id}/turns")["data"]
    assert objects(stdout_of(server, "turns", session_id, "--json")) == kept
    head, *lines = stdout_of(server, "turns", session_id).splitlines()
    assert head.split() == ["turn", "tokens", "created", "bytes"]
    ends = [(line.split()[0], line.split()[1], line.split()[-1]) for line in lines]
    assert ends == [(str(t["turn"]), str(t["tokens"]), f"{t['bytes']:,}") for t in kept]


def test_export_names_the_file_and_overwrites_none(
    server: LiveServer,
    client: httpx.Client,
    session_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = stdout_of(server, "export", session_id).strip()
    assert name == f"{session_id}-2.safetensors"
    assert Path(name).read_bytes() == state(client, session_id)
    earlier = stdout_of(server, "export", session_id, "--turn", 1).strip()
    assert earlier == f"{session_id}-1.safetensors"
    assert Path(earlier).read_bytes() != state(client, session_id)
    Path("out").write_text("precious")
    assert "out already exists; use --force" in refused(
        server, "export", session_id, "--out", "out"
    )
    assert Path("out").read_text() == "precious"
    stdout_of(server, "export", session_id, "--out", "out", "--force")
    assert Path("out").read_bytes() == state(client, session_id)
    assert "no/out: No such file" in refused(server, "export", session_id, "--out", "no/out")
    assert {file.name for file in tmp_path.iterdir()} == {name, earlier, "out"}


def test_a_failed_export_leaves_what_was_there(
    server: LiveServer, session_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out").write_text("precious")
    monkeypatch.setattr(os, "fsync", full)
    arguments = ("export", session_id, "--force", "--out", tmp_path / "out")
    assert "No space left" in refused(server, *arguments)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]


def test_export_to_a_pipe_and_not_to_a_terminal(server: LiveServer, session_id: str) -> None:
    done = commands.latentd(
        *("session", "export", session_id, "--out", "-", "--key", KEY), LATENT_URL=server.url
    )
    assert done.exit_code == 0
    imported = stdout_of(server, "import", "-", stdin=done.stdout_bytes).strip()
    assert stdout_of(server, "export", imported, "--out", "-")
    ours, terminal = pty.openpty()
    shown = subprocess.run(
        [sys.executable, "-m", "server", "session", "export", session_id, "--out", "-"],
        stdout=terminal,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(terminal)
    os.close(ours)
    assert shown.returncode == 2
    assert shown.stderr.startswith("latentd: refusing to write a binary state to a terminal")


def test_an_exported_session_and_its_import_continue_alike(
    server: LiveServer,
    client: httpx.Client,
    session_id: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "state"
    stdout_of(server, "export", session_id, "--out", file)
    report = commands.stdout_of("inspect", file, "--checkpoint", tiny_checkpoint)
    assert report.splitlines()[-1].startswith("ok: ")
    options = ("--metadata", "a=b=c", "--metadata", "d=", "--ttl", 99)
    imported = stdout_of(server, "import", file, *options).strip()
    session = get(client, imported)
    assert (session["metadata"], session["ttl"]) == ({"a": "b=c", "d": ""}, 99)
    turn = {"prompt": " sat", "temperature": 1.0}
    assert text_of(client, session_id=imported, **turn) == text_of(
        client, session_id=session_id, **turn
    )


def test_import_refuses(
    server: LiveServer, client: httpx.Client, session_id: str, tmp_path: Path
) -> None:
    file = tmp_path / "state"
    assert f"{file}: No such file" in refused(server, "import", file)
    blob = state(client, session_id)
    assert "'x' is not KEY=VALUE" in refused(server, "import", "-", "--metadata", "x", stdin=blob)
    assert "ttl" in refused(server, "import", "-", "--ttl", -1, stdin=blob)
    assert "metadata" in refused(server, "import", "-", "--metadata", "=x", stdin=blob)
    fingerprint = server.service.checkpoint.fingerprint.encode()
    file.write_bytes(blob.replace(fingerprint, b"0" * 64))
    assert "it belongs to model 000000000000, this is" in refused(server, "import", file)
    assert len(get(client)["data"]) == 1


def test_fork_and_rewind(server: LiveServer, client: httpx.Client, session_id: str) -> None:
    fork = stdout_of(server, "fork", session_id).strip()
    earlier = stdout_of(server, "fork", session_id, "--turn", 1).strip()
    assert [get(client, each)["turn"] for each in (fork, earlier)] == [2, 1]
    assert fields(stdout_of(server, "show", earlier))["parent"] == f"{session_id} after turn 1"
    tokens = get(client, earlier)["tokens"]
    done = stdout_of(server, "rewind", session_id, 1)
    assert done == f"{session_id}: turn 1, {tokens} tokens\n"
    assert get(client, session_id)["turn"] == 1
    assert "turn 2" in refused(server, "rewind", session_id, 2)


def test_delete_erases_all_that_it_can(server: LiveServer, client: httpx.Client) -> None:
    ids = [client.post("/v1/sessions").json()["id"] for _ in range(3)]
    done = commands.latentd(
        *("session", "delete", ids[0], "nobody", ids[1], "--url", server.url, "--key", KEY)
    )
    assert done.exit_code == 2
    assert done.stdout.split() == ids[:2]
    assert done.stderr.startswith("latentd: ")
    assert done.stderr.count("\n") == 1
    assert [session["id"] for session in get(client)["data"]] == ids[2:]
    assert stdout_of(server, "delete", ids[2]).split() == [ids[2]]


@pytest.mark.long
@pytest.mark.parametrize("strange", ["nobody", "no/body", "..", "{}?x", "{}#", "é", " "])
@pytest.mark.parametrize(
    "command", [["show"], ["turns"], ["export"], ["fork"], ["rewind", 1], ["delete"]]
)
def test_an_unknown_session_is_refused(
    server: LiveServer, session_id: str, strange: str, command: list[object]
) -> None:
    refused(server, command[0], strange.format(session_id), *command[1:])
    assert fields(stdout_of(server, "show", session_id))["turn"] == "2"


def test_the_servers_own_words_are_shown(server: LiveServer, session_id: str) -> None:
    assert "nobody" in refused(server, "show", "nobody")
    assert "-1" in refused(server, "export", session_id, "--turn", -1)


def test_the_key_decides_whose_sessions_they_are(server: LiveServer, session_id: str) -> None:
    own = ("session", "list", "--json", "--url", server.url)
    assert session_id in commands.stdout_of(*own, "--key", KEY)
    assert session_id in commands.stdout_of(*own, LATENT_KEY=KEY)
    assert commands.stdout_of(*own, "--key", OTHER, LATENT_KEY=KEY) == ""
    assert "invalid API key" in commands.refused(*own, "--key", "wrong")
    assert "an API key is required" in commands.refused(*own)
    for impossible in ("é", "a\nb", "\ud800"):
        assert "printable ASCII" in commands.refused(*own, "--key", impossible)


def test_the_servers_settings_do_not_mind_the_clients_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`latentd serve` rejects unknown variables with its own prefix."""
    for name in [name for name in os.environ if name.upper().startswith("LATENTD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LATENT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("LATENT_KEY", "mine")
    assert read_settings({}) == Settings()
    assert "127.0.0.1:1: " in commands.refused("session", "list", LATENT_URL="http://127.0.0.1:1")


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "x",
            "localhost:8000",
            "ftp://localhost",
            "http://",
            "http://[",
            "http://127.0.0.1:1",
        ),
        *("http://127.0.0.1:99999", "http://127.0.0.1:port", "http://\n", "http://a b"),
        *("http://no.such.host.invalid", "http://-", "http://" + "x" * 300, "http://..", "é"),
    ],
)
def test_a_server_that_cannot_be_reached(url: str) -> None:
    assert refused_by(url).startswith(f"latentd: {url.strip()}")


def refused_by(url: str) -> str:
    return commands.refused("session", "show", "x", "--url", url)


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert refused_by(url) == f"latentd: {url}: no response within 0.2 seconds\n"


@contextmanager
def another_server(status: int, body: bytes, headers: dict[str, str]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.long
@pytest.mark.parametrize("status", [200, 204, 307, 404, 500])
@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[1]", b"null", b"\xff", b'{"error": 1}'])
def test_a_server_of_another_kind(status: int, body: bytes) -> None:
    body = b"" if status == 204 else body
    with another_server(status, body, {}) as url:
        for command in (["show", "x"], ["list"], ["turns", "x"], ["export", "x"]):
            line = commands.refused("session", *command, "--url", url)
            assert line == (f"latentd: {url}: the response (status {status}) is not from latentd\n")


def test_an_empty_page_is_the_last() -> None:
    page: dict[str, Any] = {"data": [], "first_id": None, "last_id": None, "has_more": True}
    with another_server(200, json.dumps(page).encode(), {}) as url:
        assert commands.stdout_of("session", "list", "--json", "--url", url) == ""


def test_a_multi_line_error_becomes_one_line() -> None:
    error = {"message": "one\n\ttwo", "type": "x", "param": None, "code": "y"}
    with another_server(418, json.dumps({"error": error}).encode(), {}) as url:
        assert refused_by(url) == "latentd: one two\n"


@pytest.mark.parametrize("headers", [{"Content-Encoding": "gzip"}, {"Content-Length": "50"}])
def test_a_damaged_answer(headers: dict[str, str]) -> None:
    with another_server(200, b"{}", headers) as url:
        assert refused_by(url).startswith(f"latentd: {url}: ")

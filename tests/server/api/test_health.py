"""Health probes: report problems, and recover once they are resolved."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.sessions.sqlite.disk import OpenFiles
from tests.patience import PATIENCE_S, wait_until
from tests.server.api.calls import BODY, text_of
from tests.server.api.test_operations import sample
from tests.server.api.test_session_calls import error, new
from tests.server.live import LiveServer, live_server, tiny_settings
from tests.server.sessions.stores import FILE, FILES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, data: Path) -> Iterator[LiveServer]:
    with live_server(tiny_settings(tiny_checkpoint, data, step_hang_timeout_s=0.5)) as running:
        yield running


def check_well(client: httpx.Client) -> None:
    for path in ("/health/live", "/health/ready"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert sample(client, "ready") == 1


def check_not_ready(client: httpx.Client, code: str, reason: str) -> None:
    answer = client.get("/health/ready")
    assert error(answer) == (503, None, code)
    assert reason in answer.json()["error"]["message"]
    assert sample(client, "ready") == 0


@contextmanager
def hung_step(server: LiveServer) -> Iterator[None]:
    """A step hangs until the context ends."""
    reached, go = threading.Event(), threading.Event()
    network = server.service.checkpoint.network
    works = network.forward

    def forward(*arguments: object) -> object:
        reached.set()
        go.wait()
        return works(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched, server.client() as client:
        patched.setattr(network, "forward", forward)
        asking = threading.Thread(
            target=client.post, args=["/v1/completions"], kwargs={"json": BODY}
        )
        asking.start()
        try:
            assert reached.wait(PATIENCE_S)
            yield
        finally:
            go.set()
            asking.join()


def test_a_hung_step_is_reported_until_it_ends(server: LiveServer, client: httpx.Client) -> None:
    check_well(client)
    with hung_step(server):
        wait_until(lambda: client.get("/health/live").status_code == 503)
        answer = client.get("/health/live")
        assert error(answer) == (503, None, "step_hung")
        assert "more than 0.5 count as hung" in answer.json()["error"]["message"]
        check_not_ready(client, "step_hung", "has run for")
        assert sample(client, "running_step_seconds") > 0.5
    server.wait_until_idle()
    wait_until(lambda: sample(client, "running_step_seconds") == 0)
    check_well(client)


def test_an_idle_engine_and_one_that_warms_up_do_not_hang(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(
        "model.decoding.decoder.DirectRunner.prepare", lambda _: go.wait(PATIENCE_S)
    )
    settings = tiny_settings(tiny_checkpoint, tmp_path, step_hang_timeout_s=1e-9)
    with live_server(settings) as server, server.client() as client:
        check_well(client)
        go.set()
        assert text_of(client)
        server.wait_until_idle()
        wait_until(lambda: client.get("/health/live").status_code == 200)
        assert sample(client, "running_step_seconds") == 0


def test_a_full_disk_is_reported_before_a_commit_fails(
    server: LiveServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = server.service.settings.min_free_bytes
    for free in (most - 1, 0):
        with monkeypatch.context() as patched:
            patched.setattr(OpenFiles, "free_bytes", free)
            check_not_ready(client, "disk_full", f"{free:,} bytes are free, less than {most:,}")
            assert sample(client, "store_free_bytes") == free
            assert client.get("/health/live").status_code == 200
    with monkeypatch.context() as patched:
        patched.setattr(OpenFiles, "free_bytes", most)
        check_well(client)
    check_well(client)
    assert sample(client, "store_free_bytes") > most


def test_two_states_must_fit_in_any_case(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, min_free_bytes=0)
    with live_server(settings) as server, server.client() as client:
        needed = 2 * server.service.ledger.state_bytes
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(OpenFiles, "free_bytes", needed - 1)
            check_not_ready(client, "disk_full", f"less than {needed:,}")
            patched.setattr(OpenFiles, "free_bytes", needed)
            check_well(client)


@pytest.mark.parametrize("name", [FILE, f"{FILE}-wal", FILES])
def test_a_deleted_or_replaced_store_is_reported(
    server: LiveServer, client: httpx.Client, data: Path, name: str
) -> None:
    del server
    path, aside = data / name, data / f"{name}-aside"
    path.rename(aside)
    check_not_ready(client, "store_lost", f"{path} was deleted while the server ran")
    (shutil.copytree if aside.is_dir() else shutil.copyfile)(aside, path)
    check_not_ready(client, "store_lost", f"{path} was replaced while the server ran")
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    aside.rename(path)
    check_well(client)
    session_id = new(client)
    assert text_of(client, session_id=session_id)


def test_the_stores_files_are_measured(client: httpx.Client, data: Path) -> None:
    text_of(client, session_id=new(client))
    files = [path for path in data.rglob("*") if path.is_file()]
    assert sample(client, "store_bytes") == sum(path.stat().st_size for path in files)

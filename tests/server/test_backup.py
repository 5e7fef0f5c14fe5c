"""A backup of a live server, restored elsewhere, continues bit for bit."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.sessions.sqlite.backup import backup, restore
from server.sessions.sqlite.snapshots import serve_snapshots
from server.sessions.sqlite.store import SQLiteStore
from tests.patience import wait_until
from tests.server.api.calls import text_of
from tests.server.api.test_session_calls import content, export, new, post
from tests.server.api.test_sessions import get
from tests.server.cli.commands import refused, stdout_of
from tests.server.live import LiveServer, live_server, tiny_settings
from tests.server.processes import server_process
from tests.server.sessions.stores import states_in_files


@pytest.fixture(params=[False, True], ids=["in SQLite", "in files"])
def live(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path
) -> Iterator[LiveServer]:
    """A live server that keeps all turns, with its states in files or not."""
    settings = tiny_settings(tiny_checkpoint, tmp_path / "live", keep_turns=100_000)
    with states_in_files(1 if request.param else 1 << 20), live_server(settings) as running:
        store = running.service.ledger._store
        assert isinstance(store, SQLiteStore)
        with serve_snapshots(store, tmp_path / "live"):
            yield running


def next_turn(client: httpx.Client, session_id: str, turn: int) -> str:
    return text_of(client, session_id=session_id, seed=turn, max_tokens=3, prompt=f"turn {turn}")


class Load:
    """Clients that advance, fork and delete sessions, with their responses."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._stopping = threading.Event()
        self.texts: dict[str, list[str]] = {}
        """Expected state of every acknowledged turn of the sessions, which are never deleted."""

        self.deleted = list[str]()
        self.forks: dict[str, tuple[str, int]] = {}
        """Sessions and turns that they were forked from."""

    def advance(self) -> None:
        with self._server.client() as client:
            session_id = new(client)
            texts = self.texts[session_id] = []
            while not self._stopping.is_set():
                texts.append(next_turn(client, session_id, len(texts) + 1))

    def delete(self) -> None:
        with self._server.client() as client:
            while not self._stopping.is_set():
                session_id = new(client)
                next_turn(client, session_id, 1)
                assert client.delete(f"/v1/sessions/{session_id}").is_success
                self.deleted.append(session_id)

    def fork(self) -> None:
        with self._server.client() as client:
            while not self._stopping.is_set():
                for source, texts in list(self.texts.items()):
                    if texts:
                        turn = len(texts)
                        made = post(client, source, "fork", turn=turn)
                        self.forks[made["id"]] = (source, turn)

    def stop(self) -> None:
        self._stopping.set()

    def progress(self) -> list[int]:
        return [*map(len, self.texts.values()), len(self.deleted), len(self.forks)]

    def wait(self) -> None:
        """Wait until each client has two more responses."""
        before = self.progress()
        wait_until(
            lambda: all(b >= a + 2 for a, b in itertools.zip_longest(before, self.progress()))
        )


def run_during(load: Load, work: Callable[[], object]) -> None:
    """Run the work with responses before, during and after it."""
    kinds = [load.advance, load.advance, load.advance, load.delete, load.fork]
    with ThreadPoolExecutor(len(kinds)) as threads:
        running = [threads.submit(kind) for kind in kinds]
        try:
            wait_until(lambda: len(load.texts) == 3)
            load.wait()
            work()
            load.wait()
        finally:
            load.stop()
        for each in running:
            each.result()


@pytest.mark.long
def test_a_backup_under_load_has_every_acknowledged_turn(
    live: LiveServer, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    load, copied = Load(live), tmp_path / "backup"
    turns = dict[str, int]()
    deleted, forks = list[str](), list[str]()

    def make() -> None:
        turns.update({session_id: len(texts) for session_id, texts in load.texts.items()})
        deleted.extend(load.deleted)
        forks.extend(load.forks)
        backup(tmp_path / "live", copied)

    run_during(load, make)
    restored = restore(copied, tmp_path / "restored")
    assert restored.num_missing == 0
    settings = tiny_settings(tiny_checkpoint, tmp_path / "restored", keep_turns=100_000)
    with live.client() as client, live_server(settings) as other, other.client() as again:
        for session_id, at_least in turns.items():
            turn = get(again, session_id)["turn"]
            assert turn >= at_least
            for each in range(1, turn + 1):
                assert export_of(again, session_id, each) == export_of(client, session_id, each)
            texts = load.texts[session_id]
            if turn == len(texts):
                texts.append(next_turn(client, session_id, turn + 1))
            assert next_turn(again, session_id, turn + 1) == texts[turn]
        for session_id in deleted:
            assert again.get(f"/v1/sessions/{session_id}").status_code == 404
        for session_id, (source, turn) in load.forks.items():
            answer = again.get(f"/v1/sessions/{session_id}")
            assert answer.status_code in ((200,) if session_id in forks else (200, 404))
            if answer.status_code == 200:
                assert answer.json()["turn"] == turn
                assert content(again, session_id) == content(client, session_id)
                assert get(again, source)["turn"] >= turn
        assert other.service.ledger._store.total.num_sessions == restored.num_sessions


def export_of(client: httpx.Client, session_id: str, turn: int) -> bytes:
    """The tensors are in one order; the header is in any."""
    blob = export(client, session_id, turn=turn)
    return blob[8 + int.from_bytes(blob[:8], "little") :]


@pytest.mark.long
def test_commands(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data, copied = tmp_path / "data", tmp_path / "backup"
    with server_process(tiny_checkpoint, data) as server, server.client() as client:
        session_id = new(client)
        next_turn(client, session_id, 1)
        done = stdout_of("backup", copied, "--data-dir", data)
        assert done.startswith("backed up 1 sessions and 0 responses with 1 states, ")
        expected = next_turn(client, session_id, 2)
        line = refused("backup", copied, "--data-dir", data)
        assert line == f"latentd: {copied} is not empty\n"
        line = refused("restore", copied, LATENTD_DATA_DIR=str(data))
        assert line == f"latentd: a server is running on {data}\n"
        server.kill()
    stdout_of("backup", tmp_path / "later", "--data-dir", data)  # after a crash, without a server
    done = stdout_of("restore", copied, LATENTD_DATA_DIR=str(tmp_path / "restored"))
    assert done.startswith("restored 1 sessions ")
    with server_process(tiny_checkpoint, tmp_path / "restored") as server:
        with server.client() as client:
            assert get(client, session_id)["turn"] == 1
            assert next_turn(client, session_id, 2) == expected
        assert server.stop() == 0
    assert not list((tmp_path / "restored").glob("*.sock"))

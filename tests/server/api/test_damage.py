"""A state damaged on the device costs its own turn, and nothing that was committed."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.engine import worker
from tests.patience import wait_until
from tests.server.api.calls import BODY, stream, text_of
from tests.server.api.test_operations import sample
from tests.server.api.test_session_calls import content, error, new
from tests.server.api.test_sessions import get
from tests.server.live import LiveServer, live_server, tiny_settings


@contextmanager
def sampled_every(seconds: float) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker, "IDLE_SAMPLE_S", seconds)
        yield


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that does not check retained rows while idle."""
    settings = tiny_settings(tiny_checkpoint, tmp_path_factory.mktemp("data"))
    with sampled_every(3600), live_server(settings) as running:
        yield running


def begun(client: httpx.Client, seed: int = 0) -> str:
    """A session with one turn; those of the same seed are equal."""
    session_id = new(client)
    text_of(client, session_id=session_id, seed=seed)
    return session_id


def poison(server: LiveServer, session_id: str, tensor: str, value: float = math.nan) -> None:
    """Damage the row retained for the session."""
    owners = server.service.engine._worker._slots._row
    [state_id] = owners.keys() & kept(server, session_id)
    set_one(server, owners[state_id], tensor, value)


def kept(server: LiveServer, session_id: str) -> set[str]:
    db = server.service.ledger._store._writer.db  # type: ignore[attr-defined]
    rows = db.execute(
        """SELECT state_id FROM checkpoints JOIN entries ON number = entry_number
        AND entries.turn = checkpoints.turn WHERE id = ?""",
        [session_id],
    )
    return {state_id for (state_id,) in rows}


def set_one(server: LiveServer, row: int, tensor: str, value: float) -> None:
    server.service.engine._worker._pool.tensors[tensor][0, row].view(-1)[3] = value


@pytest.mark.parametrize("tensor", ["s", "z", "m"])
def test_a_damaged_row_fails_its_turn_and_no_other(alone: LiveServer, tensor: str) -> None:
    with alone.client() as client, ThreadPoolExecutor(3) as threads:
        sessions, twins = ([begun(client, seed) for seed in range(3)] for _ in range(2))
        expected = [text_of(client, session_id=twin) for twin in twins]
        alone.wait_until_idle()
        before, state = get(client, sessions[0]), content(client, sessions[0])
        counted = sample(client, "damaged_states_total", found="turn")
        poison(alone, sessions[0], tensor)

        def turn(session_id: str) -> httpx.Response:
            return client.post("/v1/completions", json=BODY | {"session_id": session_id})

        damaged, *others = threads.map(turn, sessions)
        assert error(damaged) == (500, None, "state_damaged")
        assert "are not finite" in damaged.json()["error"]["message"]
        assert "x-should-retry" not in damaged.headers
        assert [each.json()["choices"][0]["text"] for each in others] == expected[1:]
        after = get(client, sessions[0])
        assert after | {"tier": ""} == before | {"tier": ""}
        assert content(client, sessions[0]) == state
        assert sample(client, "damaged_states_total", found="turn") == counted + 1
        assert text_of(client, session_id=sessions[0]) == expected[0]
        for session_id, twin in zip(sessions, twins, strict=True):
            assert content(client, session_id) == content(client, twin)


@pytest.mark.parametrize(("tensor", "value"), [("m", math.nan), ("s", -math.inf)])
def test_a_row_damaged_during_a_turn_ends_its_stream_with_an_error(
    alone: LiveServer, tensor: str, value: float
) -> None:
    """Damage that no token shows, minus infinity next to clamped sums, is found at the commit."""
    with alone.client() as client:
        session_id = begun(client)
        alone.wait_until_idle()
        before, state = get(client, session_id), content(client, session_id)
        twin = begun(client)
        go = threading.Event()
        network = alone.service.checkpoint.network
        works, num_steps = network.forward, 0

        def forward(*arguments: object) -> object:
            nonlocal num_steps
            num_steps += 1
            if num_steps == 5:
                [row] = alone.service.engine._worker._scheduler.decoding
                set_one(alone, row, tensor, value)
                go.set()
            return works(*arguments)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(network, "forward", forward)
            *texts, failure, done = stream(client, session_id=session_id)
        assert go.is_set()
        assert (failure["error"]["code"], done) == ("state_damaged", "[DONE]")
        assert all(each["choices"][0]["finish_reason"] is None for each in texts)
        after = get(client, session_id)
        assert after | {"tier": ""} == before | {"tier": ""}
        assert content(client, session_id) == state
        expected = text_of(client, session_id=twin)
        assert text_of(client, session_id=session_id) == expected


def test_a_retained_row_is_checked_while_nothing_runs(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path)
    with sampled_every(0.001), live_server(settings) as server, server.client() as client:
        damaged, sound, twin = (begun(client) for _ in range(3))
        expected = text_of(client, session_id=twin)
        server.wait_until_idle()
        poison(server, damaged, "z")
        wait_until(lambda: sample(client, "damaged_states_total", found="idle") == 1)
        wait_until(lambda: get(client, damaged)["tier"] == "host")
        assert get(client, sound)["tier"] == "device"
        assert any("retained state on the device is" in each.message for each in caplog.records)
        assert text_of(client, session_id=damaged) == expected
        assert sample(client, "damaged_states_total", found="turn") == 0
        assert 0 < sample(client, "state_magnitude") < math.inf
        assert sample(client, "state_position") == get(client, damaged)["tokens"]

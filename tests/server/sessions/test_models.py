"""States by model, counted and erased."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from model import checkpoint
from server.sessions import models
from server.sessions.codec import Codec
from server.sessions.models import SHORT, ModelError, count_models, describe_counts, erase_model
from server.sessions.sqlite.store import STORE_FILE, SQLiteStore
from server.sessions.store import Entry, NewState
from tests.patience import wait_until
from tests.server.api.calls import text_of
from tests.server.api.test_session_calls import new
from tests.server.cli.commands import refused, stdout_of
from tests.server.live import live_server, tiny_settings
from tests.server.sessions.stores import (
    commit,
    found,
    insert,
    listed,
    opened,
    response,
    session,
    state_files,
    states_in_files,
)
from tests.server.sessions.worlds import SPEC, VOCAB, state

OTHER, THIRD = "ab" * 32, "ab" * 31 + "cd"
LONG = replace(state(), position=30_000, pending=tuple(range(200, 300)) * 100)
"""Pending tokens can make a header long."""


@pytest.fixture(params=[False, True], ids=["in SQLite", "in files"], autouse=True)
def are_large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether states are stored in files."""
    monkeypatch.setattr(models, "READ_BATCH", 2)
    with states_in_files(1 if request.param else 1 << 20):
        yield bool(request.param)


def blob(fingerprint: str, after: object = None) -> bytes:
    codec = Codec(fingerprint, SPEC, VOCAB, "float32 x float32")
    return codec.encode(LONG if after == LONG else state())


async def fill(store: SQLiteStore) -> None:
    """Two sessions and a response of one model, one session of another, and others without."""
    for name, content in (
        ("a", blob(OTHER)),
        ("b", blob(OTHER, LONG)),
        ("c", blob(THIRD)),
        ("damaged", b"noise"),
    ):
        await store.insert(session(name))
        await commit(store, name, 1, content, keep=8)
    await commit(store, "a", 2, blob(OTHER), keep=8)
    await store.insert(session("without a turn"))
    await store.insert(response("without a state"))
    await insert(store, replace(response("r"), turn=1), blob(OTHER))


def test_each_entry_counts_for_the_model_of_its_state(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            assert await count_models(store) == {}
            await fill(store)
            assert await count_models(store) == {
                OTHER: Counter(session=2, response=1),
                THIRD: Counter(session=1),
                "": Counter(session=1),
            }

    asyncio.run(main())


def test_one_model_is_erased_and_no_other(tmp_path: Path, are_large: bool) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await fill(store)
            assert len(state_files(tmp_path)) == (6 if are_large else 0)
            erased = await erase_model(store, OTHER)
            assert describe_counts(erased) == "1 response and 2 sessions"
            names = {entry.id for entry in await listed(store)}
            assert names == {"c", "damaged", "without a turn"}
            assert (await found(store, "without a state", "response")).is_finished
            assert await store.get("response", "r") is None
            assert len(state_files(tmp_path)) == (2 if are_large else 0)
            assert describe_counts(await erase_model(store, THIRD[:SHORT])) == "1 session"

    asyncio.run(main())


@pytest.mark.parametrize("beginning", ["", OTHER[:SHORT], OTHER[:62], "cd" * 32, OTHER[:11], "*"])
def test_what_names_no_model_or_two_erases_nothing(tmp_path: Path, beginning: str) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await fill(store)
            before = store.total
            there = f"stored are: {OTHER[:SHORT]}, {THIRD[:SHORT]}"
            with pytest.raises(ModelError, match=there):
                await erase_model(store, beginning)
            assert store.total == before

    asyncio.run(main())


@pytest.mark.long
def test_a_server_says_what_it_cannot_continue_and_a_command_erases_it(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        store = SQLiteStore(tmp_path / STORE_FILE)
        await store.insert(Entry("session", "a", "", 1.0, 1.0, turn=1), NewState("s", blob(OTHER)))
        await store.close()

    asyncio.run(main())
    own = checkpoint.fingerprint(tiny_checkpoint)[:SHORT]
    settings = tiny_settings(tiny_checkpoint, tmp_path)

    def logged() -> list[str]:
        return [m for m in caplog.messages if "cannot continue" in m]

    def wait_for(count: int) -> None:
        wait_until(lambda: len(logged()) == count)

    for count in (1, 2):  # also beside a session of its own
        with live_server(settings) as server, server.client() as client:
            wait_for(count)
            text_of(client, session_id=new(client))
            refused("erase-model", OTHER, "--data-dir", tmp_path)
    assert logged()[0] == logged()[1]
    assert logged()[0] == (
        f"the store has 1 session of the model with fingerprint {OTHER[:SHORT]}, which this model "
        f"(fingerprint {own}) cannot continue; serve that model again, or stop the server and "
        f"erase them with `latentd erase-model {OTHER[:SHORT]} --data-dir {tmp_path}`"
    )
    assert "stored are: " in refused("erase-model", "0" * 12, "--data-dir", tmp_path)
    assert stdout_of("erase-model", OTHER[:SHORT], "--data-dir", tmp_path) == "erased 1 session\n"
    assert "no session store" in refused("erase-model", OTHER, "--data-dir", tmp_path / "none")

    async def remaining() -> dict[str, Counter[str]]:
        store = SQLiteStore(tmp_path / STORE_FILE)
        counts = await count_models(store)
        await store.close()
        return {name[:SHORT]: Counter[str](count) for name, count in counts.items()}

    assert asyncio.run(remaining()) == {own: Counter(session=2)}

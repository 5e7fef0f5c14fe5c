"""The SQLite store: concurrent requests are written together, and erased data is gone."""

import asyncio
import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from server.errors import StorageFailed
from server.sessions.sqlite.store import LARGE_BYTES, SQLiteStore
from server.sessions.sqlite.writer import MAX_BATCH
from server.sessions.store import Entry, EntryKind, StoredAnswer, StoreError, StoreUsage
from tests.patience import PATIENCE_S
from tests.server.sessions.stores import (
    FILE,
    KINDS,
    advanced,
    blob_of,
    commit,
    found,
    insert,
    listed,
    new,
    new_state,
    opened,
    pending,
    raw,
    refusal,
    response,
    session,
    state_files,
    states_in_files,
    until_queued,
    writer_held,
)


@pytest.fixture(params=[False, True], ids=["in SQLite", "in files"])
def are_large(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether states are stored in files."""
    with states_in_files(1 if request.param else 1 << 30):
        yield request.param


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_from_its_creation_to_its_deletion(
    tmp_path: Path, kind: EntryKind, are_large: bool
) -> None:
    async def main() -> None:
        folder = tmp_path / "new" / "folder"
        async with opened(folder) as store:
            made = replace(new(kind, "a"), metadata={"topic": "cats\n\0é"}, ttl_s=7.0)
            await store.insert(made)
            assert await store.get(kind, "a") == made
            assert await blob_of(store, "a", kind) is None
            assert await commit(store, "a", 1, b"first", kind=kind, ttl_s=7.0)
            last = 1 if kind == "response" else 2
            if kind == "session":
                assert await commit(store, "a", 2, b"second", ttl_s=7.0)
            blob = [b"first", b"second"][last - 1]
            state_id = new_state("a", last, blob).id
            assert await store.get(kind, "a") == replace(
                advanced(made, last), state_id=state_id, num_checkpoints=1
            )
            assert await blob_of(store, "a", kind) == blob
            assert state_files(folder) == ({state_id} if are_large else set())
            other: EntryKind = "response" if kind == "session" else "session"
            assert await store.get(other, "a") is None
            assert not await store.delete(other, "a")
            assert await store.delete(kind, "a")
            assert not await store.delete(kind, "a")
            assert await store.get(kind, "a") is None
            assert await blob_of(store, "a", kind) is None
            assert (store.total, state_files(folder)) == (StoreUsage(), set())

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_can_begin_with_a_state(tmp_path: Path, kind: EntryKind, are_large: bool) -> None:
    async def main() -> None:
        made = replace(advanced(new(kind, "a"), 7), expires_at=9.5, owner="x")
        async with opened(tmp_path) as store:
            shown = await insert(store, made, b"state")
            assert len(state_files(tmp_path)) == are_large
        async with opened(tmp_path) as store:
            assert await store.get(kind, "a") == shown
            assert await store.load("a", 7) == b"state"
            checkpoints = await store.checkpoints("a")
            assert [(c.turn, c.num_bytes, c.state_id) for c in checkpoints] == [
                (7, 5, shown.state_id)
            ]
            body = made.body or ""
            is_session = kind == "session"
            used = StoreUsage(is_session, not is_session, 1, 5 + len(body.encode()))
            assert (store.total, await store.usage("x")) == (used, used)
            assert await store.usage("") == StoreUsage()

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_is_given_once(tmp_path: Path, kind: EntryKind, are_large: bool) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await insert(store, advanced(new(kind, "a"), 1), b"first")
            before, files = store.total, state_files(tmp_path)
            for other in KINDS:
                with pytest.raises(StorageFailed):
                    await insert(store, advanced(new(other, "a"), 1), b"second")
            assert await blob_of(store, "a", kind) == b"first"
            assert (store.total, state_files(tmp_path)) == (before, files)
            assert len(files) == are_large

    asyncio.run(main())


def test_reopening_finds_everything(tmp_path: Path, are_large: bool) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "abc":
                await store.insert(session(name, topic=name))
            await commit(store, "a", 1, b"A" * 100_000)
            await commit(store, "b", 1, b"B")
            before = await listed(store)
            totals, files = store.total, state_files(tmp_path)
        async with opened(tmp_path) as store:
            assert await listed(store) == before
            assert [len(before), store.total] == [3, totals]
            assert await blob_of(store, "a") == b"A" * 100_000
            assert await blob_of(store, "b") == b"B"
            assert await blob_of(store, "c") is None
            assert state_files(tmp_path) == files
            assert len(files) == (2 if are_large else 0)

    asyncio.run(main())


def test_an_empty_blob_is_a_blob(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"")
            assert await blob_of(store, "a") == b""

    asyncio.run(main())


def test_pages_are_newest_first_whatever_was_used_or_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "abcdefg":
                await store.insert(session(name))
                await store.insert(response(f"response {name}"))
            await commit(store, "b", 1, b"")
            await store.delete("session", "g")
            await store.delete("session", "c")
            await store.insert(session("h"))
            seen, after = "", None
            while page := await store.list("session", "", 2, after, 0.0):
                assert len(page) <= 2
                seen += "".join(found.id for found in page)
                after = page[-1].id
            assert seen == "hfedba"
            assert await store.list("session", "", 10, "nobody", 0.0) == []

    asyncio.run(main())


@pytest.mark.parametrize("turn", [-1, 0, 1, 3])
def test_only_the_next_turn_can_be_committed(tmp_path: Path, turn: int, are_large: bool) -> None:
    del are_large

    async def main() -> None:
        async with opened(tmp_path) as store:
            await store.insert(session("a"))
            await commit(store, "a", 1, b"one")
            before = (await found(store, "a"), await blob_of(store, "a"), store.total)
            files = state_files(tmp_path)
            assert not await commit(store, "a", turn, b"wrong")
            assert (await found(store, "a"), await blob_of(store, "a"), store.total) == before
            assert state_files(tmp_path) == files
            assert await commit(store, "a", 2, b"two")
            assert await blob_of(store, "a") == b"two"

    asyncio.run(main())


def test_a_turn_of_an_entry_that_is_not_there(tmp_path: Path, are_large: bool) -> None:
    del are_large

    async def main() -> None:
        async with opened(tmp_path) as store:
            for kind in KINDS:
                assert not await commit(store, "ghost", 1, b"boo", kind=kind)
            assert not await store.advance(response("ghost"), None, 1)
            assert (store.total, state_files(tmp_path)) == (StoreUsage(), set())
            assert await listed(store) == []

    asyncio.run(main())


@pytest.mark.long
def test_what_waits_shares_transactions_and_is_answered_after_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            names = [str(number) for number in range(2 * MAX_BATCH + 10)]
            for name in names:
                await store.insert(session(name))
            begun, too_early = list[str](), list[asyncio.Task[bool]]()

            def trace(sql: str) -> None:
                if sql == "BEGIN IMMEDIATE":
                    begun.append(sql)
                if sql == "COMMIT" and len(begun) == 1:
                    time.sleep(0.05)  # time for the loop to see an answer that came too early
                    too_early.extend(commit for commit in commits if commit.done())

            async with writer_held(store):
                commits = [
                    asyncio.create_task(commit(store, name, 1, name.encode())) for name in names
                ]
                await until_queued(store, len(names))
                store._writer.db.set_trace_callback(trace)
            assert all(await asyncio.gather(*commits))
            store._writer.db.set_trace_callback(None)
            assert len(begun) == math.ceil(len(names) / MAX_BATCH)
            assert not too_early
            for name in names:
                assert await blob_of(store, name) == name.encode()

    asyncio.run(main())


def test_forks_rewinds_and_responses_share_the_transaction(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "ab":
                await store.insert(session(name))
                for turn in (1, 2, 3):
                    await commit(store, name, turn, b"%d" % turn, keep=3)
            await store.insert(pending("r"))
            async with writer_held(store):
                asked = asyncio.gather(
                    commit(store, "a", 4, b"4", keep=3),
                    store.fork("a", replace(session("c"), turn=4)),
                    store.rewind("b", 2, 1.0),
                    commit(store, "b", 3, b"another 3", keep=3),
                    commit(store, "r", 1, b"state", kind="response"),
                    store.insert(pending("r")),
                    return_exceptions=True,
                )
                await until_queued(store, 6)
                begun = list[str]()
                store._writer.db.set_trace_callback(
                    lambda sql: begun.append(sql) if sql.startswith("BEGIN") else None
                )
            answers = await asked
            store._writer.db.set_trace_callback(None)
            assert len(begun) == 1
            assert (answers[0], answers[3], answers[4]) == (True, True, True)
            assert isinstance(answers[5], StorageFailed)
            assert await store.load("c", 4) == b"4"
            assert [await store.load("b", turn) for turn in (3, 2, 1)] == [b"another 3", b"2", b"1"]
            assert await store.load("r", 1) == b"state"

    asyncio.run(main())


def test_a_failure_in_a_shared_transaction_affects_no_other(
    tmp_path: Path, are_large: bool
) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            for name in "abc":
                await store.insert(session(name))
            async with writer_held(store):
                first = asyncio.create_task(commit(store, "a", 1, b"A"))
                await until_queued(store, 1)
                second = asyncio.create_task(commit(store, "b", 7, b"wrong turn"))
                await until_queued(store, 2)
                asked = asyncio.gather(
                    store.insert(session("a", second="yes")),
                    store._run(lambda db: db.execute("INSERT INTO nowhere VALUES (1)")),
                    store._run(lambda _: 1 // 0),
                    store.delete("session", "c"),
                    commit(store, "a", 2, b"AA"),
                    return_exceptions=True,
                )
                await until_queued(store, 7)
            answers = await asked
            assert [type(answer) for answer in answers[:3]] == [StorageFailed] * 3
            assert [await first, await second, *answers[3:]] == [True, False, True, True]
            assert await blob_of(store, "a") == b"AA"
            assert [found.id for found in await listed(store)] == ["b", "a"]
            assert await store.get("session", "b") == session("b")
            assert store.total == StoreUsage(2, 0, 1, 2)
            assert len(state_files(tmp_path)) == are_large

    asyncio.run(main())


def test_a_cancelled_caller_does_not_affect_others(tmp_path: Path) -> None:
    async def main() -> None:
        faults = list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
        async with opened(tmp_path) as store:
            async with writer_held(store):
                leaving = asyncio.create_task(store.insert(session("a")))
                staying = asyncio.create_task(store.insert(session("b")))
                await until_queued(store, 2)
                leaving.cancel()
            await staying
            assert [found.id for found in await listed(store)] == ["b", "a"]
        assert not faults

    asyncio.run(main())


def test_a_commit_is_flushed_to_the_disk(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as store:
            settings = [
                store._writer.db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
            ]
            assert settings == ["wal", 2, 1, 1]

    asyncio.run(main())


@pytest.mark.parametrize(("durability", "synchronous"), [("sync", 2), ("async", 1)])
def test_durability_is_what_was_asked_for(
    tmp_path: Path, durability: str, synchronous: int
) -> None:
    async def main() -> None:
        store = SQLiteStore(tmp_path / "s", "async" if durability == "async" else "sync")
        assert store._writer.db.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        await store.close()

    asyncio.run(main())


def test_closing_finishes_what_was_asked_for_and_refuses_the_rest(tmp_path: Path) -> None:
    async def main() -> None:
        store = SQLiteStore(tmp_path / FILE)
        async with writer_held(store):
            asked = [asyncio.create_task(store.insert(session(name))) for name in "abc"]
            await until_queued(store, 3)
            closing = asyncio.create_task(store.close())
            await until_queued(store, 4)
            with pytest.raises(StorageFailed, match="closed"):
                await asyncio.wait_for(store.insert(session("d")), PATIENCE_S)
        await asyncio.gather(*asked, closing)
        with pytest.raises(StorageFailed, match="closed"):
            await asyncio.wait_for(store.get("session", "a"), PATIENCE_S)
        with pytest.raises(StorageFailed):
            await asyncio.wait_for(commit(store, "a", 1, bytes(LARGE_BYTES)), PATIENCE_S)
        await store.close()
        async with opened(tmp_path) as again:
            assert [found.id for found in await listed(again)] == ["c", "b", "a"]

    asyncio.run(main())


def try_to_open(path: str, results: Connection) -> None:
    """In another process: say why the store cannot be opened."""
    try:
        SQLiteStore(Path(path))
        results.send("opened")
    except StoreError as error:
        results.send(str(error))


def test_a_store_belongs_to_one_server(tmp_path: Path) -> None:
    async def main() -> None:
        processes = multiprocessing.get_context("spawn")
        for _ in range(2):  # a new file, and one that was closed before
            async with opened(tmp_path) as store:
                assert refusal(tmp_path / FILE) == "in use by another latentd server"
                ours, theirs = processes.Pipe()
                process = processes.Process(target=try_to_open, args=(str(tmp_path / FILE), theirs))
                process.start()
                assert "in use by another latentd server" in ours.recv()
                process.join()
                await listed(store)

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_deleted_bytes_are_on_the_disk_no_more(
    tmp_path: Path, kind: EntryKind, are_large: bool
) -> None:
    del are_large

    async def main() -> None:
        async with opened(tmp_path) as store:
            secrets = list[bytes]()
            for name in "ab":
                made = replace(new(kind, name), metadata={"secret": f"<confidence of {name}>"})
                if kind == "response":
                    made = replace(made, body=f"<draft of {name}>")
                await store.insert(made)
                turns = (1, 2, 3, 4) if kind == "session" else (1,)
                for turn in turns:
                    after = advanced(made, turn)
                    if kind == "response":
                        after = replace(after, body=f"<body of {name}>" * 3)
                    mark, answer = f"<state {turn} of {name}>", f"<answer {turn} of {name}>"
                    kept = StoredAnswer(f"key {turn}", "", answer)
                    blob = mark.encode() * 2000
                    await store.advance(after, new_state(name, turn, blob, kept), 3)
                    if name == "a":
                        secrets += [mark.encode(), answer.encode()]
            secrets += [b"<confidence of a>", b"<draft of a>", b"<body of a>"]
            there = [secret for secret in secrets if secret in raw(tmp_path)]
            assert len(there) >= 5 if kind == "response" else 7
            assert await store.delete(kind, "a")
            left = raw(tmp_path)
            assert not [secret for secret in secrets if secret in left]
            for mark in ("confidence", f"state {turns[-1]}", f"answer {turns[-1]}"):
                assert f"<{mark} of b>".encode() in left
        assert not [secret for secret in secrets if secret in raw(tmp_path)]

    asyncio.run(main())


@pytest.mark.parametrize("seed", [69, 79])
def test_no_copy_of_deleted_bytes_remains_among_many(tmp_path: Path, seed: int) -> None:
    """SQLite moves rows between its pages: what it leaves where they were must be erased too.

    With these seeds it does, unless the rows are padded.
    """

    async def main() -> None:
        chance = random.Random(seed)
        made, marks, gone = dict[str, Entry](), dict[str, list[bytes]](), list[bytes]()
        async with opened(tmp_path) as store:
            for step in range(140):
                move, mark = chance.random(), f"<{chance.getrandbits(64):016x}>"
                times = chance.choice([1, 5, 20, 100, 300])
                if move < 0.4 or not made:
                    name = str(step)
                    entry = new(chance.choice(KINDS), name)
                    if entry.kind == "session":
                        entry = replace(entry, metadata={"text": mark * chance.choice([1, 10, 60])})
                    else:
                        entry = replace(entry, body=mark * times)
                    await store.insert(entry)
                    made[name], marks[name] = entry, [mark.encode()]
                    continue
                name = chance.choice(list(made))
                entry = made[name]
                if move < 0.8 and (entry.kind == "session" or not entry.turn):
                    entry = advanced(entry, entry.turn + 1)
                    kept = None
                    if entry.kind == "response":
                        entry = replace(entry, body=mark * chance.choice([1, 20, 100, 400]))
                    elif chance.random() < 0.3:
                        kept = StoredAnswer(mark, "", mark * times)
                    state = new_state(name, entry.turn, mark.encode() * times, kept)
                    assert await store.advance(entry, state, 1)
                    made[name] = entry
                    marks[name].append(mark.encode())
                else:
                    await store.delete(entry.kind, name)
                    del made[name]
                    gone += marks.pop(name)
                    left = raw(tmp_path)
                    assert not [mark for mark in gone if mark in left]
        assert all(found[-1] in raw(tmp_path) for found in marks.values())

    with states_in_files(5000):
        asyncio.run(main())


Step = tuple[str, str, str, int]
"""What to do, with which entry, of which owner, and how many bytes it has."""

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("session", "pend", "insert", "advance", "advance", "end"),
                *("interrupt", "delete", "fork", "rewind"),
            ]
        ),
        st.sampled_from("abcde"),
        st.sampled_from(["", "x", "y"]),
        st.integers(0, 40_000),
    ),
    max_size=40,
)
KEEP = 3


class Accounts:
    """What a store should hold."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.states: dict[str, dict[int, bytes]] = {}
        """By turn."""

        self.answers: dict[str, dict[int, str]] = {}
        self.num_states = 0

    def usage(self, owner: str | None) -> StoreUsage:
        """Of an owner, or of all."""
        own = [e for e in self.entries.values() if owner in (None, e.owner)]
        blobs = [blob for entry in own for blob in self.states[entry.id].values()]
        texts = [entry.body or "" for entry in own]
        texts += [text for entry in own for text in self.answers[entry.id].values()]
        return StoreUsage(
            num_sessions=sum(entry.kind == "session" for entry in own),
            num_responses=sum(entry.kind == "response" for entry in own),
            num_states=len(blobs),
            num_bytes=sum(map(len, blobs)) + sum(len(text.encode()) for text in texts),
        )

    def add(self, entry: Entry, states: dict[int, bytes]) -> None:
        self.entries[entry.id], self.states[entry.id] = entry, states
        self.answers[entry.id] = {}

    def new_blob(self, size: int) -> bytes:
        """No two have the same state id."""
        self.num_states += 1
        return f"{self.num_states:06d}".encode() + bytes(size)

    async def step(self, store: SQLiteStore, step: Step) -> None:
        what, name, owner, size = step
        body, blob, entry = "é" * (size % 100), self.new_blob(size), self.entries.get(name)
        can_advance = entry is not None and (entry.kind == "session" or not entry.is_finished)
        match what:
            case "session" | "pend" | "insert" if entry is not None:
                with pytest.raises(StorageFailed):
                    await insert(store, advanced(pending(name, owner), 1), blob)
            case "session" | "pend":
                made = new("session" if what == "session" else "response", name)
                made = replace(made, owner=owner)
                await store.insert(made)
                self.add(made, {})
            case "insert":
                made = replace(advanced(pending(name, owner), 1), body=body)
                await insert(store, made, blob)
                self.add(made, {1: blob})
            case "advance":
                before = entry or session(name)
                after, kept = advanced(before, before.turn + 1), None
                if after.kind == "response":
                    after = replace(after, body=body)
                elif size % 2:
                    kept = StoredAnswer(f"{self.num_states}", "", body)
                state = new_state(name, after.turn, blob, kept)
                assert await store.advance(after, state, KEEP) == can_advance
                if can_advance:
                    self.entries[name], oldest = after, after.turn - KEEP + 1
                    kept_answers = {} if kept is None else {after.turn: kept.answer}
                    self.states[name] |= {after.turn: blob}
                    self.answers[name] |= kept_answers
                    for by_turn in (self.states[name], self.answers[name]):
                        for turn in [turn for turn in by_turn if turn < oldest]:
                            del by_turn[turn]
            case "end" if entry is None or entry.kind == "response":
                after = replace(entry or response(name), status="failed", body=body)
                assert await store.advance(after, None, KEEP) == can_advance
                if can_advance:
                    self.entries[name] = after
            case "interrupt":
                await store.rewrite_unfinished(
                    lambda found: replace(found, status="failed", body=body), frozenset(name)
                )
                for other in self.entries.values():
                    if not other.is_finished and other.id != name:
                        ended = replace(other, status="failed", body=body)
                        self.entries = self.entries | {other.id: ended}
            case "fork" if entry is not None:
                turn = size % (entry.turn + 1)
                copy = replace(session(f"copy {self.num_states}"), owner=owner, turn=turn)
                states = {t: b for t, b in self.states[name].items() if t == turn}
                made_of = bool(states) or (turn == 0 and entry.kind == "session")
                assert (await store.fork(name, copy) is not None) == made_of
                if made_of:
                    self.add(copy, states)
            case "rewind" if entry is not None and entry.kind == "session":
                turn = size % (entry.turn + 1)
                is_retained = turn == 0 or turn in self.states[name]
                assert (await store.rewind(name, turn, 1.0) is not None) == is_retained
                if is_retained:
                    self.entries[name] = replace(entry, turn=turn)
                    for by_turn in (self.states[name], self.answers[name]):
                        for later in [later for later in by_turn if later > turn]:
                            del by_turn[later]
            case "delete":
                kind: EntryKind = "session" if entry is None else entry.kind
                assert await store.delete(kind, name) == (entry is not None)
                for kept_by_name in (self.entries, self.states, self.answers):
                    kept_by_name.pop(name, None)

    async def check(self, store: SQLiteStore, folder: Path) -> None:
        for owner in ("", "x", "y"):
            assert await store.usage(owner) == self.usage(owner)
            names = {found.id for found in await store.list("session", owner, 1000, None, 0.0)}
            own = [e.id for e in self.entries.values() if e.owner == owner and e.kind == "session"]
            assert names == set(own)
        assert store.total == self.usage(None)
        assert await store.usage("nobody") == StoreUsage()
        large = {blob for states in self.states.values() for blob in states.values()}
        assert len(state_files(folder)) == sum(len(blob) >= 20_000 for blob in large)


@pytest.mark.long
@given(STEPS)
@settings(max_examples=25, deadline=None, phases=[Phase.generate])
def test_accounts_are_exact_whatever_is_done(steps: Sequence[Step]) -> None:
    async def main(folder: Path) -> None:
        accounts = Accounts()
        async with opened(folder) as store:
            for step in steps:
                await accounts.step(store, step)
                await accounts.check(store, folder)
        async with opened(folder) as store:
            await accounts.check(store, folder)
            for name, states in accounts.states.items():
                kept = [c.turn for c in await store.checkpoints(name)]
                assert kept == sorted(states, reverse=True)
                for turn, blob in states.items():
                    assert await store.load(name, turn) == blob

    with tempfile.TemporaryDirectory() as folder, states_in_files(20_000):
        asyncio.run(main(Path(folder)))

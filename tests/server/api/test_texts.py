"""Thread pools for long work: short work does not wait for it."""

import asyncio
import json
import threading

from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from server.api.texts import LONG, SHORT, WRITE_BATCH, Texts, dump_json, to_json_list
from tests.patience import PATIENCE_S


def test_long_texts_run_one_after_the_other_and_others_pass_them() -> None:
    running, most, lock = 0, 0, threading.Lock()
    free = threading.Event()

    def work() -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        assert free.wait(PATIENCE_S)
        with lock:
            running -= 1
        return threading.current_thread().name

    async def main() -> None:
        texts = Texts()
        long = [asyncio.create_task(texts.run(LONG + 1, work)) for _ in range(4)]
        for size in (SHORT, SHORT + 1, LONG):
            await texts.run(size, int, "7")
        assert await texts.run(SHORT, threading.get_ident) == threading.get_ident()
        assert await texts.run(SHORT + 1, threading.get_ident) != threading.get_ident()
        free.set()
        assert len(set(await asyncio.gather(*long))) == 1
        texts.close()

    asyncio.run(main())
    assert most == 1


def test_what_has_not_begun_is_dropped_at_the_end() -> None:
    started, free = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        assert free.wait(PATIENCE_S)

    async def main() -> None:
        texts = Texts()
        tasks = [asyncio.create_task(texts.run(LONG + 1, work)) for _ in range(3)]
        await asyncio.to_thread(started.wait, PATIENCE_S)
        closing = asyncio.create_task(asyncio.to_thread(texts.close))
        results = asyncio.gather(*tasks[1:], return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in await results)
        free.set()
        await closing
        await tasks[0]

    asyncio.run(main())


@given(st.lists(st.text(), max_size=3), st.integers(0, 2 * WRITE_BATCH + 1))
def test_a_list_is_written_as_it_would_be_in_one(names: list[str], count: int) -> None:
    items = (names * count)[:count] if names else []
    assert json.loads(to_json_list(items)) == items


class Entry(BaseModel):
    name: str
    bytes: list[int] | None = None


class Part(BaseModel):
    entries: list[Entry] = []
    ids: list[int] | None = None
    tops: list[dict[str, float] | None] = []


class Whole(BaseModel):
    before: str | None = None
    parts: list[Part] = []
    part: Part | None = None
    after: float = 0.5


ENTRIES = st.builds(Entry, name=st.text()) | st.builds(
    Entry, name=st.text(), bytes=st.lists(st.integers(0, 255))
)


@given(
    entry=ENTRIES,
    num_entries=st.sampled_from([1, SHORT, SHORT + 1]),
    num_ids=st.sampled_from([0, 1, SHORT + 1, WRITE_BATCH + 1]),
    place=st.sampled_from(["part", "parts"]),
)
def test_a_long_model_is_written_as_a_short_one(
    entry: Entry, num_entries: int, num_ids: int, place: str
) -> None:
    tops = [{"é": -0.25}, None] * (num_entries // 2)
    part = Part(entries=[entry] * num_entries, ids=list(range(num_ids)), tops=tops)
    small = Part(entries=[entry])
    whole = Whole(after=0.1, **({"part": part} if place == "part" else {"parts": [small, part]}))
    assert dump_json(whole).decode() == whole.model_dump_json(exclude_unset=True)

"""States of shared prefixes on the tiny real network: same bits, read once."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.decoding.sampling import SamplingParams
from server.engine.messages import DeadlinePassed, EngineRequest, Finished, Forget
from tests.server.engine.driver import LIMITS, Driver, following, request
from tests.server.engine.stepper import Stepper

CACHE_BYTES = 64 << 20
SYSTEM = tuple(i * 31 % 299 + 1 for i in range(1000))


@pytest.fixture
def sharing(checkpoint: Checkpoint) -> Iterator[Driver]:
    made = Driver(checkpoint, replace(LIMITS, max_running=32, prefix_cache_bytes=CACHE_BYTES))
    yield made
    made.engine.stop()


def tokens_read(driver: Driver) -> float:
    return driver.value("prompt_tokens_total") - driver.value("prefix_cached_tokens_total")


def after(name: str, prompt: tuple[int, ...], **changes: Any) -> EngineRequest:
    return request(name, token_ids=prompt, retain_as=f"after {name}", **changes)


def end(driver: Driver, asked: EngineRequest) -> tuple[object, ...]:
    """Everything a turn emits and leaves."""
    driver.engine.submit(asked)
    return outcome(driver, asked)


def outcome(driver: Driver, asked: EngineRequest) -> tuple[object, ...]:
    text, last = driver.result(asked.request_id)
    return text, last.state, last.continuation


def test_a_prompt_is_read_once_and_its_turn_is_the_same(driver: Driver, sharing: Driver) -> None:
    expected = end(driver, after("first", SYSTEM))
    assert end(sharing, after("first", SYSTEM)) == expected
    assert end(sharing, after("again", SYSTEM)) == expected
    assert sharing.result("first")[1].cached_tokens == 0
    assert sharing.result("again")[1].cached_tokens == 960
    assert sharing.value("prefix_cache_hits_total") == 1
    assert tokens_read(sharing) == 1000 + 40


def test_many_at_once_read_a_common_beginning_once(driver: Driver, sharing: Driver) -> None:
    asked = [after(f"client-{i:02}", (*SYSTEM, *range(1, i + 2))) for i in range(32)]
    sharing.engine.submit(*asked)
    for each in asked:
        assert outcome(sharing, each) == end(driver, each)
    rest = sum(len(each.token_ids) - 960 for each in asked)
    # Tails that go on beyond the common chunks share those, too.
    assert 960 < tokens_read(sharing) <= 960 + rest
    assert sharing.value("prefix_cache_hits_total") == 31


def test_waiting_for_a_prefix_survives_the_cancellation_of_its_reader(
    driver: Driver, checkpoint: Checkpoint
) -> None:
    sharing = Stepper(checkpoint, replace(LIMITS, max_running=32, prefix_cache_bytes=CACHE_BYTES))
    long = tuple(i * 17 % 299 + 1 for i in range(20_000))
    others = [after(f"other-{i}", (*long[:6000], i + 1, 7)) for i in range(3)]
    sharing.submit(after("reader", long), *others)
    sharing.step(2)
    sharing.cancel("reader")
    sharing.run()
    for each in others:
        last = sharing.finished(each.request_id)
        found = (sharing.text(each.request_id), last.state, last.continuation)
        assert found == end(driver, each)
    assert sharing.worker._metrics.prefix_cache_hits_total._value.get() == 2


def test_waiting_for_a_prefix_survives_a_late_reader(sharing: Driver) -> None:
    reader = after("reader", (*SYSTEM, 5), deadline=0.0)
    sharing.engine.submit(reader, after("other", (*SYSTEM, 6)))
    assert sharing.result("other")[1].num_generated == 12
    assert DeadlinePassed("reader") in sharing.seen


def test_a_step_that_fails_ends_those_who_wait_too(
    sharing: Driver, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    asked = [after(f"x{i}", SYSTEM) for i in range(4)]
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.network, "forward", broken)
        sharing.engine.submit(*asked)
        sharing.wait(lambda seen: len(seen) == 4)
    assert not [event for event in sharing.seen if isinstance(event, Finished)]
    again = [replace(each, request_id=f"again-{i}") for i, each in enumerate(asked)]
    sharing.engine.submit(*again)
    assert len({sharing.result(each.request_id)[0] for each in again}) == 1
    assert tokens_read(sharing) == 1000 + 3 * 40


def test_a_session_begins_from_a_shared_state_and_never_goes_back_to_one(sharing: Driver) -> None:
    end(sharing, after("first", SYSTEM))
    hits = sharing.value("prefix_cache_hits_total")
    _, last = sharing.turn(after("turn", SYSTEM))
    assert sharing.value("prefix_cache_hits_total") == hits + 1
    assert last.retained_as is not None
    second = following(last, "second", token_ids=SYSTEM)
    assert sharing.turn(second)[1].cached_tokens == 0


def test_the_cached_bytes_are_bounded_and_reported(checkpoint: Checkpoint) -> None:
    state_bytes = checkpoint.network.state_spec.num_bytes
    driver = Driver(checkpoint, replace(LIMITS, prefix_cache_bytes=3 * state_bytes + 1))
    for i in range(5):
        driver.turn(after(f"r{i}", (i + 1, *SYSTEM[:200]), max_tokens=1))
        assert driver.value("prefix_cache_bytes") == min(i + 1, 3) * state_bytes
    driver.engine.stop()


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> Iterator[Driver]:
    made = Driver(checkpoint, replace(LIMITS, warm_sessions=0))
    yield made
    made.engine.stop()


EXPECTED: dict[tuple[int, ...], tuple[object, ...]] = {}
"""Turns without a cache, by prompt."""

PROMPTS = st.lists(
    st.tuples(st.lists(st.integers(1, 2), max_size=5), st.integers(1, 80)), min_size=1, max_size=7
)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(PROMPTS, min_size=1, max_size=2),
    num_states=st.integers(0, 4),
    budget=st.integers(1, 8),
    cancelled=st.sets(st.integers(0, 6)),
)
def test_any_company_cache_and_budget_give_the_same_turns(
    plain: Driver,
    checkpoint: Checkpoint,
    groups: list[list[tuple[list[int], int]]],
    num_states: int,
    budget: int,
    cancelled: set[int],
) -> None:
    """Prompts of few distinct chunks, so that they share and diverge everywhere."""
    state_bytes = checkpoint.network.state_spec.num_bytes
    limits = replace(
        LIMITS,
        prefill_chunk_tokens=64 * budget,
        prefix_cache_bytes=num_states * state_bytes,
        warm_sessions=0,
    )
    driver = Driver(checkpoint, limits)
    for number, group in enumerate(groups):
        asked = []
        for i, (chunks, tail) in enumerate(group):
            prompt = (*(t for chunk in chunks for t in range(chunk, chunk + 64)), *range(tail))
            asked.append(after(f"{number}-{i}", prompt, max_tokens=3))
        driver.engine.submit(*asked)
        for i in cancelled:
            driver.engine.cancel(f"{number}-{i}")
        for each in [each for i, each in enumerate(asked) if i not in cancelled]:
            if each.token_ids not in EXPECTED:
                name = f"plain-{len(EXPECTED)}"
                EXPECTED[each.token_ids] = end(plain, replace(each, request_id=name))
            assert outcome(driver, each) == EXPECTED[each.token_ids]
    driver.engine.stop()


@pytest.mark.parametrize("num_opening", [1, 2])
def test_a_state_before_what_opens_an_answer_is_found_by_its_text(
    checkpoint: Checkpoint, driver: Driver, sharing: Driver, num_opening: int
) -> None:
    size_of = [len(checkpoint.tokenizer.bytes_of(i)) for i in range(300)]
    prompt = tuple(i for i in SYSTEM if size_of[i])[:101]
    assert len(prompt) == 101
    opening = sum(size_of[i] for i in prompt[-num_opening:])
    going_on = (*prompt[:-num_opening], 70, 71, 72)
    for name, ids in (("first", prompt), ("second", going_on)):
        plain = request(name, token_ids=ids, sampling=SamplingParams(temperature=0))
        text, last = sharing.turn(replace(plain, caches_answer=True, opening_bytes=opening))
        assert (text, last.num_generated) == (driver.turn(plain)[0], plain.max_tokens)
    assert sharing.result("second")[1].cached_tokens == 99


def expected_prompt(checkpoint: Checkpoint, count: int, **changes: Any) -> EngineRequest:
    """The beginning of a prompt that nobody has sent yet, of tokens that have a text."""
    ids = tuple(i for i in SYSTEM * 10 if checkpoint.tokenizer.bytes_of(i))[:count]
    anticipated = {"max_tokens": 0, "caches_answer": True, "is_anticipated": True}
    return request("expected", token_ids=ids, **anticipated | changes)


def following_text(expected: EngineRequest) -> EngineRequest:
    ids = (*expected.token_ids, 70, 71, 72)
    greedy = SamplingParams(temperature=0)
    return request("chat", token_ids=ids, sampling=greedy, caches_answer=True)


def test_who_sends_what_was_expected_waits_for_its_state(
    checkpoint: Checkpoint, driver: Driver
) -> None:
    limits = replace(LIMITS, prefix_cache_bytes=CACHE_BYTES, prefill_chunk_tokens=64)
    sharing, expected = Stepper(checkpoint, limits), expected_prompt(checkpoint, 1001)
    chat = following_text(expected)
    sharing.submit(expected)
    sharing.step(2)
    sharing.submit(chat)
    sharing.run()
    assert sharing.finished("chat").cached_tokens == 1000
    assert sharing.text("chat") == driver.turn(chat)[0]
    assert sharing.metrics.prompt_tokens_total._value.get() == len(chat.token_ids)


def test_what_is_expected_of_one_is_not_for_another(checkpoint: Checkpoint) -> None:
    sharing = Stepper(checkpoint, replace(LIMITS, prefix_cache_bytes=CACHE_BYTES))
    expected = expected_prompt(checkpoint, 1001, owner="a")
    sharing.submit(expected)
    sharing.submit(replace(following_text(expected), owner="b"))
    sharing.run()
    assert sharing.finished("chat").cached_tokens == 0


def test_nothing_is_read_in_place_of_who_waits(checkpoint: Checkpoint) -> None:
    limits = replace(LIMITS, prefix_cache_bytes=CACHE_BYTES, max_running=1)
    sharing = Stepper(checkpoint, limits)
    sharing.submit(request("other"))
    sharing.step(2)
    sharing.submit(expected_prompt(checkpoint, 1001))
    sharing.run()
    assert sharing.metrics.prefix_cache_bytes._value.get() == 0
    assert not sharing.inbox._num_waiting
    assert sharing.last("expected") is None


def test_what_is_expected_of_an_owner_is_forgotten_while_it_is_read(checkpoint: Checkpoint) -> None:
    limits = replace(LIMITS, prefix_cache_bytes=CACHE_BYTES, prefill_chunk_tokens=64)
    sharing, expected = Stepper(checkpoint, limits), expected_prompt(checkpoint, 1001)
    sharing.submit(expected, following_text(expected))
    sharing.step(3)
    sharing.inbox.put(Forget(expected.owner))
    sharing.run()
    assert sharing.finished("chat").cached_tokens == 0
    assert sharing.finished("chat").num_generated == 12

"""The engine on a tiny real network."""

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.decoding.sampling import SamplingParams
from model.heinsen.network import LanguageModel
from model.state import StatePool
from server.engine.messages import (
    Continuation,
    DeadlinePassed,
    EngineRequest,
    Failed,
    Finished,
    RowReleased,
    StoredState,
    TextDelta,
)
from server.errors import Overloaded, ShuttingDown
from tests.model.calls import prefill, step
from tests.patience import PATIENCE_S, wait_until
from tests.server.engine.driver import LIMITS, Driver, following, is_last, request, stored

GREEDY = SamplingParams(temperature=0.0)


def expected_greedy(checkpoint: Checkpoint, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy continuation, by repeated training-time forward passes over the whole sequence."""
    ids, network = list(prompt), checkpoint.network
    assert isinstance(network, LanguageModel)
    for _ in range(count):
        logits, _ = network.unroll(torch.tensor([ids]), network.empty_state(1))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_text_is_that_of_the_whole_sequence(driver: Driver, checkpoint: Checkpoint) -> None:
    asked = request("g", 70, sampling=GREEDY)
    text, last = driver.turn(asked)
    wanted = expected_greedy(checkpoint, asked.token_ids, 12)
    whole = checkpoint.tokenizer.decode(wanted)
    assert whole.startswith(text)
    assert len(text) >= len(whole) - 3
    assert last.reason == "length"
    assert last.num_generated == 12
    assert last.state is None


def test_a_turn_in_two_parts_is_the_turn_in_one(driver: Driver) -> None:
    whole, end = driver.turn(request("whole", max_tokens=40, retain_as="end"))
    asked = replace(request("whole"), request_id="first", max_tokens=17, retain_as="half")
    first, half = driver.turn(asked)
    for i, source in enumerate((stored(half, "elsewhere"), stored(half, "half"))):
        second, rest = driver.turn(
            following(half, f"second-{i}", 0, source=source, max_tokens=23, retain_as=f"end-{i}")
        )
        assert first + second == whole
        assert rest.state == end.state
        assert rest.continuation == end.continuation


@pytest.mark.parametrize("cut", [1, 2, 63, 64, 65, 150])
def test_a_prompt_sent_in_two_turns_leaves_the_bits_of_one(driver: Driver, cut: int) -> None:
    whole = request("one", 151, max_tokens=9, retain_as="whole")
    text, end = driver.turn(whole)
    ids = whole.token_ids
    _, half = driver.turn(
        replace(whole, request_id="read", retain_as="half", token_ids=ids[:cut], max_tokens=0)
    )
    rest = following(
        half,
        "rest",
        source=stored(half, "elsewhere"),
        retain_as="rest",
        token_ids=ids[cut:],
        max_tokens=9,
    )
    assert driver.turn(rest)[0] == text
    again = driver.result("rest")[1]
    assert (again.state, again.continuation) == (end.state, end.continuation)


def test_company_does_not_change_the_tokens(driver: Driver) -> None:
    alone, _ = driver.turn(request("a", 50, max_tokens=30))
    others = [request(f"other-{i}", 3 + 41 * i, max_tokens=5 + 9 * i) for i in range(8)]
    again = replace(request("a", 50, max_tokens=30), request_id="again")
    driver.engine.submit(*others[:4], again, *others[4:])
    assert driver.result("again")[0] == alone
    for other in others:
        assert driver.result(other.request_id)[1].num_generated == other.max_tokens


def test_stop_string_leaves_the_session_where_the_text_ends(
    driver: Driver, checkpoint: Checkpoint
) -> None:
    whole, _ = driver.turn(request("w", max_tokens=40))
    stop = whole[len(whole) // 2 :][:4]
    asked = replace(request("w", max_tokens=40), request_id="s", stop=(stop,), retain_as="s")
    text, last = driver.turn(asked)
    assert text == whole[: whole.index(stop)]
    assert last.reason == "stop"
    assert last.state is not None
    assert last.continuation is not None
    pool, expected = checkpoint.network.new_pool(1), checkpoint.network.new_pool(1)
    pool.import_row(0, last.state)
    seen = last.continuation.position - len(last.continuation.pending)
    ids = [*asked.token_ids]
    generated = seen - len(ids)
    ids += _sampled_ids(driver, asked, generated)
    prefill(checkpoint.network, torch.tensor([ids[:-1]]), [seen - 1], expected, [0])
    step(checkpoint.network, torch.tensor(ids[-1:]), expected, [0])
    for name, values in expected.tensors.items():
        torch.testing.assert_close(pool.tensors[name], values, rtol=1e-4, atol=1e-4)
    kept = [*ids[len(asked.token_ids) :], *last.continuation.pending]
    assert checkpoint.tokenizer.decode(kept) == text


def _sampled_ids(driver: Driver, asked: EngineRequest, count: int) -> list[int]:
    """The first sampled tokens of a request, observed through the pending token of shorter
    turns."""
    ids = []
    for i in range(1, count + 1):
        name = f"{asked.request_id}-{i}"
        _, last = driver.turn(
            replace(asked, request_id=name, max_tokens=i, stop=(), retain_as=name)
        )
        assert last.continuation is not None
        ids.append(last.continuation.pending[0])
    return ids


def test_no_token_generates_nothing_but_reads_the_prompt(driver: Driver) -> None:
    text, last = driver.turn(request("zero", 9, max_tokens=0, retain_as="read"))
    assert text == ""
    assert last.continuation is not None
    assert last.continuation.position == 9
    assert len(last.continuation.pending) == 1
    assert last.num_generated == 0


def test_cancelling_frees_the_row_in_every_phase(driver: Driver) -> None:
    driver.engine.submit(*(request(f"r{i}", 5, max_tokens=10_000) for i in range(3)))
    driver.engine.submit(request("long", 20_000), request("queued"))
    driver.wait(lambda seen: {e.request_id for e in seen} >= {"r0", "r1", "r2"})
    for name in ("queued", "long", "r1", "r0", "r2", "unknown"):
        driver.engine.cancel(name)
    driver.turn(request("after"))
    wait_until(lambda: driver.slots() == {"free": 6.0, "running": 0.0, "warm": 0.0})


def test_a_long_prompt_does_not_stall_a_stream(checkpoint: Checkpoint) -> None:
    """If no step is short enough, each reads the smallest possible piece of the prompt."""
    driver = Driver(checkpoint, replace(LIMITS, inter_token_latency_s=1e-9))
    driver.engine.submit(request("stream", 5, max_tokens=100_000))
    driver.wait(lambda seen: len(seen) > 3)
    driver.engine.submit(request("long", 2000, max_tokens=1))
    events = driver.wait(lambda seen: any(is_last(e, "long") for e in seen))
    before = next(i for i, e in enumerate(events) if e.request_id == "long")
    tokens = sum(e.request_id == "stream" for e in events[:before])
    assert tokens >= 2000 // checkpoint.network.cut - 1
    driver.engine.stop()


def test_evicted_rows_are_reported_oldest_first(driver: Driver) -> None:
    num_rows = LIMITS.max_running + LIMITS.warm_sessions
    for i in range(num_rows + 2):
        _, last = driver.turn(replace(request("kept"), request_id=f"k{i}", retain_as=f"state-{i}"))
        assert last.retained_as == f"state-{i}"
    driver.turn(request("one more"))
    expected = [RowReleased(f"state-{i}", is_evicted=True) for i in range(2)]
    assert driver.given_up[:2] == expected


def test_wrong_bytes_are_reported(driver: Driver) -> None:
    driver.engine.submit(request("bad", source=StoredState("unknown", b"123")))
    [failed] = driver.wait(lambda seen: bool(seen))
    assert isinstance(failed, Failed)
    assert failed.request_id == "bad"
    assert "bytes" in failed.message
    driver.turn(request("fine"))


def test_the_queue_is_bounded(checkpoint: Checkpoint) -> None:
    driver = Driver(checkpoint, replace(LIMITS, max_running=1, max_waiting=2))
    driver.engine.submit(request("runs", max_tokens=100_000))
    driver.wait(lambda seen: len(seen) > 1)
    driver.engine.submit(request("one"), request("two"))
    with pytest.raises(Overloaded):
        driver.engine.submit(request("three"))
    driver.engine.cancel("one")
    driver.engine.cancel("runs")
    driver.result("two")
    driver.turn(request("three"))
    driver.engine.stop()


def test_the_tokens_in_the_queue_are_bounded(checkpoint: Checkpoint) -> None:
    driver = Driver(checkpoint, replace(LIMITS, max_running=1, max_waiting_tokens=100))
    driver.engine.submit(request("runs", 90, max_tokens=100_000))
    driver.wait(lambda seen: len(seen) > 1)
    driver.engine.submit(request("one", 60))
    with pytest.raises(Overloaded) as refused:
        driver.engine.submit(request("two", 20), request("three", 21))
    assert refused.value.code == "queue_tokens_full"
    driver.engine.submit(request("four", 40))
    for name in ("one", "runs"):
        driver.engine.cancel(name)
    driver.result("four")
    driver.turn(request("five", 100))
    driver.engine.stop()


def test_an_impossible_request_is_reported_and_the_engine_continues(driver: Driver) -> None:
    wrong = request("wrong", continuation=Continuation(recent=b"123"))
    driver.engine.submit(wrong)
    [failed] = driver.wait(lambda seen: bool(seen))
    assert isinstance(failed, Failed)
    driver.turn(request("right"))


def test_an_error_in_a_step_ends_the_turns_and_not_the_engine(
    driver: Driver, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.network, "forward", broken)
        driver.engine.submit(*(request(f"x{i}", 3 + 100 * i) for i in range(6)))
        events = driver.wait(lambda seen: len(seen) == 6)
    failed = [event for event in events if isinstance(event, Failed)]
    assert {event.request_id for event in failed} == {f"x{i}" for i in range(6)}
    assert not [event for event in failed if "no memory" in event.message]
    driver.turn(request("y"))
    assert driver.slots()["running"] == 0


@pytest.mark.parametrize("broken", ["export_row", "reset"])
def test_an_error_between_two_phases_is_reported_too(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    asked = [request(f"x{i}", 5, retain_as=f"s{i}") for i in range(6)]
    with monkeypatch.context() as patched:
        patched.setattr(StatePool, broken, fail)
        driver.engine.submit(*asked)
        seen = driver.wait(
            lambda seen: (
                {e.request_id for e in seen if isinstance(e, Failed)}
                == {each.request_id for each in asked}
            )
        )
    assert not [event for event in seen if isinstance(event, Finished)]
    driver.turn(request("y"))
    assert driver.slots()["running"] == 0


def test_an_engine_whose_device_is_lost_ends_and_refuses_all(
    driver: Driver, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    driver.turn(request("before"))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.network, "forward", lost)
        patched.setattr(StatePool, "poison", lost)
        patched.setattr(StatePool, "responds", False)
        driver.engine.submit(*(request(f"x{i}", 3) for i in range(6)))
        seen = driver.wait(lambda seen: sum(isinstance(e, Failed) for e in seen) == 6)
        driver.engine._thread.join(PATIENCE_S)
    assert not driver.engine.is_running
    assert not [event for event in seen if isinstance(event, Failed) and "CUDA" in event.message]
    with pytest.raises(ShuttingDown, match="has stopped"):
        driver.engine.submit(request("late"))


def test_an_idle_engine_uses_no_processor_time(driver: Driver) -> None:
    driver.turn(request("warm up"))
    clock = time.pthread_getcpuclockid(driver.engine._thread.ident or 0)
    wait_until(lambda: driver.slots()["running"] == 0)
    before = time.clock_gettime(clock)
    time.sleep(0.5)
    assert time.clock_gettime(clock) - before < 0.05


def test_a_reused_row_does_not_show_the_former_state(driver: Driver) -> None:
    asked = request("fresh", 1, max_tokens=20)
    expected, _ = driver.turn(asked)
    for i in range(12):
        driver.turn(request(f"fill-{i}", 30, retain_as=f"s{i}"))
    assert driver.turn(replace(asked, request_id="later"))[0] == expected


def test_a_deadline_ends_a_turn_in_every_phase(driver: Driver) -> None:
    late = {
        "decodes": request("decodes", 5, max_tokens=10**9),
        "reads": request("reads", 90_000),
        "queued": request("queued", 5),
        "over": request("over", 5, deadline=0.0),
    }
    others = [request(f"other-{i}", 5, max_tokens=10**9) for i in range(2)]
    driver.engine.submit(*others)
    driver.wait(lambda seen: {event.request_id for event in seen} == {"other-0", "other-1"})
    soon = time.monotonic() + 0.3
    for each in late.values():
        driver.engine.submit(replace(each, deadline=each.deadline or soon))
    seen = driver.wait(lambda seen: {DeadlinePassed(name) for name in late} <= {*seen})
    assert "reads" not in {e.request_id for e in seen if isinstance(e, TextDelta)}
    assert len([e for e in seen if isinstance(e, DeadlinePassed)]) == len(late)
    assert driver.slots()["running"] == 2
    for other in others:
        driver.engine.cancel(other.request_id)
    _, last = driver.turn(request("in time", deadline=time.monotonic() + 1000))
    assert last.num_generated == 12
    assert driver.slots() == {"free": 6.0, "running": 0.0, "warm": 0.0}


def test_a_waiting_turn_that_ends_leaves_the_row_that_it_would_have_continued(
    driver: Driver,
) -> None:
    _, last = driver.turn(request("first", retain_as="kept"))
    for end in ("cancelled", "late"):
        blockers = [request(f"{end}-{i}", 3, max_tokens=10**9) for i in range(4)]
        driver.engine.submit(*blockers)
        names = {blocker.request_id for blocker in blockers}
        driver.wait(lambda seen, names=names: {e.request_id for e in seen} >= names)  # type: ignore[misc]
        deadline = time.monotonic() + 0.2 if end == "late" else None
        driver.engine.submit(following(last, end, deadline=deadline))
        if end == "cancelled":
            driver.engine.cancel(end)
        else:
            driver.wait(lambda seen: DeadlinePassed("late") in seen)
        for blocker in blockers:
            driver.engine.cancel(blocker.request_id)
        driver.turn(request(f"after {end}"))
        assert driver.slots()["warm"] == 1
    assert driver.given_up == []

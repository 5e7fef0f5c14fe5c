"""Which sequences prefill and decode next."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from model.decoding.sampling import SamplingParams
from server.engine.messages import Continuation, EngineRequest
from server.engine.scheduler import EngineLimits, Plan, Scheduler
from server.engine.sequence import EngineSequence

CHUNK = 64
LIMITS = EngineLimits(
    max_running=8,
    warm_sessions=1,
    max_waiting=64,
    max_waiting_tokens=100_000,
    prefill_chunk_tokens=512,
    inter_token_latency_s=0.1,
    prefix_cache_bytes=0,
)
REQUEST = EngineRequest("", None, Continuation(), (), 5, SamplingParams())


def sequence(
    name: str, num_tokens: int, deadline: float | None = None, **changes: Any
) -> EngineSequence:
    ids = (1,) * num_tokens
    made = replace(REQUEST, request_id=name, token_ids=ids, deadline=deadline)
    return EngineSequence(replace(made, **changes), 0.0)


def scheduler_of(
    *waiting: EngineSequence, limits: EngineLimits = LIMITS, max_logits: int = 128
) -> Scheduler[EngineSequence]:
    scheduler = Scheduler[EngineSequence](limits, CHUNK, max_logits)
    for each in waiting:
        scheduler.add(each)
    return scheduler


def admit(scheduler: Scheduler[EngineSequence]) -> list[str]:
    """Admit as many as allowed; the names of the running ones."""
    names = []
    while (admitted := scheduler.admit()) is not None:
        scheduler.slots.acquire(admitted.request.request_id)
        names.append(admitted.request.request_id)
    return names


def read(scheduler: Scheduler[EngineSequence]) -> Plan[EngineSequence]:
    """One step after which completed prompts leave."""
    plan = scheduler.plan()
    for each, count in plan.read:
        each.pop_unread(count)
        if each.is_read:
            scheduler.prefilling.remove(each)
            scheduler.slots.release(each.request.request_id)
    return plan


def names_of(plan: Plan[EngineSequence]) -> list[str]:
    return [each.request.request_id for each, _ in plan.read]


def test_admission_keeps_to_the_number_of_running_sequences() -> None:
    waiting = [sequence(str(i), 3) for i in range(3)]
    scheduler = scheduler_of(*waiting, limits=replace(LIMITS, max_running=2))
    assert admit(scheduler) == ["0", "1"]
    assert list(scheduler.waiting) == waiting[2:]
    assert not scheduler.idle


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_the_last_prompt_token_is_left_unread_where_nothing_is_generated(max_tokens: int) -> None:
    scheduler = scheduler_of(sequence("a", 40, max_tokens=max_tokens))
    admit(scheduler)
    assert [count for _, count in scheduler.plan().read] == [40 if max_tokens else 39]


@pytest.mark.parametrize(
    ("num_tokens", "pieces"),
    [
        (1, []),
        (2, [2]),
        (64, [64]),
        (65, [65]),
        (66, [64, 2]),
        (129, [64, 65]),
        (200, [64] * 3 + [8]),
    ],
)
def test_no_piece_is_a_single_token(num_tokens: int, pieces: list[int]) -> None:
    """Without compilation, other code reads single tokens."""
    scheduler = scheduler_of(
        sequence("a", num_tokens), limits=replace(LIMITS, prefill_chunk_tokens=1)
    )
    admit(scheduler)
    found = []
    while scheduler.prefilling and not scheduler.prefilling[0].is_read:
        [(each, count)] = scheduler.plan().read
        each.pop_unread(count)
        found.append(count)
    assert found == pieces


@pytest.mark.parametrize(
    ("tokens", "read_at_once"), [(1, 64), (127, 64), (128, 128), (200, 192), (10_000, 512)]
)
def test_a_step_reads_whole_cuts_and_fewer_while_others_decode(
    tokens: int, read_at_once: int
) -> None:
    scheduler = scheduler_of(sequence("a", 5000))
    admit(scheduler)
    assert [count for _, count in scheduler.plan().read] == [128]
    scheduler.pace.observe(tokens, LIMITS.inter_token_latency_s)
    assert [count for _, count in scheduler.plan().read] == [max(128, read_at_once)]
    scheduler.decoding[1] = sequence("b", 1)
    plan = scheduler.plan()
    assert [count for _, count in plan.read] == [read_at_once]
    assert [s.request.request_id for s in plan.decode] == ["b"]


@given(
    lengths=st.lists(st.integers(2, 3000), min_size=1, max_size=20),
    budget=st.integers(1, 700),
    decoding=st.booleans(),
    stops=st.sets(st.integers(1, 40).map(lambda chunks: chunks * CHUNK)),
)
@example(lengths=[1473], budget=1, decoding=False, stops={1472})
def test_every_prompt_is_read_in_whole_cuts_and_no_step_exceeds_its_budget(
    lengths: list[int], budget: int, decoding: bool, stops: set[int]
) -> None:
    limits = replace(LIMITS, prefill_chunk_tokens=budget)
    waiting = [sequence(str(i), length) for i, length in enumerate(lengths)]
    for each in waiting:
        each.retain_at = {stop for stop in stops if stop < each.num_unread}
    scheduler = scheduler_of(*waiting, limits=limits)
    if decoding:
        scheduler.decoding[0] = sequence("decodes", 1)
        scheduler.pace.observe(budget, LIMITS.inter_token_latency_s)
    most = max(CHUNK, budget)
    reached = {each.request.request_id: {0} for each in waiting}
    steps = 0
    while scheduler.waiting or scheduler.prefilling:
        admit(scheduler)
        plan = read(scheduler)
        steps += 1
        assert plan.read
        assert sum(count for _, count in plan.read) <= most + 1  # a last token that is not left
        for each, _ in plan.read:
            assert each.is_read or each.num_read % CHUNK == 0
            reached[each.request.request_id].add(each.num_read)
    assert steps <= sum(-(-length // CHUNK) for length in lengths)
    for each in waiting:
        assert each.num_unread == 0
        assert reached[each.request.request_id] >= each.retain_at


@given(
    lengths=st.lists(st.integers(2, 1000), min_size=1, max_size=8),
    max_logits=st.integers(1, 300),
)
def test_the_logits_of_scored_prompts_are_bounded_and_do_not_hold_up_others(
    lengths: list[int], max_logits: int
) -> None:
    waiting = [
        sequence(str(i), length, score_prompt=i % 2 == 0) for i, length in enumerate(lengths)
    ]
    scheduler = scheduler_of(*waiting, max_logits=max_logits)
    while scheduler.waiting or scheduler.prefilling:
        admit(scheduler)
        plan = read(scheduler)
        counts = [count for each, count in plan.read if each.request.score_prompt]
        assert sum(counts) <= max(CHUNK, max_logits) + 1
        assert plan.read
    assert all(each.is_read for each in waiting)


def test_prompts_that_are_alike_are_read_side_by_side_while_nothing_decodes() -> None:
    alike = [sequence(f"alike-{i}", 512 + i) for i in range(3)]
    scheduler = scheduler_of(*alike, sequence("long", 2000))
    scheduler.pace.observe(512, LIMITS.inter_token_latency_s)
    admit(scheduler)
    for _ in range(3):
        plan = read(scheduler)
        assert [count for each, count in plan.read if each in alike] == [128] * 3
    assert not any(each.is_read for each in alike)
    read(scheduler)
    assert all(each.is_read for each in alike)


def test_prompts_are_read_one_after_the_other_while_others_decode() -> None:
    scheduler = scheduler_of(*(sequence(f"{i}", 256) for i in range(3)))
    scheduler.decoding[0] = sequence("decodes", 1)
    scheduler.pace.observe(128, LIMITS.inter_token_latency_s)
    admit(scheduler)
    assert [names_of(read(scheduler)) for _ in range(6)] == [[f"{i}"] for i in (0, 0, 1, 1, 2, 2)]


def test_a_short_prompt_passes_long_ones() -> None:
    scheduler = scheduler_of(*(sequence(f"long-{i}", 50_000) for i in range(6)))
    scheduler.decoding[0] = sequence("decodes", 1)
    admit(scheduler)
    for _ in range(9):
        read(scheduler)
    short = sequence("short", 120)
    scheduler.add(short)
    admit(scheduler)
    for _ in range(3):
        read(scheduler)
    assert short.is_read


def test_long_prompts_progress_however_many_short_ones_come() -> None:
    long = [sequence(f"long-{i}", 1 + 10 * CHUNK) for i in range(3)]
    scheduler = scheduler_of(*long)
    scheduler.decoding[0] = sequence("decodes", 1)
    for step in range(4 * 8 * 10):
        scheduler.add(sequence(f"short-{step}", 60))
        admit(scheduler)
        read(scheduler)
    assert all(each.is_read for each in long)


def test_long_prompts_leave_rows_to_short_ones_but_are_not_left_out() -> None:
    long = [sequence(f"long-{i}", 1000) for i in range(8)]
    scheduler = scheduler_of(*long, sequence("short-0", 512))
    assert admit(scheduler) == [*(f"long-{i}" for i in range(6)), "short-0"]
    for i in range(1, 4):
        scheduler.add(sequence(f"short-{i}", 10))
    assert admit(scheduler) == ["short-1"]
    for _ in range(-(-6 * 1000 // 128)):
        read(scheduler)
    assert scheduler.find("long-0") is None
    assert admit(scheduler)[0] == "long-6"


def test_the_only_row_accepts_a_long_prompt() -> None:
    limits = replace(LIMITS, max_running=1)
    scheduler = scheduler_of(sequence("long", 10_000), sequence("short", 3), limits=limits)
    assert admit(scheduler) == ["long"]


def test_a_prompt_that_waits_for_another_is_not_read_and_lends_it_its_urgency() -> None:
    long, other, short = sequence("long", 9000), sequence("other", 5000), sequence("short", 100)
    scheduler = scheduler_of(other, long, short)
    scheduler.decoding[0] = sequence("decodes", 1)
    admit(scheduler)
    short.waits_for, short.waits_until = long, CHUNK
    read(scheduler)
    assert [names_of(read(scheduler)) for _ in range(3)] == [["long"]] * 3
    assert names_of(read(scheduler)) == ["other"]  # the one step in four that is not for it
    short.waits_for = None
    assert names_of(read(scheduler)) == ["short"]


def test_deadlines_pass_in_every_phase_and_once() -> None:
    first, second, third = sequence("a", 9, 1.0), sequence("b", 9, 2.0), sequence("c", 9, 2.5)
    endless = sequence("d", 9)
    scheduler = scheduler_of(first, endless, second)
    assert scheduler.expired(0.9) == []
    assert scheduler.expired(1.0) == [first]
    scheduler.waiting.remove(first)
    scheduler.add(third)
    admit(scheduler)
    scheduler.prefilling.remove(third)
    scheduler.decoding[1] = third
    assert scheduler.expired(1.9) == []
    assert set(scheduler.expired(2.6)) == {second, third}
    scheduler.prefilling.remove(second)
    scheduler.decoding.clear()
    assert scheduler.expired(1e9) == []


def test_what_only_counts_needs_neither_torch_nor_numpy() -> None:
    """In a new interpreter: here everything is already imported."""
    code = "import sys, server.engine.scheduler; print({'torch', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def decode(scheduler: Scheduler[EngineSequence], max_steps: int) -> list[str]:
    """Steps in which prompts of one token start to decode; the decoding ones in the last step."""
    decoded = list[str]()
    for _ in range(max_steps):
        admit(scheduler)
        for each in list(scheduler.prefilling):
            scheduler.prefilling.remove(each)
            scheduler.decoding[scheduler.slots.row(each.request.request_id)] = each
        decoded = [each.request.request_id for each in scheduler.plan().decode]
    return decoded


def of(owner: str, count: int, **changes: Any) -> list[EngineSequence]:
    return [sequence(f"{owner}{i}", 1, owner=owner, **changes) for i in range(count)]


SHARED = replace(LIMITS, max_running=4, warm_sessions=4)


def test_one_owner_gets_everything_until_another_arrives() -> None:
    scheduler = scheduler_of(*of("a", 9), limits=SHARED)
    assert len(decode(scheduler, 3)) == 4
    for each in of("b", 1):
        scheduler.add(each)
    decoded = decode(scheduler, 1)
    assert sorted(name[0] for name in decoded) == ["a", "a", "a", "b"]
    for each in of("b", 9)[1:]:
        scheduler.add(each)
    assert sorted(name[0] for name in decode(scheduler, 1)) == ["a", "a", "b", "b"]
    paused = [each.request.request_id for each in scheduler.sequences() if each.is_paused]
    for each in [each for each in scheduler.sequences() if each.request.owner == "b"]:
        if each in scheduler.waiting:
            scheduler.waiting.remove(each)
        else:
            row = scheduler.slots.row(each.request.request_id)
            del scheduler.decoding[row]
            scheduler.slots.release(each.request.request_id)
    assert set(paused) <= set(decode(scheduler, 1))
    assert not any(each.is_paused for each in scheduler.sequences())


def test_more_owners_than_may_run_have_the_engine_in_turn() -> None:
    names = "abcdef"
    limits = replace(SHARED, max_running=2, warm_sessions=6)
    scheduler = scheduler_of(*(each for name in names for each in of(name, 2)), limits=limits)
    counts = dict.fromkeys(names, 0)
    for _ in range(3000):
        decoded = decode(scheduler, 1)
        assert len(decoded) == 2
        for name in decoded:
            counts[name[0]] += 1
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_paused_sequences_leave_rows_for_owners_that_have_none() -> None:
    scheduler = scheduler_of(*of("a", 20), limits=replace(SHARED, warm_sessions=2))
    decode(scheduler, 2)
    for name in "bc":
        for each in of(name, 20):
            scheduler.add(each)
        decode(scheduler, 2)
    assert {each.request.owner for each in scheduler.decoding.values()} == {"a", "b", "c"}
    assert len(decode(scheduler, 1)) == 4


def test_without_spare_rows_nobody_is_paused() -> None:
    scheduler = scheduler_of(*of("a", 9), limits=replace(SHARED, warm_sessions=0))
    decode(scheduler, 2)
    scheduler.add(of("b", 1)[0])
    assert {name[0] for name in decode(scheduler, 2)} == {"a"}
    assert not any(each.is_paused for each in scheduler.sequences())


def test_prompts_of_the_owner_with_fewest_tokens_are_read_first() -> None:
    limits = replace(SHARED, prefill_chunk_tokens=64)
    scheduler = scheduler_of(*(sequence(f"a{i}", 640, owner="a") for i in range(3)), limits=limits)
    admit(scheduler)
    read(scheduler)
    scheduler.add(sequence("b", 640, owner="b"))
    admit(scheduler)
    read_for = [each.request.owner for _ in range(12) for each, _ in read(scheduler).read]
    assert 4 <= read_for.count("b") <= 9


def test_priority_and_the_flexible_tier_order_an_owners_own() -> None:
    asked = [
        sequence("flexible", 1, owner="a", is_flexible=True, priority=-9),
        sequence("plain", 1, owner="a"),
        sequence("late", 1, owner="a", priority=5),
        sequence("urgent", 1, owner="a", priority=-1),
    ]
    assert admit(scheduler_of(*asked)) == ["urgent", "plain", "late", "flexible"]

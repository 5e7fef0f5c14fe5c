"""Who reads and who decodes next."""

from dataclasses import replace

from model.sampling import SamplingParams
from model.tokenizer import train
from server.engine.messages import Continuation, EngineRequest, Fresh
from server.engine.scheduler import EngineLimits, Scheduler
from server.engine.sequence import Sequence

WORDS = train(["words"], 260, ["<|endoftext|>"])
LIMITS = EngineLimits(max_running=2, warm_sessions=1, max_waiting=8, prefill_chunk_tokens=64)
REQUEST = EngineRequest("", Fresh(), Continuation(), (), 5, SamplingParams())


def sequence(name: str, num_tokens: int) -> Sequence:
    return Sequence(replace(REQUEST, request_id=name, token_ids=(1,) * num_tokens), WORDS, 0.0)


def test_admission_keeps_to_the_number_of_running_sequences() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.waiting.extend(sequence(str(i), 3) for i in range(3))
    while (admitted := scheduler.next_to_admit()) is not None:
        scheduler.slots.acquire(admitted.request.request_id)
        scheduler.reading.append(admitted)
    assert [s.request.request_id for s in scheduler.reading] == ["0", "1"]
    assert [s.request.request_id for s in scheduler.waiting] == ["2"]
    assert not scheduler.idle


def test_the_last_prompt_token_is_left_for_decoding() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.reading.append(sequence("a", 40))
    ((_, count),) = scheduler.plan().prefill
    assert count == 39


def test_prompts_share_the_budget_and_running_streams_shrink_it() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.reading.extend([sequence("a", 5000), sequence("b", 5000)])
    assert [count for _, count in scheduler.plan().prefill] == [32, 32]
    scheduler.decoding[1] = sequence("c", 1)
    plan = scheduler.plan()
    assert [count for _, count in plan.prefill] == [4, 4]
    assert [s.request.request_id for s in plan.decode] == ["c"]

"""Owners share the engine: paused sequences resume as if never paused."""

import random
from dataclasses import replace

import pytest

from model.checkpoint import Checkpoint
from server.engine.messages import EngineRequest
from tests.server.engine.stepper import SMALL, Clock, Stepper, asked

LIMITS = replace(SMALL, max_running=2, warm_sessions=5)


def of(owner: str, first: int, count: int, num_prompt: int = 20) -> list[EngineRequest]:
    return [
        asked(f"{owner}{i}", first + i, num_prompt, owner=owner, max_tokens=60, ignore_eos=True)
        for i in range(count)
    ]


@pytest.mark.parametrize("num_prompt", [1, 20, 150])
def test_texts_are_those_of_sequences_that_run_alone(
    checkpoint: Checkpoint, clock: Clock, num_prompt: int
) -> None:
    del clock
    alone, stepper = Stepper(checkpoint, LIMITS), Stepper(checkpoint, LIMITS)
    asked_by = [of("a", 1, 4, num_prompt), of("b", 11, 2, num_prompt), of("c", 21, 1, num_prompt)]
    expected = {each.request_id: alone.turn(each)[0] for owner in asked_by for each in owner}
    most_paused = 0
    for requests in asked_by:
        stepper.submit(*requests)
        stepper.step(5)
    while stepper.has_work:
        stepper.step()
        paused = sum(each.is_paused for each in stepper.scheduler.sequences())
        most_paused = max(most_paused, paused)
    assert most_paused > 0
    assert {name: stepper.text(name) for name in expected} == expected
    assert stepper.owners() == {}


def test_paused_sequences_can_be_cancelled(checkpoint: Checkpoint, clock: Clock) -> None:
    del clock
    chance, stepper = random.Random(7), Stepper(checkpoint, LIMITS)
    requests = [
        each for owner, first in (("a", 1), ("b", 31), ("c", 61)) for each in of(owner, first, 4)
    ]
    for each in requests:
        stepper.submit(each)
        stepper.step(2)
    paused = [each for each in stepper.scheduler.sequences() if each.is_paused]
    assert paused
    for one in paused:
        stepper.cancel(one.request.request_id)
    for each in chance.sample(requests, 4):
        stepper.cancel(each.request_id)
    stepper.run()
    assert stepper.owners() == {}
    assert stepper.scheduler.idle

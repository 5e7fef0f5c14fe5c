"""Running ahead changes no results."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.decoding.sampling import SamplingParams
from server.engine.messages import (
    EngineRequest,
    Finished,
    RowDamaged,
    RowReleased,
    ThinkingBudget,
)
from server.engine.scheduler import EngineLimits
from tests.server.engine.ahead import AheadRunner, running_beside
from tests.server.engine.driver import LIMITS, request
from tests.server.engine.stepper import Stepper


@contextmanager
def running_ahead(
    checkpoint: Checkpoint, limits: EngineLimits = LIMITS
) -> Iterator[tuple[Stepper, AheadRunner]]:
    with running_beside() as made:
        stepper = Stepper(checkpoint, limits)
        yield stepper, made[0]


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "retain_as": st.sampled_from([None, "state"]),
        "max_tokens": st.integers(0, 25),
        "stop_token_ids": st.sets(st.integers(1, 299), max_size=60).map(tuple),
        "stop": st.sampled_from([(), ("a",), ("the", "e")]),
        "end_texts": st.sampled_from([(), ("at", "ca"), (" then",)]),
        "thinking_budget": st.sampled_from([None, ThinkingBudget(2, b"a", (9, 7))]),
        "caches_answer": st.booleans(),
        "include_stop": st.booleans(),
        "min_tokens": st.integers(0, 4),
        "num_logprobs": st.sampled_from([None, 0, 2]),
        "return_tokens": st.booleans(),
        "sampling": st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1.0, 5.0]),
            seed=st.integers(0, 9),
            top_k=st.sampled_from([0, 5]),
            repetition_penalty=st.sampled_from([1.0, 1.3]),
            logit_bias=st.sampled_from([(), ((7, 3.0),)]),
        ),
    },
)


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(CHANGES, min_size=1, max_size=6))
def test_every_turn_ends_as_it_would_step_by_step(
    checkpoint: Checkpoint, changes: list[dict[str, Any]]
) -> None:
    asked = [request(f"r{i}", 3 + 9 * i, **each) for i, each in enumerate(changes)]
    asked = [
        replace(each, retain_as=each.retain_as and f"after {each.request_id}") for each in asked
    ]
    direct = Stepper(checkpoint, LIMITS)
    with running_ahead(checkpoint) as (stepper, _), pytest.MonkeyPatch.context() as patched:
        patched.setattr("server.engine.text_sequence.SNAPSHOT_TOKENS", 3)
        patched.setattr("server.engine.text_sequence.MAX_REPEATED", 5)
        patched.setattr("server.engine.text.TOKENS_APART", 4)
        for played in (direct, stepper):
            played.submit(*asked)
            played.run()
        for each in asked:
            name = each.request_id
            ours, expected = stepper.finished(name), direct.finished(name)
            assert stepper.text(name) == direct.text(name)
            # Clocks go on, and a row may be evicted before its state has come.
            ours = replace(ours, timings=expected.timings, retained_as=expected.retained_as)
            assert ours == expected
            deltas = [[e for e in s.events() if e.request_id == name] for s in (stepper, direct)]
            assert deltas[0][:-1] == deltas[1][:-1]


@pytest.mark.parametrize("ends_at", [1, 2, 5])
@pytest.mark.parametrize("include_stop", [False, True])
def test_a_session_does_not_read_what_ended_its_turn(
    checkpoint: Checkpoint, ends_at: int, include_stop: bool
) -> None:
    """The step after the end was already in flight, and left the row unchanged."""
    plain = request("plain", 5, return_tokens=True, max_tokens=ends_at)
    direct = Stepper(checkpoint, LIMITS)
    direct.turn(plain)
    emitted = [event.tokens for event in direct.events() if hasattr(event, "tokens")]
    last = [token.token_id for tokens in emitted for token in tokens][-1]
    asked = replace(
        plain,
        request_id="asked",
        max_tokens=50,
        stop_token_ids=(last,),
        include_stop=include_stop,
        retain_as="state",
    )
    _, expected = direct.turn(asked)
    assert expected.reason == "stop"
    with running_ahead(checkpoint) as (stepper, runner):
        _, finished = stepper.turn(asked)
        assert finished.state == expected.state
        assert finished.continuation == expected.continuation
        assert finished.retained_as == "state"
        row = stepper.slots.row("state")
        assert stepper.pool.export_row(row) == expected.state
        assert runner.num_ahead == ends_at - 1


CAREFUL: dict[str, dict[str, Any]] = {
    "penalties": {"sampling": SamplingParams(frequency_penalty=0.5)},
    "biases": {"sampling": SamplingParams(logit_bias=((5, 1.0),))},
    "thoughts that must end": {"thinking_budget": ThinkingBudget(99, b"zzz", (7,))},
    "many end tokens": {"stop_token_ids": (*range(1, 10),), "min_tokens": 12},
}


@pytest.mark.parametrize("name", CAREFUL)
def test_what_depends_on_the_last_token_waits_for_it_and_nothing_else_does(
    checkpoint: Checkpoint, name: str
) -> None:
    with running_ahead(checkpoint) as (stepper, runner):
        stepper.turn(request("alone", 5, **CAREFUL[name]))
        assert runner.num_ahead == 0
        stepper.release("state")
        stepper.submit(request("careful", 5, **CAREFUL[name]), request("plain", 5))
        stepper.run()
        assert runner.num_ahead == 11


@pytest.mark.parametrize("stop", ["stop", "end_texts"])
def test_a_stop_string_lets_a_session_run_ahead(checkpoint: Checkpoint, stop: str) -> None:
    """All but the first token, after which the state is first stored, are read before they are
    known; a text that is cut leaves the same state and tokens as step by step."""
    plain = request("plain", 5, max_tokens=60, sampling=SamplingParams(temperature=3, seed=1))
    direct = Stepper(checkpoint, LIMITS)
    direct.turn(plain)
    text = direct.text("plain")
    with running_ahead(checkpoint) as (stepper, runner):
        for i, end in enumerate(("zzz", *(text[at : at + 3] for at in range(9, len(text) - 3, 6)))):
            changes: dict[str, Any] = {stop: (end,), "retain_as": f"state {i}"}
            asked = replace(plain, request_id=f"asked {i}", **changes)
            _, expected = direct.turn(asked)
            before = runner.num_ahead
            _, ours = stepper.turn(asked)
            assert (ours.state, ours.continuation) == (expected.state, expected.continuation)
            assert (ours.reason, ours.num_generated) == (expected.reason, expected.num_generated)
            assert stepper.text(asked.request_id) == direct.text(asked.request_id)
            assert runner.num_ahead - before >= 0.8 * (ours.num_generated - 3)
        assert ours.reason == "stop"


def test_thoughts_are_closed_even_by_a_stop_that_is_not_allowed_yet(
    checkpoint: Checkpoint,
) -> None:
    stepper = Stepper(checkpoint, LIMITS)
    budget = ThinkingBudget(2, b"zzz", (9, 7))
    asked = request("asked", 5, thinking_budget=budget, stop_token_ids=(9, 7), min_tokens=4)
    assert stepper.turn(asked)[1].stopped_by == 9


def test_no_token_is_read_beyond_the_last_that_may_come(checkpoint: Checkpoint) -> None:
    asked = request("asked", 5, max_tokens=7, retain_as="state")
    with running_ahead(checkpoint) as (stepper, runner):
        stepper.turn(asked)
        assert runner.num_ahead == 6


def test_a_sequence_that_ends_during_a_step_leaves_its_row_to_others(
    checkpoint: Checkpoint,
) -> None:
    def endless(name: str) -> EngineRequest:
        return request(name, 5, max_tokens=500)

    expected = Stepper(checkpoint, LIMITS).turn(request("next", 5))[0]
    with running_ahead(checkpoint) as (stepper, _):
        stepper.submit(*(endless(f"r{i}") for i in range(LIMITS.max_running)))
        stepper.step(5)
        for i in range(LIMITS.max_running):
            stepper.cancel(f"r{i}")
        assert stepper.turn(request("next", 5))[0] == expected
        assert stepper.owners() == {}


def test_a_model_that_gives_no_numbers_ends_the_turn_once(checkpoint: Checkpoint) -> None:
    with running_ahead(checkpoint) as (stepper, _):
        stepper.submit(request("beside", 5, max_tokens=30), request("damaged", 5, max_tokens=30))
        stepper.step(5)
        for values in stepper.pool.tensors.values():
            if values.is_floating_point():
                values[:, stepper.slots.row("damaged")] = float("nan")
        stepper.run()
        assert isinstance(stepper.last("damaged"), RowDamaged)
        assert stepper.finished("beside").num_generated == 30


def test_a_state_that_comes_late_is_that_of_the_end_of_its_turn(checkpoint: Checkpoint) -> None:
    """Meanwhile its row may have gone to another sequence: no stale id is reported."""
    limits = replace(LIMITS, max_running=1, warm_sessions=0)
    asked = [request(f"r{i}", 1, retain_as=f"s{i}", max_tokens=1 + i % 2) for i in range(6)]
    direct = Stepper(checkpoint, limits)
    expected = [direct.turn(each)[1].state for each in asked]
    with running_ahead(checkpoint, replace(limits, warm_sessions=1)) as (stepper, _):
        stepper.submit(*asked)
        stepper.run()
        assert [stepper.finished(each.request_id).state for each in asked] == expected
        gone, reported = set[str](), list[str | None]()
        for event in stepper.delivered:
            if isinstance(event, RowReleased):
                gone.add(event.state_id)
            elif isinstance(event, Finished):
                assert event.retained_as not in gone
                reported.append(event.retained_as)
        assert None in reported
        assert reported[-1] is not None

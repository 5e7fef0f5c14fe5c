"""One step of several sequences: its results, and isolation of errors."""

from dataclasses import replace

import pytest
import torch

from model.checkpoint import Checkpoint
from model.decoding import runners
from model.decoding.sampling import SamplingParams
from server.engine.messages import EngineRequest, Failed, InvalidLogits, RowDamaged, StoredState
from server.engine.steps import FAILED, Outcomes, Steps
from server.engine.text_sequence import End, TextSequence
from server.metrics import Metrics
from tests.server.engine.driver import LIMITS, request
from tests.server.engine.stepper import Stepper, asked

CHOICES = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(seed=3),
    "filtered": SamplingParams(seed=3, top_k=20),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_state_fails_alone(checkpoint: Checkpoint, choice: str, value: float) -> None:
    stepper = Stepper(checkpoint)
    others = [asked(f"beside-{i}", i + 1, 10 + 30 * i, sampling=CHOICES[choice]) for i in range(3)]
    expected = [
        stepper.turn(replace(each, request_id=f"alone-{each.request_id}"))[0] for each in others
    ]
    damaged = stepper.worker._network.new_pool(1)
    damaged.tensors["h"][0, 0, 5] = value
    source = StoredState("damaged", damaged.export_row(0))
    bad = asked("bad", 9, 5, source=source, sampling=CHOICES[choice], retain_as="state")
    stepper.submit(others[0], bad, *others[1:])
    stepper.run()
    assert stepper.last("bad") == InvalidLogits("bad")
    assert stepper.text("bad") == ""
    assert [stepper.text(each.request_id) for each in others] == expected
    assert stepper.owners() == {}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tensor", ["h", "m", "z", "s", "n"])
def test_a_state_damaged_during_a_turn_fails_alone(
    stepper: Stepper, tensor: str, value: float
) -> None:
    other = asked("beside", 2, 30, max_tokens=40)
    expected, _ = stepper.turn(replace(other, request_id="alone"))
    bad = asked("bad", 9, 3, max_tokens=40, retain_as="state")
    undamaged, _ = stepper.turn(replace(bad, request_id="undamaged", retain_as=None))
    stepper.submit(bad, other)
    stepper.step(10)
    stepper.pool.tensors[tensor][0, stepper.owners()["bad"]].view(-1)[0] = value
    stepper.run()
    last = stepper.last("bad")
    assert isinstance(last, RowDamaged)
    assert "not finite" in last.reason
    assert stepper.metrics.damaged_states_total.labels(found="turn")._value.get() == 1
    assert stepper.text("bad") != undamaged
    assert undamaged.startswith(stepper.text("bad"))
    assert stepper.text("beside") == expected
    assert stepper.owners() == {}


def test_a_damaged_beginning_of_prompts_fails_one_turn_only(checkpoint: Checkpoint) -> None:
    stepper = Stepper(checkpoint, replace(LIMITS, prefix_cache_bytes=1 << 20))
    asking = asked("first", 9, 200)
    expected, first = stepper.turn(asking)
    kept = stepper.worker._reader._prefixes._states
    assert len(kept)
    for key in kept:
        found = kept.get(key)
        assert found is not None
        found.state[0].fill_(torch.nan)
    stepper.submit(replace(asking, request_id="second"))
    stepper.run()
    assert isinstance(stepper.last("second"), RowDamaged)
    assert not len(kept)
    text, last = stepper.turn(replace(asking, request_id="third"))
    assert (text, last.cached_tokens) == (expected, first.cached_tokens)


@pytest.mark.parametrize("method", ["push_plain", "cut", "append"])
def test_an_error_in_one_text_ends_no_other(
    stepper: Stepper, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    other = asked("beside", 2, 30)
    expected, _ = stepper.turn(replace(other, request_id="alone"))
    bad = asked("bad", 9, 3, retain_as="state")
    whole, _ = stepper.turn(replace(bad, request_id="whole", retain_as=None))
    if method == "cut":
        bad = replace(bad, stop=(whole[2:4],))

    def fail(*_: object, **__: object) -> None:
        raise OSError("a secret")

    stepper.submit(bad, other)
    stepper.worker._receive()
    sequence = stepper.scheduler.find("bad")
    assert sequence is not None
    monkeypatch.setattr(sequence.text if method == "push_plain" else sequence, method, fail)
    stepper.run()
    assert stepper.last("bad") == Failed("bad", FAILED)
    assert stepper.text("beside") == expected
    assert stepper.owners() == {}


def sequences(checkpoint: Checkpoint, *requests: EngineRequest) -> list[tuple[int, TextSequence]]:
    """Sequences with a row each; their prompts are one token."""
    made = (TextSequence(each, checkpoint.tokenizer, 0.0) for each in requests)
    return list(enumerate(made, 1))


def new_steps(checkpoint: Checkpoint, decoder: str) -> Steps:
    del decoder  # the fixture that says which one a network makes
    pool = checkpoint.network.new_pool(5)
    return Steps(runners.new_runner(checkpoint.network, pool, 4), pool, Metrics())


def test_what_has_ended_since_the_launch_gets_no_token(
    checkpoint: Checkpoint, decoder: str
) -> None:
    steps = new_steps(checkpoint, decoder)
    batch = sequences(checkpoint, *(request(name, 1) for name in ("stays", "ended", "replaced")))
    assert steps.launch([]) is None
    flight = steps.launch(batch)
    assert flight is not None
    assert [sequence.num_in_flight for _, sequence in batch] == [1, 1, 1]
    (row, stays), _, (other_row, _) = batch
    [(_, successor)] = sequences(checkpoint, request("successor", 1))
    outcomes = steps.collect(flight, {row: stays, other_row: successor})
    assert [text.request_id for text in outcomes.texts] == ["stays"]
    assert outcomes.ended == []
    assert [sequence.num_generated for _, sequence in batch] == [1, 0, 0]
    assert [sequence.num_in_flight for _, sequence in batch] == [0, 0, 0]


def test_only_a_decoder_that_runs_ahead_steps_before_the_last_token_is_known(
    checkpoint: Checkpoint, decoder: str
) -> None:
    steps, outcomes = new_steps(checkpoint, decoder), Outcomes()
    careful = SamplingParams(presence_penalty=1.0)
    batch = sequences(
        checkpoint,
        request("plain", 1, max_tokens=2),
        request("last", 1, max_tokens=1),
        request("careful", 1, sampling=careful),
    )
    assert steps.find_ready(batch, outcomes) == batch
    flight = steps.launch(batch)
    assert flight is not None
    ahead = steps.find_ready(batch, outcomes)
    assert ahead == (batch[:1] if decoder == "ahead" else [])
    landed = steps.collect(flight, dict(batch))
    [(ended, end)] = landed.ended
    assert (ended.request.request_id, end) == ("last", End("length"))
    assert {text.request_id for text in landed.texts} == {"plain", "last", "careful"}
    assert outcomes == Outcomes()

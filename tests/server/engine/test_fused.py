"""The engine on the network in kernels: on a GPU if there is one, else in the interpreter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint
from model.decoding.sampling import SamplingParams
from model.heinsen.checkpoint import load_trainable
from model.kernels import cuda
from server.engine.messages import EngineRequest
from tests.server.engine.driver import LIMITS, request, stored
from tests.server.engine.stepper import Stepper


@pytest.fixture
def fused(tiny_checkpoint: Path) -> Checkpoint:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_trainable(tiny_checkpoint, device).network.requires_grad_(False).eval()
    return replace(checkpoints.load(tiny_checkpoint, device), network=network.fuse())


def asked(name: str, num_prompt: int, **changes: object) -> EngineRequest:
    return request(name, num_prompt, **({"max_tokens": 4, "return_tokens": True} | changes))


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.skipif(not cuda.is_available(), reason="needs Triton")
def test_turns_are_those_of_the_compiled_network(fused: Checkpoint, checkpoint: Checkpoint) -> None:
    """Streams, a session with its next turn from bytes, penalties and log-probabilities."""
    first = [
        asked("greedy", 3, sampling=SamplingParams(temperature=0.0)),
        asked("session", 70, retain_as="state"),
        asked("careful", 2, sampling=SamplingParams(frequency_penalty=0.5, seed=3)),
        asked("scored", 5, num_logprobs=1, score_prompt=True),
    ]
    played = [Stepper(each, replace(LIMITS, warm_sessions=0)) for each in (fused, checkpoint)]
    assert played[0].worker._runner.runs_ahead
    for stepper in played:
        stepper.submit(*first)
        stepper.run()
        last = stepper.finished("session")
        assert last.state is not None
        assert last.continuation is not None
        stepper.turn(
            asked("next", 2, source=stored(last), continuation=last.continuation, max_tokens=2)
        )
    for name in [*(each.request_id for each in first), "next"]:
        ours, theirs = (each.finished(name) for each in played)
        assert (ours.reason, ours.num_generated) == (theirs.reason, theirs.num_generated)
        assert ours.continuation == theirs.continuation
        assert played[0].text(name) == played[1].text(name)
    scores = [
        [token.logprob for event in each.events() if event.request_id == "scored"
         for token in getattr(event, "tokens", ())]
        for each in played
    ]  # fmt: skip
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)

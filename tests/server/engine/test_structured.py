"""Texts under a grammar, in the engine: where they end, and that they do not affect others."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from model.checkpoint import Checkpoint
from model.decoding.grammar import Grammar, GrammarCompiler, GrammarSpec
from model.decoding.grammar.vocabulary import NO_CONTINUATION
from model.decoding.sampling import SamplingParams
from server.engine.messages import (
    EngineRequest,
    Finished,
    GrammarFailed,
    RowDamaged,
    TextDelta,
    Token,
)
from tests.server.engine.driver import request, stored
from tests.server.engine.stepper import Stepper

CHOICES = ("yes", "no", "the cat sat on the mat")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["ä", "cat"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
SPECS = {
    "choice": GrammarSpec("choice", CHOICES),
    "schema": GrammarSpec("json_schema", json.dumps(SCHEMA)),
    "letters": GrammarSpec("regex", "[ab]*"),
    "three": GrammarSpec("regex", "[ab]{3}"),
    "nothing": GrammarSpec("choice", ("",)),
    "dead end": GrammarSpec("grammar", 'start: "a" B\nB: "b" & "d"\n'),
}


@pytest.fixture(scope="module")
def compiler(checkpoint: Checkpoint) -> Iterator[GrammarCompiler]:
    network = checkpoint.network
    made = GrammarCompiler(checkpoint.tokenizer, network.vocab_size, network.eos)
    yield made
    made.close()


@pytest.fixture(scope="module")
def grammars(compiler: GrammarCompiler) -> dict[str, Grammar]:
    return {name: compiler.compile(spec) for name, spec in SPECS.items()}


@pytest.fixture
def stepper(checkpoint: Checkpoint) -> Stepper:
    return Stepper(checkpoint)


def asked(name: str, grammar: Grammar, **changes: Any) -> EngineRequest:
    base: dict[str, Any] = {"max_tokens": 200, "ignore_eos": False, "grammar": grammar}
    return request(name, **(base | changes))


def seeded(seed: int, temperature: float = 1.0, **changes: Any) -> SamplingParams:
    return SamplingParams(seed=seed, temperature=temperature, **changes)


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 100])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_a_complete_text_ends_whatever_else_is_asked_for(
    stepper: Stepper,
    grammars: dict[str, Grammar],
    temperature: float,
    min_tokens: int,
    ignore_eos: bool,
) -> None:
    for seed in range(6):
        sampling = seeded(seed, temperature)
        text, last = stepper.turn(
            asked(
                f"choice {seed}",
                grammars["choice"],
                sampling=sampling,
                min_tokens=min_tokens,
                ignore_eos=ignore_eos,
            )
        )
        assert text in CHOICES
        assert (last.reason, last.stopped_by) == ("stop", None)


@pytest.mark.long
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_text_satisfies_its_schema(
    stepper: Stepper, grammars: dict[str, Grammar], filters: dict[str, Any], ignore_eos: bool
) -> None:
    for seed in range(4):
        sampling = seeded(seed, 1.0, repetition_penalty=1.5, **filters)
        wanted = asked(f"{seed}", grammars["schema"], sampling=sampling, ignore_eos=ignore_eos)
        text, last = stepper.turn(wanted)
        jsonschema.validate(json.loads(text), SCHEMA)
        assert last.reason == "stop"


def test_tokens_do_not_depend_on_the_company(
    checkpoint: Checkpoint, grammars: dict[str, Grammar]
) -> None:
    requests = [
        asked("structured", grammars["schema"], sampling=seeded(1)),
        asked("twin", grammars["schema"], sampling=seeded(2)),
        asked("choice", grammars["choice"], sampling=seeded(3)),
        request("free", max_tokens=60),
    ]
    alone = {r.request_id: Stepper(checkpoint).turn(r)[0] for r in requests}
    together = Stepper(checkpoint)
    together.submit(*requests)
    together.run()
    assert {r.request_id: together.text(r.request_id) for r in requests} == alone
    assert len(set(alone.values())) == 4


@pytest.mark.parametrize("before", range(5))
def test_a_text_may_begin_while_others_decode(
    before: int, checkpoint: Checkpoint, grammars: dict[str, Grammar]
) -> None:
    """Its prompt is read in a step in which they decode: its first token is constrained, too."""
    stepper = Stepper(checkpoint)
    first = asked("first", grammars["schema"], sampling=seeded(1))
    late = asked("late", grammars["choice"], num_prompt=100, sampling=seeded(before))
    expected = {r.request_id: Stepper(checkpoint).turn(r)[0] for r in (first, late)}
    stepper.submit(first)
    stepper.step(2 + before)
    assert stepper.scheduler.decoding
    stepper.submit(late)
    stepper.run()
    assert {name: stepper.text(name) for name in expected} == expected
    assert expected["late"] in CHOICES


def test_a_grammar_that_allows_no_token_fails_alone(
    stepper: Stepper, grammars: dict[str, Grammar]
) -> None:
    beside = request("beside", max_tokens=30)
    expected = stepper.turn(replace(beside, request_id="alone"))[0]
    stepper.submit(beside, asked("stuck", grammars["dead end"]))
    stepper.run()
    assert stepper.last("stuck") == GrammarFailed("stuck", NO_CONTINUATION)
    assert stepper.text("stuck") == "a"
    assert stepper.text("beside") == expected
    assert isinstance(stepper.last("beside"), Finished)
    assert stepper.owners() == {}


def test_what_is_forbidden_until_later_can_leave_nothing(
    stepper: Stepper, checkpoint: Checkpoint, grammars: dict[str, Grammar]
) -> None:
    """Stop tokens are not allowed before `min_tokens`, and here nothing else is."""
    letters = {checkpoint.tokenizer.token_bytes.index(letter) for letter in (b"a", b"b")}
    wanted = asked("both", grammars["three"], stop_token_ids=tuple(sorted(letters)), min_tokens=2)
    stepper.submit(wanted)
    stepper.run()
    last = stepper.last("both")
    assert isinstance(last, GrammarFailed)
    assert "min_tokens" in last.reason


def test_a_text_that_may_end_continues_as_long_as_requested(
    stepper: Stepper, grammars: dict[str, Grammar]
) -> None:
    ignoring = asked("ignoring", grammars["letters"], ignore_eos=True, max_tokens=40)
    text, last = stepper.turn(ignoring)
    assert re.fullmatch("[ab]{40,}", text)
    assert (last.reason, last.num_generated) == ("length", 40)
    lengths = set()
    for seed in range(30):
        wanted = asked(f"{seed}", grammars["letters"], min_tokens=4, sampling=seeded(seed))
        text, last = stepper.turn(wanted)
        assert re.fullmatch("[ab]{4,}", text)
        assert last.num_generated > 4 or last.reason == "length"
        lengths.add(len(text))
    assert len(lengths) > 3


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_only_text_may_be_empty(
    stepper: Stepper, grammars: dict[str, Grammar], ignore_eos: bool
) -> None:
    text, last = stepper.turn(
        asked("nothing", grammars["nothing"], ignore_eos=ignore_eos, min_tokens=5)
    )
    assert (text, last.reason) == ("", "stop")


def test_a_text_is_cut_where_the_client_says(
    stepper: Stepper, grammars: dict[str, Grammar]
) -> None:
    text, last = stepper.turn(asked("short", grammars["schema"], max_tokens=3))
    assert (last.reason, last.num_generated) == ("length", 3)
    assert text.startswith("{")
    text, last = stepper.turn(asked("stop", grammars["schema"], stop=("name",)))
    assert (text, last.stopped_by) == ('{"', "name")


def test_a_stop_token_that_is_an_end_token_ends_a_text_that_may_end(
    stepper: Stepper, checkpoint: Checkpoint, grammars: dict[str, Grammar]
) -> None:
    end = checkpoint.network.eos[0]
    wanted = asked(
        "stops", grammars["letters"], ignore_eos=True, stop_token_ids=(end,), sampling=seeded(4)
    )
    text, last = stepper.turn(wanted)
    assert re.fullmatch("[ab]*", text)
    assert (last.reason, last.stopped_by) == ("stop", end)


def test_a_session_continues_after_a_structured_turn(
    stepper: Stepper, grammars: dict[str, Grammar]
) -> None:
    """Its last token is read first by the next turn, as after any text that ends without one."""
    first = asked("first", grammars["three"], retain_as="state", return_tokens=True)
    text, last = stepper.turn(first)
    assert re.fullmatch("[ab]{3}", text)
    tokens = [token.token_id for token in emitted_tokens(stepper, "first")]
    assert len(tokens) == last.num_generated
    assert last.continuation is not None
    assert last.continuation.position == len(first.token_ids) + last.num_generated
    assert last.continuation.pending == (tokens[-1],)
    following = asked(
        "second",
        grammars["choice"],
        source=stored(last),
        continuation=last.continuation,
        token_ids=(),
    )
    assert stepper.turn(following)[0] in CHOICES


def emitted_tokens(stepper: Stepper, request_id: str) -> list[Token]:
    """All tokens of a text."""
    own = [event for event in stepper.events() if event.request_id == request_id]
    return [t for event in own if isinstance(event, TextDelta | Finished) for t in event.tokens]


def first_token(stepper: Stepper, request_id: str) -> Token:
    return emitted_tokens(stepper, request_id)[0]


def test_probabilities_are_the_models_own(stepper: Stepper, grammars: dict[str, Grammar]) -> None:
    free = request("free", max_tokens=1, num_logprobs=300)
    stepper.turn(free)
    stepper.turn(asked("bound", grammars["choice"], num_logprobs=3, token_ids=free.token_ids))
    whole, bound = first_token(stepper, "free"), first_token(stepper, "bound")
    assert bound.top == whole.top[:3]
    assert bound.logprob == pytest.approx(dict(whole.top)[bound.token_id], abs=1e-6)


def test_a_damaged_state_is_not_a_fault_of_the_grammar(
    stepper: Stepper, grammars: dict[str, Grammar]
) -> None:
    stepper.submit(asked("damaged", grammars["letters"], ignore_eos=True))
    stepper.step(3)
    row = stepper.owners()["damaged"]
    for values in stepper.pool.tensors.values():
        if values.is_floating_point():
            values[:, row] = torch.nan
    stepper.run()
    assert isinstance(stepper.last("damaged"), RowDamaged)

"""Log-probabilities of answers and prompts, and what ends the text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.decoding.logprobs import score
from model.decoding.sampling import SamplingParams
from model.heinsen.network import LanguageModel
from model.state import StatePool
from server.engine.messages import (
    Continuation,
    EngineRequest,
    Failed,
    Finished,
    InvalidLogits,
    PromptScored,
    RowDamaged,
    StoredState,
    TextDelta,
    Token,
)
from server.engine.scoring import PromptScores
from tests.model.calls import step
from tests.server.engine.driver import LIMITS, request, stored
from tests.server.engine.stepper import Stepper

SMALL = replace(LIMITS, prefill_chunk_tokens=32)
EOS = 0
"""The end token of the tiny checkpoint."""


@pytest.fixture
def stepper(checkpoint: Checkpoint) -> Stepper:
    assert checkpoint.network.eos == (EOS,)
    return Stepper(checkpoint, SMALL)


def answer(stepper: Stepper, name: str) -> list[Token]:
    """The tokens of a request in the order of its events."""
    own = [event for event in stepper.events() if event.request_id == name]
    return [t for event in own if isinstance(event, TextDelta | Finished) for t in event.tokens]


def ids_of(tokens: Sequence[Token]) -> list[int]:
    return [token.token_id for token in tokens]


def prompt_scores(stepper: Stepper, name: str) -> tuple[Token, ...]:
    """The prompt's scores, which are sent once and before anything else."""
    own = [event for event in stepper.events() if event.request_id == name]
    assert [isinstance(event, PromptScored) for event in own] == [True, *[False] * (len(own) - 1)]
    assert isinstance(own[0], PromptScored)
    return own[0].tokens


def by_steps(checkpoint: Checkpoint, ids: Sequence[int]) -> Tensor:
    """Logits after each of the tokens, one step after another `[tokens, vocab]`."""
    network = checkpoint.network
    assert isinstance(network, LanguageModel)
    pool = network.new_pool(1)
    return torch.cat([step(network, torch.tensor([token_id]), pool, [0]) for token_id in ids])


def scored(logits: Tensor, ids: Sequence[int], num_top: int) -> list[Token]:
    found = score(logits, ids, [num_top] * len(ids))
    pairs = zip(ids, found, strict=True)
    return [Token(i, each.logprob, each.top) for i, each in pairs if each is not None]


HOT = SamplingParams(
    seed=3,
    temperature=2.5,
    top_k=50,
    repetition_penalty=1.4,
    presence_penalty=0.5,
    logit_bias=((5, 3.0), (9, -100.0)),
)


@pytest.mark.parametrize("sampling", [HOT, SamplingParams(temperature=0.0), SamplingParams()])
@pytest.mark.parametrize("num_top", [0, 1, 4, 300])
def test_probabilities_of_the_answer_are_the_models(
    stepper: Stepper, checkpoint: Checkpoint, sampling: SamplingParams, num_top: int
) -> None:
    """Before any sampling parameters apply; those of a softmax in float64."""
    asked = request("asked", 9, sampling=sampling, num_logprobs=num_top)
    others = [request(f"other-{i}", 5 + i, num_logprobs=(None, 7)[i % 2]) for i in range(3)]
    stepper.submit(others[0], asked, *others[1:])
    stepper.run()
    tokens = answer(stepper, "asked")
    assert len(tokens) == stepper.finished("asked").num_generated == 12
    ids = [*asked.token_ids, *ids_of(tokens)]
    assert tokens == scored(by_steps(checkpoint, ids[:-1])[8:], ids[9:], num_top)
    network = checkpoint.network
    assert isinstance(network, LanguageModel)
    logits, _ = network.unroll(torch.tensor([ids]), network.empty_state(1))
    expected = logits[0, 8:-1].double().log_softmax(-1)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=2e-5)
        assert len(token.top) == num_top
        for token_id, logprob in token.top:
            assert logprob == pytest.approx(float(row[token_id]), abs=2e-5)
        found = [logprob for _, logprob in token.top]
        assert found == sorted(found, reverse=True)
        assert all(logprob >= max(row) - 2e-5 for logprob in found[:1])


def test_without_logprobs_the_text_is_the_same_and_has_no_tokens(stepper: Stepper) -> None:
    texts = []
    for name, changes in (
        ("plain", {}),
        ("ids", {"return_tokens": True}),
        ("top", {"num_logprobs": 3}),
    ):
        texts.append(stepper.turn(replace(request("x", 9), request_id=name, **changes))[0])
    assert len(set(texts)) == 1
    assert answer(stepper, "plain") == []
    assert answer(stepper, "ids") == [Token(i) for i in ids_of(answer(stepper, "top"))]
    assert len(answer(stepper, "ids")) == 12


@pytest.mark.parametrize("num_prompt", [1, 2, 16, 17, 100, 333])
@pytest.mark.parametrize("num_top", [None, 0, 3])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_prompt_has_the_probabilities_of_its_tokens_one_by_one(
    stepper: Stepper, checkpoint: Checkpoint, num_prompt: int, num_top: int | None, max_tokens: int
) -> None:
    asked = request(
        "asked", num_prompt, num_logprobs=num_top, score_prompt=True, max_tokens=max_tokens
    )
    stepper.turn(asked)
    first, *rest = prompt_scores(stepper, "asked")
    ids = asked.token_ids
    assert first == Token(ids[0])
    if num_prompt == 1:
        assert rest == []
    else:
        assert rest == scored(by_steps(checkpoint, ids[:-1]), ids[1:], num_top or 0)


def test_prompts_are_scored_in_pieces_next_to_others(
    stepper: Stepper, checkpoint: Checkpoint
) -> None:
    asked = [
        request(f"r{i}", 40 + 31 * i, score_prompt=i % 2 == 1, num_logprobs=i) for i in range(4)
    ]
    stepper.submit(request("runs", 3, max_tokens=60), *asked[:3])
    stepper.step(3)
    assert len(stepper.scheduler.prefilling) > 1
    stepper.submit(asked[3])
    stepper.run()
    for i, each in enumerate(asked):
        own = [e for e in stepper.events() if e.request_id == each.request_id]
        assert sum(isinstance(event, PromptScored) for event in own) == i % 2
        if i % 2:
            logits = by_steps(checkpoint, each.token_ids[:-1])
            found = prompt_scores(stepper, each.request_id)
            assert list(found[1:]) == scored(logits, each.token_ids[1:], i)
        text, _ = Stepper(checkpoint, SMALL).turn(replace(each, score_prompt=False))
        assert stepper.text(each.request_id) == text


@pytest.mark.parametrize("is_in_place", [True, False])
def test_a_session_continues_with_the_probability_of_the_first_token_too(
    stepper: Stepper, checkpoint: Checkpoint, is_in_place: bool
) -> None:
    first = request("first", 20, retain_as="state", return_tokens=True)
    _, last = stepper.turn(first)
    assert last.continuation is not None
    assert len(last.continuation.pending) == 1
    ids = [*first.token_ids, *ids_of(answer(stepper, "first"))]
    second = request(
        "second",
        30,
        source=stored(last) if is_in_place else stored(last, "elsewhere"),
        continuation=last.continuation,
        score_prompt=True,
        num_logprobs=2,
    )
    stepper.turn(second)
    whole = [*ids, *second.token_ids]
    logits = by_steps(checkpoint, whole[:-1])[len(ids) - 1 :]
    assert list(prompt_scores(stepper, "second")) == scored(logits, second.token_ids, 2)


def test_tokens_that_are_pending_are_read_and_not_scored(
    stepper: Stepper, checkpoint: Checkpoint
) -> None:
    pending, ids = (5, 6, 7, 8), (9, 10, 11)
    start = Continuation(position=4, pending=pending)
    asked = request("asked", token_ids=ids, continuation=start, score_prompt=True, num_logprobs=1)
    stepper.turn(asked)
    logits = by_steps(checkpoint, [*pending, *ids[:-1]])[3:]
    assert list(prompt_scores(stepper, "asked")) == scored(logits, ids, 1)
    nothing = replace(asked, request_id="nothing", token_ids=())
    stepper.turn(nothing)
    assert prompt_scores(stepper, "nothing") == ()


@pytest.mark.parametrize("cuts", [[], [1], [2, 3], [3, 4, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_scores_do_not_depend_on_the_slices_that_come(cuts: list[int]) -> None:
    logits = torch.randn(10, 40, generator=torch.Generator().manual_seed(1))
    ids = list(range(11))
    whole, parts = PromptScores(ids, 3, 2), PromptScores(ids, 3, 2)

    def add(scores: PromptScores, start: int, end: int) -> None:
        first, token_ids, num_top = scores.following(start, end)
        before = logits[start + first : start + first + len(token_ids)]
        scores.add(
            token_ids, score(before, token_ids, [num_top] * len(token_ids)) if token_ids else []
        )

    add(whole, 0, 10)
    for start, end in zip([0, *cuts], [*cuts, 10], strict=True):
        add(parts, start, end)
    assert whole.tokens == parts.tokens == scored(logits[2:], ids[3:], 2)


def test_a_prompt_without_a_token_to_read_fails_without_scores(stepper: Stepper) -> None:
    stepper.submit(request("empty", token_ids=(), score_prompt=True))
    stepper.run()
    assert [type(event) for event in stepper.events()] == [Failed]
    stepper.turn(request("nothing", token_ids=(), score_prompt=True, max_tokens=0))
    assert prompt_scores(stepper, "nothing") == ()


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_damaged_state_has_no_scores_and_fails_alone(stepper: Stepper, max_tokens: int) -> None:
    other = request("other", 30, score_prompt=True)
    stepper.turn(replace(other, request_id="alone"))
    damaged = stepper.worker._network.new_pool(1)
    damaged.tensors["h"][0, 0, 5] = torch.nan
    bad = request(
        "bad", 9, source=StoredState("damaged", damaged.export_row(0)), max_tokens=max_tokens
    )
    stepper.submit(replace(bad, score_prompt=True, retain_as="state"), other)
    stepper.run()
    own = [event for event in stepper.events() if event.request_id == "bad"]
    assert own == [InvalidLogits("bad")]
    assert prompt_scores(stepper, "other") == prompt_scores(stepper, "alone")
    assert stepper.owners() == {}


def test_a_row_with_invalid_logits_fails_alone(stepper: Stepper) -> None:
    other = request("other", 9, num_logprobs=2)
    stepper.turn(replace(other, request_id="alone"))
    stepper.submit(request("bad", 9, num_logprobs=2, max_tokens=40), other)
    stepper.step(5)
    stepper.pool.tensors["h"][0, stepper.owners()["bad"]] = torch.nan
    stepper.run()
    assert isinstance(stepper.last("bad"), RowDamaged)
    assert answer(stepper, "other") == answer(stepper, "alone")


def test_a_scored_prompt_is_read_completely_and_others_share_its_states(
    checkpoint: Checkpoint,
) -> None:
    cache_bytes = 8 * checkpoint.network.state_spec.num_bytes
    stepper = Stepper(checkpoint, replace(SMALL, prefix_cache_bytes=cache_bytes))
    asked = request("first", 200, score_prompt=True, num_logprobs=1, owner="a")
    _, first = stepper.turn(asked)
    for name, changes, cached in (
        ("plain", {"score_prompt": False}, 192),
        ("again", {}, 0),
        ("salted", {"score_prompt": False, "owner": "b"}, 0),
        ("unsalted", {"score_prompt": False, "owner": ""}, 0),
    ):
        text, last = stepper.turn(replace(asked, request_id=name, **changes))
        assert last.cached_tokens == cached
        assert text == stepper.text("first")
    assert first.cached_tokens == 0
    assert prompt_scores(stepper, "again") == prompt_scores(stepper, "first")
    assert len(prompt_scores(stepper, "first")) == 200


def sure(*token_ids: int) -> SamplingParams:
    """Samples the first of these tokens that is allowed."""
    bias = tuple((token_id, 100.0 - 10 * i) for i, token_id in enumerate(token_ids))
    return SamplingParams(temperature=0.0, logit_bias=bias)


def pending(last: Finished) -> tuple[int, ...]:
    assert last.continuation is not None
    return last.continuation.pending


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("ends", ["eos", "stop token", "stop token, eos ignored", "eos is listed"])
def test_a_token_ends_the_text(stepper: Stepper, ends: str, include: bool) -> None:
    listed = EOS if ends in ("stop token, eos ignored", "eos is listed") else 77
    asked = request(
        "asked",
        ignore_eos=ends == "stop token, eos ignored",
        stop_token_ids=() if ends == "eos" else (50, listed),
        include_stop=include,
        sampling=sure(EOS if ends == "eos" else listed),
        min_tokens=3,
        return_tokens=True,
        retain_as="state",
    )
    text, last = stepper.turn(asked)
    token_id = EOS if ends == "eos" else listed
    assert last.reason == "stop"
    assert last.stopped_by == (None if ends == "eos" else listed)
    assert last.num_generated == 4
    ids = ids_of(answer(stepper, "asked"))
    kept = include and ends != "eos"
    assert len(ids) == 3 + kept
    assert (token_id in ids) == kept
    assert text.encode().startswith(stepper.worker._tokenizer.decode(ids).encode()[:-3])
    assert pending(last) == ((token_id,) if kept else ())
    assert last.continuation is not None
    assert last.continuation.position == 7 + 3 + kept


def test_the_models_end_token_is_an_ordinary_one_where_it_is_ignored(stepper: Stepper) -> None:
    asked = request("asked", sampling=sure(EOS), ignore_eos=True, return_tokens=True, min_tokens=5)
    _, last = stepper.turn(asked)
    assert (last.reason, last.stopped_by, last.num_generated) == ("length", None, 12)
    assert ids_of(answer(stepper, "asked")) == [EOS] * 12


def test_the_least_number_of_tokens_bans_each_that_would_end_the_text(stepper: Stepper) -> None:
    asked = request(
        "asked",
        ignore_eos=False,
        stop_token_ids=(77, 78),
        sampling=sure(EOS, 77, 78, 90),
        return_tokens=True,
    )
    for least in (0, 1, 11, 12, 50):
        name = f"least-{least}"
        _, last = stepper.turn(replace(asked, request_id=name, min_tokens=least))
        assert ids_of(answer(stepper, name)) == [90] * min(least, 12)
        assert last.reason == ("stop" if least < 12 else "length")


def tokens_for(checkpoint: Checkpoint, text: str) -> list[int]:
    """One token per byte."""
    single = {checkpoint.tokenizer.bytes_of(i): i for i in range(1, 300)}
    return [single[bytes([byte])] for byte in text.encode()]


def scripted(monkeypatch: pytest.MonkeyPatch, start: int, ids: Sequence[int]) -> None:
    """Make the tokens from position `start` on these."""

    def choose(logits: Tensor, rows: Sequence[Any]) -> list[int]:
        del logits
        return [ids[row.position - start] for row in rows]

    monkeypatch.setattr("model.decoding.decoder.sample", choose)


@pytest.mark.parametrize(
    ("written", "stop", "changes", "text", "num_tokens", "reason"),
    [
        ("one two.", "two", {}, "one ", 4, "stop"),
        ("one two.", "two", {"include_stop": True}, "one two", 7, "stop"),
        ("café é", "é", {}, "caf", 3, "stop"),
        ("café é", "é", {"include_stop": True}, "café", 5, "stop"),
        ("café é", "é", {"min_tokens": 5}, "caf", 3, "stop"),
        ("café é", "é", {"min_tokens": 6}, "café ", 6, "stop"),
        ("aaab--", "ab", {"min_tokens": 4}, "aa", 2, "stop"),
        ("aaab--", "ab", {"min_tokens": 5}, "aaab--", 6, "length"),
        ("aaab-a", "ab", {}, "aa", 2, "stop"),
        ("xyz--a", "ab", {}, "xyz--a", 6, "length"),
        ("xyz--é", "ab", {"cut": 1}, "xyz--", 6, "length"),
    ],
)
def test_stop_strings_over_several_tokens_and_their_probabilities(
    stepper: Stepper,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    written: str,
    stop: str,
    changes: dict[str, Any],
    text: str,
    num_tokens: int,
    reason: str,
) -> None:
    """Single-byte tokens: the events contain a prefix of what was sampled."""
    ids = tokens_for(checkpoint, written)
    changes = dict(changes)
    ids = ids[: len(ids) - changes.pop("cut", 0)]
    asked = request(
        "asked", 9, stop=(stop,), num_logprobs=2, max_tokens=len(ids), retain_as="state", **changes
    )
    scripted(monkeypatch, 9, ids)
    emitted, last = stepper.turn(asked)
    assert (emitted, last.reason) == (text, reason)
    assert last.stopped_by == (stop if reason == "stop" else None)
    kept = ids[:num_tokens]
    logits = by_steps(checkpoint, [*asked.token_ids, *kept])
    assert answer(stepper, "asked") == scored(logits[8:-1], kept, 2)
    for event in stepper.events():
        if isinstance(event, TextDelta) and not event.text:
            assert event.tokens == ()


def test_a_token_of_which_a_part_is_cut_away_is_kept(
    stepper: Stepper, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of its text is in the answer; the session contains only that part."""
    words = checkpoint.tokenizer
    token_id = next(i for i in range(300) if len(words.bytes_of(i)) > 3)
    text = words.decode([token_id])
    ids = [*tokens_for(checkpoint, "x"), token_id, *tokens_for(checkpoint, "yz")]
    scripted(monkeypatch, 9, ids)
    base = request("", 9, return_tokens=True, max_tokens=4)
    for include, end in ((False, 1), (True, 3)):
        name = f"{include}"
        asked = replace(
            base,
            request_id=name,
            retain_as=f"after {name}",
            stop=(text[1:3],),
            include_stop=include,
        )
        emitted, last = stepper.turn(asked)
        assert emitted == f"x{text[:end]}"
        assert ids_of(answer(stepper, name)) == ids[:2]
        assert words.decode(pending(last)) in (emitted, emitted[1:])
        assert last.num_generated == 2


def turn_after(last: Finished, base: EngineRequest, name: str, max_tokens: int) -> EngineRequest:
    assert last.continuation is not None
    return replace(
        base,
        request_id=name,
        retain_as=name,
        token_ids=(),
        source=stored(last),
        continuation=last.continuation,
        max_tokens=max_tokens,
        stop=(),
        stop_token_ids=(),
    )


@pytest.mark.parametrize("kind", ["string", "token"])
@pytest.mark.parametrize("place", [1, 4, 7, 10, 14])
def test_a_session_continues_after_an_included_stop_as_in_one_turn(
    stepper: Stepper,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    place: int,
) -> None:
    """The string or token is in the state as sampled, not tokenised again."""
    words = checkpoint.tokenizer
    ids = [*words.encode("the cat sat"), *tokens_for(checkpoint, " the mat, é"), *words.encode("!")]
    scripted(monkeypatch, 9, ids)
    whole = request("whole", 9, retain_as="whole", return_tokens=True, max_tokens=len(ids))
    text, end = stepper.turn(whole)
    assert ids_of(answer(stepper, "whole")) == ids
    at = ids.index(ids[place]) + 1
    before = words.decode(ids[:at])
    stop = next(before[i:] for i in range(len(before) - 1, -1, -1) if before.find(before[i:]) == i)
    how = {"stop": (stop,)} if kind == "string" else {"stop_token_ids": (ids[place],)}
    asked = replace(whole, request_id="part", retain_as="part", include_stop=True, **how)
    emitted, last = stepper.turn(asked)
    assert emitted == before
    assert (last.reason, last.num_generated) == ("stop", at)
    assert last.stopped_by == (stop if kind == "string" else ids[place])
    assert ids_of(answer(stepper, "part")) == ids[:at]
    assert pending(last) == (ids[at - 1],)
    rest, after = stepper.turn(turn_after(last, whole, "rest", len(ids) - at))
    assert emitted + rest == text
    assert ids_of(answer(stepper, "rest")) == ids[at:]
    assert (after.state, after.continuation) == (end.state, end.continuation)


def test_a_stop_token_that_the_model_does_not_have_fails_alone(stepper: Stepper) -> None:
    for token_id in (300, -1):
        stepper.submit(request(f"bad{token_id}", stop_token_ids=(token_id,)))
    stepper.turn(request("good", stop_token_ids=(299,)))
    assert isinstance(stepper.last("bad300"), Failed)
    assert isinstance(stepper.last("bad-1"), Failed)


def test_rows_that_do_not_ask_are_not_copied_or_scored(
    stepper: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list[int]()

    def counted(logits: Tensor, ids: Sequence[int], num_top: Sequence[int]) -> object:
        rows.append(len(logits))
        return score(logits, ids, num_top)

    monkeypatch.setattr("model.decoding.decoder.score", counted)
    stepper.submit(*(request(f"plain-{i}", 3, max_tokens=5) for i in range(3)))
    stepper.run()
    assert rows == []
    stepper.submit(request("asks", 3, max_tokens=5, num_logprobs=0), request("plain", 3))
    stepper.run()
    assert rows == [1] * 5


def test_the_pool_is_the_same_after_a_scored_prompt(
    stepper: Stepper, checkpoint: Checkpoint
) -> None:
    asked = request("asked", 100, retain_as="asked", max_tokens=0)
    _, plain = stepper.turn(asked)
    _, last = stepper.turn(
        replace(asked, request_id="scored", retain_as="scored", score_prompt=True)
    )
    assert last.state == plain.state
    pool: StatePool = checkpoint.network.new_pool(1)
    pool.import_row(0, last.state or b"")
    assert pool.export_row(0) == plain.state

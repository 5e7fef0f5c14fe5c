"""A turn may end anywhere: on an empty prompt the next one yields what would have followed."""

from dataclasses import replace
from typing import Any

import pytest

from model.checkpoint import Checkpoint
from model.decoding.grammar import GrammarCompiler, GrammarSpec
from model.decoding.sampling import SamplingParams
from server.engine.messages import EngineRequest, Finished, TextDelta, Token
from tests.server.engine.driver import following, request, stored
from tests.server.engine.stepper import Stepper

LENGTH = 24
CHOICES = {"greedy": SamplingParams(temperature=0.0), "drawn": SamplingParams(seed=8)}
each_choice = pytest.mark.parametrize("choice", CHOICES)


def whole_turn(name: str, choice: str, **changes: Any) -> EngineRequest:
    prompt = request("prompt", 9 + len(choice)).token_ids
    return request(
        name,
        token_ids=prompt,
        max_tokens=LENGTH,
        sampling=CHOICES[choice],
        retain_as=name,
        **changes,
    )


def in_ascii(stepper: Stepper, first: EngineRequest) -> EngineRequest:
    """Without bytes of other characters, which an untrained model cannot complete."""
    tokens = enumerate(stepper.worker._tokenizer.token_bytes)
    bias = tuple((token_id, -1000.0) for token_id, text in tokens if not text or not text.isascii())
    return replace(first, sampling=replace(first.sampling, logit_bias=bias))


def tokens_of(stepper: Stepper, request_id: str) -> list[int]:
    own = [event for event in stepper.events() if event.request_id == request_id]
    emitted = [t for event in own if isinstance(event, TextDelta | Finished) for t in event.tokens]
    return [token.token_id for token in emitted if isinstance(token, Token)]


def go_on(
    stepper: Stepper, first: EngineRequest, last: Finished, **changes: Any
) -> tuple[str, Finished]:
    """The rest of the uninterrupted turn, from the row and from the state's bytes: the same."""
    name = first.request_id
    count = LENGTH - (last.continuation or first.continuation).position + len(first.token_ids)
    found = []
    for place, state_id in (("bytes", "elsewhere"), ("row", last.retained_as)):
        rest = following(last, f"{name} in {place}", 0, source=stored(last, state_id), **changes)
        rest = replace(rest, sampling=first.sampling, max_tokens=count, retain_as=f"{name} {place}")
        text, end = stepper.turn(rest)
        found.append((text, end.state, end.continuation))
        stepper.release(f"{name} {place}")
    assert found[0] == found[1]
    return text, end


@pytest.fixture
def uninterrupted(stepper: Stepper) -> Stepper:
    """A stepper that has generated the whole turn by both methods."""
    for choice in CHOICES:
        stepper.turn(whole_turn(choice, choice, return_tokens=True))
        stepper.release(choice)
    return stepper


@each_choice
def test_a_session_continues_after_each_of_its_tokens_as_a_stop_token(
    uninterrupted: Stepper, choice: str
) -> None:
    """The token is not in the session, and is sampled first again."""
    stepper, tokens = uninterrupted, tokens_of(uninterrupted, choice)
    whole = stepper.finished(choice)
    for token_id in dict.fromkeys(tokens):
        first = whole_turn(f"{choice} {token_id}", choice, stop_token_ids=(token_id,))
        text, last = stepper.turn(first)
        assert (last.stopped_by, last.num_generated) == (token_id, tokens.index(token_id) + 1)
        assert last.continuation is not None
        assert last.continuation.pending == ()
        rest, end = go_on(stepper, first, last)
        assert text + rest == stepper.text(choice)
        assert (end.state, end.continuation) == (whole.state, whole.continuation)


@each_choice
def test_a_session_continues_after_a_stop_token_that_it_includes(
    uninterrupted: Stepper, choice: str
) -> None:
    stepper, tokens = uninterrupted, tokens_of(uninterrupted, choice)
    stop = tokens[LENGTH // 2]
    first = whole_turn(f"{choice} +", choice, stop_token_ids=(stop,), include_stop=True)
    text, last = stepper.turn(first)
    assert last.continuation is not None
    assert last.continuation.pending == (stop,)
    rest, end = go_on(stepper, first, last)
    assert text + rest == stepper.text(choice)
    assert end.state == stepper.finished(choice).state


@pytest.mark.long
@each_choice
@pytest.mark.parametrize("min_tokens", [0, 7])
@pytest.mark.parametrize("include_stop", [False, True])
def test_a_session_continues_where_a_stop_string_has_cut_it(
    stepper: Stepper, choice: str, include_stop: bool, min_tokens: int
) -> None:
    """Bit for bit, if the cut is between two tokens."""
    plain = in_ascii(stepper, whole_turn("whole", choice, return_tokens=True))
    whole, end_of_whole = stepper.turn(plain)
    stepper.release("whole")
    tokens, tokenizer = tokens_of(stepper, "whole"), stepper.worker._tokenizer
    boundaries = {tokenizer.decode(tokens[:count]) for count in range(LENGTH)}
    num_cut, num_exact = 0, 0
    for stop in {whole[at : at + size] for at in range(0, len(whole), 3) for size in (1, 2, 7)}:
        name = f"stops {stop!r}"
        first = replace(plain, request_id=name, retain_as=name, stop=(stop,))
        first = replace(first, include_stop=include_stop, min_tokens=min_tokens)
        text, last = stepper.turn(first)
        if last.reason == "length":
            continue
        num_cut += 1
        if text in boundaries:
            num_exact += 1
            rest, end = go_on(stepper, first, last)
            assert text + rest == whole
            assert end.state == end_of_whole.state
        else:
            go_on(stepper, first, last)
        stepper.release(first.request_id)
    assert num_cut > 3
    assert num_exact > 1


def test_a_held_text_that_is_cut_later_keeps_its_own_tokens(stepper: Stepper) -> None:
    """All tokens since the anchor may belong to one stop string; another one cuts it in the
    middle."""
    plain = in_ascii(stepper, whole_turn("whole", "greedy", return_tokens=True))
    whole, end_of_whole = stepper.turn(plain)
    stepper.release("whole")
    tokens, tokenizer = tokens_of(stepper, "whole"), stepper.worker._tokenizer
    begin, middle = len(tokenizer.decode(tokens[:3])), len(tokenizer.decode(tokens[:12]))
    stops = (whole[begin:middle] + whole[middle:] + "!", whole[middle : middle + 4])
    first = replace(plain, request_id="held", retain_as="held", stop=stops)
    text, last = stepper.turn(first)
    assert last.stopped_by == stops[1]
    rest, end = go_on(stepper, first, last)
    assert text + rest == whole
    assert end.state == end_of_whole.state


def test_a_session_continues_after_an_end_of_text(checkpoint: Checkpoint, stepper: Stepper) -> None:
    """Also after an empty answer; and repeatedly."""
    end_of_text = checkpoint.network.eos[0]
    biased = SamplingParams(temperature=0.0, logit_bias=((end_of_text, 1000.0),))
    plain = whole_turn("plain", "greedy", ignore_eos=True)
    stepper.turn(plain)
    stepper.release("plain")
    first = replace(plain, request_id="ends", retain_as="ends", sampling=biased, ignore_eos=False)
    text, last = stepper.turn(first)
    assert (text, last.reason, last.num_generated) == ("", "stop", 1)
    again = following(last, "again", 0, sampling=biased, ignore_eos=False, retain_as="again")
    text, last = stepper.turn(again)
    assert (text, last.reason, last.num_generated) == ("", "stop", 1)
    text, _ = go_on(stepper, plain, last)
    assert text == stepper.text("plain")


def test_a_session_continues_after_a_complete_text(
    checkpoint: Checkpoint, stepper: Stepper
) -> None:
    """Whether the grammar leaves nothing but the end, or the model has chosen it."""
    network = checkpoint.network
    compiler = GrammarCompiler(checkpoint.tokenizer, network.vocab_size, network.eos)
    ends = tuple((token_id, 1000.0) for token_id in network.eos)
    sampling = SamplingParams(temperature=0.0, logit_bias=ends)
    for source, num_generated in (("[ab]{3}", 3), ("[ab]{2,9}", 3)):
        grammar = compiler.compile(GrammarSpec("regex", source))
        plain = whole_turn(source, "greedy", grammar=grammar, ignore_eos=False)
        text, last = stepper.turn(replace(plain, sampling=sampling))
        assert (last.reason, last.num_generated) == ("stop", num_generated)
        assert go_on(stepper, plain, last)[0]
        bound = replace(plain, request_id=f"{source} again", retain_as=None, max_tokens=len(text))
        _, same = stepper.turn(replace(bound, retain_as=f"{source} again", sampling=sampling))
        assert go_on(stepper, replace(plain, request_id=f"{source} after"), same)[0]
    compiler.close()


def test_a_turn_that_reads_nothing_leaves_others_as_they_are(uninterrupted: Stepper) -> None:
    """Beside others, it is what it is alone, and so are they."""
    stepper, tokens = uninterrupted, tokens_of(uninterrupted, "drawn")
    first = whole_turn("first", "drawn", stop_token_ids=(tokens[5],))
    _, last = stepper.turn(first)
    beside = request("beside", 5, max_tokens=30)
    alone, _ = stepper.turn(replace(beside, request_id="alone"))
    logprobs = {"num_logprobs": 2, "sampling": first.sampling, "max_tokens": 9}
    by_itself = following(last, "by itself", 0, source=stored(last, "elsewhere"), **logprobs)
    expected, _ = stepper.turn(by_itself)
    stepper.submit(beside)
    stepper.step(4)
    stepper.submit(replace(by_itself, request_id="together"))
    stepper.run()
    assert stepper.text("together") == expected
    assert tokens_of(stepper, "together") == tokens_of(stepper, "by itself") == tokens[5:14]
    assert stepper.text("beside") == alone


def test_the_name_of_a_special_token_as_a_stop_string_is_the_token(
    checkpoint: Checkpoint, stepper: Stepper
) -> None:
    name, token_id = next(iter(checkpoint.tokenizer.special_tokens.items()))
    biased = SamplingParams(temperature=0.0, logit_bias=((token_id, 1000.0),))
    for min_tokens in (0, 3):
        first = whole_turn(f"{min_tokens}", "greedy", stop=("zz", name), min_tokens=min_tokens)
        _, last = stepper.turn(replace(first, sampling=biased))
        assert (last.reason, last.stopped_by) == ("stop", name)
        assert last.num_generated == min_tokens + 1

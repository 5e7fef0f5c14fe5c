"""The session's content after a cut, and which tokens end a text."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from model.decoding.sampling import SamplingParams
from server.engine.messages import Continuation, EngineRequest, Token
from server.engine.text_sequence import TextSequence
from tests.server.engine.words import WORDS, byte_tokens, word_tokens

REQUEST = EngineRequest("r", None, Continuation(), (1,), 100, SamplingParams())


def sequence(*stop: str, retain_as: str | None = "state", **changes: Any) -> TextSequence:
    request = replace(REQUEST, stop=stop, retain_as=retain_as, **changes)
    made = TextSequence(request, WORDS, 0.0)
    made.pop_unread(1)
    return made


def generate(running: TextSequence, tokens: list[int]) -> tuple[str, bool, list[int]]:
    """Feed sampled tokens as the engine does; the state is modelled by a list of ids."""
    text, state, snapshots = "", [1], list[list[int]]()
    for token_id in tokens:
        running.num_generated += 1
        step = running.push_text(Token(token_id))
        text += step.text
        if step.wants_anchor:
            snapshots.append(list(state))
            running.set_anchor((torch.tensor(len(snapshots) - 1),))
        if step.cuts_token:
            back = running.cut()
            return text, True, state if back is None else snapshots[int(back[0])]
        if step.stop is not None:
            running.append(token_id)
            return text, True, state
        running.append(token_id)
        state += running.pop_unread(1)
    return text + running.text.flush()[0], False, state


def text_of(ids: list[int]) -> str:
    return WORDS.decode(i for i in ids if i != 1)


@example(text="a\na", stop=["\n", "a\na"], kind="words")
@given(
    text=st.text("abé\n", max_size=30),
    stop=st.lists(st.text("abé\n", min_size=1, max_size=4), min_size=1, max_size=3),
    kind=st.sampled_from(["words", "bytes"]),
)
def test_a_session_holds_what_was_delivered(text: str, stop: list[str], kind: str) -> None:
    running = sequence(*stop)
    tokens = word_tokens(text, kind)
    got, stopped, state = generate(running, tokens)
    kept = running.continuation()
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stopped == bool(ends)
    assert got == (text[: min(ends)[1]] if ends else text)
    if stopped:
        assert text_of([*state, *kept.pending]) == got
        assert kept.position == len(state) + len(kept.pending)
        assert kept.undecoded == b""


def test_half_a_character_is_carried_to_the_next_turn() -> None:
    first, second = byte_tokens("é")
    running = sequence()
    assert running.push_text(Token(first)).text == ""
    running.append(first)
    carried = running.continuation()
    assert carried.undecoded == "é".encode()[:1]
    assert carried.pending == (first,)
    following = TextSequence(replace(REQUEST, continuation=carried, token_ids=()), WORDS, 0.0)
    assert following.push_text(Token(second)).text == "é"


def test_no_anchor_without_a_session_or_a_stop_string() -> None:
    for running in (sequence("ab", retain_as=None), sequence()):
        assert not running.push_text(Token(byte_tokens("a")[0])).wants_anchor
    assert sequence("ab").push_text(Token(byte_tokens("a")[0])).wants_anchor


TEXTS = st.text("anbé\n", max_size=30)
STOPS = st.lists(st.text("anbé\n", min_size=1, max_size=4), max_size=3)


def places(tokens: list[int]) -> list[int]:
    """Start of each token's text: the number of complete characters before it."""
    texts = [b"".join(map(WORDS.bytes_of, tokens[:i])) for i in range(len(tokens) + 1)]
    return [len(text.decode("utf-8", "ignore")) for text in texts]


def first_stop(text: str, stop: list[str], earliest_end: int) -> tuple[int, int] | None:
    """End and beginning of the stop string that is complete first, at this end or later."""
    found = [
        (at + len(each), at)
        for each in stop
        for at in range(len(text))
        if text.startswith(each, at) and at + len(each) >= earliest_end
    ]
    return min(found, default=None)


@example(text="ab", stop=["b", "abx"], kind="bytes", min_tokens=3, include=False)
@example(text="bxé", stop=["b", "bxy"], kind="bytes", min_tokens=2, include=False)
@given(
    text=TEXTS,
    stop=STOPS,
    kind=st.sampled_from(["words", "bytes"]),
    min_tokens=st.integers(0, 8),
    include=st.booleans(),
)
def test_text_state_and_tokens_end_in_the_same_place(
    text: str, stop: list[str], kind: str, min_tokens: int, include: bool
) -> None:
    tokens = word_tokens(text, kind)
    at = places(tokens)
    running = sequence(*stop, min_tokens=min_tokens, include_stop=include, return_tokens=True)
    emitted, given_tokens, state, snapshots = "", list[int](), [1], list[list[int]]()
    stopped, whole = False, True
    for number, token_id in enumerate(tokens, 1):
        running.num_generated += 1
        step = running.push_text(Token(token_id))
        emitted += step.text
        given_tokens += [token.token_id for token in step.tokens]
        stopped, whole = step.stop is not None, not step.cuts_token
        if step.wants_anchor:
            snapshots.append(list(state))
            running.set_anchor((torch.tensor(len(snapshots) - 1),))
        if not stopped:
            assert given_tokens == tokens[: sum(place < len(emitted) for place in at[:number])]
            if include:
                assert len(emitted) == at[number]
        if not whole:
            back = running.cut()
            state = state if back is None else snapshots[int(back[0])]
            break
        running.append(token_id)
        if stopped:
            break
        state += running.pop_unread(1)
    rest, last_tokens = running.text.flush()
    emitted += rest
    given_tokens += [token.token_id for token in last_tokens]

    earliest = at[min_tokens - 1] + 1 if 0 < min_tokens <= len(tokens) else 0
    found = first_stop(text, stop, earliest) if min_tokens <= len(tokens) else None
    assert stopped == (found is not None)
    expected = text if found is None else text[: found[0] if include else found[1]]
    assert emitted == expected
    kept = running.continuation()
    assert kept.position == len(state) + len(kept.pending)
    assert text_of([*state, *kept.pending]) == emitted
    if found is None:
        assert given_tokens == tokens
        assert [*state, *kept.pending][1:] == tokens
    else:
        begins = sum(place < len(emitted) for place in at[:-1])
        assert given_tokens == tokens[:begins]
        if include and len(emitted) in at[1:] and len(emitted) == at[begins]:
            assert whole
            assert [*state, *kept.pending][1:] == tokens[:begins]


def test_tokens_come_only_if_they_are_asked_for() -> None:
    for changes, expected in (
        ({}, 0),
        ({"return_tokens": True}, 1),
        ({"num_logprobs": 0}, 1),
        ({"score_prompt": True}, 0),
    ):
        running = sequence(**changes)
        assert len(running.push_text(Token(byte_tokens("a")[0])).tokens) == expected


def test_tokens_that_end_the_text_are_banned_until_there_are_enough() -> None:
    request = replace(REQUEST, stop_token_ids=(7, 9), min_tokens=2)
    for ignore_eos, expected in ((False, {5, 7, 9}), (True, {7, 9})):
        running = TextSequence(replace(request, ignore_eos=ignore_eos), WORDS, 0.0, (5, 7))
        assert running.end_token_ids == expected
        for number, banned in enumerate((expected, expected, set(), set())):
            running.num_generated = number
            running.append(1)
            sampled = running.next_token(3).sampled
            assert sampled is not None
            assert set(sampled.banned) == banned

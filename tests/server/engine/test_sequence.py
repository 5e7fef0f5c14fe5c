"""Stop strings across tokens, half characters, and what a session keeps when text is cut."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from model.sampling import SamplingParams
from model.tokenizer import Tokenizer, train
from server.engine.messages import Continuation, EngineRequest, Fresh
from server.engine.sequence import Sequence

WORDS = train(["a banana and an ananas"], 260, ["<|endoftext|>"])
REQUEST = EngineRequest("r", Fresh(), Continuation(), (1,), 100, SamplingParams())


def sequence(*stop: str, keep_state: bool = True) -> Sequence:
    made = Sequence(replace(REQUEST, stop=stop, keep_state=keep_state), WORDS, 0.0)
    made.take(1)
    return made


def byte_tokens(text: str) -> list[int]:
    """One token per byte."""
    single = {WORDS.bytes_of(i): i for i in range(257)}
    return [single[bytes([byte])] for byte in text.encode()]


def generate(running: Sequence, tokens: list[int]) -> tuple[str, bool, list[int]]:
    """Feed sampled tokens as the engine does; what the state holds is modelled by a list of ids."""
    text, state, snapshots = "", [1], list[list[int]]()
    for token_id in tokens:
        step = running.push_text(token_id)
        text += step.text
        if step.wants_anchor:
            snapshots.append(list(state))
            running.set_anchor((torch.tensor(len(snapshots) - 1),))
        if step.stopped:
            back = running.cut()
            return text, True, state if back is None else snapshots[int(back[0])]
        running.append(token_id)
        state += running.take(1)
    return text + running.flush(), False, state


def text_of(words: Tokenizer, ids: list[int]) -> str:
    return words.decode(i for i in ids if i != 1)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("aaaaab", ["aab"], "aaa"),
        ("ananas", ["anas", "zzz"], "an"),
        ("naïve café!", ["fé"], "naïve ca"),
        ("ééü and more", ["ü"], "éé"),
        ("no stop here", ["stop!"], "no stop here"),
        ("x\n\ny", ["\n\n"], "x"),
        ("abcabd", ["abd", "bca"], "a"),
        ("stop", ["stop"], ""),
    ],
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str], expected: str) -> None:
    running = sequence(*stop)
    got, stopped, _ = generate(running, byte_tokens(text))
    assert got == expected
    assert stopped == (text != expected)


@example(text="a\na", stop=["\n", "a\na"], joined=True)
@given(
    text=st.text("abé\n", max_size=30),
    stop=st.lists(st.text("abé\n", min_size=1, max_size=4), min_size=1, max_size=3),
    joined=st.booleans(),
)
def test_a_session_holds_what_was_delivered(text: str, stop: list[str], joined: bool) -> None:
    running = sequence(*stop)
    tokens = WORDS.encode(text) if joined else byte_tokens(text)
    got, stopped, state = generate(running, tokens)
    kept = running.continuation()
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stopped == bool(ends)
    assert got == (text[: min(ends)[1]] if ends else text)
    if stopped:
        assert text_of(WORDS, [*state, *kept.pending]) == got
        assert kept.position == len(state) + len(kept.pending)
        assert kept.undecoded == b""


def test_half_a_character_is_carried_to_the_next_turn() -> None:
    first, second = byte_tokens("é")
    running = sequence()
    assert running.push_text(first).text == ""
    running.append(first)
    carried = running.continuation()
    assert carried.undecoded == "é".encode()[:1]
    assert carried.pending == (first,)
    following = Sequence(replace(REQUEST, continuation=carried, token_ids=()), WORDS, 0.0)
    assert following.push_text(second).text == "é"


def test_no_anchor_without_a_session_or_a_stop_string() -> None:
    for running in (sequence("ab", keep_state=False), sequence()):
        assert not running.push_text(byte_tokens("a")[0]).wants_anchor
    assert sequence("ab").push_text(byte_tokens("a")[0]).wants_anchor

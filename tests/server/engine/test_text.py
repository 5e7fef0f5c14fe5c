"""Detokenisation: stop strings, incomplete characters, and which token is in which event."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.text.tokenizer import Detokenizer
from server.engine.messages import Token
from server.engine.text import StreamedText, TextRules
from tests.server.engine.words import WORDS, byte_tokens, word_tokens


def output(*stop: str, undecoded: bytes = b"", **rules: bool) -> StreamedText:
    return StreamedText(WORDS, TextRules(stop, **rules), undecoded)


def generate(text: StreamedText, tokens: list[int]) -> tuple[str, str | None]:
    """The whole text, and the stop string that ended it."""
    emitted = ""
    for token_id in tokens:
        step = text.push(Token(token_id), may_stop=True)
        emitted += step.text
        if step.stop is not None:
            return emitted, step.stop
    return emitted + text.flush()[0], None


@pytest.mark.parametrize("kind", ["words", "bytes"])
@pytest.mark.parametrize(
    ("text", "stop", "expected", "found"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("aaaaab", ["aab"], "aaa", "aab"),
        ("ananas", ["anas", "zzz"], "an", "anas"),
        ("naïve café!", ["fé"], "naïve ca", "fé"),
        ("ééü and more", ["ü"], "éé", "ü"),
        ("no stop here", ["stop!"], "no stop here", None),
        ("x\n\ny", ["\n\n"], "x", "\n\n"),
        ("abcabd", ["abd", "bca"], "a", "bca"),
        ("stop", ["stop"], "", "stop"),
    ],
)
def test_text_ends_before_the_first_stop_string(
    text: str, stop: list[str], expected: str, found: str | None, kind: str
) -> None:
    assert generate(output(*stop), word_tokens(text, kind)) == (expected, found)
    if found is not None:
        included = generate(output(*stop, include_stop=True), word_tokens(text, kind))
        assert included == (expected + found, found)


def test_a_stop_string_before_its_time_is_text() -> None:
    text = output("b")
    early, late = (
        text.push(Token(token_id), may_stop=may_stop)
        for token_id, may_stop in zip(byte_tokens("bb"), (False, True), strict=True)
    )
    assert (early.text, early.stop) == ("b", None)
    assert (late.text, late.stop) == ("", "b")


def test_an_incomplete_character_is_held_until_complete() -> None:
    first, second = byte_tokens("é")
    text = output()
    assert text.push(Token(first), may_stop=True).text == ""
    assert text.undecoded == "é".encode()[:1]
    assert output(undecoded=text.undecoded).push(Token(second), may_stop=True).text == "é"
    assert text.push(Token(second), may_stop=True).text == "é"
    assert text.undecoded == b""


@given(text=st.text("anbé\n", max_size=20), kind=st.sampled_from(["words", "bytes"]))
def test_text_that_is_never_held_is_the_same_by_either_method(text: str, kind: str) -> None:
    plain, other, whole = output(), output(), Detokenizer(WORDS)
    assert plain.is_unbuffered
    for token_id in word_tokens(text, kind):
        expected = whole.push(token_id)
        assert plain.push_plain(token_id) == expected
        step = other.push(Token(token_id), may_stop=True)
        assert step == (expected, (), None, False, False)
    assert plain.flush() == other.flush() == ("", ())


def test_text_is_held_only_for_stop_strings_and_tokens() -> None:
    assert output(include_stop=True, can_rewind=True).is_unbuffered
    assert not output("a").is_unbuffered
    assert not output(returns_tokens=True).is_unbuffered


def test_an_anchor_is_asked_for_where_text_begins_that_may_be_cut_away() -> None:
    text = output("abc", can_rewind=True)
    steps = [text.push(Token(token_id), may_stop=True) for token_id in byte_tokens("xabac")]
    assert [step.wants_anchor for step in steps] == [False, True, False, True, False]
    assert [step.text for step in steps] == ["x", "", "", "ab", "ac"]
    ends = output("abc", can_rewind=True)
    *_, last = [ends.push(Token(token_id), may_stop=True) for token_id in byte_tokens("xabc")]
    assert (last.stop, last.cuts_token, last.text) == ("abc", True, "")
    assert ends.cut() == ([], "")
    assert not any(
        output(*stop, can_rewind=can_rewind).push(Token(a), may_stop=True).wants_anchor
        for stop, can_rewind in (((), True), (("ab",), False))
        for a in byte_tokens("a")
    )


def test_a_token_without_text_is_in_the_event_where_it_comes() -> None:
    text = output("abc", returns_tokens=True)
    empty, (a, b, x) = WORDS.special_tokens["<|endoftext|>"], byte_tokens("abx")
    seen = []
    for token_id in (empty, a, empty, b, x, empty):
        step = text.push(Token(token_id), may_stop=True)
        seen.append((step.text, [token.token_id for token in step.tokens]))
    assert seen == [
        ("", [empty]),
        ("", []),
        ("", []),
        ("", []),
        ("abx", [a, empty, b, x]),
        ("", [empty]),
    ]


def test_an_incomplete_character_at_the_end_has_its_token() -> None:
    text = output(returns_tokens=True)
    first = Token(byte_tokens("é")[0], -1.5)
    assert text.push(first, may_stop=True).tokens == ()
    assert text.flush() == ("", (first,))


def test_tokens_come_only_if_they_are_asked_for() -> None:
    token = Token(byte_tokens("a")[0])
    assert output("b").push(token, may_stop=True).tokens == ()
    assert output("b", returns_tokens=True).push(token, may_stop=True).tokens == (token,)

"""The World vocabulary: the longest token at each position, and every text survives."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.text import formats, world
from model.text.tokenizer import Detokenizer, TokenizerError, TooManyTokens
from model.text.world import END, WorldTokenizer
from tests.model.text.worlds import SINGLE, TOKENS, WORDS

CASES = json.loads((Path(__file__).parent / "world_cases.json").read_text())
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("é日本th User:"))


def lines(tokens: dict[int, bytes]) -> str:
    """A vocabulary in its published format."""
    shown = []
    for token_id, token in tokens.items():
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        shown.append(f"{token_id} {literal} {len(token)}\n")
    return "".join(shown)


def longest_match(text: str) -> list[int]:
    """Longest match, by trying every token at every position."""
    data, ids = text.encode(), list[int]()
    while data:
        found = max((t for t in TOKENS.items() if data.startswith(t[1])), key=lambda t: len(t[1]))
        ids.append(found[0])
        data = data[len(found[1]) :]
    return ids


@given(ANY_TEXT)
def test_the_longest_token_is_found_at_each_place(text: str) -> None:
    assert WORDS.encode_text(text) == longest_match(text)
    assert WORDS.decode(WORDS.encode_text(text)) == text


@given(ANY_TEXT, st.integers(0, 12))
def test_a_text_with_more_tokens_than_it_may_have_is_refused(text: str, most: int) -> None:
    ids = WORDS.encode(text)
    if len(ids) <= most:
        assert WORDS.encode(text, most) == ids
    else:
        with pytest.raises(TooManyTokens) as caught:
            WORDS.encode(text, most)
        assert most < caught.value.num_tokens <= len(ids)


def test_backtracking_from_the_prefix_of_a_longer_token() -> None:
    found = [WORDS.bytes_of(token_id) for token_id in WORDS.encode("Userth   .")]
    assert found == [b"User", b"th", b"  ", b" ", b"."]


@given(st.lists(st.integers(0, WORDS.num_tokens + 3)), st.integers(0, 9))
def test_tokens_of_half_characters_come_as_whole_ones(ids: list[int], place: int) -> None:
    first = Detokenizer(WORDS)
    text = "".join(first.push(i) for i in ids[:place])
    second = Detokenizer(WORDS, first.undecoded)
    text += "".join(second.push(i) for i in ids[place:])
    assert text + second.undecoded.decode("utf-8", "replace") == WORDS.decode(ids)


def test_the_end_has_a_name_that_is_text_where_it_is_only_text() -> None:
    assert WORDS.special_tokens == {END: 0}
    assert WORDS.encode(f"a{END}b") == [1 + ord("a"), 0, 1 + ord("b")]
    assert WORDS.decode(WORDS.encode_text(END)) == END
    assert 0 not in WORDS.encode_text(END)
    assert WORDS.decode([1 + ord("a"), 0]) == "a"
    assert WORDS.decode([0], names=True) == END
    assert WORDS.bytes_of(0) == b""


def test_tokens_have_names_also_where_they_are_not_text() -> None:
    names = [WORDS.name_of(WORDS.token_bytes.index(t)) for t in (b" cat", b"\x97\xa5")]
    assert names == [" cat", "<0x97><0xA5>"]
    assert WORDS.name_of(10**6) == ""


def test_a_batch_is_encoded_as_its_texts() -> None:
    texts = ["the cat", "", "日本"]
    assert WORDS.encode_batch(texts) == [WORDS.encode(text) for text in texts]


def test_a_tokenizer_survives_its_json() -> None:
    again = formats.from_json(WORDS.to_json())
    assert isinstance(again, WorldTokenizer)
    assert again.token_bytes == WORDS.token_bytes


def test_the_published_form_is_read(tmp_path: Path) -> None:
    (tmp_path / "rwkv_vocab_small.txt").write_text(lines(TOKENS), "utf-8")
    assert world.find(tmp_path).token_bytes == WORDS.token_bytes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("300 'abc' 4", "line 257: not `id token length`: \"300 'abc' 4\""),
        ("300 abc 3", "line 257: not"),
        ("300 __import__('os').getcwd() 3", "line 257: not"),
        ("300 5 1", "line 257: not"),
        ("300 '' 0", "line 257: not"),
        ("x 'abc' 3", "line 257: not"),
        ("-1 'abc' 3", "line 257: not"),
        (f"{10**12} 'abc' 3", "line 257: not"),
        ("300 '\\ud800' 3", "line 257: not"),
        ("5 'abc' 3", "line 257: duplicate id or token"),
        ("300 'a' 1", "line 257: duplicate id or token"),
        ("0 'abc' 3", "id 0 ends a text"),
    ],
)
def test_a_line_that_is_no_token_is_refused_by_name(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "rwkv_vocab_bad.txt"
    path.write_text(lines(SINGLE) + line, "utf-8")
    with pytest.raises(TokenizerError) as caught:
        world.read(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_vocabulary_needs_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "rwkv_vocab_bad.txt"
    path.write_text(lines({i: t for i, t in SINGLE.items() if t != b"q"}), "utf-8")
    with pytest.raises(TokenizerError, match="no token for the byte b'q'"):
        world.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"rwkv_vocab_bad\.txt: "):
        world.read(path)


def test_two_vocabularies_are_one_too_many(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"rwkv_vocab_{name}.txt").write_text(lines(SINGLE), "utf-8")
    with pytest.raises(TokenizerError, match="more than one vocabulary"):
        world.find(tmp_path)


def test_without_a_vocabulary_both_places_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.text.world.PACKAGE", "no_such_package")
    with pytest.raises(TokenizerError) as caught:
        world.find(tmp_path)
    assert "latentd[rwkv]" in str(caught.value)
    assert "rwkv_vocab_*.txt next to the weights" in str(caught.value)


@pytest.fixture(scope="module")
def published() -> WorldTokenizer:
    """The vocabulary of 65,529 tokens, from the package."""
    pytest.importorskip(world.PACKAGE)
    return world.find(Path("no such folder"))


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_published_tokens_are_found(published: WorldTokenizer, case: dict[str, object]) -> None:
    text = str(case["text"])
    assert published.encode(text) == case["ids"]
    assert published.decode(published.encode(text)) == text


def test_the_published_vocabulary_is_whole(published: WorldTokenizer) -> None:
    assert published.num_tokens == 65_530
    assert sum(map(bool, published.token_bytes)) == 65_529

"""Every text survives tokenisation, also one token at a time."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from model.text import byte_level
from model.text.byte_level import ByteLevelTokenizer
from model.text.tokenizer import Detokenizer, TokenizerError, TooManyTokens

TEXTS = ["the cat sat on the mat, and the café was naïve 日本語 🙂🙂 " * 3, "  two\n\n\tspaces"]
SPECIAL = ["<|endoftext|>", "<|user|>"]
WORDS = byte_level.train(TEXTS, 300, SPECIAL)
ANY_TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("éñ日🙂 the cat")
).filter(lambda text: not any(name in text for name in SPECIAL))
ANY_TOKENS = st.lists(st.integers(0, WORDS.num_tokens - 1), max_size=40)


def pieces(token_ids: list[int], undecoded: bytes = b"") -> tuple[list[str], bytes]:
    detokenizer = Detokenizer(WORDS, undecoded)
    return [detokenizer.push(token_id) for token_id in token_ids], detokenizer.undecoded


@given(ANY_TEXT)
def test_every_text_round_trips(text: str) -> None:
    assert WORDS.decode(WORDS.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_that_is_only_text_is_encoded_as_ever(text: str) -> None:
    if not any(name in text for name in SPECIAL):
        assert WORDS.encode_text(text) == WORDS.encode(text)


def test_names_of_special_tokens_can_be_spelt_out() -> None:
    text = "the <|user|> cat<|endoftext|>"
    ids = WORDS.encode_text(text)
    assert WORDS.decode(ids) == text
    assert set(ids).isdisjoint(WORDS.special_tokens.values())
    assert not set(WORDS.encode(text)).isdisjoint(WORDS.special_tokens.values())


@given(st.lists(ANY_TEXT, max_size=5))
def test_a_batch_is_encoded_as_its_texts(texts: list[str]) -> None:
    assert WORDS.encode_batch(texts) == [WORDS.encode(text) for text in texts]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(SPECIAL)))
def test_the_faster_call_gives_the_tokens_of_the_plain_one(parts: list[str]) -> None:
    text = "".join(parts)
    assert WORDS.encode(text) == WORDS._inner.encode(text, add_special_tokens=False).ids


PARTS = st.sampled_from(["a", "the", "é", "it's", "'s", "7", "…", " ", "  ", "\n", "\t ", *SPECIAL])


@given(st.lists(PARTS | st.text(st.sampled_from("ab' \n<|end>7é"))), st.integers(1, 8))
def test_a_long_text_has_the_tokens_of_its_pieces(parts: list[str], piece: int) -> None:
    text = "".join(parts)
    whole, as_text = WORDS.encode(text), WORDS.encode_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.text.byte_level.PIECE", piece)
        patch.setattr("model.text.byte_level.SEARCH_SPAN", 4)
        assert WORDS.encode(text) == whole
        assert WORDS.encode_text(text) == as_text


def test_only_where_a_word_ends_a_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.text.byte_level.PIECE", 3)
    monkeypatch.setattr("model.text.byte_level.SEARCH_SPAN", 4)
    found = list(WORDS._pieces("ab cd  ef 7 gh'x ij k"))
    assert found == ["ab cd  ef 7 gh'x", " ij k"]


@given(ANY_TEXT, st.integers(0, 20))
def test_a_text_with_more_tokens_than_it_may_have_is_refused(text: str, most: int) -> None:
    ids = WORDS.encode(text)
    if len(ids) <= most:
        assert WORDS.encode(text, most) == ids
        WORDS.check_length(len(text), most)
    else:
        with pytest.raises(TooManyTokens) as caught:
            WORDS.encode(text, most)
        assert most < caught.value.num_tokens <= len(ids)


def test_a_text_that_is_far_too_long_is_refused_by_its_length() -> None:
    with pytest.raises(TooManyTokens):
        WORDS.check_length(1_000_000, 100)


@given(ANY_TEXT)
def test_pieces_of_a_text_are_the_text(text: str) -> None:
    found, undecoded = pieces(WORDS.encode(text))
    assert "".join(found) == text
    assert undecoded == b""


@given(ANY_TEXT)
def test_no_piece_has_half_a_character(text: str) -> None:
    """Byte by byte: a character is emitted with its last byte, and nothing before."""
    single = {WORDS.bytes_of(i): i for i in range(WORDS.num_tokens) if len(WORDS.bytes_of(i)) == 1}
    found, _ = pieces([single[bytes([byte])] for byte in text.encode()])
    expected: list[str] = []
    for character in text:
        expected += [*[""] * (len(character.encode()) - 1), character]
    assert found == expected


@given(ANY_TOKENS)
def test_any_tokens_give_the_text_of_the_whole(token_ids: list[int]) -> None:
    found, undecoded = pieces(token_ids)
    assert "".join(found) + undecoded.decode("utf-8", "replace") == WORDS.decode(token_ids)
    assert len(undecoded) <= 3


@given(token_ids=ANY_TOKENS, place=st.integers(0, 40))
def test_a_text_continues_where_it_was_left(token_ids: list[int], place: int) -> None:
    whole = pieces(token_ids)
    first, undecoded = pieces(token_ids[:place])
    second, end = pieces(token_ids[place:], undecoded)
    assert ([*first, *second], end) == whole


@given(ANY_TOKENS)
def test_bytes_that_are_no_text_become_replacement_characters(token_ids: list[int]) -> None:
    raw = b"".join(WORDS.bytes_of(token_id) for token_id in token_ids)
    assert WORDS.decode(token_ids) == raw.decode("utf-8", "replace")


def test_every_byte_has_a_token_and_learned_tokens_have_several() -> None:
    known = [WORDS.bytes_of(i) for i in range(WORDS.num_tokens)]
    assert {bytes([byte]) for byte in range(256)} <= set(known)
    assert b" the" in known
    assert WORDS.num_tokens == 300


def test_special_tokens_come_first_and_have_no_text() -> None:
    assert WORDS.special_tokens == {"<|endoftext|>": 0, "<|user|>": 1}
    assert WORDS.encode("a<|user|>b") == [*WORDS.encode("a"), 1, *WORDS.encode("b")]
    assert WORDS.bytes_of(0) == WORDS.bytes_of(1) == b""
    assert WORDS.decode([0, *WORDS.encode("cat"), 1]) == "cat"


def test_ids_without_a_token_have_no_text() -> None:
    assert WORDS.bytes_of(10**6) == b""
    assert WORDS.decode([10**6, *WORDS.encode("cat")]) == "cat"


def test_added_tokens_that_are_not_special_are_text() -> None:
    inner = tokenizers.Tokenizer.from_str(WORDS.to_json())
    inner.add_tokens(["Ünïcode"])
    more = ByteLevelTokenizer(inner)
    assert more.num_tokens == 301
    assert more.encode("Ünïcode") == [300]
    assert more.decode([300]) == "Ünïcode"


def test_a_tokenizer_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(WORDS.to_json(), "utf-8")
    found = byte_level.read(path)
    assert found.token_bytes == WORDS.token_bytes
    assert found.special_tokens == WORDS.special_tokens
    assert found.encode(TEXTS[0]) == WORDS.encode(TEXTS[0])


def test_other_kinds_of_tokenizers_are_refused() -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"hello": 0, "?": 1}, unk_token="?"))
    with pytest.raises(TokenizerError, match="ByteLevel, not None"):
        ByteLevelTokenizer(words)
    words.decoder = decoders.Metaspace()
    with pytest.raises(TokenizerError, match="ByteLevel, not Metaspace"):
        ByteLevelTokenizer(words)
    foreign = tokenizers.Tokenizer(models.WordLevel({"▁hello": 0, "?": 1}, unk_token="?"))
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel()
    foreign.decoder = decoders.ByteLevel()
    with pytest.raises(TokenizerError, match="'▁' in token '▁hello'"):
        ByteLevelTokenizer(foreign)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"version": "1.0"}'])
def test_a_malformed_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        byte_level.read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_tokenizer_without_tokens_has_none() -> None:
    content = json.loads(WORDS.to_json())
    content["added_tokens"], content["model"]["vocab"], content["model"]["merges"] = [], {}, []
    assert ByteLevelTokenizer.from_json(json.dumps(content)).num_tokens == 0

"""Documents are read completely, chunk by chunk, each once per epoch."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.training.corpus import IGNORED, Lanes, TrainingBatch, read_documents


def numbered(lengths: list[int]) -> list[Tensor]:
    """Documents in which every token encodes its document and position."""
    return [torch.arange(length) + 1000 * number for number, length in enumerate(lengths)]


def document_of(token: int) -> int:
    return token // 1000


class Reader:
    """Reassembles what each lane reads, and checks each batch."""

    def __init__(self, num_lanes: int, chunk_tokens: int) -> None:
        self.open: list[list[int]] = [[] for _ in range(num_lanes)]
        self.finished: list[list[int]] = []
        self.chunk_tokens = chunk_tokens

    def read(self, batch: TrainingBatch, documents: list[Tensor]) -> None:
        assert batch.inputs.shape == batch.targets.shape
        assert 1 <= batch.inputs.shape[1] <= self.chunk_tokens
        lanes = zip(batch.inputs, batch.targets, batch.fresh.tolist(), strict=True)
        for lane, (inputs, targets, fresh) in enumerate(lanes):
            count = int((targets != IGNORED).sum())
            assert count >= 1
            assert (targets[count:] == IGNORED).all()
            assert (inputs >= 0).all()
            assert torch.equal(inputs[1:count], targets[: count - 1])
            text = self.open[lane]
            assert fresh == (text == [])
            if fresh:
                text.append(int(inputs[0]))
                assert text[0] % 1000 == 0
            assert int(inputs[0]) == text[-1]
            text += targets[:count].tolist()
            assert document_of(text[0]) == document_of(text[-1])
            if len(text) == len(documents[document_of(text[0])]):
                self.finished.append(text)
                self.open[lane] = []
            else:
                assert count == self.chunk_tokens


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    num_lanes=st.integers(1, 5),
    chunk_tokens=st.integers(1, 15),
    seed=st.integers(0, 5),
)
def test_each_document_is_read_in_order_and_once_in_an_epoch(
    lengths: list[int], num_lanes: int, chunk_tokens: int, seed: int
) -> None:
    documents = numbered(lengths)
    lanes = Lanes(documents, num_lanes, chunk_tokens, seed)
    reader, epochs = Reader(num_lanes, chunk_tokens), 3
    while len(reader.finished) < epochs * len(documents):
        reader.read(lanes.next(), documents)
    counts = Counter(
        document_of(text[0]) for text in reader.finished + list(filter(None, reader.open))
    )
    assert min(counts.values()) >= epochs
    assert len(counts) == len(documents)
    assert max(counts.values()) - min(counts.values()) <= 1 + num_lanes // len(documents)
    for text in reader.finished:
        assert text == documents[document_of(text[0])].tolist()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    num_lanes=st.integers(1, 5),
    num_before=st.integers(0, 30),
)
def test_lanes_continue_from_a_saved_position(
    lengths: list[int], num_lanes: int, num_before: int
) -> None:
    documents = numbered(lengths)
    lanes, later = (Lanes(documents, num_lanes, 7, 1) for _ in range(2))
    for _ in range(num_before):
        lanes.next()
    later.load_state_dict(json.loads(json.dumps(lanes.state_dict())))
    for _ in range(30):
        expected, found = lanes.next(), later.next()
        assert torch.equal(found.inputs, expected.inputs)
        assert torch.equal(found.targets, expected.targets)
        assert torch.equal(found.fresh, expected.fresh)


def test_a_saved_place_does_not_move() -> None:
    lanes, later = (Lanes(numbered([30, 20]), 2, 7, 1) for _ in range(2))
    lanes.next()
    saved = lanes.state_dict()
    expected = lanes.next()
    later.load_state_dict(saved)
    assert torch.equal(later.next().inputs, expected.inputs)


def test_the_seed_and_the_epoch_decide_the_order() -> None:
    def order(seed: int, epochs: int) -> list[int]:
        lanes = Lanes(numbered([5] * 30), 1, 10, seed)
        return [document_of(int(lanes.next().inputs[0, 0])) for _ in range(30 * epochs)]

    assert order(0, 2) == order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert order(0, 2)[:30] != order(0, 2)[30:]


def test_lanes_start_together_on_documents_of_similar_length() -> None:
    """Otherwise most of a batch would be padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 200, (256,), generator=generator).tolist()
    lanes, filled, places = Lanes(numbered(lengths), 8, 200, 0), 0, 0
    for _ in range(32):
        batch = lanes.next()
        filled, places = filled + int((batch.targets >= 0).sum()), places + batch.targets.numel()
    assert filled / places > 0.9


def test_no_document_is_refused() -> None:
    with pytest.raises(ValueError, match="no document"):
        Lanes([], 2, 7, 1)


def test_a_text_file_is_cut_at_its_separators(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("<|endoftext|>\n one\nmore \n<|endoftext|>\n \n<|endoftext|>zwei ü", "utf-8")
    assert read_documents(path) == ["one\nmore", "zwei ü"]


def test_a_jsonl_file_has_a_document_in_each_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [{"text": "one"}, {"title": "Two", "text": "two\nü", "more": 1}, {"text": " "}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", "utf-8")
    assert read_documents(path) == ["one", "Two\n\ntwo\nü"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"txt": "b"}', "x.jsonl, line 2: "),
        ("x.jsonl", b'{"title": "a"}', "x.jsonl, line 1: "),
        ("x.jsonl", b"[1]", "x.jsonl, line 1: "),
        ("x.jsonl", b"\n{", "x.jsonl, line 2: "),
        ("x.txt", b"\xff\xfe", "x.txt: not UTF-8"),
    ],
)
def test_a_malformed_file_is_refused_by_name_and_line(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_documents(path)

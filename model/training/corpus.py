"""Training text: documents from files, and their tokens in lanes of consecutive chunks."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEPARATOR = "<|endoftext|>"
IGNORED = -100
"""Target of a position without a next token; cross entropy's default `ignore_index`."""

SORT_GROUP = 64
"""Documents per lane sorted by length together, so that lanes start new ones at the same time."""


def read_documents(path: Path) -> list[str]:
    """Documents of a `.txt`, separated by `<|endoftext|>`, or of a `.jsonl` with `text` (`title`).

    Raises ValueError for malformed files, naming the file and, for `.jsonl`, the line.
    """
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        texts = [_titled(path, i, line) for i, line in enumerate(content.splitlines(), 1) if line]
    else:
        texts = content.split(SEPARATOR)
    return [text.strip() for text in texts if text.strip()]


def _titled(path: Path, number: int, line: str) -> str:
    try:
        story = json.loads(line)
        return f"{story['title']}\n\n{story['text']}" if "title" in story else str(story["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, line {number}: not an object with a text: {error}") from error


@dataclass(frozen=True)
class TrainingBatch:
    """One chunk of every lane."""

    inputs: Tensor
    """`[lanes, tokens]`"""
    targets: Tensor
    """The next tokens; `IGNORED` after a document's end. `[lanes, tokens]`"""
    fresh: Tensor
    """Lanes whose chunk starts a document. `[lanes]`, bool"""


class Lanes:
    """Endless batches in which each lane reads one document after another, chunk by chunk.

    Documents start only at the start of a chunk, so a lane's latent state can be carried from batch
    to batch and reset exactly where a document starts.
    """

    def __init__(
        self, documents: Sequence[Tensor], num_lanes: int, chunk_tokens: int, seed: int
    ) -> None:
        if not documents:
            raise ValueError("there is no document to train on")
        self._documents = documents
        self._chunk_tokens = chunk_tokens
        self._seed = seed
        self._num_started = 0
        self._order: list[int] = []
        self._document = [-1] * num_lanes
        self._offset = [0] * num_lanes

    def next(self) -> TrainingBatch:
        """The next batch."""
        chunks, fresh = [], []
        for lane, document in enumerate(self._document):
            begins = document < 0
            if begins:
                self._document[lane], self._offset[lane] = self._next_document(), 0
            start = self._offset[lane]
            tokens = self._documents[self._document[lane]]
            chunks.append(tokens[start : start + self._chunk_tokens + 1])
            fresh.append(begins)
            self._offset[lane] = start + self._chunk_tokens
            if self._offset[lane] + 1 >= len(tokens):
                self._document[lane] = -1
        padded = torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True, padding_value=IGNORED)
        return TrainingBatch(padded[:, :-1].clamp(min=0), padded[:, 1:], torch.tensor(fresh))

    def state_dict(self) -> dict[str, Any]:
        """Positions of all lanes; valid for the same documents, lanes and seed."""
        return {
            "taken": self._num_started,
            "document": list(self._document),
            "offset": list(self._offset),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._num_started = state["taken"]
        self._document, self._offset = list(state["document"]), list(state["offset"])
        self._order = self._shuffled(self._num_started // len(self._documents))

    def _next_document(self) -> int:
        epoch, place = divmod(self._num_started, len(self._documents))
        if place == 0:
            self._order = self._shuffled(epoch)
        self._num_started += 1
        return self._order[place]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._documents)))
        shuffle = random.Random(f"{self._seed} {epoch}")
        shuffle.shuffle(order)
        size = SORT_GROUP * len(self._document)
        blocks = [
            sorted(order[i : i + size], key=lambda d: len(self._documents[d]))
            for i in range(0, len(order), size)
        ]
        groups = [
            block[i : i + len(self._document)]
            for block in blocks
            for i in range(0, len(block), len(self._document))
        ]
        shuffle.shuffle(groups)
        return [document for group in groups for document in group]

"""The input of one network step: tokens of many sequences, prompts and single tokens mixed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_PADDING = 2
"""Within a group, padding to the longest piece multiplies the tokens by at most this factor."""


@dataclass(frozen=True)
class Batch:
    """The next tokens of sequences whose states are rows of a pool."""

    token_ids: NDArray[np.int64]
    """Tokens of all pieces, concatenated. `[tokens]`"""

    starts: NDArray[np.int64]
    """Piece i is token_ids[starts[i]:starts[i + 1]]. `[pieces + 1]`"""

    rows: Sequence[int]
    """Pool row of each piece's sequence, without duplicates. `[pieces]`"""

    logits_at: NDArray[np.int64]
    """Positions of the tokens whose logits are returned, in any order. `[wanted]`"""

    @staticmethod
    def of(pieces: Sequence[ArrayLike], rows: Sequence[int]) -> "Batch":
        """Pieces of at least one token each, without logits."""
        parts = [np.asarray(piece, np.int64) for piece in pieces]
        starts = np.cumsum([0, *map(len, parts)])
        return Batch(np.concatenate(parts), starts, rows, np.empty(0, np.int64))

    @staticmethod
    def of_tokens(token_ids: ArrayLike, rows: Sequence[int]) -> "Batch":
        """One token per row `[rows]`, with logits after each."""
        ids = np.asarray(token_ids, np.int64)
        places = np.arange(len(ids) + 1)
        return Batch(ids, places, rows, places[:-1])

    def wanting(self, logits_at: ArrayLike) -> "Batch":
        """The same pieces with logits at other positions."""
        return replace(self, logits_at=np.asarray(logits_at, np.int64))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens in each piece."""
        return np.diff(self.starts)

    @property
    def ends(self) -> NDArray[np.int64]:
        """Position of each piece's last token."""
        return self.starts[1:] - 1

    def check(self, vocab_sz: int, num_rows: int) -> None:
        """Raises IndexError for token ids outside the vocabulary and for missing or duplicate
        rows."""
        rows, places = self.rows, (self.starts[0], self.starts[-1])
        if len(rows) != len(self.starts) - 1 or self.lengths.min() < 1:
            raise IndexError(f"pieces of {self.lengths.tolist()} tokens for rows {list(rows)}")
        if min(rows) < 0 or max(rows) >= num_rows:
            raise IndexError(f"rows {list(rows)} of {num_rows}")
        if len(set(rows)) != len(rows):
            raise IndexError(f"rows {list(rows)}: one is duplicated")
        if places != (0, len(self.token_ids)):
            raise IndexError(f"{len(self.token_ids)} tokens for pieces from {places}")
        if (
            len(self.logits_at)
            and not 0 <= self.logits_at.min() <= self.logits_at.max() < places[1]
        ):
            raise IndexError(f"logits after {self.logits_at.tolist()} of {places[1]} tokens")
        if self.token_ids.min() < 0 or self.token_ids.max() >= vocab_sz:
            raise IndexError(f"token ids must be from 0 to {vocab_sz - 1}")

    def groups(self) -> list[list[int]]:
        """Pieces grouped by similar length, longest first; single tokens form the last group.

        For networks that compute on padded `[pieces, tokens]`.
        """
        lengths = self.lengths.tolist()
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        groups, num_tokens = list[list[int]](), 0
        for i in order:
            if groups and (length := lengths[groups[-1][0]]) > 1:
                padded = length * (len(groups[-1]) + 1)
                if lengths[i] > 1 and padded <= MAX_PADDING * (num_tokens + lengths[i]):
                    groups[-1].append(i)
                    num_tokens += lengths[i]
                    continue
            elif groups:
                groups[-1].append(i)
                continue
            groups.append([i])
            num_tokens = lengths[i]
        return groups

    def padded(self, group: Sequence[int]) -> NDArray[np.int64]:
        """Token positions of a group's pieces, -1 for padding. `[pieces, longest]`"""
        first, counts = self.starts[:-1][group], self.lengths[group]
        token = np.arange(counts.max())
        return np.where(token < counts[:, None], first[:, None] + token, -1)

"""Steps: pieces of prompts and rows that generate go through the network together.

A step is launched, and what came of it is taken later. Where the device works beside the host, the
next step is launched before the tokens of this one are known: what a row reads is then what its own
last step chose, which the host need not see. A row whose last token ends its text, or is none, is
left as it is by steps that were launched before the host knew. It can go on later: the distribution
after its last token can be had again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch
from model.decoding.logprobs import Scored, score
from model.decoding.sampling import SampledRow, prepare, sample
from model.network import Network
from model.state import StatePool

MAX_END_TOKENS = 8
"""Tokens that may end a row's text if its next step is to be launched ahead."""


class Following(NamedTuple):
    """Tokens of a prompt whose probabilities are asked for."""

    first: int
    """The first of them comes after this token of the piece, the next after the next, and so on."""

    token_ids: tuple[int, ...]
    num_top: int
    """How many of the most probable tokens come with each."""


class Piece(NamedTuple):
    """One row's part in a step."""

    row: int
    """In the pool."""

    token_ids: Sequence[int] | None
    """To be read. None: the token that the row's last step chose, if the row goes on after it.
    Empty: nothing is read, and what follows the row's last token is chosen; then the row's next
    step is not launched ahead."""

    sampled: SampledRow | None = None
    """How to choose the token after the piece, if one is to be chosen. Where no token is given, its
    position is that of an earlier step: it grows by one with each."""

    ends: frozenset[int] = frozenset()
    """Tokens that end the row's text; at most `MAX_END_TOKENS` where the next step is launched
    ahead."""

    num_logprobs: int | None = None
    """None, or so many of the most probable tokens with the chosen token's own probability."""

    following: Following | None = None

    @property
    def resumes(self) -> bool:
        """Whether nothing is read."""
        return self.token_ids is not None and not self.token_ids


@dataclass(frozen=True)
class Decoded:
    """What came of a step."""

    token_ids: Sequence[int | None]
    """The tokens chosen, in the order of the pieces; None where none was to be chosen, where there
    is no distribution, and for rows that had ended before the step."""

    scored: Mapping[int, Scored | None] = field(default_factory=dict)
    """By place in the step, where probabilities were asked for."""

    followed: Mapping[int, list[Scored | None]] = field(default_factory=dict)
    """Likewise, of the tokens in `Piece.following`."""


class Launched(Protocol):
    """A step that was launched."""

    def collect(self) -> Decoded:
        """Wait for it. Called once, in the order of the launches."""


class Runner(Protocol):
    """Launches the steps of one pool's rows."""

    runs_ahead: bool
    """Whether a step may be launched before the one before it was taken; two are then under way at
    most."""

    def prepare(self) -> None:
        """Do what takes long once, so that no request waits for it."""

    def launch(self, pieces: Sequence[Piece]) -> Launched:
        """Read these pieces, of which none has another's row."""


@dataclass(frozen=True)
class CompletedStep:
    """A step that was computed when it was launched."""

    decoded: Decoded

    def collect(self) -> Decoded:
        return self.decoded


class DirectRunner:
    """Computes each step when it is launched: for a processor that the host itself is."""

    runs_ahead = False

    def __init__(self, network: Network, pool: StatePool) -> None:
        self._network = network
        self._pool = pool

    def prepare(self) -> None:
        prepare()

    def launch(self, pieces: Sequence[Piece]) -> CompletedStep:
        token_ids = list[int | None]([None] * len(pieces))
        scored = dict[int, Scored | None]()
        choosing, logits, of_prompts = self._logits(pieces)
        if choosing:
            asked = [i for i, place in enumerate(choosing) if wants_probability(pieces[place])]
            model_logits = logits[asked] if asked else None  # a copy, before penalties
            rows = [each.sampled for each in pieces if each.sampled is not None]
            for place, token_id in zip(choosing, sample(logits, rows), strict=True):
                token_ids[place] = token_id
            if model_logits is not None:
                scored = score_chosen(model_logits, [choosing[i] for i in asked], pieces, token_ids)
        return CompletedStep(Decoded(token_ids, scored, score_following(of_prompts, pieces)))

    def _logits(self, pieces: Sequence[Piece]) -> tuple[list[int], Tensor, Tensor]:
        """Places of the pieces after which a token is chosen; the logits for that; and those before
        the tokens in `following`."""
        network, pool = self._network, self._pool
        choosing = [place for place, each in enumerate(pieces) if each.sampled is not None]
        reading = [place for place, each in enumerate(pieces) if not each.resumes]
        if not reading:
            rows = [each.row for each in pieces]
            return choosing, network.logits(pool, rows), torch.empty(0)
        logits = network.forward(batch_of([pieces[place] for place in reading]), pool)
        num_read = sum(pieces[place].sampled is not None for place in reading)
        of_prompts, logits = logits[num_read:], logits[:num_read]
        if len(reading) < len(pieces):
            is_read = torch.tensor([not pieces[place].resumes for place in choosing])
            rows = [each.row for each in pieces if each.resumes]
            both = logits.new_empty(len(choosing), logits.shape[1])
            both[is_read], both[~is_read] = logits, network.logits(pool, rows)
            logits = both
        return choosing, logits, of_prompts


def batch_of(pieces: Sequence[Piece]) -> Batch:
    """Pieces that read given tokens. First come the logits after those that choose a token, then
    those before the tokens in `following`. Raises ValueError where no token is given."""
    ids, starts, at, before = list[int](), [0], list[int](), list[int]()
    for each in pieces:
        if each.token_ids is None:
            raise ValueError("no step runs ahead here: every row is given its token")
        if each.following is not None:
            first = len(ids) + each.following.first
            before += range(first, first + len(each.following.token_ids))
        ids += each.token_ids
        starts.append(len(ids))
        if each.sampled is not None:
            at.append(len(ids) - 1)
    arrays = (np.array(numbers, np.int64) for numbers in (ids, starts, at + before))
    token_ids, cuts, logits_at = arrays
    return Batch(token_ids, cuts, [each.row for each in pieces], logits_at)


def wants_probability(piece: Piece) -> bool:
    """Whether the probability of the chosen token is asked for."""
    return piece.num_logprobs is not None


def score_chosen(
    logits: Tensor, places: Sequence[int], pieces: Sequence[Piece], token_ids: Sequence[int | None]
) -> dict[int, Scored | None]:
    """`Decoded.scored` of the pieces at some places, from their logits `[places, vocab_sz]`."""
    chosen = [token_ids[place] or 0 for place in places]
    num_top = [pieces[place].num_logprobs or 0 for place in places]
    return dict(zip(places, score(logits, chosen, num_top), strict=True))


def score_following(logits: Tensor, pieces: Sequence[Piece]) -> dict[int, list[Scored | None]]:
    """`Decoded.followed`, from the logits before each of the tokens `[tokens, vocab_sz]`."""
    found, start = dict[int, list[Scored | None]](), 0
    for place, each in enumerate(pieces):
        if each.following is not None:
            _, ids, num_top = each.following
            own = logits[start : start + len(ids)]
            found[place] = score(own, ids, [num_top] * len(ids)) if ids else []
            start += len(ids)
    return found

"""Steps: prefill and decode rows go through the network in one batch.

A step is launched first and collected later. On a GPU the next step is launched before the tokens
of the current one are known: a row then reads the token its last step sampled, which the host need
not see. Steps launched ahead skip a row whose last token ended its text or is not valid. The row
can still continue: its last distribution can be computed again.
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
"""Maximum number of end tokens of a row that runs ahead."""


class Following(NamedTuple):
    """Tokens of a prompt whose log-probabilities are requested."""

    first: int
    """Index in the piece of the token before the first of them; the others follow."""

    token_ids: tuple[int, ...]
    num_top: int
    """Number of top tokens for each of them."""


class Piece(NamedTuple):
    """One row's part in a step."""

    row: int
    """Row in the pool."""

    token_ids: Sequence[int] | None
    """Tokens to read. None: the token sampled in the row's last step, if the row continues. Empty:
    read nothing and sample after the row's last token; such a row does not run ahead."""

    sampled: SampledRow | None = None
    """How to sample the token after the piece; None samples nothing. If no tokens are given, its
    position is that of an earlier step and grows by one per step."""

    ends: frozenset[int] = frozenset()
    """Tokens that end the row's text; at most `MAX_END_TOKENS` for rows that run ahead."""

    num_logprobs: int | None = None
    """Number of top tokens to return with the sampled token's log-probability; None for neither."""

    following: Following | None = None

    @property
    def resumes(self) -> bool:
        """Whether the piece reads nothing."""
        return self.token_ids is not None and not self.token_ids


@dataclass(frozen=True)
class Decoded:
    """Results of a step."""

    token_ids: Sequence[int | None]
    """Sampled tokens in the order of the pieces; None where nothing was sampled, the logits are not
    a distribution, or the row had ended before the step."""

    scored: Mapping[int, Scored | None] = field(default_factory=dict)
    """Log-probabilities by piece index, where requested."""

    followed: Mapping[int, list[Scored | None]] = field(default_factory=dict)
    """The same for the tokens of `Piece.following`."""


class Launched(Protocol):
    """A launched step."""

    def collect(self) -> Decoded:
        """Wait for the results. Call once, in launch order."""


class Runner(Protocol):
    """Launches the steps of one pool."""

    runs_ahead: bool
    """Whether a step may be launched before the previous one is collected; at most two are in
    flight."""

    def prepare(self) -> None:
        """Compile and record what is slow, so that no request waits for it."""

    def launch(self, pieces: Sequence[Piece]) -> Launched:
        """Launch a step of these pieces, at most one per row."""


@dataclass(frozen=True)
class CompletedStep:
    """A step computed at launch."""

    decoded: Decoded

    def collect(self) -> Decoded:
        return self.decoded


class DirectRunner:
    """Computes each step at launch, for networks that run on the host itself."""

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
        """Indices of the pieces that sample a token; their logits; and the logits before the tokens
        in `following`."""
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
    """The batch of pieces with given tokens: logits after those that sample a token come first,
    then those before the tokens in `following`. Raises ValueError where no token is given."""
    ids, starts, at, before = list[int](), [0], list[int](), list[int]()
    for each in pieces:
        if each.token_ids is None:
            raise ValueError("this runner does not run ahead: every row needs its token")
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
    """Whether the sampled token's log-probability is requested."""
    return piece.num_logprobs is not None


def score_chosen(
    logits: Tensor, places: Sequence[int], pieces: Sequence[Piece], token_ids: Sequence[int | None]
) -> dict[int, Scored | None]:
    """`Decoded.scored` of the pieces with these indices, from their logits `[indices,
    vocab_sz]`."""
    chosen = [token_ids[place] or 0 for place in places]
    num_top = [pieces[place].num_logprobs or 0 for place in places]
    return dict(zip(places, score(logits, chosen, num_top), strict=True))


def score_following(logits: Tensor, pieces: Sequence[Piece]) -> dict[int, list[Scored | None]]:
    """`Decoded.followed`, from the logits before each token `[tokens, vocab_sz]`."""
    found, start = dict[int, list[Scored | None]](), 0
    for place, each in enumerate(pieces):
        if each.following is not None:
            _, ids, num_top = each.following
            own = logits[start : start + len(ids)]
            found[place] = score(own, ids, [num_top] * len(ids)) if ids else []
            start += len(ids)
    return found

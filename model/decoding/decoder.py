"""One step of a batch of sequences that generate: read a token of each, choose the next one.

A step is launched, and its tokens are taken later. Where the device works beside the host, the next
step is launched before the tokens of this one are known: what a row reads is then what its own last
step chose, which the host need not see. A row whose last token ends its text, or is none, is left
as it is by steps that were launched before the host knew. It can go on later: the distribution
after its last token can be had again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from model.decoding.logprobs import Scored, score
from model.decoding.sampling import SampledRow, prepare, sample
from model.network import Network
from model.state import StatePool

MOST_ENDS = 8
"""Tokens that may end a row's text if its next step is to be launched ahead."""


class DecodeInput(NamedTuple):
    """One row's part in a step."""

    row: int
    """In the pool."""

    token_id: int | None
    """To be read; None for the one that the row's last step chose, if it goes on after it, or if
    nothing is to be read."""

    sampled: SampledRow
    """How to choose the next token. Where none is given, its position is that of an earlier step:
    it grows by one with each."""

    ends: frozenset[int] = frozenset()
    """Tokens that end the row's text; at most `MOST_ENDS` where the next step is launched ahead."""

    resumes: bool = False
    """Nothing is read: choose what follows the token that the row's last step read. Its next step
    is not launched ahead."""

    num_logprobs: int | None = None
    """None, or so many of the most probable tokens with the token's own probability."""


@dataclass(frozen=True)
class Decoded:
    """What came of a step."""

    token_ids: Sequence[int | None]
    """The tokens chosen, in the order of the inputs; None where there is no distribution, and for
    rows that had ended before the step."""

    scored: Mapping[int, Scored | None] = field(default_factory=dict)
    """By place in the batch, where probabilities were asked for."""


class Launched(Protocol):
    """A step that was launched."""

    def take(self) -> Decoded:
        """Wait for it. Called once, in the order of the launches."""


class Decoder(Protocol):
    """Launches the steps of one pool's rows."""

    runs_ahead: bool
    """Whether a step may be launched before the one before it was taken; two are then under way at
    most."""

    def prepare(self) -> None:
        """Do what takes long once, so that no request waits for it."""

    def launch(self, inputs: Sequence[DecodeInput]) -> Launched:
        """Advance these rows, of which each comes once, by one token."""


@dataclass(frozen=True)
class Done:
    """A step that was computed when it was launched."""

    decoded: Decoded

    def take(self) -> Decoded:
        return self.decoded


class DirectDecoder:
    """Computes each step when it is launched: for a processor that the host itself is."""

    runs_ahead = False

    def __init__(self, network: Network, pool: StatePool) -> None:
        self._network = network
        self._pool = pool

    def prepare(self) -> None:
        prepare()

    def launch(self, inputs: Sequence[DecodeInput]) -> Done:
        logits = self._logits(inputs)
        asked = [i for i, each in enumerate(inputs) if each.num_logprobs is not None]
        model_logits = logits[asked] if asked else None  # a copy, before penalties
        token_ids = sample(logits, [each.sampled for each in inputs])
        if model_logits is None:
            return Done(Decoded(token_ids))
        chosen = [token_ids[i] or 0 for i in asked]
        num_top = [inputs[i].num_logprobs or 0 for i in asked]
        scored = zip(asked, score(model_logits, chosen, num_top), strict=True)
        return Done(Decoded(token_ids, dict(scored)))

    def _logits(self, inputs: Sequence[DecodeInput]) -> torch.Tensor:
        """After each row's token, or the last one that it read `[inputs, vocab_sz]`."""
        network, pool = self._network, self._pool
        reading = [i for i, each in enumerate(inputs) if not each.resumes]
        ids = [inputs[i].token_id for i in reading]
        if None in ids:
            raise ValueError("no step runs ahead here: every row is given its token")
        if len(reading) == len(inputs):
            return network.step(torch.tensor(ids), pool, [each.row for each in inputs])
        logits = torch.empty(len(inputs), network.vocab_size, device=pool.device)
        resuming = [i for i, each in enumerate(inputs) if each.resumes]
        logits[resuming] = network.logits(pool, [inputs[i].row for i in resuming])
        if reading:
            rows = [inputs[i].row for i in reading]
            logits[reading] = network.step(torch.tensor(ids), pool, rows)
        return logits

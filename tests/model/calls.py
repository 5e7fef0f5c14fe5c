"""A network's `forward` in the shapes of the tests."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch
from model.network import Network
from model.state import StatePool


def prefill(
    network: Network,
    ids: Tensor,
    lengths: Sequence[int],
    pool: StatePool,
    rows: Sequence[int],
    scored: Collection[int] = (),
) -> dict[int, Tensor]:
    """Read the first lengths[i] tokens of each row of ids `[rows, tokens]`; rows of length 0 are
    skipped.

    Returns the logits after each token `[tokens, vocab]` of the sequences in `scored`.
    """
    chosen = [place for place, length in enumerate(lengths) if length]
    pieces = [ids[place, : lengths[place]] for place in chosen]
    batch = Batch.of(pieces, [rows[place] for place in chosen])
    wanted = [
        np.arange(*batch.starts[i : i + 2]) for i, place in enumerate(chosen) if place in scored
    ]
    if wanted:
        batch = batch.wanting(np.concatenate(wanted))
    parts = torch.split(network.forward(batch, pool), [len(part) for part in wanted])
    return dict(zip([place for place in chosen if place in scored], parts, strict=True))


def step(network: Network, ids: Tensor, pool: StatePool, rows: Sequence[int]) -> Tensor:
    """One token for each row: ids `[rows]` -> logits `[rows, vocab]`."""
    return network.forward(Batch.of_tokens(ids, rows), pool)

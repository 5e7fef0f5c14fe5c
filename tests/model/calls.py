"""A network's calls for the shapes that tests have."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

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
    """Read the first lengths[i] tokens of each row of ids `[rows, tokens]`.

    Returns the logits after each token `[tokens, vocab]` of the sequences in `scored`.
    """
    parts = {place: list[Tensor]() for place in sorted(scored)}
    takers = {place: part.append for place, part in parts.items()}
    network.prefill(ids, lengths, pool, rows, takers)
    return {place: torch.cat(part) for place, part in parts.items()}


def step(network: Network, ids: Tensor, pool: StatePool, rows: Sequence[int]) -> Tensor:
    """One token for each row: ids `[rows]` -> logits `[rows, vocab]`."""
    return network.step(ids, pool, rows)

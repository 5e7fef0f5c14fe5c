"""Pieces of sequences, read in plain torch from and into rows of a pool."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.batch import Batch
from model.rwkv7.layers import Weights, read
from model.rwkv7.recurrence import Recurrence
from model.state import StatePool


def read_group(
    weights: Weights,
    batch: Batch,
    group: Sequence[int],
    pool: StatePool,
    recurrence: Recurrence,
    x: Tensor,
) -> None:
    """Advance the rows of some pieces of like lengths. What the last layer makes of their tokens
    goes to their places of x `[tokens of the batch, d_emb]`."""
    device, padded = pool.device, batch.padded(group)
    ids = torch.from_numpy(batch.token_ids[padded]).to(device)
    lengths = torch.from_numpy(batch.lengths[group]).to(device)
    places = torch.from_numpy(padded).to(device)
    rows = torch.tensor([batch.rows[i] for i in group], device=device)
    states = {name: values[:, rows] for name, values in pool.tensors.items()}
    read_x, after = read(weights, ids, lengths, states, recurrence)
    for name, values in after.items():
        pool.tensors[name][:, rows] = values
    x[places[places >= 0]] = read_x[places >= 0]

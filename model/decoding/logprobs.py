"""Log-probabilities of a token and of the top alternatives.

They are the model's own, log softmax(logits), whatever the sampling parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.decoding.sampling import compiled_sampling

FEW = 64
"""So many most probable tokens are found one by one."""

ROWS = 16
"""The probabilities of so many rows are computed at once."""

LEAST = -1e30
"""Lower bound of a log-probability, so that impossible tokens have a finite one."""


@dataclass(frozen=True)
class Scored:
    """Natural logarithms of probabilities."""

    logprob: float
    """Of the token itself."""

    top: tuple[tuple[int, float], ...]
    """Top tokens, most probable first; ties by lower id."""


@torch.inference_mode()
def score(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[Scored | None]:
    """Score each row's token and its `num_top` most probable tokens.

    logits `[rows, vocab]`, at least one row. Sums are float64, and a row's do not depend on the
    others. None for rows that are not a distribution: NaN, inf, or only -inf.
    """
    places = torch.tensor(token_ids, device=logits.device).unsqueeze(-1)
    own = logits.gather(-1, places).squeeze(-1).tolist()
    ids, values = _largest(logits, min(max(num_top), logits.shape[-1]))
    found: list[Scored | None] = []
    for i, (value, sums) in enumerate(zip(own, _log_sums(logits), strict=True)):
        if sums is None:
            found.append(None)
            continue
        logprobs = sums.logprobs(values[i, : num_top[i]]).tolist()
        top = zip(ids[i, : num_top[i]].tolist(), logprobs, strict=True)
        found.append(Scored(sums.logprob(value), tuple(top)))
    return found


@dataclass(frozen=True)
class _LogSum:
    """log-sum-exp in two parts: added to large logits, the second one would be rounded away."""

    largest: float
    """The largest logit."""

    rest: float
    """log of the sum, relative to it."""

    def logprob(self, logit: float) -> float:
        return max(logit - self.largest - self.rest, LEAST)

    def logprobs(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.maximum(logits.astype(np.float64) - self.largest - self.rest, LEAST)


def _log_sums(logits: Tensor) -> list[_LogSum | None]:
    """Of each row; None where it is no distribution."""
    if logits.device.type == "cpu":
        return [
            each
            for start in range(0, len(logits), ROWS)
            for each in _log_sums_on_cpu(logits[start : start + ROWS])
        ]
    largest = logits.amax(-1, keepdim=True).double()
    rest = (logits.double() - largest).exp_().sum(-1).log_()
    pairs = zip(largest.squeeze(-1).tolist(), rest.tolist(), strict=True)
    return [_LogSum(*pair) if math.isfinite(pair[0]) else None for pair in pairs]


def _log_sums_on_cpu(logits: Tensor) -> list[_LogSum | None]:
    """torch is the faster one at exponentials; NumPy's sum has one order whatever the threads."""
    largest = logits.amax(-1, keepdim=True).double()
    weights = logits.double().sub_(largest).exp_().numpy()
    pairs = zip(largest.squeeze(-1).tolist(), weights, strict=True)
    return [_LogSum(top, math.log(row.sum())) if math.isfinite(top) else None for top, row in pairs]


def _largest(logits: Tensor, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The `count` largest logits of each row, of equal ones those with the lower ids, and the ids:
    ids and logits `[rows, count]`, the largest first."""
    compiled = compiled_sampling() if logits.device.type == "cpu" else None
    if compiled is not None and count <= FEW:
        ids = np.empty((len(logits), count), np.int64)
        values = np.empty((len(logits), count), np.float32)
        if count:
            compiled.largest_function()(logits.float().contiguous().numpy(), ids, values)
        return ids, values
    top = logits.float().topk(min(count + 1, logits.shape[-1]))
    values, ids = top.values.cpu().numpy(), top.indices.cpu().numpy()
    for i in range(len(logits)):
        if len(ids[i]) > count and values[i, count] == values[i, count - 1]:
            whole = logits[i].argsort(descending=True, stable=True)  # topk takes any of them
            ids[i, :count] = whole[:count].cpu().numpy()
    ids, values = ids[:, :count], values[:, :count]
    order = np.lexsort((ids, -values))
    return np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)

"""Log-probabilities of a token and of the top alternatives.

They are the model's own, log softmax(logits), whatever the sampling parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    tops = _largest(logits, min(max(num_top), logits.shape[-1]))
    found: list[Scored | None] = []
    for value, sums, top, count in zip(own, _log_sums(logits), tops, num_top, strict=True):
        if sums is None:
            found.append(None)
            continue
        pairs = ((token_id, sums.logprob(logit)) for token_id, logit in top[:count])
        found.append(Scored(sums.logprob(value), tuple(pairs)))
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


def _log_sums(logits: Tensor) -> list[_LogSum | None]:
    """Of each row; None if it is not a distribution.

    On a CPU row by row: a sum over many rows at once may use another order.
    """
    if logits.device.type == "cpu":
        return [_log_sum(row.double()) for row in logits]
    largest = logits.amax(-1, keepdim=True).double()
    rest = (logits.double() - largest).exp_().sum(-1).log_()
    pairs = zip(largest.squeeze(-1).tolist(), rest.tolist(), strict=True)
    return [_LogSum(*pair) if math.isfinite(pair[0]) else None for pair in pairs]


def _log_sum(row: Tensor) -> _LogSum | None:
    largest = float(row.numpy().max())
    if not math.isfinite(largest):
        return None
    # torch computes exponentials faster; NumPy sums in the same order for any number of threads.
    return _LogSum(largest, math.log(row.sub(largest).exp_().numpy().sum()))


def _largest(logits: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The `count` largest logits of each row with their ids, in the order of `Scored.top`."""
    if count == 0:
        return [[] for _ in logits]
    values, ids = logits.topk(min(count + 1, logits.shape[-1]))
    found = []
    for i, row in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
        pairs = list(zip(*row, strict=True))
        if len(pairs) > count and pairs[count][1] == pairs[count - 1][1]:
            # topk does not order ties
            ordered, order = logits[i].sort(descending=True, stable=True)
            pairs = list(zip(order[:count].tolist(), ordered[:count].tolist(), strict=True))
        found.append(sorted(pairs[:count], key=lambda pair: (-pair[1], pair[0])))
    return found

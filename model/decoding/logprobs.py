"""What the model thought of a token: its log-probability, and the most probable tokens beside it.

Probabilities are the model's own, softmax(logits), whatever a token is sampled with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = -1e30
"""Bound of a log-probability: also a token that is impossible has a number."""


@dataclass(frozen=True)
class Scored:
    """Natural logarithms of probabilities."""

    logprob: float
    """Of the token itself."""

    top: tuple[tuple[int, float], ...]
    """Of the most probable tokens, the most probable first; of equal ones the lower id."""


@torch.inference_mode()
def score(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[Scored | None]:
    """Each row's token, and as many of the row's most probable ones as `num_top` says.

    logits `[rows, vocab]`, at least one row. Sums are float64, and a row's do not depend on the
    others. None for a row that is no distribution: one that has NaN or inf in it, or only -inf.
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
    """log of a sum of exponentials, in two parts: large logits would hide the second one."""

    largest: float
    """The largest logit."""

    rest: float
    """log of the sum, relative to it."""

    def logprob(self, logit: float) -> float:
        return max(logit - self.largest - self.rest, LEAST)


def _log_sums(logits: Tensor) -> list[_LogSum | None]:
    """Of each row; None where it is no distribution.

    On a CPU row by row: a sum over many rows at once may go in another order.
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
    # torch is the faster one at exponentials; NumPy's sum has one order whatever the threads.
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
            ordered, order = logits[i].sort(descending=True, stable=True)  # topk takes any of them
            pairs = list(zip(order[:count].tolist(), ordered[:count].tolist(), strict=True))
        found.append(sorted(pairs[:count], key=lambda pair: (-pair[1], pair[0])))
    return found

"""On how many threads a step runs, and what compiled code knows of them."""

import numpy as np
import torch

THREADS = np.dtype([(name, np.int64) for name in ("thread", "threads", "rest", "arrived")])
"""A thread's number and the number of threads; the address of the C function `int f(void)` that
lets others have the core, and of the int64 that counts how often threads came to a barrier."""

ALONE = (0, 1, 0, 0)

WORTH_A_THREAD = 32 << 20
"""Multiply-adds for a token that leaves for which one more thread is of use. For fewer, it is more
often waited for: it would have to be awake a thousand times a second, next to the event loop, which
then has that many tokens to send."""


def num_threads(products: int, answers: int) -> int:
    """Threads for a step of so many multiply-adds and rows of logits: what the step is decides it,
    and never a measured time. At most as many as torch uses."""
    return min(torch.get_num_threads(), 1 + products // max(1, answers) // WORTH_A_THREAD)

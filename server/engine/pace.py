"""How many prompt tokens a step may read next to decoding rows, from measured times."""

MAX_CHANGE = 2.0
"""Maximum factor by which one measurement changes the number, since measurements are noisy."""


class Pace:
    """Adapts prompt tokens per step to the target inter-token latency.

    It affects only how far prompts get in a step: their bits do not depend on where they are split.
    """

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._tokens: float | None = None

    @property
    def tokens(self) -> int:
        """Number of prompt tokens estimated to bring a step to the target."""
        return 0 if self._tokens is None else int(self._tokens)

    def observe(self, num_tokens: int, step_s: float) -> None:
        """A step read `num_tokens` prompt tokens and ended `step_s` after the one before."""
        estimate = num_tokens * self._latency_s / max(step_s, 1e-6)
        if self._tokens is None:
            self._tokens = estimate
        elif estimate > self._tokens:
            self._tokens = min(estimate, self._tokens * MAX_CHANGE)
        elif step_s > self._latency_s:
            self._tokens = max(estimate, self._tokens / MAX_CHANGE)

"""How many prompt tokens a step may read beside the rows that generate, from measured times."""

MOST_CHANGE = 2.0
"""A measured time changes the number by at most this factor: the next one may be another."""


class Pace:
    """Keeps steps as long as the gap that streams may see between tokens.

    Only how far prompts get in a step depends on it: cut anywhere, they have the same bits.
    """

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._tokens: float | None = None

    @property
    def tokens(self) -> int:
        """Prompt tokens with which a step is as long as it may be, as far as is known."""
        return 0 if self._tokens is None else int(self._tokens)

    def observe(self, num_tokens: int, step_s: float) -> None:
        """A step read so many prompt tokens, and the tokens before it came so long ago."""
        estimate = num_tokens * self._latency_s / max(step_s, 1e-6)
        if self._tokens is None:
            self._tokens = estimate
        elif estimate > self._tokens:
            self._tokens = min(estimate, self._tokens * MOST_CHANGE)
        elif step_s > self._latency_s:
            self._tokens = max(estimate, self._tokens / MOST_CHANGE)

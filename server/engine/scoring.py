"""Log-probabilities of a prompt's tokens."""

from collections.abc import Sequence

from model.decoding.decoder import Following
from model.decoding.logprobs import Scored
from server.engine.messages import Token


class PromptScores:
    """Collects a prompt's tokens with their log-probabilities, in reading order.

    The turn's first token has no context, hence no log-probability.
    """

    def __init__(self, token_ids: Sequence[int], num_pending: int, num_top: int) -> None:
        """token_ids: those of the turn. The first `num_pending` are pending ones, which are not
        part of the prompt and not reported."""
        self._token_ids = token_ids
        self._num_pending = num_pending
        self._num_top = num_top
        self.tokens = [Token(token_ids[0])] if token_ids and not num_pending else []
        self.is_damaged = False
        """Whether the logits were not a distribution."""

    def following(self, start: int, end: int) -> Following:
        """What to request when the turn's tokens from start to end are read."""
        first = max(start + 1, self._num_pending)
        ids = self._token_ids[first : end + 1]
        return Following(first - 1 - start, tuple(ids), self._num_top)

    def add(self, token_ids: Sequence[int], scores: Sequence[Scored | None]) -> None:
        """Add the results of the last request."""
        for token_id, scored in zip(token_ids, scores, strict=True):
            if scored is None:
                self.is_damaged = True
            else:
                self.tokens.append(Token(token_id, scored.logprob, scored.top))

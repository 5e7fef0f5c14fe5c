"""The tokens of a prompt with what the model thought of them."""

from collections.abc import Sequence

from model.decoding.decoder import Following
from model.decoding.logprobs import Scored
from server.engine.messages import Token


class PromptScores:
    """Collects a prompt's tokens with their probabilities, in the order of reading.

    Nothing comes before the first token of the turn: it has no probability.
    """

    def __init__(self, token_ids: Sequence[int], num_pending: int, num_top: int) -> None:
        """token_ids: those of the turn, the pending ones first, which are not of the prompt: the
        client knows them already."""
        self._token_ids = token_ids
        self._num_pending = num_pending
        self._num_top = num_top
        self.tokens = [Token(token_ids[0])] if token_ids and not num_pending else []
        self.is_damaged = False
        """Whether the model's output was no numbers."""

    def following(self, start: int, end: int) -> Following:
        """What to ask for where the tokens of the turn from start to end are read."""
        first = max(start + 1, self._num_pending)
        ids = self._token_ids[first : end + 1]
        return Following(first - 1 - start, tuple(ids), self._num_top)

    def add(self, token_ids: Sequence[int], scores: Sequence[Scored | None]) -> None:
        """What was asked for last."""
        for token_id, scored in zip(token_ids, scores, strict=True):
            if scored is None:
                self.is_damaged = True
            else:
                self.tokens.append(Token(token_id, scored.logprob, scored.top))

"""The tokens of a prompt with what the model thought of them."""

from collections.abc import Sequence as Row

from torch import Tensor

from model.decoding.logprobs import score
from server.engine.messages import Token


class PromptScores:
    """Collects a prompt's tokens from the logits before each of them, in the order of reading."""

    def __init__(self, token_ids: Row[int], num_pending: int, num_top: int) -> None:
        """token_ids: those of the turn, the pending ones first, which are not of the prompt.

        Nothing comes before the first token of the turn: it has no probability.
        """
        self._token_ids = token_ids
        self._num_pending = num_pending
        self._num_top = num_top
        self._num_seen = 1
        """Tokens of the turn whose logits have come, the first one included."""

        self.tokens = [Token(token_ids[0])] if token_ids and not num_pending else []
        self.is_damaged = False
        """Whether the model's output was no numbers."""

    def add(self, logits: Tensor) -> None:
        """Logits `[tokens, vocab]` after the next tokens of the turn, of which all but the last
        one of the turn come."""
        first = self._num_seen
        self._num_seen += len(logits)
        skipped = max(0, self._num_pending - first)  # tokens that the client knows already
        ids = self._token_ids[first + skipped : self._num_seen]
        if not ids:
            return
        scores = score(logits[skipped:], ids, [self._num_top] * len(ids))
        for token_id, scored in zip(ids, scores, strict=True):
            if scored is None:
                self.is_damaged = True
            else:
                self.tokens.append(Token(token_id, scored.logprob, scored.top))

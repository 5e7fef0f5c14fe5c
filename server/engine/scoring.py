"""Tokens with what the model thought of them: of the prompt, and of the answer."""

from collections.abc import Sequence as Row

from torch import Tensor

from model.logprobs import Scored, score
from server.engine.messages import Token


def score_tokens(
    logits: Tensor, tokens: Row[Token | None], num_top: Row[int]
) -> list[Token | None]:
    """The tokens sampled from rows of logits `[tokens, vocab]`, with their probabilities.

    None where there is none, or the logits are no numbers.
    """
    ids = [0 if token is None else token.token_id for token in tokens]
    scores = zip(tokens, score(logits, ids, num_top), strict=True)
    return [None if token is None else _with(token.token_id, scored) for token, scored in scores]


def _with(token_id: int, scored: Scored | None) -> Token | None:
    return None if scored is None else Token(token_id, scored.logprob, scored.top)


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

    def take(self, logits: Tensor) -> None:
        """Logits `[tokens, vocab]` after the next tokens of the turn, of which all but the last
        one of the turn come."""
        first = self._num_seen
        self._num_seen += len(logits)
        skipped = max(0, self._num_pending - first)  # tokens that the client knows already
        ids = self._token_ids[first + skipped : self._num_seen]
        if not ids:
            return
        scored = score_tokens(logits[skipped:], list(map(Token, ids)), [self._num_top] * len(ids))
        self.tokens += [token for token in scored if token is not None]
        self.is_damaged |= None in scored

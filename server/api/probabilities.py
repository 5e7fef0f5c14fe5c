"""Log-probabilities in the format of chats and responses."""

from collections.abc import Sequence

from model.text.tokenizer import Tokenizer
from server.api.schemas.chat import TokenLogprob, TopLogprob
from server.engine.messages import Token


def told_tokens(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[TokenLogprob]:
    """One entry per token, with the most probable alternatives."""
    return [_told(tokenizer, token) for token in tokens]


def _told(tokenizer: Tokenizer, token: Token) -> TokenLogprob:
    top = [_named(tokenizer, *pair) for pair in token.top]
    named = _named(tokenizer, token.token_id, token.logprob or 0.0)
    return TokenLogprob(**named.model_dump(), top_logprobs=top)


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    text = tokenizer.bytes_of(token_id)
    name = text.decode("utf-8", "replace") or tokenizer.name_of(token_id)
    return TopLogprob(token=name, logprob=logprob, bytes=list(text))

"""Log-probabilities in the format of chats and responses."""

from collections.abc import Sequence
from typing import Any

from model.text.tokenizer import Tokenizer
from server.api.schemas.chat import TokenLogprob, TopLogprob
from server.engine.messages import Token


def render_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[TokenLogprob]:
    """One entry per token, with the most probable alternatives."""
    return [_render(tokenizer, token) for token in tokens]


def _render(tokenizer: Tokenizer, token: Token) -> TokenLogprob:
    top = [
        TopLogprob.model_construct(**_fields(tokenizer, token_id, logprob))
        for token_id, logprob in token.top
    ]
    own = _fields(tokenizer, token.token_id, token.logprob or 0.0)
    return TokenLogprob.model_construct(**own, top_logprobs=top)


def _fields(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    """Not validated: a token can have hundreds of them."""
    text = tokenizer.bytes_of(token_id)
    name = text.decode("utf-8", "replace") or tokenizer.name_of(token_id)
    return {"token": name, "logprob": logprob, "bytes": list(text)}

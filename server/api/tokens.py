"""`/tokenize` and `/detokenize`: what the model reads of a text."""

from fastapi import APIRouter, Depends

from server.api.auth import get_owner
from server.api.generation.generation import check_ids, check_model
from server.api.generation.prompts import ChatPrompt, encode, said
from server.api.refusals import BODY, GUARDED, refusals
from server.api.schemas.tokens import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    TokenizerInfo,
)
from server.api.service import Service, ServiceDep
from server.engine.messages import Continuation
from server.errors import InvalidRequest

router = APIRouter(
    dependencies=[Depends(get_owner)],
    tags=["tokens"],
    responses=refusals(*GUARDED),
)


@router.post("/tokenize", responses=refusals(*BODY, 404))
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> Tokenized:
    """The tokens of a text, or of a conversation by the model's chat template."""
    check_model(service, body.model)
    adds = body.add_special_tokens is None or body.add_special_tokens
    bos = service.checkpoint.network.config.bos_token_id
    match body.prompt, body.messages:
        case str(text), None:
            ids = await encode(service, text)
            ids = (bos, *ids) if adds and bos is not None else ids
        case None, list(messages):
            [ids] = await ChatPrompt(service, said(messages), "messages").read(Continuation())
            ids = ids if adds or ids[:1] != (bos,) else ids[1:]
        case _:
            raise InvalidRequest("give a prompt or messages, one of them", "prompt")
    names = None
    if body.return_token_strs:
        names = [service.checkpoint.tokenizer.name_of(token_id) for token_id in ids]
    return Tokenized(count=len(ids), tokens=list(ids), token_strs=names, max_model_len=None)


@router.post("/detokenize", responses=refusals(*BODY, 404))
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> Detokenized:
    """The text of tokens. What was tokenised without `add_special_tokens` comes back as it was."""
    check_model(service, body.model)
    check_ids(service, body.tokens, "tokens")
    return Detokenized(prompt=service.checkpoint.tokenizer.decode(body.tokens, names=True))


@router.get("/tokenizer_info")
async def tokenizer_info(service: ServiceDep) -> TokenizerInfo:
    """The tokenizer's special tokens and the chat template."""
    config = service.checkpoint.network.config
    ends = config.eos_token_ids
    return TokenizerInfo(
        bos_token=_name(service, config.bos_token_id),
        eos_token=_name(service, ends[0] if ends else None),
        pad_token=None,
        vocab_size=config.vocab_sz,
        chat_template=service.checkpoint.chat_template,
    )


def _name(service: Service, token_id: int | None) -> str | None:
    return None if token_id is None else service.checkpoint.tokenizer.name_of(token_id)

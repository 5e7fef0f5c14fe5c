"""`/tokenize`, `/detokenize` and `/tokenizer_info`."""

from collections.abc import Sequence

from fastapi import APIRouter, Response

from server.api.auth import CallerDep
from server.api.bodies import JSONRoute
from server.api.generation.generation import check_ids, check_model
from server.api.generation.prompts import ChatPrompt, chat_messages, encode
from server.api.refusals import BODY, GUARDED, refusals
from server.api.schemas.tokens import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    TokenizerInfo,
)
from server.api.service import Service, ServiceDep
from server.api.texts import to_json_list
from server.engine.messages import Continuation
from server.errors import InvalidRequest

router = APIRouter(
    route_class=JSONRoute,
    tags=["tokens"],
    responses=refusals(*GUARDED),
)


@router.post("/tokenize", response_model=Tokenized, responses=refusals(*BODY, 404, 429))
async def tokenize(body: TokenizeRequest, service: ServiceDep, caller: CallerDep) -> Response:
    """The tokens of a text, or of a conversation in the model's chat template.

    Charged as a request that reads them.
    """
    check_model(service, body.model)
    await service.limiter.count(caller)
    adds = body.add_special_tokens is None or body.add_special_tokens
    bos = service.checkpoint.network.bos
    texts, most = service.texts, service.settings.max_waiting_tokens
    ids: Sequence[int]
    match body.prompt, body.messages:
        case str(text), None:
            ids = await texts.run(len(text), encode, service, text, most)
            ids = [bos, *ids] if adds and bos is not None else ids
        case None, list(messages):
            [ids] = await ChatPrompt(service, chat_messages(messages), "messages").read(
                Continuation()
            )
            ids = ids if adds or ids[:1] != (bos,) else ids[1:]
        case _:
            raise InvalidRequest("give either a prompt or messages", "prompt")
    await service.limiter.record(caller, "tokens", len(ids))
    content = await texts.run(len(ids), _tokenized, service, ids, bool(body.return_token_strs))
    return Response(content, media_type="application/json")


@router.post("/detokenize", response_model=Detokenized, responses=refusals(*BODY, 404, 429))
async def detokenize(body: DetokenizeRequest, service: ServiceDep, caller: CallerDep) -> Response:
    """The text of tokens. The inverse of tokenizing without `add_special_tokens`.

    Charged as a request that reads them.
    """
    check_model(service, body.model)
    check_ids(service, body.tokens, "tokens")
    await service.limiter.count(caller, len(body.tokens))
    content = await service.texts.run(len(body.tokens), _detokenized, service, body.tokens)
    return Response(content, media_type="application/json")


@router.get("/tokenizer_info")
async def tokenizer_info(service: ServiceDep, _: CallerDep) -> TokenizerInfo:
    """The tokenizer's special tokens and the chat template."""
    network = service.checkpoint.network
    ends = network.eos
    return TokenizerInfo(
        bos_token=_name(service, network.bos),
        eos_token=_name(service, ends[0] if ends else None),
        pad_token=None,
        vocab_size=network.vocab_size,
        chat_template=service.checkpoint.chat_template,
    )


def _tokenized(service: Service, ids: Sequence[int], with_names: bool) -> bytes:
    """Serialized without a model: there may be a million tokens."""
    name_of = service.checkpoint.tokenizer.name_of
    names = to_json_list([name_of(i) for i in ids]) if with_names else b"null"
    fields = (len(ids), to_json_list(ids), names)
    return b'{"count":%d,"tokens":%s,"token_strs":%s,"max_model_len":null}' % fields


def _detokenized(service: Service, ids: Sequence[int]) -> str:
    text = service.checkpoint.tokenizer.decode(ids, names=True)
    return Detokenized(prompt=text).model_dump_json()


def _name(service: Service, token_id: int | None) -> str | None:
    return None if token_id is None else service.checkpoint.tokenizer.name_of(token_id)

"""`/v1/sessions`: stored conversations, each one state of fixed size."""

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, TypeAdapter, ValidationError

from model.checkpoint import CheckpointError, parse_initial_state
from server.api.auth import Caller, CallerDep, OwnerDep
from server.api.bodies import JSONRoute
from server.api.generation.answer import Answer
from server.api.generation.deliver import Reply, deliver
from server.api.generation.generation import find_initial, read_generation
from server.api.generation.prompts import TextPrompt
from server.api.generation.shape import Shape
from server.api.generation.turn import Replay, open_turn
from server.api.held import hold
from server.api.parameters import (
    AfterSession,
    MetadataQuery,
    PageLimit,
    SessionId,
    TtlQuery,
    TurnQuery,
)
from server.api.problems import record_of
from server.api.refusals import BODY, GUARDED, STORED, TURN, WRITTEN, refusals
from server.api.schemas.base import Prompt
from server.api.schemas.completions import CompletionRequest
from server.api.schemas.sessions import (
    Checkpoint,
    CheckpointList,
    CreateSessionRequest,
    ForkRequest,
    ImportedSession,
    Metadata,
    Parent,
    RewindRequest,
    Session,
    SessionDeleted,
    SessionList,
)
from server.api.service import Service, ServiceDep
from server.api.texts import LONG
from server.errors import IncompatibleState, InternalError, InvalidRequest
from server.records import RequestRecord
from server.sessions.codec import is_exported
from server.sessions.ledger import NewSession
from server.sessions.store import Entry

PREFIX = "/v1/sessions"
IMPORT = "/import"
BLOB = "application/octet-stream"
BLOB_SCHEMA = {
    "type": "string",
    "format": "binary",
    "description": "A safetensors file: the tensors of one state, and metadata with the model's "
    "fingerprint and what is needed to continue the text.",
}
TURN_HEADER = {
    "X-Session-Turn": {
        "description": "The turn that the state belongs to.",
        "required": True,
        "schema": {"type": "integer", "minimum": 0, "examples": [3]},
    },
}
METADATA: TypeAdapter[dict[str, str]] = TypeAdapter(
    Metadata, config=ConfigDict(cache_strings="keys")
)
router = APIRouter(
    route_class=JSONRoute,
    prefix=PREFIX,
    tags=["sessions"],
    responses=refusals(*GUARDED),
)


@router.post("", status_code=201, responses=refusals(*BODY, *TURN))
async def create_session(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    body: CreateSessionRequest | None = None,
) -> Session:
    """Create a session: empty, with a first prompt, or from a stored response."""
    service.check_ready()
    body = body or CreateSessionRequest()
    ttl_s = _ttl_s(service, body.ttl)
    if body.response_id is not None:
        if body.prompt is not None:
            raise InvalidRequest(
                "a session starts from a prompt or a response, not both", "response_id"
            )
        if body.initial_state is not None:
            raise InvalidRequest(
                "a session starts from an initial state or a response, not both", "response_id"
            )
        record = await service.ledger.fork_response(
            caller.owner, body.response_id, body.metadata or {}, ttl_s
        )
    elif body.prompt is None and (initial := find_initial(service, body.initial_state)):
        record = await service.ledger.import_state(
            caller.owner, initial.data, body.metadata or {}, ttl_s
        )
    elif body.prompt is not None:
        target = NewSession(body.metadata or {}, ttl_s)
        request_record = record_of(request.scope)
        record = await _create_with_prompt(
            service, caller, body.prompt, body.initial_state, target, request_record
        )
    else:
        record = await service.ledger.create(caller.owner, body.metadata or {}, ttl_s)
    return _render(service, record)


@router.get("", responses=refusals(400, 503))
async def list_sessions(
    service: ServiceDep,
    owner: OwnerDep,
    limit: PageLimit = 20,
    after: AfterSession = None,
) -> SessionList:
    """List your sessions, newest first; `after` is the last id of the previous page."""
    records = await service.ledger.list(owner, "session", limit + 1, after)
    page = [_render(service, record) for record in records[:limit]]
    return SessionList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(records) > limit,
    )


@router.post(
    IMPORT,
    status_code=201,
    responses=refusals(*BODY, 422, 429, *WRITTEN),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {BLOB: {"schema": BLOB_SCHEMA}},
        }
    },
)
async def import_session(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    metadata: MetadataQuery = None,
    ttl: TtlQuery = None,
) -> ImportedSession:
    """Make a session from an exported state, which is the body, or from a tuned one.

    It must be of this server's model: what differs is named with status 422. `metadata` is a JSON
    object. Where products are computed in another arithmetic than before, the session goes on, but
    not to the bit as it would have there. A tuned initial state, as a safetensors file with the
    tensors that its publisher has in it, makes a session in which nothing was said yet.
    """
    await service.limiter.count(caller)
    service.check_ready()
    ttl_s = _ttl_s(service, ttl)
    facts = _metadata(metadata)
    blob = await request.body()
    before: str | None = None
    if is_exported(blob):
        record, before = await service.ledger.import_blob(caller.owner, blob, facts, ttl_s)
    else:
        data = await service.texts.run(LONG, _read_tuned, service, blob)
        record = await service.ledger.import_state(caller.owner, data, facts, ttl_s)
    return ImportedSession(
        **_render(service, record).model_dump(),
        arithmetic=service.checkpoint.network.arithmetic,
        arithmetic_before=before,
    )


@router.get("/{session_id}", responses=refusals(*STORED))
async def get_session(session_id: SessionId, service: ServiceDep, owner: OwnerDep) -> Session:
    """Get a session."""
    return _render(service, await service.ledger.get(owner, "session", session_id))


@router.get("/{session_id}/turns", responses=refusals(*STORED))
async def list_turns(session_id: SessionId, service: ServiceDep, owner: OwnerDep) -> CheckpointList:
    """List the session's checkpoints: the turns that can be forked, rewound to and exported."""
    kept = await service.ledger.checkpoints(owner, session_id)
    return CheckpointList(
        data=[
            Checkpoint(turn=c.turn, tokens=c.num_tokens, created_at=c.created_at, bytes=c.num_bytes)
            for c in kept
        ]
    )


@router.post(
    "/{session_id}/fork",
    status_code=201,
    responses=refusals(*BODY, *STORED, 429, *WRITTEN),
)
async def fork_session(
    session_id: SessionId, service: ServiceDep, caller: CallerDep, body: ForkRequest | None = None
) -> Session:
    """Create a session from this one's state, now or after an earlier turn.

    The session itself does not change and may be busy. The cost does not depend on its length.
    """
    await service.limiter.count(caller)
    service.check_ready()
    body = body or ForkRequest()
    ttl_s = None if body.ttl is None else _ttl_s(service, body.ttl)
    record = await service.ledger.fork(caller.owner, session_id, body.turn, body.metadata, ttl_s)
    return _render(service, record)


@router.post("/{session_id}/rewind", responses=refusals(*BODY, *STORED, 409, 429, *WRITTEN))
async def rewind_session(
    session_id: SessionId, body: RewindRequest, service: ServiceDep, caller: CallerDep
) -> Session:
    """Go back to an earlier turn. Later turns are erased; fork first to keep them.

    A latent state cannot be truncated: only checkpoints can be restored.
    """
    await service.limiter.count(caller)
    return _render(service, await service.ledger.rewind(caller.owner, session_id, body.turn))


@router.get(
    "/{session_id}/state",
    response_class=Response,
    responses=refusals(400, 429, *STORED)
    | {200: {"content": {BLOB: {"schema": BLOB_SCHEMA}}, "headers": TURN_HEADER}},
)
async def export_session(
    session_id: SessionId,
    service: ServiceDep,
    caller: CallerDep,
    turn: TurnQuery = None,
) -> Response:
    """The session's state, now or after an earlier turn, as one safetensors blob."""
    await service.limiter.count(caller)
    hold(service.ledger.state_bytes)
    record, turn, blob = await service.ledger.export(caller.owner, session_id, turn)
    name = f"{record.id}-{turn}.safetensors"
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "X-Session-Turn": str(turn),
    }
    return Response(blob, media_type=BLOB, headers=headers)


@router.delete("/{session_id}", responses=refusals(*STORED, 409, *WRITTEN))
async def delete_session(
    session_id: SessionId, service: ServiceDep, owner: OwnerDep
) -> SessionDeleted:
    """Erase a session with its checkpoints and stored answers, in memory and on disk."""
    await service.ledger.delete(owner, "session", session_id)
    return SessionDeleted(id=session_id)


def _read_tuned(service: Service, blob: bytes) -> bytes:
    """The bytes of a tuned initial state. Raises IncompatibleState."""
    spec = service.checkpoint.network.state_spec
    try:
        return parse_initial_state(service.settings.checkpoint, blob, spec)
    except CheckpointError as error:
        raise IncompatibleState(f"this is not a state for this server: {error}") from error


def _ttl_s(service: Service, ttl: float | None) -> float | None:
    """Validated time to live. Raises InvalidRequest."""
    most = service.settings.session_ttl_s
    if ttl is not None and most is not None and ttl > most:
        raise InvalidRequest(f"ttl is {ttl:g}, the maximum is {most:g}", "ttl")
    return most if ttl is None else ttl


def _metadata(given: str | None) -> dict[str, str]:
    """Parse metadata. Raises InvalidRequest."""
    try:
        return {} if given is None else METADATA.validate_json(given, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise InvalidRequest(f"metadata: {problem['msg']}", "metadata") from error


async def _create_with_prompt(
    service: Service,
    caller: Caller,
    prompt: Prompt,
    initial_state: str | None,
    target: NewSession,
    request: RequestRecord,
) -> Entry:
    """A session whose first turn read the prompt. Raises InvalidRequest and the errors of a
    turn."""
    asked = CompletionRequest.model_construct(  # already validated
        prompt=prompt, max_tokens=0, initial_state=initial_state
    )
    if len(asked.prompts) != 1 or not asked.prompts[0]:
        raise InvalidRequest("prompt must be a single non-empty text", "prompt")
    generation = await read_generation(service, asked)
    text = TextPrompt(service, asked.prompts)
    turn = await open_turn(service, caller, None, target, generation, text, request=request)
    if isinstance(turn, Replay) or turn.session_id is None:
        raise InternalError("a new session was replayed")
    answer = Answer(turn, service.checkpoint.tokenizer, turn.session_id)
    await deliver(turn, answer, Shape(service, asked, answer), Reply())
    return await service.ledger.get(caller.owner, "session", turn.session_id)


def _render(service: Service, record: Entry) -> Session:
    parent = None
    if record.parent_id is not None and record.parent_turn is not None:
        parent = Parent(session_id=record.parent_id, turn=record.parent_turn)
    return Session(
        id=record.id,
        created_at=record.created_at,
        last_used_at=record.last_used_at,
        expires_at=record.expires_at,
        ttl=record.ttl_s,
        turn=record.turn,
        checkpoints=record.num_checkpoints,
        tokens=record.num_tokens,
        state_bytes=service.ledger.state_bytes,
        tier=service.ledger.tier(record),
        status="busy" if service.ledger.is_busy(record.id) else "idle",
        parent=parent,
        metadata=record.metadata,
    )

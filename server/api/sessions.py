"""`/v1/sessions`: conversations that the server keeps, each as one state of fixed size."""

from typing import Annotated

from fastapi import APIRouter, Query

from server.api.schemas import (
    CreateSessionRequest,
    ErrorResponse,
    Session,
    SessionDeleted,
    SessionList,
)
from server.api.service import Service, ServiceDep
from server.sessions.store import SessionRecord

router = APIRouter(
    prefix="/v1/sessions",
    tags=["sessions"],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)


@router.post("", status_code=201)
async def create_session(service: ServiceDep, body: CreateSessionRequest | None = None) -> Session:
    """Create an empty session. Its id is the key to it: whoever knows it can continue it."""
    service.check_ready()
    metadata = (body.metadata if body is not None else None) or {}
    return _render(service, await service.sessions.create(metadata))


@router.get("")
async def list_sessions(
    service: ServiceDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query()] = None,
) -> SessionList:
    """Sessions, newest first; `after` is the id that the page before ended with."""
    records = await service.sessions.list(limit + 1, after)
    page = [_render(service, record) for record in records[:limit]]
    return SessionList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(records) > limit,
    )


@router.get("/{session_id}")
async def get_session(session_id: str, service: ServiceDep) -> Session:
    """One session: its tokens, its turn, and where its state is."""
    return _render(service, await service.sessions.get(session_id))


@router.delete("/{session_id}")
async def delete_session(session_id: str, service: ServiceDep) -> SessionDeleted:
    """Erase a session and its state, in memory and on disk."""
    row = await service.sessions.delete(session_id)
    if row is not None:
        service.engine.release(row)
    return SessionDeleted(id=session_id)


def _render(service: Service, record: SessionRecord) -> Session:
    return Session(
        id=record.id,
        created_at=record.created_at,
        last_used_at=record.last_used_at,
        turn=record.turn,
        tokens=record.num_tokens,
        state_bytes=service.sessions.state_bytes,
        tier=service.sessions.tier(record),
        status="busy" if service.sessions.is_busy(record.id) else "idle",
        metadata=record.metadata,
    )

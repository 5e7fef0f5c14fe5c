"""`/v1/streams`: resume a stream whose connection was lost."""

from fastapi import APIRouter, Response

from server.api.auth import OwnerDep
from server.api.parameters import AfterEvent, LastEventId, StreamId
from server.api.refusals import GUARDED, refusals
from server.api.schemas.streams import StreamDeleted, StreamInfo
from server.api.service import Service, ServiceDep
from server.api.sse import AT_END, events_of
from server.api.streams import Stream

router = APIRouter(
    prefix="/v1/streams",
    tags=["streams"],
    responses=refusals(*GUARDED, 404),
)


@router.get(
    "/{stream_id}",
    response_class=Response,
    responses=refusals(400, 410)
    | AT_END
    | {200: events_of("Completion", "ChatChunk", "ResponseEvent")},
)
async def resume_stream(
    stream_id: StreamId,
    service: ServiceDep,
    owner: OwnerDep,
    last_event_id: LastEventId = None,
    after: AfterEvent = None,
) -> Response:
    """Follow a `resumable` stream: its events so far and those to come.

    Starts after the event named by `Last-Event-ID` (or `after`, for clients that cannot set
    headers), or at the oldest stored event. Any number of readers may follow a stream.
    """
    stream = service.streams.get(owner, stream_id)
    given = after if last_event_id is None else last_event_id
    start = 0 if given is None else stream.number_after(given)
    return stream.response(service.settings.stream_keepalive_s, start=start)


@router.post("/{stream_id}/cancel")
async def cancel_stream(stream_id: StreamId, service: ServiceDep, owner: OwnerDep) -> StreamInfo:
    """Cancel a stream's turn; a session's turn is rolled back.

    A finished stream is returned unchanged.
    """
    stream = service.streams.get(owner, stream_id)
    await stream.cancel()
    return _render(service, stream)


@router.delete("/{stream_id}")
async def delete_stream(stream_id: StreamId, service: ServiceDep, owner: OwnerDep) -> StreamDeleted:
    """Cancel a stream and delete its events."""
    await service.streams.delete(owner, stream_id)
    return StreamDeleted(id=stream_id)


def _render(service: Service, stream: Stream) -> StreamInfo:
    return StreamInfo(
        id=stream.id,
        created_at=stream.created_at,
        status=stream.status,
        events=stream.log.num_events,
        expires_at=service.streams.expires_at(stream),
    )

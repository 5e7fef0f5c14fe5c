"""For orchestrators and Prometheus."""

from fastapi import APIRouter, Response, Security
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from server.api.auth import BEARER, METRICS
from server.api.refusals import ALWAYS, GUARDED, refusals
from server.api.schemas.models import Health
from server.api.service import ServiceDep

router = APIRouter(tags=["operations"], responses=refusals(*ALWAYS))

EXPOSITION = {
    "type": "string",
    "description": "Prometheus' text format; the metrics' names begin with `latentd_`.",
    "examples": ['latentd_slots{state="running"} 2.0\n'],
}


@router.get("/health/live")
async def live() -> Health:
    """The process answers."""
    return Health()


@router.get("/health", include_in_schema=False)
@router.get("/health/ready", responses=refusals(503))
async def ready(service: ServiceDep) -> Health:
    """The server takes turns."""
    service.check_ready()
    return Health()


@router.get(
    METRICS,
    response_class=Response,
    dependencies=[Security(BEARER)],
    responses=refusals(*GUARDED) | {200: {"content": {"text/plain": {"schema": EXPOSITION}}}},
)
async def metrics(service: ServiceDep) -> Response:
    """Prometheus metrics."""
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

"""For orchestrators and Prometheus."""

from fastapi import APIRouter, Request, Response, Security

from server.api.auth import BEARER, METRICS
from server.api.refusals import ALWAYS, GUARDED, refusals
from server.api.schemas.models import Health
from server.api.service import ServiceDep

router = APIRouter(tags=["operations"], responses=refusals(*ALWAYS))
metrics_router = APIRouter(tags=["operations"], responses=refusals(*ALWAYS))
"""Left out where metrics have an address of their own."""

EXPOSITION = {
    "type": "string",
    "description": "Prometheus' text format; the metrics' names begin with `latentd_`.",
    "examples": ['latentd_slots{state="running"} 2.0\n'],
}

FORMATS = ("text/plain", "application/openmetrics-text")


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


@metrics_router.get(
    METRICS,
    response_class=Response,
    dependencies=[Security(BEARER)],
    responses=refusals(*GUARDED)
    | {200: {"content": {kind: {"schema": EXPOSITION} for kind in FORMATS}}},
)
async def metrics(service: ServiceDep, request: Request) -> Response:
    """Prometheus metrics; for who accepts OpenMetrics, with exemplars that name requests."""
    text, content_type = service.metrics.exposition(request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": content_type})

"""For orchestrators and Prometheus."""

from fastapi import APIRouter, Response, Security
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from server.api.auth import BEARER, METRICS
from server.api.problems import REFUSALS
from server.api.schemas.models import Health
from server.api.schemas.problems import ErrorResponse
from server.api.service import ServiceDep

router = APIRouter(tags=["operations"])


@router.get("/health/live")
async def live() -> Health:
    """The process answers."""
    return Health()


@router.get("/health", include_in_schema=False)
@router.get("/health/ready", responses={503: {"model": ErrorResponse}})
async def ready(service: ServiceDep) -> Health:
    """The server takes turns."""
    service.check_ready()
    return Health()


@router.get(
    METRICS,
    response_class=Response,
    dependencies=[Security(BEARER)],
    responses={401: REFUSALS[401]},
)
async def metrics(service: ServiceDep) -> Response:
    """Prometheus metrics."""
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

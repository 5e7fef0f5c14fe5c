"""Health probes and metrics."""

from fastapi import APIRouter, Request, Response, Security

from server.api.auth import BEARER
from server.api.refusals import ALWAYS, GUARDED, refusals
from server.api.schemas.models import Health
from server.api.service import Service, ServiceDep
from server.errors import LatentdError, NotReady
from server.metrics import METRICS
from server.sessions.store import StoreHealth

router = APIRouter(tags=["operations"], responses=refusals(*ALWAYS))
metrics_router = APIRouter(tags=["operations"], responses=refusals(*ALWAYS))
"""Without `/metrics` if metrics have their own address."""

EXPOSITION = {
    "type": "string",
    "description": "Prometheus' text format; the metrics' names begin with `latentd_`.",
    "examples": ['latentd_slots{state="running"} 2.0\n'],
}

FORMATS = ("text/plain", "application/openmetrics-text")


SMALL_PART = 20
"""Caps `min_free_bytes` at this fraction of the disk, for small disks."""


@router.get("/health/live", responses=refusals(503))
async def live(service: ServiceDep) -> Health:
    """The process responds, and its engine is not hung."""
    _check_step(service)
    return Health()


@router.get("/health", include_in_schema=False)
@router.get("/health/ready", responses=refusals(503))
async def ready(service: ServiceDep) -> Health:
    """The server accepts turns and can store them; otherwise the message says what is wrong."""
    problem = await check_readiness(service)
    if problem is not None:
        raise problem
    return Health()


@metrics_router.get(
    METRICS,
    response_class=Response,
    dependencies=[Security(BEARER)],
    responses=refusals(*GUARDED)
    | {200: {"content": {kind: {"schema": EXPOSITION} for kind in FORMATS}}},
)
async def metrics(service: ServiceDep, request: Request) -> Response:
    """Prometheus metrics; in OpenMetrics format, if accepted, with request ids as exemplars."""
    await check_readiness(service)
    text, content_type = service.metrics.exposition(request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": content_type})


async def check_readiness(service: Service) -> LatentdError | None:
    """Why the server is not ready, or None. Updates the health metrics."""
    metrics, problem = service.metrics, None
    metrics.running_step_seconds.set(service.engine.running_step_s)
    store = await service.ledger.store_health()
    metrics.store_bytes.set(store.num_bytes)
    metrics.store_free_bytes.set(store.free_bytes)
    try:
        service.check_ready()
        _check_step(service)
        _check_store(service, store)
    except LatentdError as error:
        problem = error
    metrics.ready.set(problem is None)
    return problem


def _check_step(service: Service) -> None:
    """Raises NotReady when the engine's current step hangs."""
    seconds, most = service.engine.running_step_s, service.settings.step_hang_timeout_s
    if seconds > most:
        raise NotReady(
            f"an engine step has run for {seconds:.0f} seconds; more than {most:g} count as hung",
            "step_hung",
        )


def _check_store(service: Service, store: StoreHealth) -> None:
    """Raises NotReady if commits may be lost, or the disk is full."""
    if store.fault is not None:
        raise NotReady(f"the store is lost: {store.fault}", "store_lost")
    wanted = min(service.settings.min_free_bytes, store.disk_bytes // SMALL_PART)
    needed = max(wanted, 2 * service.ledger.state_bytes)
    free = store.free_bytes + store.unused_bytes
    if free < needed:
        raise NotReady(
            f"the store's disk is full: {free:,} bytes are free, less than {needed:,}",
            "disk_full",
        )

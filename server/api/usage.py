"""`/v1/usage`: a key's usage."""

from fastapi import APIRouter

from server.api.auth import OwnerDep
from server.api.refusals import GUARDED, refusals
from server.api.schemas.usage import KeyUsage
from server.api.service import ServiceDep

router = APIRouter(tags=["usage"], responses=refusals(*GUARDED, 503))


@router.get("/v1/usage")
async def get_usage(service: ServiceDep, owner: OwnerDep) -> KeyUsage:
    """Your key's usage since the server started, and what it stores now."""
    used, held = service.limiter.used(owner), await service.ledger.usage(owner)
    return KeyUsage(
        since=int(service.limiter.started_at),
        requests=used.num_requests,
        prompt_tokens=used.num_prompt_tokens,
        completion_tokens=used.num_generated_tokens,
        sessions=held.num_sessions,
        responses=held.num_responses,
        states=held.num_states,
        bytes=held.num_bytes,
    )

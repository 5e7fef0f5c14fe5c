"""`/v1/models`: the served model."""

from fastapi import APIRouter, Depends

from server.api.auth import get_caller
from server.api.generation.generation import check_model
from server.api.parameters import ModelName
from server.api.refusals import GUARDED, refusals
from server.api.schemas.models import Model, ModelList
from server.api.service import Service, ServiceDep

router = APIRouter(
    dependencies=[Depends(get_caller)], tags=["models"], responses=refusals(*GUARDED)
)


@router.get("/v1/models")
async def list_models(service: ServiceDep) -> ModelList:
    """List the models: one."""
    return ModelList(data=[_render(service)])


@router.get("/v1/models/{model:path}", responses=refusals(404))
async def get_model(model: ModelName, service: ServiceDep) -> Model:
    """Get the model."""
    check_model(service, model)
    return _render(service)


def _render(service: Service) -> Model:
    network, settings = service.checkpoint.network, service.settings
    return Model(
        id=service.model_name,
        created=service.created,
        parameters=network.num_parameters,
        vocab_size=network.vocab_size,
        state_bytes=service.ledger.state_bytes,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_tokens=settings.max_tokens_limit,
        chat=service.conversation is not None,
    )

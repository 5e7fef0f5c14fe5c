"""Who asks: the key of a request, and the name under which its sessions are kept."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request

from server.api.service import ServiceDep
from server.errors import Unauthorized

EVERYBODY = ""
"""The owner of all sessions where no keys are asked for."""


async def get_owner(request: Request, service: ServiceDep) -> str:
    """The owner that the request's key stands for. Raises Unauthorized."""
    known = service.settings.api_key
    if not known:
        return EVERYBODY
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise Unauthorized("this server wants an API key: Authorization: Bearer KEY")
    digest = _digest(given.strip())
    if not any(hmac.compare_digest(digest, _digest(key)) for key in known):
        raise Unauthorized("this server does not know this API key")
    return f"key_{digest[:32]}"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


OwnerDep = Annotated[str, Depends(get_owner)]

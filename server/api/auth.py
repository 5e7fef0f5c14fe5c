"""Who asks: the key of a request, and the name under which its sessions are kept."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.problems import respond
from server.errors import Unauthorized
from server.keys import KeyFileError, Limits, digest, owner_of, read_keys
from server.metrics import METRICS
from server.settings import Settings

EVERYBODY = ""
"""The owner of all sessions where no keys are asked for."""

OPEN = {"/health", "/health/live", "/health/ready"}
"""What is asked without a key: orchestrators have none."""

CALLER = "latentd.caller"
"""Where a request's scope has its caller."""

NO_LIMITS = Limits()
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who asks; the default is anybody."""

    owner: str = EVERYBODY
    name: str = ""
    """What the key is called in the key file."""

    limits: Limits = NO_LIMITS


class KeyRing:
    """The keys that the server knows: those of its settings and those of the key file."""

    def __init__(self, settings: Settings) -> None:
        """Raises KeyFileError."""
        self.asks_for_keys = settings.has_keys
        self._file = settings.key_file
        self._defaults = Limits(
            requests_per_minute=settings.key_requests_per_minute,
            tokens_per_minute=settings.key_tokens_per_minute,
            concurrent_requests=settings.key_concurrent_requests,
        )
        self._anybody = Caller(limits=self._defaults)
        digests = [digest(key) for key in settings.api_key]
        self._given = {d: Caller(owner_of(d), limits=self._defaults) for d in digests}
        self._listed = dict[str, Caller]()
        self._stamp: object = None
        if self._file is not None:
            self._stamp = _stamp(self._file)
            self._listed = self._read(self._file)

    def find(self, authorization: str) -> Caller:
        """Who sends this header. Raises Unauthorized.

        The key is looked up by its digest, which takes the same time for any number of keys. How
        long that takes could tell something of a digest, but no digest tells anything of the key.
        """
        if not self.asks_for_keys:
            return self._anybody
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("this server wants an API key: Authorization: Bearer KEY")
        key_digest = digest(key.strip())
        caller = self._listed.get(key_digest) or self._given.get(key_digest)
        if caller is None:
            raise Unauthorized("this server does not know this API key")
        return caller

    def refresh(self) -> None:
        """Read the key file again if it has changed; if it cannot be used, the keys stay."""
        if self._file is None or _stamp(self._file) == self._stamp:
            return
        self._stamp = _stamp(self._file)
        try:
            self._listed = self._read(self._file)
        except KeyFileError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.info("%s: %d keys", self._file, len(self._listed))

    def _read(self, file: Path) -> dict[str, Caller]:
        return {
            key.hash: Caller(key.id, key.name, self._limits(key.limits)) for key in read_keys(file)
        }

    def _limits(self, own: Limits) -> Limits:
        """A key's own limits, and the settings' where it has none."""
        return self._defaults.model_copy(update=own.model_dump(exclude_none=True))


class Guard:
    """Lets requests through whose caller is known, and puts the caller into their scope.

    It stands before all routes, so that none can be forgotten.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, guard_metrics: bool) -> None:
        self._app = app
        self._keys = keys
        self._guard_metrics = guard_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._guards(scope["path"]):
            try:
                given = Headers(scope=scope).get("authorization", "")
                scope[CALLER] = self._keys.find(given)
            except Unauthorized as error:
                await respond(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _guards(self, path: str) -> bool:
        return path not in OPEN and (self._guard_metrics or path != METRICS)


BEARER = HTTPBearer(
    auto_error=False,
    scheme_name="APIKey",
    description="A key of this server, if it asks for keys.",
)


async def get_caller(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]
) -> Caller:
    """Who asks, as the guard found out."""
    caller = request.scope[CALLER]
    if not isinstance(caller, Caller):
        raise Unauthorized("nobody has asked who this is")
    return caller


CallerDep = Annotated[Caller, Depends(get_caller)]


async def get_owner(caller: CallerDep) -> str:
    """The name under which the caller's sessions are kept."""
    return caller.owner


OwnerDep = Annotated[str, Depends(get_owner)]


def _stamp(file: Path) -> object:
    """What changes with the file; None if there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size

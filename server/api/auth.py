"""Authentication: a request's API key, and the owner of its sessions."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.held import HOLD, HeldBytes, Hold
from server.api.problems import respond
from server.errors import Overloaded, Unauthorized
from server.keys import KeyFileError, Limits, digest, owner_of, read_keys
from server.metrics import METRICS
from server.settings import Settings
from server.threads import OWNER

ANONYMOUS = ""
"""The owner of all sessions if no keys are required."""

PUBLIC_PATHS = {"/health", "/health/live", "/health/ready"}
"""Paths that need no key: orchestrators have none."""

CALLER = "latentd.caller"
"""Key of the caller in a request's scope."""

NO_LIMITS = Limits()
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """The sender of a request; anonymous by default."""

    owner: str = ANONYMOUS
    name: str = ""
    """The key's name in the key file."""

    limits: Limits = NO_LIMITS


ANONYMOUS_CALLER = Caller()


class KeyRing:
    """The server's API keys: those of its settings and those of the key file."""

    def __init__(self, settings: Settings) -> None:
        """Raises KeyFileError."""
        self.requires_keys = settings.has_keys
        self._file = settings.key_file
        self._defaults = Limits(
            requests_per_minute=settings.key_requests_per_minute,
            tokens_per_minute=settings.key_tokens_per_minute,
            concurrent_requests=settings.key_concurrent_requests,
            concurrent_sequences=settings.key_concurrent_sequences,
        )
        self._anonymous = Caller(limits=self._defaults)
        digests = [digest(key) for key in settings.api_key]
        self._given = {d: Caller(owner_of(d), limits=self._defaults) for d in digests}
        self._listed = dict[str, Caller]()
        self._stamp: object = None
        if self._file is not None:
            self._stamp = _stamp(self._file)
            self._listed = self._read(self._file)

    def find(self, authorization: str) -> Caller:
        """The caller with this Authorization header. Raises Unauthorized.

        Keys are looked up by digest: the timing could reveal something about a digest, but a digest
        reveals nothing about its key.
        """
        if not self.requires_keys:
            return self._anonymous
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("an API key is required: Authorization: Bearer KEY")
        key_digest = digest(key.strip())
        caller = self._listed.get(key_digest) or self._given.get(key_digest)
        if caller is None:
            raise Unauthorized("invalid API key")
        return caller

    def refresh(self) -> set[str]:
        """Read the key file again if it has changed; an unusable file leaves the keys unchanged.
        Returns the owners whose keys are no longer valid."""
        if self._file is None or _stamp(self._file) == self._stamp:
            return set()
        before = {caller.owner for caller in self._listed.values()}
        self._stamp = _stamp(self._file)
        try:
            self._listed = self._read(self._file)
        except KeyFileError as error:
            log.error("the key file was not reloaded: %s", error)
        else:
            log.info("%s: %d keys", self._file, len(self._listed))
        valid = (*self._listed.values(), *self._given.values())
        return before - {caller.owner for caller in valid}

    def _read(self, file: Path) -> dict[str, Caller]:
        return {
            key.hash: Caller(key.id, key.name, self._limits(key.limits)) for key in read_keys(file)
        }

    def _limits(self, own: Limits) -> Limits:
        """A key's limits, with the settings as defaults."""
        return self._defaults.model_copy(update=own.model_dump(exclude_none=True))


class AuthMiddleware:
    """Middleware that authenticates requests and puts the caller into their scope.

    It precedes all routes, so that none can be left unprotected.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyRing, protect_metrics: bool, most: int, held: HeldBytes
    ) -> None:
        """`most`: requests under way of all callers. Of these a caller may have as many as are left
        for the others then, where there are keys. `held` counts the bodies of requests."""
        self._app = app
        self._most = most
        self._held = held
        self._under_way = Counter[str]()
        self._keys = keys
        self._guard_metrics = protect_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._guards(scope["path"]):
            try:
                given = Headers(scope=scope).get("authorization", "")
                scope[CALLER] = caller = self._keys.find(given)
                OWNER.set(caller.owner)
                self._check_space(caller.owner)
            except (Unauthorized, Overloaded) as error:
                await respond(scope, error)(scope, receive, send)
                return
            self._under_way[caller.owner] += 1
            hold = Hold(self._held, caller.owner)
            HOLD.set(hold)
            try:
                await self._app(scope, _counted(receive, hold), send)
            finally:
                if not hold.is_handed_over:
                    hold.release()
                self._under_way[caller.owner] -= 1
                if not self._under_way[caller.owner]:
                    del self._under_way[caller.owner]
        else:
            await self._app(scope, receive, send)

    def _check_space(self, owner: str) -> None:
        """Raises Overloaded."""
        num_own, num_left = self._under_way[owner], self._most - self._under_way.total()
        if self._keys.requires_keys and num_own >= max(1, num_left):
            raise Overloaded(
                f"{num_own} of your requests are running, and only {num_left} are left for "
                "others; retry when some have ended",
                "too_many_requests",
            )

    def _guards(self, path: str) -> bool:
        return path not in PUBLIC_PATHS and (self._guard_metrics or path != METRICS)


BEARER = HTTPBearer(
    auto_error=False,
    scheme_name="APIKey",
    description="An API key, if the server requires one.",
)


async def get_caller(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]
) -> Caller:
    """The authenticated caller."""
    caller = request.scope[CALLER]
    if not isinstance(caller, Caller):
        raise Unauthorized("the request was not authenticated")
    return caller


CallerDep = Annotated[Caller, Depends(get_caller)]


async def get_owner(caller: CallerDep) -> str:
    """The owner of the caller's sessions."""
    return caller.owner


OwnerDep = Annotated[str, Depends(get_owner)]


def _counted(receive: Receive, hold: Hold) -> Receive:
    """Counts what is received. It raises Overloaded."""

    async def receive_counted() -> Message:
        message = await receive()
        hold.add(len(message.get("body", b"")))
        return message

    return receive_counted


def _stamp(file: Path) -> object:
    """Identifies a version of the file; None if there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size

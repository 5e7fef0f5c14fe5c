"""Validation of the Host header: protects a server on the loopback from DNS rebinding.

A web page whose hostname resolves to 127.0.0.1 can send requests there, and browsers put that name
into the Host header. Names without a dot cannot be registered by an attacker.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.auth import PUBLIC_PATHS
from server.api.problems import MAX_ECHO_CHARACTERS, respond
from server.errors import InvalidRequest
from server.settings import DOTLESS


class HostMiddleware:
    """Accepts requests whose Host header is one of the server's names, or missing.

    Public paths accept any name: orchestrators use addresses.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        """`hosts` without ports; `*.` matches any subdomain, DOTLESS any name without a dot."""
        self._app = app
        self._hosts = [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            given = Headers(scope=scope).get("host", "")
            if given and not self._knows(_name(given)):
                await respond(
                    scope,
                    InvalidRequest(
                        f"unknown host name {given[:MAX_ECHO_CHARACTERS]!r}: see --allowed-hosts",
                        code="host_not_allowed",
                        status=421,
                    ),
                )(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _knows(self, name: str) -> bool:
        return any(
            name.endswith(host[1:]) if host.startswith("*.") else name == host
            for host in self._hosts
        ) or (DOTLESS in self._hosts and name != "" and not {".", ":"} & set(name))


def _name(host: str) -> str:
    """Strip the port, the brackets of an IPv6 address, and a trailing dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()

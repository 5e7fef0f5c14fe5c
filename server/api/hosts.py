"""By what names clients may call the server: protects one on the loopback from DNS rebinding.

A web page whose own name leads to 127.0.0.1 may send anything there, and browsers name the page in
the Host header. No stranger owns a name without a dot.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.auth import OPEN
from server.api.problems import LONGEST_ECHO, respond
from server.errors import InvalidRequest
from server.settings import DOTLESS


class HostMiddleware:
    """Lets requests through that call the server by one of its names, or by none.

    What is asked for without a key is answered to all: orchestrators use addresses.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        """`hosts` without ports; `*.` stands for any names before the rest, DOTLESS for itself."""
        self._app = app
        self._hosts = [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = Headers(scope=scope).get("host", "")
            if given and not self._knows(_name(given)):
                await respond(
                    scope,
                    InvalidRequest(
                        f"this server does not go by the name {given[:LONGEST_ECHO]!r}: see "
                        "--allowed-hosts",
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
    """Without the port, the brackets of an IPv6 address, and the dot at the end."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()

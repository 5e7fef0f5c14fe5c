"""CORS: which web origins may use the server."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.problems import render
from server.errors import InvalidRequest

METHODS = ("GET", "POST", "DELETE")


class PageMiddleware(CORSMiddleware):
    """Pages of the listed origins may send any header, even from a public page to a private
    address, and read ours. Others are denied, with an error for their preflights."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...], exposed: tuple[str, ...]) -> None:
        """`exposed`: response headers that they may read."""
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=exposed,
        )

    async def simple_response(
        self, scope: Scope, receive: Receive, send: Send, request_headers: Headers
    ) -> None:
        if self.is_allowed_origin(request_headers.get("origin", "")):
            await super().simple_response(scope, receive, send, request_headers)
        else:
            await self.app(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        origin, method = (
            request_headers[name][:80] for name in ("origin", "access-control-request-method")
        )
        if not self.is_allowed_origin(request_headers["origin"]):
            return render(InvalidRequest(f"origin {origin} is not allowed", code="cors_refused"))
        if method not in METHODS:
            return render(InvalidRequest(f"method {method} is not allowed", code="cors_refused"))
        return super().preflight_response(request_headers)

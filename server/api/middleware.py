"""Handles each request's id, body limits, rate limit headers, metrics and log line.

Pure ASGI, so that streams are not buffered.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import problems
from server.api.auth import CALLER, PUBLIC_PATHS
from server.api.encodings import decoded
from server.api.limits import Limiter
from server.api.problems import OUTCOME, RECORD, render
from server.api.schemas.unknown import POLICY, UnknownParameters
from server.errors import InternalError
from server.metrics import METRICS, Metrics
from server.records import RequestRecord

REQUEST_ID = "X-Request-ID"
TRACE_HEADERS = ("traceparent", "tracestate", "baggage")
PROBES = {*PUBLIC_PATHS, METRICS}
"""Paths that are polled: logged at level debug, and not traced."""

CHEAP_REJECTIONS = (401, 421, 429, 503)
"""Statuses of cheap rejections, which can be arbitrarily many: their log lines are limited."""

Trace = Callable[[RequestRecord], None]
_GOOD_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
log = logging.getLogger(__name__)


class RequestMiddleware:
    """Assigns each request an id, from its header or new, and bounds its body.

    Adds rate limit headers to responses. HEAD is handled as GET; the server drops the body.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        limiter: Limiter,
        unknown: UnknownParameters,
        body_timeout_s: float,
        max_body_bytes: int,
        max_bytes_by_path: Mapping[str, int],
        root_path: str,
        trace: Trace | None,
    ) -> None:
        """`max_bytes_by_path` raises the body limit of single paths. A proxy may leave `root_path`
        in front of paths. `trace` receives the records of finished requests."""
        self._app = app
        self._metrics = metrics
        self._limiter = limiter
        self._unknown = unknown
        self._body_timeout_s = body_timeout_s
        self._max_body_bytes = max_body_bytes
        self._max_bytes_by_path = max_bytes_by_path
        self._root_path = root_path
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}
        if self._root_path:
            path = scope["path"]
            if path.startswith(f"{self._root_path}/"):
                path = path.removeprefix(self._root_path)
            scope = {**scope, "root_path": self._root_path, "path": path}
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _GOOD_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        record = scope[RECORD] = RequestRecord(request_id, method, _address(scope))
        if self._trace is not None:
            record.trace_headers = {h: headers[h] for h in TRACE_HEADERS if h in headers}
        POLICY.set(self._unknown)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                response_headers = MutableHeaders(scope=message)
                response_headers[REQUEST_ID] = request_id
                if CALLER in scope:
                    response_headers.update(await self._limiter.headers(scope[CALLER]))
            await send(message)

        try:
            most = max(self._max_body_bytes, self._max_bytes_by_path.get(scope["path"], 0))
            if _declared_length(headers) > most:
                await render(problems.body_too_large())(scope, receive, send_with_id)
            else:
                in_time = _with_timeout(receive, self._body_timeout_s)
                body = decoded(_limited(in_time, most), headers, most)
                await self._app(scope, body, send_with_id)
        except Exception:  # last resort: answer with status 500
            log.exception("request %s failed", request_id)
            if record.status == 0:
                await render(InternalError())(scope, receive, send_with_id)
        finally:
            record.outcome = scope.get(OUTCOME) or _outcome(record.status)
            record.endpoint = getattr(scope.get("route"), "path", "unknown")
            if CALLER in scope:
                record.key = scope[CALLER].name or scope[CALLER].owner or None
            record.session_id = record.session_id or scope.get("path_params", {}).get("session_id")
            labels = {"endpoint": record.endpoint, "outcome": record.outcome}
            self._metrics.requests_total.labels(**labels).inc()
            if record.turn is not None and record.turn.ended is None:
                record.turn.on_end = partial(self._report, record)  # detached: reported later
            else:
                self._report(record)

    def _report(self, record: RequestRecord) -> None:
        """Log and trace a finished request."""
        record.end()
        is_probe = record.endpoint in PROBES and record.status < 400
        refused = f"status {record.status}" if record.status in CHEAP_REJECTIONS else None
        log.log(
            logging.DEBUG if is_probe else logging.INFO,
            "request",
            extra={"fields": record.fields(), "limited": refused},
        )
        if self._trace is not None and not is_probe:
            self._trace(record)


def _address(scope: Scope) -> str | None:
    client = scope.get("client")
    return None if client is None else client[0]


def _with_timeout(receive: Receive, timeout_s: float) -> Receive:
    """Limits the time for receiving the body, not what comes after it."""
    deadline = time.monotonic() + timeout_s
    is_complete = False

    async def in_time() -> Message:
        nonlocal is_complete
        if is_complete:
            return await receive()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, headers={"Connection": "close"}) from None
        is_complete = not message.get("more_body", False)
        return message

    return in_time


def _limited(receive: Receive, most: int) -> Receive:
    """Limits the bytes of the body, whatever the headers declare."""
    num_bytes = 0

    async def limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > most:
            raise HTTPException(413)  # the framework passes HTTPException on
        return message

    return limited


def _declared_length(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


def _outcome(status: int) -> str:
    if status < 400:
        return "ok" if status else "cancelled"
    return "client_error" if status < 500 else "server_error"

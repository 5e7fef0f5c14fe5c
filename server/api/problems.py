"""Every error becomes OpenAI's error object, whoever raised it."""

import http
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from server.api.encodings import UNDECODABLE
from server.errors import (
    InvalidRequest,
    LatentdError,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    ShuttingDown,
)
from server.metrics import Metrics
from server.records import RequestRecord

OUTCOME = "latentd.outcome"
"""Where a request's scope has its outcome, if its status does not show it."""

RECORD = "latentd.record"
"""Where a request's scope has its record."""

LONGEST_ECHO = 200
_ECHO = reprlib.Repr()
_ECHO.maxstring = _ECHO.maxlong = _ECHO.maxother = LONGEST_ECHO
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def install(app: FastAPI, metrics: Metrics) -> None:
    """Make the app answer all errors in one shape."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, LatentdError):
            raise error
        request.scope[OUTCOME] = error.outcome
        if isinstance(error, Overloaded | QuotaExceeded | RateLimited | ShuttingDown):
            reason = error.code or "unknown"
            metrics.admission_rejections_total.labels(reason=reason).inc()
        return respond(request.scope, error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RequestValidationError):
            raise error
        return respond(request.scope, _describe(request, error.errors()))

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            raise error
        return respond(request.scope, _from_http(request, error))

    app.add_exception_handler(LatentdError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request; outside of the server's middleware a new one."""
    record: RequestRecord = scope.setdefault(RECORD, RequestRecord())
    return record


def respond(scope: Scope, error: LatentdError) -> JSONResponse:
    """The answer that tells an error, which is noted in the request's record."""
    record_of(scope).error = error.code
    return render(error)


def render(error: LatentdError) -> JSONResponse:
    """The answer that tells an error."""
    return JSONResponse(error.body(), error.status, error.headers)


def body_too_large() -> InvalidRequest:
    """The body exceeds `max_body_bytes`."""
    return InvalidRequest(
        "the body is larger than this server accepts", code="body_too_large", status=413
    )


def describe(found: Sequence[Mapping[str, Any]], path: Sequence[int | str]) -> InvalidRequest:
    """The first of a validation's errors, with the path of its field and what was given, cut to a
    few words."""
    problem = found[0]
    param, kind = _field([str(part) for part in path]), problem["type"]
    if kind == "missing":
        named = f"{param} is required" if param else "a body is required"
        return InvalidRequest(named, param, "missing_required_parameter")
    if not path:
        return InvalidRequest("the body must be a JSON object", code="invalid_body")
    if kind == "extra_forbidden":
        return InvalidRequest(f"{param}: there is no such parameter", param, "unknown_parameter")
    if kind == "unsupported":
        return InvalidRequest(f"{param}: {problem['msg']}", param, "unsupported_parameter")
    given = shortened(_ECHO.repr(problem.get("input")))
    return InvalidRequest(f"{param}: {problem['msg']}, not {given}", param, "invalid_value")


def shortened(text: str) -> str:
    """So much of what a client sent as an answer may have."""
    return text if len(text) <= LONGEST_ECHO else text[:LONGEST_ECHO] + "…"


def _describe(request: Request, found: Sequence[Any]) -> InvalidRequest:
    """What the framework finds wrong with a request: a parameter, or a body that is not JSON."""
    path = found[0]["loc"][1:]
    if path or found[0]["type"] == "missing":
        return describe(found, path)
    given = request.headers.get("content-type")
    if given is not None and "json" in given:
        return describe(found, path)
    said = "without a Content-Type" if given is None else f"of type {shortened(given)}"
    return InvalidRequest(
        f"the body is {said}; it must be application/json",
        code="unsupported_media_type",
        status=415,
    )


def _field(path: Sequence[str]) -> str | None:
    """`a.b[0]` for the parts of a path.

    Parts in parentheses are not of the path: they say which of several forms a field has.
    """
    shown = ""
    for part in path:
        if part.isdigit():
            shown += f"[{part}]"
        elif not part.startswith("("):
            shown += f".{part}" if shown else part
    return shown[:LONGEST_ECHO] or None


def _from_http(request: Request, error: HTTPException) -> LatentdError:
    """The framework's own errors."""
    method, path = request.method, request.url.path[:LONGEST_ECHO]
    match error.status_code:
        case 404:
            message, code = f"there is no {method} {path}", "not_found"
        case 405:
            message, code = f"{path} cannot be asked to {method}", "method_not_allowed"
        case 408:
            message, code = "the body did not arrive in time", "request_timeout"
        case 413:
            return body_too_large()
        case 415:
            given = request.headers.get("content-encoding", "")[:LONGEST_ECHO]
            message = f"a body with Content-Encoding {given} cannot be decoded here"
            code = "unsupported_content_encoding"
        case 400 if error.detail == UNDECODABLE:
            message, code = UNDECODABLE, "invalid_body"
        case 400:
            message, code = "the body cannot be read as JSON", "invalid_body"
        case _:
            message = error.detail or http.HTTPStatus(error.status_code).phrase
            code = "http_error"
    problem = InvalidRequest(message, None, code, error.status_code)
    problem.headers.update(error.headers or {})
    if error.status_code == 405:
        problem.headers["Allow"] = ", ".join(_methods(request))
    return problem


def _methods(request: Request) -> list[str]:
    """What the path can be asked to, by all of its routes: the framework tells the first one's.

    A path that is documented as it stands has the methods that it is documented with: routes that
    would take it for the id of something do not count.
    """
    documented = request.app.openapi()["paths"].get(request.scope["path"])
    if documented is None:
        known = [method for method in METHODS if _is_routed(request, method)]
    else:
        known = [method for method in METHODS if method.lower() in documented]
    return ["HEAD", *known] if "GET" in known else known


def _is_routed(request: Request, method: str) -> bool:
    scope = {**request.scope, "method": method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

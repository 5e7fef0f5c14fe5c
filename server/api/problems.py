"""Renders every error as OpenAI's error object."""

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
"""Key of the outcome in a request's scope, if the status does not imply it."""

RECORD = "latentd.record"
"""Key of the record in a request's scope."""

MAX_ECHO_CHARACTERS = 200
_ECHO = reprlib.Repr()
_ECHO.maxstring = _ECHO.maxlong = _ECHO.maxother = MAX_ECHO_CHARACTERS
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def install(app: FastAPI, metrics: Metrics) -> None:
    """Register the app's exception handlers."""

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
    """The record of a request; a new one outside the server's middleware."""
    record: RequestRecord = scope.setdefault(RECORD, RequestRecord())
    return record


def respond(scope: Scope, error: LatentdError) -> JSONResponse:
    """The response for an error, which is noted in the request's record."""
    record_of(scope).error = error.code
    return render(error)


def render(error: LatentdError) -> JSONResponse:
    """The response for an error."""
    return JSONResponse(error.body(), error.status, error.headers)


def body_too_large() -> InvalidRequest:
    """The body exceeds `max_body_bytes`."""
    return InvalidRequest(
        "the body is larger than this server accepts", code="body_too_large", status=413
    )


def describe_errors(
    found: Sequence[Mapping[str, Any]], path: Sequence[int | str]
) -> InvalidRequest:
    """The first validation error, with the path of its field and the value, shortened."""
    problem = found[0]
    param, kind = _field([str(part) for part in path]), problem["type"]
    if kind == "missing":
        named = f"{param} is required" if param else "a body is required"
        return InvalidRequest(named, param, "missing_required_parameter")
    if not path:
        return InvalidRequest("the body must be a JSON object", code="invalid_body")
    if kind == "extra_forbidden":
        return InvalidRequest(f"{param}: unknown parameter", param, "unknown_parameter")
    if kind == "unsupported":
        return InvalidRequest(f"{param}: {problem['msg']}", param, "unsupported_parameter")
    given = shortened(_ECHO.repr(problem.get("input")))
    return InvalidRequest(f"{param}: {problem['msg']}, not {given}", param, "invalid_value")


def shortened(text: str) -> str:
    """Shorten client input for an error message."""
    return text if len(text) <= MAX_ECHO_CHARACTERS else text[:MAX_ECHO_CHARACTERS] + "…"


def _describe(request: Request, found: Sequence[Any]) -> InvalidRequest:
    """The framework's validation error: of a parameter, or of a body that is not JSON."""
    path = found[0]["loc"][1:]
    if path or found[0]["type"] == "missing":
        return describe_errors(found, path)
    given = request.headers.get("content-type")
    if given is not None and "json" in given:
        return describe_errors(found, path)
    content_type = "without a Content-Type" if given is None else f"of type {shortened(given)}"
    return InvalidRequest(
        f"the body is {content_type}; it must be application/json",
        code="unsupported_media_type",
        status=415,
    )


def _field(path: Sequence[str]) -> str | None:
    """`a.b[0]` for the parts of a path.

    Parts in parentheses are tags of union members, not part of the path.
    """
    shown = ""
    for part in path:
        if part.isdigit():
            shown += f"[{part}]"
        elif not part.startswith("("):
            shown += f".{part}" if shown else part
    return shown[:MAX_ECHO_CHARACTERS] or None


def _from_http(request: Request, error: HTTPException) -> LatentdError:
    """Convert the framework's errors."""
    method, path = request.method, request.url.path[:MAX_ECHO_CHARACTERS]
    match error.status_code:
        case 404:
            message, code = f"unknown path: {method} {path}", "not_found"
        case 405:
            message, code = f"{path} does not support {method}", "method_not_allowed"
        case 408:
            message, code = "the body did not arrive in time", "request_timeout"
        case 413:
            return body_too_large()
        case 415:
            given = request.headers.get("content-encoding", "")[:MAX_ECHO_CHARACTERS]
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
    """The methods of a path, over all its routes: the framework reports only the first one's.

    A path that is itself documented has only its documented methods: routes that would match it as
    an id do not count.
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

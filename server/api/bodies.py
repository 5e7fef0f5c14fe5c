"""JSON bodies: bounded, parsed and validated; large ones off the event loop.

The shape of a large body is checked before it is parsed. Hundreds of thousands of objects are never
a valid request, and creating, rejecting and freeing them would hold the GIL.
"""

import json
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.api import problems
from server.api.service import get_service
from server.api.texts import SHORT
from server.errors import InvalidRequest

MAX_NAMES = MAX_CONTAINERS = 16_384
"""Limits per body: members of objects, and objects plus lists. A chat of 5,000 messages has
fewer."""

MAX_STRINGS = MAX_DEEP_VALUES = 65_536
"""Limits per body: strings including names, and values nested deeper than token ids in a list of
prompts. A schema of the maximum grammar size has fewer."""

TOKEN_IDS = 3
"""Deepest nesting of token ids: body, list of prompts, prompt."""


class JSONRoute(APIRoute):
    """A route whose endpoint receives an already validated body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        adapter = TypeAdapter[Any](self.body_field.field_info.annotation or Any)

        async def read(request: Request) -> Response:
            service = await get_service(request)
            try:
                content = await request.body()
            except ClientDisconnect as error:
                raise HTTPException(400) from error
            if not _is_json(request.headers.get("content-type", "")):
                return await handle(request)
            read = ReadRequest(request.scope, request.receive)
            read.content = content
            if content:
                most = service.settings.max_waiting_tokens
                read.value = await service.texts.run(len(content), parse, content, adapter, most)
            return await handle(read)

        return read


class ReadRequest(Request):
    """A request with a parsed body."""

    content = b""
    value: Any = None

    async def body(self) -> bytes:
        return self.content

    async def json(self) -> Any:
        return self.value


def parse(content: bytes, adapter: TypeAdapter[Any], max_values: int) -> Any:
    """Parse and validate a body. Raises InvalidRequest naming the first error."""
    if (encoding := json.detect_encoding(content)) not in ("utf-8", "utf-8-sig"):
        content = content.decode(encoding, "replace").encode()
    if len(content) > SHORT:
        check_shape(content, max_values)
    try:
        return adapter.validate_python(_loads(content))
    except ValidationError as error:
        found = error.errors(include_url=False)
    raise problems.describe_errors(found, found[0]["loc"])


def _is_json(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type
    kind = message.get_content_subtype()
    is_json = kind == "json" or kind.endswith("+json")
    return message.get_content_maintype() == "application" and is_json


def _loads(content: bytes) -> Any:
    """Parse JSON. Raises InvalidRequest."""
    try:
        return from_json(content, cache_strings="keys")  # by default, 16,384 texts are kept
    except ValueError:  # the standard library accepts more, and its messages name the position
        pass
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the body cannot be read as JSON", code="invalid_body") from error


def check_shape(content: bytes, max_values: int) -> None:
    """Raises InvalidRequest for too many values, names or objects.

    The content may be invalid JSON: only punctuation outside strings is counted.
    """
    marks = _Marks(content)
    bounds = (
        (marks.is_name, MAX_NAMES, "names"),
        (marks.is_container, MAX_CONTAINERS, "objects and lists"),
        (marks.ends_string, MAX_STRINGS, "strings"),
        (marks.is_value & (marks.depths > TOKEN_IDS), MAX_DEEP_VALUES, "values in values"),
        (marks.is_value, max_values, "values"),
    )
    for found, most, what in bounds:
        count = int(np.count_nonzero(found))
        if count > most:
            param = marks.member(int(np.flatnonzero(found)[most]))
            where = "" if param is None else f"{param}: "
            raise InvalidRequest(
                f"{where}the body has {count} {what}, the maximum is {most}",
                param,
                "invalid_body" if param is None else "invalid_value",
            )


class _Marks:
    """The punctuation `[]{},:` of a JSON text outside its strings. numpy releases the GIL."""

    def __init__(self, content: bytes) -> None:
        # Blank out escaped backslashes and escaped quotes.
        plain = content
        if b"\\" in content:
            plain = content.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        codes = np.frombuffer(plain, np.uint8)
        is_quote = codes == ord('"')
        is_inside = np.bitwise_xor.accumulate(is_quote.view(np.uint8)).view(np.bool_)
        self._content = content
        self._places = np.flatnonzero(_IS_MARK[codes] & ~is_inside)
        self._kinds = codes[self._places]
        quotes_before = np.searchsorted(np.flatnonzero(is_quote), self._places)
        self.ends_string = np.diff(quotes_before, prepend=0) > 0
        self.is_name = self._kinds == ord(":")
        self.is_container = self._is(b"[{")
        self.is_value = self._is(b",[{")
        self.depths = np.cumsum(self.is_container.astype(np.int32) - self._is(b"]}"))

    def member(self, mark: int) -> str | None:
        """Name of the body's top-level member that contains a mark."""
        own = np.flatnonzero(self.is_name[: mark + 1] & (self.depths[: mark + 1] == 1))
        if not len(own):
            return None
        colon = int(own[-1])
        start = int(self._places[colon - 1]) + 1 if colon else 0
        try:
            name = json.loads(self._content[start : int(self._places[colon])])
        except ValueError:
            return None
        if not isinstance(name, str):
            return None
        return problems.shortened(name.encode(errors="replace").decode())

    def _is(self, marks: bytes) -> NDArray[np.bool_]:
        return np.isin(self._kinds, np.frombuffer(marks, np.uint8))


_IS_MARK = np.isin(np.arange(256), np.frombuffer(b"[]{},:", np.uint8))

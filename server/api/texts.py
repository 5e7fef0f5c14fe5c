"""Threads for what clients send and get: bodies, texts and answers that are long.

The store and the engine have threads of their own, so that no client's text holds them up. Owners
get the threads in turn.
"""

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, copy_context
from typing import ParamSpec, TypeVar

from pydantic import BaseModel
from pydantic_core import to_json

from server.threads import FairThreads

SHORT = 2048
"""Bytes, or items of a list, that are handled faster than a thread is asked to do it."""

LONG = 256 * 1024
"""More than these are handled one after the other: tokenising needs about a hundred times the
memory of its text. Also the size of what may be long."""

THREADS = 2
OWNER: ContextVar[str] = ContextVar("owner", default="")
"""Whose request is being answered."""

WRITTEN_TOGETHER = 16_384
P = ParamSpec("P")
R = TypeVar("R")


class Texts:
    """Runs work whose length a client decides. For one event loop."""

    def __init__(self) -> None:
        self._long = FairThreads(1, "long-text")
        self._others = FairThreads(THREADS, "text")

    async def run(self, size: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The work's result; `size` is the number of bytes or items that it goes through.

        The work must not hold the GIL for long: neither in one call of a library nor by freeing
        hundreds of thousands of objects together. Raises what the work raises.
        """
        if size <= SHORT:
            return work(*args, **kwargs)
        pool = self._long if size > LONG else self._others
        context = copy_context()  # validation asks what to do with unknown parameters
        return await pool.run(OWNER.get(), lambda: context.run(work, *args, **kwargs))

    def close(self) -> None:
        """Wait for what runs; what has not begun is dropped."""
        for pool in (self._long, self._others):
            pool.close()


def dump_json(model: BaseModel) -> bytes:
    """The fields of a model that are set, as JSON; in parts where a list in it is long."""
    if not _is_long(model):
        return model.model_dump_json(exclude_unset=True).encode()
    return b"".join(_parts(model))


def _is_long(value: object) -> bool:
    if isinstance(value, BaseModel):
        return any(map(_is_long, vars(value).values()))
    if not isinstance(value, list) or not value:
        return False
    return len(value) > SHORT or (isinstance(value[0], BaseModel) and any(map(_is_long, value)))


def _parts(value: object) -> Iterator[bytes]:
    """Of a value's JSON."""
    if isinstance(value, BaseModel) and _is_long(value):
        separator = b"{"
        for name in (name for name in type(value).model_fields if name in value.model_fields_set):
            yield b'%s"%s":' % (separator, name.encode())
            yield from _parts(getattr(value, name))
            separator = b","
        yield b"}"
    elif isinstance(value, BaseModel):
        yield value.model_dump_json(exclude_unset=True).encode()
    elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
        separator = b"["
        for item in value:
            yield separator
            yield from _parts(item)
            separator = b","
        yield b"]"
    elif isinstance(value, list):
        yield to_json_list(value)
    else:
        yield to_json(value)


def to_json_list(items: Sequence[object]) -> bytes:
    """The items as JSON, in parts, so that the GIL is free between them."""
    starts = range(0, len(items), WRITTEN_TOGETHER)
    parts = (to_json(items[start : start + WRITTEN_TOGETHER])[1:-1] for start in starts)
    return b"[" + b",".join(parts) + b"]"

"""Thread pools for long bodies, texts and answers.

The store and the engine have their own threads, which no client's text can block. Owners are served
in turn.
"""

from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from typing import ParamSpec, TypeVar

from pydantic import BaseModel
from pydantic_core import to_json

from server.threads import OWNER, FairThreads

SHORT = 2048
"""Below this many bytes or items a thread is not worth it."""

LONG = 256 * 1024
"""Above this many bytes or items work is serialized: tokenizing needs about a hundred times the
memory of its text. Also the size to assume for work of unknown size."""

THREADS = 2
WRITE_BATCH = 16_384
P = ParamSpec("P")
R = TypeVar("R")


class Texts:
    """Runs work whose size clients control. For one event loop."""

    def __init__(self) -> None:
        self._long = FairThreads(1, "long-text")
        self._others = FairThreads(THREADS, "text")

    async def run(self, size: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `work`, in a thread if `size`, its number of bytes or items, is large.

        The work must not hold the GIL for long: neither in one library call nor by freeing hundreds
        of thousands of objects at once. Raises what the work raises.
        """
        if size <= SHORT:
            return work(*args, **kwargs)
        pool = self._long if size > LONG else self._others
        context = copy_context()  # validation reads the policy for unknown parameters
        return await pool.run(OWNER.get(), lambda: context.run(work, *args, **kwargs))

    def close(self) -> None:
        """Wait for running work; drop queued work."""
        for pool in (self._long, self._others):
            pool.close()


def dump_json(model: BaseModel) -> bytes:
    """Serialize the set fields of a model, in parts if it contains a long list."""
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
    """Parts of a value's JSON."""
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
    """Serialize a list in parts, releasing the GIL between them."""
    starts = range(0, len(items), WRITE_BATCH)
    parts = (to_json(items[start : start + WRITE_BATCH])[1:-1] for start in starts)
    return b"[" + b",".join(parts) + b"]"

"""How long tests wait: for a condition, not for a time, so that they pass at any speed."""

import asyncio
import time
from collections.abc import Callable

PATIENCE_S = 60.0
"""What a test waits for comes within this time, or never."""

PROGRAM_S = 10 * PATIENCE_S
"""The same of a whole program, with its imports."""

POLL_S = 0.01


def wait_until(condition: Callable[[], object]) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {PATIENCE_S:g} seconds")
        time.sleep(POLL_S)


async def until(condition: Callable[[], object]) -> None:
    """`wait_until` in an event loop, whose tasks go on."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {PATIENCE_S:g} seconds")
        await asyncio.sleep(POLL_S)

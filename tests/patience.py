"""How long tests wait: for a condition, not for a time, so that they pass at any speed."""

import asyncio
import time
from collections.abc import Callable

PATIENCE_S = 60.0
"""Time limit for what a test waits for; polled conditions are checked as often as fits in this
time, however long the process is suspended meanwhile."""

PROGRAM_S = 10 * PATIENCE_S
"""The same for a whole program, including its imports."""

POLL_S = 0.01
NUM_LOOKS = round(PATIENCE_S / POLL_S)


def wait_until(condition: Callable[[], object]) -> None:
    """Raises TimeoutError."""
    for _ in range(NUM_LOOKS):
        if condition():
            return
        time.sleep(POLL_S)
    raise TimeoutError(f"it did not happen within {PATIENCE_S:g} seconds")


async def until(condition: Callable[[], object]) -> None:
    """`wait_until` in an event loop, whose tasks go on."""
    for _ in range(NUM_LOOKS):
        if condition():
            return
        await asyncio.sleep(POLL_S)
    raise TimeoutError(f"it did not happen within {PATIENCE_S:g} seconds")

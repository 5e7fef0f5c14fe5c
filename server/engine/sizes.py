"""How many states fit where, from a state's size and the free memory.

Settings that are not given are chosen: as for small states while the memory suffices, and at least
enough states for each tier to be useful. Half of the free memory is left for everything else.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from server.settings import Settings

RUNNING, WARM, TURNS = 32, 32, 8
PREFIX_BYTES, HOST_BYTES = 64 << 20, 256 << 20
PREFIX_STATES, HOST_STATES = 16, 32
"""Minimum number of states, however large they are."""

TURN_BYTES, MIN_TURNS = 64 << 20, 2
"""Stored bytes per session, unless that is less than the minimum number of turns."""

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


class SizeError(ValueError):
    """The requested states do not fit in memory; the message has the sizes."""


@dataclass(frozen=True)
class Memory:
    """Free bytes."""

    device: int
    host: int
    is_shared: bool
    """Whether the device's memory is the host's."""


@dataclass(frozen=True)
class Sizes:
    """Number or size of states per tier."""

    max_running: int
    warm_sessions: int
    prefix_cache_bytes: int
    host_cache_bytes: int
    waiting_bytes: int
    """Size limit of the states of waiting requests."""

    keep_turns: int

    def on_device(self, state_bytes: int) -> int:
        """Size of the rows, one of which is never owned, of snapshots for stop strings, and of the
        prefix cache."""
        rows = 1 + 2 * self.max_running + self.warm_sessions
        return rows * state_bytes + self.prefix_cache_bytes

    @property
    def on_host(self) -> int:
        return self.host_cache_bytes + self.waiting_bytes


def choose(settings: Settings, state_bytes: int, memory: Memory) -> Sizes:
    """The given sizes, and defaults for the others. Raises SizeError."""
    turns = max(MIN_TURNS, min(TURNS, TURN_BYTES // state_bytes))
    wanted = Sizes(
        max_running=_or(settings.max_running, RUNNING),
        warm_sessions=_or(settings.warm_sessions, WARM),
        prefix_cache_bytes=_or(
            settings.prefix_cache_bytes, max(PREFIX_BYTES, PREFIX_STATES * state_bytes)
        ),
        host_cache_bytes=_or(settings.host_cache_bytes, max(HOST_BYTES, HOST_STATES * state_bytes)),
        waiting_bytes=settings.max_waiting * state_bytes,
        keep_turns=_or(settings.keep_turns, turns),
    )
    least = replace(
        wanted,
        max_running=_or(settings.max_running, 1),
        warm_sessions=_or(settings.warm_sessions, 0),
        prefix_cache_bytes=_or(settings.prefix_cache_bytes, 0),
        host_cache_bytes=_or(settings.host_cache_bytes, 0),
        waiting_bytes=state_bytes,
    )
    _check(least, state_bytes, memory)
    spare = [memory.device // 2, memory.host // 2]
    chosen = least
    for name in (
        "max_running",
        "warm_sessions",
        "prefix_cache_bytes",
        "host_cache_bytes",
        "waiting_bytes",
    ):
        unit = {"max_running": 2 * state_bytes, "warm_sessions": state_bytes}.get(name, 1)
        at = 1 if name in ("host_cache_bytes", "waiting_bytes") and not memory.is_shared else 0
        used = chosen.on_device(state_bytes) if at == 0 else chosen.on_host
        used += chosen.on_host if memory.is_shared else 0
        first = getattr(least, name)
        more = min(getattr(wanted, name) - first, max(0, spare[at] - used) // unit)
        chosen = replace(chosen, **{name: first + max(0, more)})
    return chosen


def _check(least: Sizes, state_bytes: int, memory: Memory) -> None:
    needed = least.on_device(state_bytes)
    if memory.is_shared:
        needed += least.on_host
    elif least.on_host > memory.host:
        raise SizeError(
            f"the host cache needs {least.on_host:,} bytes, but "
            f"only {memory.host:,} are free: lower --host-cache-bytes"
        )
    if needed > memory.device:
        raise SizeError(
            f"states of {state_bytes:,} bytes need {needed:,} bytes for {least.max_running} "
            f"running and {least.warm_sessions} warm sequences and the caches, but only "
            f"{memory.device:,} bytes are free: lower --max-running, --warm-sessions, "
            "--prefix-cache-bytes or --host-cache-bytes"
        )


def free_memory(device: torch.device) -> Memory:
    """Free memory of device and host, within the limits of the process's control group."""
    host = _free_of_host()
    if device.type != "cuda":
        return Memory(host, host, is_shared=True)
    free, _ = torch.cuda.mem_get_info(device)
    return Memory(free, host, is_shared=False)


def _free_of_host() -> int:
    found = list(_free_of_groups(CGROUPS))
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0, min(found))


def _free_of_groups(files: Sequence[tuple[str, str]]) -> list[int]:
    """Free memory within the limits of control groups."""
    found = []
    for most, used in files:
        try:
            found.append(int(Path(most).read_text("ascii")) - int(Path(used).read_text("ascii")))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return found


def _or(value: int | None, usual: int) -> int:
    return usual if value is None else value

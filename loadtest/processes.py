"""Resources of a latentd server's process, from /proc and its metrics."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import httpx

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Held:
    """Resources of a process."""

    resident_bytes: int
    anonymous_bytes: int
    """Of these, what is not a page of a file: heaps, stacks, tensors."""

    descriptors: int
    threads: int


def held(pid: int) -> Held:
    """Raises RuntimeError if the process no longer exists."""
    process = Path(f"/proc/{pid}")
    try:
        _, resident, files, *_ = map(int, (process / "statm").read_text().split())
        descriptors = len(os.listdir(process / "fd"))
        threads = len(os.listdir(process / "task"))
    except OSError as error:
        raise RuntimeError(f"process {pid} cannot be seen: {error}") from None
    return Held(PAGE * resident, PAGE * (resident - files), descriptors, threads)


Metrics = dict[str, float]
"""Values by name including labels: `latentd_sessions{tier="store"}`."""


def parse_metrics(text: str) -> Metrics:
    """Parses Prometheus' text format."""
    return {name: float(value) for name, value in re.findall(r"^(\w\S*) (\S+)$", text, re.M)}


def read_metrics(client: httpx.Client) -> Metrics:
    return parse_metrics(client.get("/metrics").raise_for_status().text)

"""A latentd server as a process: its start, and its resources from /proc and its metrics."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx

PAGE = os.sysconf("SC_PAGE_SIZE")


class Started(NamedTuple):
    """A server that listens."""

    port: int
    process: subprocess.Popen[str]
    facts: tuple[str, ...]
    """The lines it printed about its device and backend."""


@contextmanager
def started(module: str, *arguments: str, checkout: Path | None = None) -> Iterator[Started]:
    """Run a server on a free port with an empty data folder, in this or another checkout.

    Raises RuntimeError if it does not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, *arguments, "--port", "0", "--data-dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=checkout)
        facts = list[str]()
        try:
            for line in process.stdout or ():
                if line.startswith(("device", "backend")):
                    facts.append(line.strip())
                if found := re.match(r"listening +http://.*:(\d+)", line):
                    yield Started(int(found[1]), process, tuple(facts))
                    break
            else:
                raise RuntimeError("the server did not start")
        finally:
            process.terminate()
            process.wait()


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

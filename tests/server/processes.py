"""`latentd serve` as a process, for what happens when one starts, stops or dies."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.patience import PATIENCE_S


class ServerProcess:
    """A running server; `url` is its address. Its log is next to its data."""

    def __init__(self, checkpoint: Path, data_dir: Path, *flags: str) -> None:
        self._log = data_dir.with_name(f"{data_dir.name}.log")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LATENTD_")}
        arguments = [str(checkpoint), "--data-dir", str(data_dir), "--port", "0"]
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", "serve", *arguments, *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.facts: list[str] = []
        self.url = ""
        for line in self.process.stdout or []:
            self.facts.append(line.rstrip("\n"))
            if line.startswith("listening"):
                self.url = line.split()[1]
                return
        raise RuntimeError(f"the server ended with {self.process.wait()}: {self.facts}")

    def client(self) -> httpx.Client:
        if self.url.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=self.url.removeprefix("unix:"))
            return httpx.Client(
                base_url="http://localhost", timeout=PATIENCE_S, transport=transport
            )
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def lines(self, message: str) -> list[dict[str, Any]]:
        """Log lines with this message."""
        lines = map(json.loads, self._log.read_text().splitlines())
        return [line for line in lines if line["message"] == message]

    def stop(self) -> int:
        """Send SIGTERM. Returns the exit status."""
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        status = self.process.wait(timeout=PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


@contextmanager
def server_process(checkpoint: Path, data_dir: Path, *flags: str) -> Iterator[ServerProcess]:
    """A server that runs until the context ends."""
    server = ServerProcess(checkpoint, data_dir, *flags)
    try:
        yield server
    finally:
        server.kill()

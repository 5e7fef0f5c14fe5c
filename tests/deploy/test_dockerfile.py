"""The Dockerfile's commands, run in a folder of this machine in place of an image.

The build stage's torch comes from the package index that pip knows and not from PyTorch's, which
gives a larger build; everything else is run as it is written. It needs root, as `install -o` does.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.deploy.programs import ROOT, free_port
from tests.patience import PATIENCE_S, PROGRAM_S, wait_until

pytestmark = pytest.mark.external

PYTORCH_INDEX = "--index-url https://download.pytorch.org/whl/cpu"
FOLDERS = ("/opt/latentd", "/src", "/data")
"""Of the image; those that the commands read and write."""


@dataclass
class Image:
    """A folder in which a Dockerfile's instructions are executed."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    commands: dict[str, list[str]] = field(default_factory=dict)
    """CMD, and that of HEALTHCHECK."""

    def inside(self, text: str) -> str:
        """Maps paths of the image to the folder."""
        for folder in FOLDERS:
            text = re.sub(rf"(?<![\w/.]){folder}\b", str(self.root) + folder, text)
        return text.replace("useradd ", f"useradd --prefix {self.root} ")

    def environment(self) -> dict[str, str]:
        """This machine's environment, without the tests' virtual environment, plus the image's."""
        usual = {
            name: value
            for name, value in os.environ.items()
            if name not in ("VIRTUAL_ENV", "PYTHONPATH") and not name.startswith("LATENTD_")
        }
        own = {name: self.inside(value) for name, value in self.variables.items()}
        if "PATH" in own:
            own["PATH"] = own["PATH"].replace("$PATH", f"{self.root}/bin:{usual['PATH']}")
        return usual | own

    def run(self, command: str) -> None:
        done = subprocess.run(
            ["sh", "-euc", self.inside(command)],
            cwd=self.inside(self.workdir),
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PROGRAM_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"

    def follow(self, instruction: str, value: str) -> None:
        """Raises AssertionError for an unknown instruction."""
        match instruction:
            case "FROM":
                self.variables, self.workdir = {}, "/"
            case "ARG":
                name, _, default = value.partition("=")
                self.variables[name] = default
            case "ENV":
                self.variables |= dict(re.findall(r"(\w+)=(\S+)", value))
            case "WORKDIR":
                self.workdir = value
                Path(self.inside(value)).mkdir(parents=True, exist_ok=True)
            case "COPY" if value.startswith("--from=build "):
                source, target = value.split()[1:]  # one folder holds both stages
                assert source == target
            case "COPY":
                *sources, target = value.split()
                for source in sources:
                    place = Path(self.inside(self.workdir), target)
                    if (ROOT / source).is_dir():
                        shutil.copytree(ROOT / source, place)
                    else:
                        shutil.copy(ROOT / source, place)
            case "RUN":
                self.run(value.replace(PYTORCH_INDEX, ""))
            case "HEALTHCHECK":
                self.commands["healthcheck"] = json.loads(value[value.index("CMD ") + 4 :])
            case "CMD":
                self.commands["cmd"] = json.loads(value)
            case _:
                assert instruction in ("USER", "VOLUME", "EXPOSE"), instruction


def instructions() -> list[tuple[str, str]]:
    """Instructions with continuation lines joined and without comments."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", text)
    return [(name, value) for name, value in re.findall(r"^([A-Z]+) (.+)$", joined, re.MULTILINE)]


def test_its_commands_make_a_server_that_is_healthy(tmp_path: Path) -> None:
    assert PYTORCH_INDEX in (ROOT / "Dockerfile").read_text()
    image = Image(tmp_path)
    (tmp_path / "etc").mkdir()  # for useradd
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    for instruction, value in instructions():
        image.follow(instruction, value)
    name, _, user_id, *_ = (tmp_path / "etc" / "passwd").read_text().split(":")
    assert (name, user_id) == ("latentd", "10001")
    assert (tmp_path / "data").stat().st_uid == 10001
    environment = image.environment() | {
        "LATENTD_HOST": "127.0.0.1",
        "LATENTD_PORT": str(free_port()),
        "LATENTD_DEVICE": "cpu",
    }
    command, check = image.commands["cmd"], image.commands["healthcheck"]
    program = shutil.which(command[0], path=environment["PATH"])
    assert program == f"{tmp_path}/opt/latentd/bin/latentd"
    server = subprocess.Popen(
        [program, *command[1:]], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None

    def is_healthy() -> bool:
        return subprocess.run(check, env=environment, stderr=subprocess.DEVNULL).returncode == 0

    try:
        assert any(line.startswith("listening") for line in server.stdout)  # it compiles first
        wait_until(is_healthy)
        assert (tmp_path / "data" / "sessions.sqlite3").exists()
        assert any((tmp_path / "data" / "compiled").iterdir())
    finally:
        server.terminate()
        with server.stdout:
            assert server.wait(PATIENCE_S) == 0

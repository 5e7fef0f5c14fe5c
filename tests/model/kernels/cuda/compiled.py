"""Compiles Triton kernels for a GPU without one.

    python -m tests.model.kernels.cuda.compiled FAMILY

makes the calls of the family's `cuda.launches` here, in which nothing is launched: every kernel is
compiled for a Hopper GPU as its call would have it, with its options and what its arguments are
specialised on. It prints what came of them as JSON: for each call by name a list of `Compiled`. A
program of its own, because in tests without a GPU Triton's interpreter has taken its compiler's
place.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parents[4]
HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Compiled:
    """A kernel as launched by a call."""

    name: str
    ptx: str
    num_warps: int
    shared_bytes: int
    """Of a program."""
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Bytes of spilled registers per thread."""


class NoGpu:
    """A driver that lets kernels be compiled, but not launched."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_all(family: str, cache: Path) -> dict[str, list[Compiled]]:
    """The kernels of each call of a family, compiled in a program of its own."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.model.kernels.cuda.compiled", family]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: [Compiled(**kernel) for kernel in kernels] for name, kernels in found.items()}


def describe(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        name=kernel.metadata.name,
        ptx=kernel.asm["ptx"],
        num_warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
    )


def main() -> None:
    driver.set_active(NoGpu())
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment] # calls go by it
    launch, launched = JITFunction.run, list[Any]()

    def compile_only(self: Any, *args: Any, **options: Any) -> None:
        kernel = launch(self, *args, **options | {"warmup": True})
        if kernel not in launched:
            launched.append(kernel)

    JITFunction.run = compile_only
    found = dict[str, list[Any]]()
    launches = importlib.import_module(f"tests.model.{sys.argv[1]}.cuda.launches").LAUNCHES
    for name, call in launches.items():
        call()
        found[name] = [asdict(describe(kernel)) for kernel in launched]
        launched.clear()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

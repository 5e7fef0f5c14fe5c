"""The GPU benchmark runs without a GPU, so that no GPU time is lost to a typo."""

import subprocess
import sys
from pathlib import Path

import pytest

from model.kernels import cuda

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.skipif(not cuda.is_available(), reason="needs Triton")
def test_it_checks_and_prints_every_part() -> None:
    command = [sys.executable, "-m", "loadtest.gpu", "--tiny", "--no-server"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("kernels against float64", "copy:", "of the copy", "prefill", "to host memory"):
        assert part in done.stdout

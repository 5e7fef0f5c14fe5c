"""The load test measures another server: transformers', with a tiny model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from model import PRETRAINED
from tests.deploy.programs import free_port
from tests.patience import PATIENCE_S, PROGRAM_S, wait_until
from tests.server.live import live_server, tiny_settings

pytestmark = pytest.mark.external

SLO = ("--slo", "ttft=60s", "--slo", "itl=60s")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers with the default model's tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096,
        n_positions=512,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = PreTrainedTokenizerFast(
        tokenizer_file=str(PRETRAINED / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    words.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("logs") / "transformers.log"
    command = [shutil.which("transformers") or "transformers", "serve", str(model)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    with log.open("w") as reported:
        process = subprocess.Popen(
            command, stdout=reported, stderr=reported, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_up)
        yield url
    finally:
        process.terminate()
        process.wait()


def loadtest(*arguments: str) -> str:
    """The command's output."""
    done = subprocess.run(
        [sys.executable, "-m", "loadtest", *arguments],
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_bench_measures_it(url: str, model: Path, tmp_path: Path, endpoint: str) -> None:
    load = ("--concurrency", "2", "--requests", "4", "--prompt", "10", "--output", "8")
    asked = ("--endpoint", endpoint, "--model", str(model), "--out", str(tmp_path))
    loadtest("bench", url, *load, *SLO, *asked)
    summary = json.loads((tmp_path / "result.json").read_text())["summary"]
    assert summary["errors"] == {}
    assert summary["good"] == summary["requests"] == 4
    assert 4 < summary["output_tokens"] <= 4 * 8
    assert summary["prompt_tokens"] >= 4 * 10
    assert 0 < summary["percentiles"]["ttft"]["p50"] <= summary["percentiles"]["e2e"]["p50"]
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_compare_measures_it_next_to_ours(url: str, model: Path, tmp_path: Path) -> None:
    settings = tiny_settings(PRETRAINED, tmp_path / "data", model_name=str(model))
    with live_server(settings) as ours:
        load = ("--rounds", "2", "--requests", "2", "--prompt", "10", "--output", "8")
        loadtest("compare", url, ours.url, *load, "--model", str(model), "--out", str(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())
    [ratios] = result["ratios"]
    assert ratios["output tokens/s"]["low"] <= ratios["output tokens/s"]["high"]
    assert all(not server["errors"] for each in result["rounds"] for server in each)

"""The commands of the README run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model import PRETRAINED
from tests.patience import PROGRAM_S
from tests.server.processes import server_process

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
LOCAL = "http://127.0.0.1:8000"
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with this environment's `latentd` and `python`."""
    for name, arguments in {"latentd": "-m server", "python": ""}.items():
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        script.chmod(0o755)
    return tmp_path


def run(script: str, tools: Path) -> str:
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_two_commands_come_first() -> None:
    assert BLOCKS[0] == "pip install . && latentd serve\n"
    assert BLOCKS[1] == "pip install '.[dev]' && pytest\n"
    assert BLOCKS[1].strip() in (ROOT / ".ci" / "run").read_text()


@pytest.mark.long
def test_the_tour_works_on_the_default_model(tools: Path, tmp_path: Path) -> None:
    tour = [block for block in BLOCKS if "127.0.0.1:8000" in block]
    assert len(tour) == 6
    first, rest = tour[:2], tour[2:]
    with server_process(PRETRAINED, tmp_path / "data") as server:
        reported = run("\n".join([*first, "echo id $session"]).replace(LOCAL, server.url), tools)
        assert "data: [DONE]" in reported
        assert '"object":"text_completion"' in reported
        session = reported.split()[-1]
        server.kill()
    with server_process(PRETRAINED, tmp_path / "data") as server:
        script = "\n".join([f"session={session}", *rest])
        script = script.replace("fox.safetensors", str(tmp_path / "fox.safetensors"))
        reported = run(script.replace(LOCAL, server.url), tools)
    assert '"turn":2' in reported
    assert "ok: a server of this model would import it" in reported
    assert (tmp_path / "fox.safetensors").stat().st_size > 200_000
    assert '"object":"chat.completion"' in reported
    assert "The end." in reported or "To be continued." in reported
    assert "latentd_session_state_bytes" in reported


def test_the_official_client_holds_a_session_as_its_page_says(tools: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "sessions.md").read_text("utf-8")
    assert "(docs/sessions.md#with-the-official-client)" in README
    assert "\n## With the official client\n" in page
    [program] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with server_process(PRETRAINED, tmp_path / "data") as server:
        shown = run(f"python - <<'END'\n{program.replace(LOCAL, server.url)}END\n", tools)
        with server.client() as client:
            [session] = client.get("/v1/sessions").json()["data"]
    assert shown.endswith("\n2 turns\n")
    assert (session["turn"], session["tokens"] > 80) == (2, True)


@pytest.mark.long
def test_generate_and_verify_work(tools: Path) -> None:
    [generate] = [block for block in BLOCKS if block.startswith("latentd generate")]
    assert run(generate, tools).startswith("Once upon a time")
    [verify] = re.findall(r"^latentd verify .*$", README, re.MULTILINE)
    assert "FAILED" not in run(verify, tools)


@pytest.mark.long
def test_keys_and_limits_are_used_as_their_page_says(tools: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "keys.md").read_text("utf-8"), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    file = tmp_path / "keys.json"
    add, show, revoke, erase = (
        line.replace("keys.json", str(file)) for line in lines if line.startswith("latentd keys")
    )
    key = run(add, tools).strip()
    assert run(show, tools).splitlines()[1].split()[-4:] == ["60", "20,000", "-", "-"]
    flags = [
        flag for line in lines if line.startswith("latentd serve") for flag in line.split()[2:]
    ]
    flags[flags.index("keys.json")] = str(file)
    with server_process(PRETRAINED, tmp_path / "data", *flags) as server, server.client() as client:
        asked = {"prompt": "Once upon a time", "max_tokens": 20}
        assert client.post("/v1/completions", json=asked).status_code == 401
        client.headers["Authorization"] = f"Bearer {key}"
        answer = client.post("/v1/completions", json=asked)
        assert answer.headers["x-ratelimit-remaining-requests"] == "59"
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 20_000
        session = client.post("/v1/sessions").json()["id"]
        erase = erase.replace("--data-dir data", f"--data-dir {tmp_path / 'data'}")
        assert "1 session" in run(erase, tools)
        assert client.get(f"/v1/sessions/{session}").status_code == 404
    assert run(revoke, tools).startswith("app key_")

"""The command line: its output, and its errors."""

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.heinsen import checkpoint as heinsen
from model.weights import read_tensors
from server import __version__
from server.__main__ import app
from server.settings import Group, Settings
from tests.patience import PROGRAM_S
from tests.server.cli import commands as in_process

VECTORS = Path(__file__).parents[1] / "vectors"


def latentd(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", "NO_COLOR": "1", **environment},
        check=False,
    )


def refused(*arguments: object, **environment: str) -> str:
    """The one line printed by a command that fails."""
    done = latentd(*arguments, **environment)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("latentd: ")
    return done.stderr


def commands(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Every command by its names, with all names of its options."""
    opts = {opt for each in command.params for opt in (*each.opts, *each.secondary_opts)}
    yield names, {opt for opt in opts if opt.startswith("-")}
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, *names, name)


@pytest.mark.parametrize(("names", "options"), [*commands(typer.main.get_command(app))])
def test_help_on_80_columns_cuts_nothing(names: tuple[str, ...], options: set[str]) -> None:
    shown = in_process.stdout_of(*names, "--help", COLUMNS="80")
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert options <= set(re.findall(r"[\w-]+", shown))


def test_the_version() -> None:
    assert in_process.stdout_of("--version") == f"latentd {__version__}\n"


def test_serve_help_has_every_setting_in_its_group() -> None:
    shown = in_process.stdout_of("serve", "--help", COLUMNS="80")
    panels = {each[1]: each[2] for each in re.finditer(r"╭─ ([\w ]+) ─+╮\n(.*?)╰", shown, re.S)}
    assert list(panels) == ["Arguments", "Options", *Group]
    assert "MODEL" in panels["Arguments"]
    for name, group in {
        "device": Group.MODEL,
        "inter_token_latency_ms": Group.ENGINE,
        "session_ttl_s": Group.SESSIONS,
        "port": Group.HTTP,
        "key_file": Group.KEYS,
        "data_dir": Group.STORAGE,
        "log_level": Group.LOGS,
    }.items():
        assert f"--{name.replace('_', '-')} " in panels[group]
    assert len(re.findall(r"│ --", shown)) == len(Settings.model_fields)  # --help, but no MODEL
    assert "LATENTD_DATA_DIR" in shown
    assert "debug | info | warning | error; default: info" in re.sub(r" *│\n│ *", " ", shown)


@pytest.mark.long
def test_generate_reports_invalid_logits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lnorm.weight"].fill_(1e38)
    weights["lnorm.bias"].fill_(1e38)
    save_file(weights, folder / "model.safetensors")
    done = latentd("generate", "the cat", "--checkpoint", folder)
    assert done.returncode == 2
    assert (
        "no valid probabilities" in done.stderr.splitlines()[-1]
    )  # a first run has compiled before


@pytest.mark.long
def test_generate_writes_the_prompt_and_a_text_that_the_seed_decides(
    tiny_checkpoint: Path,
) -> None:
    arguments = ("generate", "the cat", "--checkpoint", tiny_checkpoint, "--max-tokens", 20)
    first, second = (latentd(*arguments, "--seed", 3) for _ in range(2))
    assert first.returncode == 0
    assert first.stdout.startswith("the cat")
    assert first.stdout == second.stdout
    assert re.search(r"\d+ tokens, the first after \d+ ms, [\d,]+ tokens/s", first.stderr)


@pytest.mark.long
def test_verify_accepts_the_reference_and_rejects_anything_else(tmp_path: Path) -> None:
    source = VECTORS / "small.safetensors"
    passed = latentd("verify", source)
    assert passed.returncode == 0
    assert passed.stdout.count("ok") == 5
    for mode in ("quadratic", "parallel", "chunked", "recurrent", "mixed"):
        assert mode in passed.stdout
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        facts = file.metadata()
    tensors = load_file(source)
    tensors["logits"][0, 50, 3] += 1e-4
    wrong = tmp_path / "wrong.safetensors"
    save_file(tensors, wrong, facts)
    failed = latentd("verify", wrong)
    assert failed.returncode == 1
    assert "FAILED" in failed.stdout
    (tmp_path / "text").write_text("text")
    assert "not a file of reference outputs" in refused("verify", tmp_path / "text")
    assert "missing" in refused("verify", tmp_path / "missing")


@pytest.mark.long
def test_import_checkpoint_makes_a_servable_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = heinsen.read_config(tiny_checkpoint / "config.json")
    weights = read_tensors(tiny_checkpoint / "model.safetensors")
    torch.save(weights, tmp_path / "reference.pt")
    names = ("vocab_sz", "d_emb", "n_layers", "n_heads", "d_key", "d_val")
    shape = [str(x) for n in names for x in (f"--{n.replace('_', '-')}", getattr(config, n))]
    out = tmp_path / "out"
    arguments = [
        *("import-checkpoint", tmp_path / "reference.pt", "--out", out),
        *("--tokenizer", tiny_checkpoint / "tokenizer.json", *shape),
    ]
    tokens = [
        *("--bos-token-id", config.bos_token_id, "--eos-token-id", config.eos_token_ids[0]),
    ]
    done = latentd(*arguments, *tokens)
    assert done.returncode == 0, done.stderr
    ours = checkpoint.load(out, torch.device("cpu"))
    original = checkpoint.load(tiny_checkpoint, torch.device("cpu"))
    assert ours.fingerprint == original.fingerprint
    shutil.rmtree(out)
    assert "vocab_sz" in refused(*arguments, "--bos-token-id", 300)
    arguments[arguments.index("--n-layers") + 1] = "3"
    assert "layers.2" in refused(*arguments)
    assert not out.exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("environment", "flags", "named"),
    [
        ({"LATENTD_PROT": "1"}, [], "LATENTD_PROT"),
        ({"LATENTD_PORT": "70000"}, [], "LATENTD_PORT: '70000'"),
        ({}, ["--port", "70000"], "--port: 70000"),
        ({"LATENTD_DEVICE": "tpu"}, [], "LATENTD_DEVICE: 'tpu'"),
        ({"LATENTD_CHECKPOINT": "/nowhere"}, [], "/nowhere: no such checkpoint folder"),
        ({"LATENTD_CHECKPOINT": "/else"}, ["/nowhere"], "/nowhere: no such checkpoint folder"),
        ({}, ["--host", "256.0.0.1"], "256.0.0.1"),
    ],
)
def test_serve_refuses_wrong_settings(
    tmp_path: Path, environment: dict[str, str], flags: list[str], named: str
) -> None:
    common = ["serve", "--data-dir", tmp_path, "--port", 0]
    if "LATENTD_PORT" in environment or "--port" in flags:
        common = common[:3]
    assert named in refused(*common, *flags, **environment)


@pytest.mark.long
def test_serve_refuses_a_port_in_use(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        common = (tiny_checkpoint, "--data-dir", tmp_path)
        assert f"127.0.0.1:{port}" in refused("serve", "--port", port, *common)


@pytest.mark.long
def test_serve_refuses_a_foreign_store_and_a_damaged_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    common = ("serve", "--port", 0, "--data-dir", tmp_path)
    (tmp_path / "sessions.sqlite3").write_bytes(b"not a database" * 500)
    assert "sessions.sqlite3: damaged" in refused(*common, tiny_checkpoint)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors: not a safetensors file" in refused(*common, copy)


@pytest.mark.long
def test_a_key_file_that_cannot_be_used_is_named_before_the_model_is_loaded(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys.json"
    arguments = ("serve", tmp_path / "none", "--key-file", file)
    assert refused(*arguments) == f"latentd: {file}: No such file or directory\n"
    file.write_text('{"keys": [{}]}')
    assert "keys.0.name: Field required" in refused(*arguments)

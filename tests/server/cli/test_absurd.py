"""Special files and files of absurd sizes end every command at once, with one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model import PRETRAINED
from tests.server.cli.commands import refused

Put = Callable[[Path], None]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def huge(path: Path) -> None:
    """A sparse file of a terabyte."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


STRANGE = (pipe, device, folder, huge)
VECTORS = Path(__file__).parents[2] / "vectors" / "small.safetensors"


@pytest.fixture
def copied(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, path)
    return path


def commands(checkpoint: Path) -> list[list[object]]:
    """Commands that read a checkpoint."""
    data = checkpoint.parent / "data"
    return [
        ["serve", checkpoint, "--port", 0, "--data-dir", data, "--device", "cpu"],
        ["inspect", checkpoint],
        ["inspect", VECTORS, "--checkpoint", checkpoint],
        ["generate", "who", "--checkpoint", checkpoint, "--device", "cpu"],
    ]


@pytest.mark.parametrize("put", STRANGE)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_checkpoint_with_what_is_no_file(copied: Path, name: str, put: Put) -> None:
    (copied / name).unlink()
    put(copied / name)
    for command in commands(copied):
        assert name in refused(*command) or name == "config.json"


@pytest.mark.parametrize("put", STRANGE)
def test_a_template_that_is_no_file(copied: Path, put: Put) -> None:
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    put(copied / "chat_template.jinja")
    for command in commands(copied):
        assert "chat_template.jinja" in refused(*command)


@pytest.mark.parametrize("put", [pipe, device])
def test_a_checkpoint_that_is_no_folder(tmp_path: Path, put: Put) -> None:
    put(tmp_path / "checkpoint")
    for command in commands(tmp_path / "checkpoint"):
        refused(*command)


@pytest.mark.parametrize("put", STRANGE)
def test_a_file_that_is_none(tmp_path: Path, put: Put, tiny_checkpoint: Path) -> None:
    path = tmp_path / "file"
    put(path)
    if put is not folder:  # that may be a checkpoint
        refused("inspect", path, "--checkpoint", tiny_checkpoint)
    refused("verify", path)
    refused("session", "import", path, "--url", "http://127.0.0.1:9")
    data = tmp_path / "data"
    serve = ["serve", tiny_checkpoint, "--port", 0, "--data-dir", data]
    refused(*serve, "--key-file", path)
    refused(*serve, "--tls-certificate", path)
    refused("keys", "list", "--file", path)
    arguments = ["--out", tmp_path / "out", "--tokenizer", PRETRAINED / "tokenizer.json"]
    if put is not huge:
        refused("import-checkpoint", path, *arguments)
    weights = PRETRAINED / "model.safetensors"
    refused("import-checkpoint", weights, "--out", tmp_path / "out", "--tokenizer", path)


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 10**7},
        {"n_layers": 2**63},
        {"vocab_sz": 2**63},
        {"vocab_sz": 2**24, "d_emb": 2**24},
        {"d_emb": 2**62, "d_key": 2**62},
        {"n_heads": 10**30},
        {"eos_token_ids": [2**70]},
        {"bos_token_id": -1},
    ],
    ids=str,
)
def test_a_config_of_absurd_sizes(copied: Path, change: dict[str, Any]) -> None:
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for command in commands(copied):
        refused(*command)


def test_a_tokenizer_with_an_absurd_id(copied: Path) -> None:
    path = copied / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["a token"] = 2**32 - 1
    path.write_text(json.dumps(tokenizer))
    for command in commands(copied):
        assert "tokenizer.json" in refused(*command)


@pytest.mark.parametrize("change", [{"n_layers": 10**7}, {"vocab_sz": 2**63}, {"d_emb": 2**24}])
def test_reference_outputs_of_absurd_sizes(tmp_path: Path, change: dict[str, Any]) -> None:
    content = VECTORS.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    config = json.loads(header["__metadata__"]["config"]) | change
    header["__metadata__"]["config"] = json.dumps(config)
    written = json.dumps(header).encode()
    path = tmp_path / "file"
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + size :])
    assert "not a file of reference outputs" in refused("verify", path)

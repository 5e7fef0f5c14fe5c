"""An exported checkpoint has half the size, and is the same up to the rounding of its matrices."""

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from model.heinsen import checkpoint
from model.training import export
from model.weights import read_tensors
from tests.model.calls import step

CPU = torch.device("cpu")


def run(*arguments: Path | str) -> tuple[int, str]:
    application = typer.Typer()
    application.command()(export.main)
    done = CliRunner().invoke(application, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def test_only_matrices_are_rounded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = run(tiny_checkpoint, out)
    assert code == 0, printed
    exact = read_tensors(tiny_checkpoint / checkpoint.WEIGHTS)
    found = read_tensors(out / checkpoint.WEIGHTS)
    for name, tensor in exact.items():
        assert found[name].dtype == (torch.bfloat16 if tensor.dim() > 1 else torch.float32)
        assert torch.equal(found[name], tensor.to(found[name].dtype))
    one, other = ((folder / checkpoint.WEIGHTS).stat().st_size for folder in (tiny_checkpoint, out))
    assert other < 0.6 * one
    served, whole = checkpoint.load(out, CPU), checkpoint.load(tiny_checkpoint, CPU)
    assert served.network.config == whole.network.config
    assert served.tokenizer.to_json() == whole.tokenizer.to_json()
    logits, expected = (
        step(each.network, torch.tensor([5]), each.network.new_pool(1), [0])
        for each in (served, whole)
    )
    assert 0 < (logits - expected).abs().max() < 0.02 * expected.abs().max()


def test_weights_are_averaged_with_those_of_the_same_shape(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    later, out = tmp_path / "later", tmp_path / "out"
    loaded = checkpoint.load_trainable(tiny_checkpoint, CPU)
    config, words = loaded.network.config, loaded.tokenizer
    exact = loaded.network.state_dict()
    changed = {name: 2 * tensor for name, tensor in exact.items()}
    checkpoint.save(later, config, changed, words, loaded.chat_template)
    code, printed = run(later, out, "--average", tiny_checkpoint, "--share", "0.25")
    assert code == 0, printed
    found = read_tensors(out / checkpoint.WEIGHTS)
    for name, tensor in exact.items():
        assert torch.equal(found[name], (1.75 * tensor).to(found[name].dtype))
    differs = config.model_copy(update={"eos_token_ids": ()})
    checkpoint.save(later, differs, changed, words, loaded.chat_template)
    code, printed = run(later, tmp_path / "none", "--average", tiny_checkpoint)
    assert code == 1
    assert "has not the config" in printed
    assert not (tmp_path / "none").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    code, printed = run(tmp_path / "nothing", tmp_path / "out")
    assert code == 1
    assert "no such checkpoint" in printed


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.TOKENIZER])
def test_nothing_is_written_of_a_checkpoint_that_lacks_a_file(
    name: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_checkpoint.iterdir():
        if file.name != name:
            (broken / file.name).write_bytes(file.read_bytes())
    assert run(broken, tmp_path / "out")[0] == 1
    assert not (tmp_path / "out").exists()

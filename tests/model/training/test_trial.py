"""A trial compares networks of one size, and goes on with the runs that it has no result of."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from model.heinsen.network import LanguageModel
from model.text import byte_level
from model.training import trial
from model.training.trial import VARIANTS, runs, sized

WORDS = byte_level.train(["the cat sat on the mat"], 300, ["<|endoftext|>"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_networks_of_a_trial_have_one_size_and_their_options(variant: str) -> None:
    config = sized(VARIANTS[variant], 2_000_000, WORDS)
    assert LanguageModel(config).num_parameters == pytest.approx(2_000_000, rel=0.03)
    for name, value in VARIANTS[variant].items():
        assert getattr(config, name) == value
    named = [name for name in ("decay", "shift", "gate") if name in variant]
    assert len(config.extensions) == len(named)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"n_layers": 1, "n_heads": 1, "d_key": 4, "d_val": 4, "values": "linear"}
    monkeypatch.setattr(trial, "SHAPE", shape)
    monkeypatch.setattr(trial, "VARIANTS", {"paper": {}, "gate": {"output_gate": True}})


def run(tales: Path, results: Path, **changes: Any) -> str:
    options = {
        **{"results": results, "train": tales, "valid": tales, "num-parameters": 5000},
        **{"tokens": 400, "vocab-sz": 300, "seeds": 2, **changes},
    }
    application = typer.Typer()
    application.command()(trial.main)
    arguments = [x for name, value in options.items() for x in (f"--{name}", str(value))]
    done = CliRunner().invoke(application, arguments)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.usefixtures("small")
def test_every_variant_and_seed_has_a_line_and_none_is_run_again(tmp_path: Path) -> None:
    tales, results = tmp_path / "tales.txt", tmp_path / "trial.jsonl"
    tales.write_text("the cat sat on the mat <|endoftext|> and slept " * 20, "utf-8")
    assert list(runs(results, 2)) == [("paper", 0), ("gate", 0), ("paper", 1), ("gate", 1)]
    run(tales, results)
    lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    assert [(line["variant"], line["seed"]) for line in lines] == [
        ("paper", 0), ("gate", 0), ("paper", 1), ("gate", 1)
    ]  # fmt: skip
    assert len({line["bits_per_byte"]["tales.txt"] for line in lines}) == 4
    assert {line["recipe"]["tokens"] for line in lines} == {400}
    results.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]), "utf-8")
    assert list(runs(results, 2)) == [("gate", 1)]
    run(tales, results)
    again = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    del again[3]["cpu_s"], lines[3]["cpu_s"]
    assert again == lines

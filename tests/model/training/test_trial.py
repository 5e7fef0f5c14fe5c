"""A trial compares networks of one size, and resumes with the runs that have no result."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from model.heinsen.network import LanguageModel
from model.text import byte_level
from model.training import chart, trial
from model.training.trial import VARIANTS, runs, sized

WORDS = byte_level.train(["the cat sat on the mat"], 300, ["<|endoftext|>"])


@pytest.mark.long
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
    variants = {"paper": {}, "gate": {"output_gate": True}, "softmax": {}}
    monkeypatch.setattr(trial, "SHAPE", shape)
    monkeypatch.setattr(trial, "VARIANTS", variants)
    monkeypatch.setattr(trial, "CURVE_STEPS", 2)


@pytest.fixture
def tales(tmp_path: Path) -> Path:
    file = tmp_path / "tales.txt"
    file.write_text("the cat sat on the mat <|endoftext|> and slept " * 20, "utf-8")
    return file


def run(tales: Path, results: Path, **changes: Any) -> tuple[int, str]:
    options = {
        **{"results": results, "train": tales, "valid": tales, "num-parameters": 5000},
        **{"tokens": 400, "vocab-sz": 300, "seeds": 2, **changes},
    }
    application = typer.Typer()
    application.command()(trial.main)
    arguments = [x for name, value in options.items() for x in (f"--{name}", str(value))]
    done = CliRunner().invoke(application, arguments)
    return done.exit_code, done.output


def lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()]


@pytest.mark.usefixtures("small")
def test_every_variant_and_seed_has_a_line_and_none_is_run_again(
    tales: Path, tmp_path: Path
) -> None:
    results = tmp_path / "trial.jsonl"
    planned = [(name, seed) for seed in (0, 1) for name in ("paper", "gate", "softmax")]
    assert list(runs(results, trial.VARIANTS, 2)) == planned
    assert run(tales, results)[0] == 0
    first = lines(results)
    assert [(line["variant"], line["seed"]) for line in first] == planned
    assert len({line["bits_per_byte"]["tales.txt"] for line in first}) == 6
    assert {line["recipe"]["tokens"] for line in first} == {400}
    for points in chart.chart(first).lines.values():
        assert [tokens for tokens, _ in points] == sorted(tokens for tokens, _ in points)
        assert points[-1][1] < points[0][1]
    results.write_text("".join(json.dumps(line) + "\n" for line in first[:5]), "utf-8")
    assert list(runs(results, trial.VARIANTS, 2)) == planned[5:]
    assert run(tales, results)[0] == 0
    again = lines(results)
    del again[5]["cpu_s"], first[5]["cpu_s"]
    assert again == first


@pytest.mark.usefixtures("small")
def test_variants_are_chosen_by_name(tales: Path, tmp_path: Path) -> None:
    results = tmp_path / "trial.jsonl"
    assert run(tales, results, variant="gate", seeds=1)[0] == 0
    assert [line["variant"] for line in lines(results)] == ["gate"]
    code, output = run(tales, results, variant="other")
    assert code == 2
    assert "there is no other" in output

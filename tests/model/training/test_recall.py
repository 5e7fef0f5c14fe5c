"""Recall tasks ask for earlier tokens, and a network trained on one learns it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from model.training import recall
from model.training.corpus import IGNORED
from model.training.recall import (
    DIGITS,
    MARK,
    Run,
    accuracy,
    associative,
    build,
    fit,
    passkey,
    state_bytes,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(("pairs", "gap"), [(1, 0), (5, 3), (32, 0)])
def test_every_key_is_asked_for_once_and_its_value_wanted(pairs: int, gap: int) -> None:
    inputs, targets = associative(generator(), 4, pairs, gap)
    assert inputs.shape == targets.shape == (4, 4 * pairs + gap - 1)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        given = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(given) == pairs
        answers = {row[i]: t for i, t in enumerate(wanted) if t != IGNORED}
        assert answers == given
        assert sum(t != IGNORED for t in wanted) == pairs
    with pytest.raises(ValueError, match="33 pairs: there are 32 keys"):
        associative(generator(), 4, 33, 0)


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 10), (1.0, 20), (None, None)])
def test_a_passkey_stands_at_its_depth_and_wanted_at_the_end(
    depth: float | None, place: int | None
) -> None:
    inputs, targets = passkey(generator(), 6, 20, depth)
    assert inputs.shape == targets.shape == (6, 20 + 2 * (DIGITS + 1) - 1)
    starts = set()
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        start = row.index(MARK)
        starts.add(start)
        key = row[start + 1 : start + 1 + DIGITS]
        assert [t for t in wanted if t != IGNORED] == key
        assert row[-DIGITS:] == [MARK, *key[:-1]]
        assert wanted[-DIGITS:] == key
    assert starts == {place} if place is not None else len(starts) > 1


@pytest.mark.long
@pytest.mark.parametrize("variant", ["paper", "decay + shift + gate", "softmax + shift + gate"])
def test_a_network_learns_to_recall(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "VOCAB", 18)
    run = Run(variant, d_key=16, steps=100, learning_rate=1e-2)
    network = build(run)
    task = partial(associative, batch=16, pairs=1, gap=2)
    held_out = associative(generator(), 64, 1, 2)
    assert accuracy(network, held_out) < 0.5
    assert fit(network, run, task) < 1
    assert accuracy(network, held_out) > 0.9


def test_the_gain_is_that_of_queries_keys_and_values_alone() -> None:
    plain, sharp = (build(Run("shift + gate", gain=gain)).state_dict() for gain in (1.0, 3.0))
    scaled = {name for name in plain if not plain[name].equal(sharp[name])}
    assert scaled == {f"layers.{i}.feedforward1.1.weight" for i in range(2)}
    assert all(torch.equal(3 * plain[name], sharp[name]) for name in scaled)


def test_a_latent_state_has_one_size_and_keys_and_values_grow() -> None:
    latent, softmax = (build(Run(name, d_key=8)) for name in ("paper", "softmax"))
    assert state_bytes(latent, 10) == state_bytes(latent, 1000) == latent.state_spec.num_bytes
    assert state_bytes(softmax, 10) == 10 * 2 * 2 * (8 + 8) * 4
    assert state_bytes(softmax, 1000) == 100 * state_bytes(softmax, 10)


def run_command(*arguments: Any) -> tuple[int, str]:
    application = typer.Typer()
    application.command()(recall.main)
    done = CliRunner().invoke(application, [str(x) for x in arguments])
    return done.exit_code, done.output


def test_the_command_writes_a_line_for_each_network(tmp_path: Path) -> None:
    results = tmp_path / "recall.jsonl"
    few = ("--results", results, "--steps", 2, "--d-key", 4, "--variant", "paper")
    asked = ("--pairs", 2, "--pairs", 3, "--gap", 5)
    assert run_command("associative", *few, *asked)[0] == 0
    lengths = ("--trained-length", 8, "--length", 4, "--length", 9, "--depth", 0.5)
    assert run_command("passkey", *few, *lengths)[0] == 0
    lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    assert [line["task"] for line in lines] == ["associative", "passkey"]
    assert [(x["pairs"], x["gap"]) for x in lines[0]["found"]] == [(2, 5), (3, 5)]
    assert [(x["length"], x["depth"]) for x in lines[1]["found"]] == [(4, 0.5), (9, 0.5)]
    code, output = run_command("passkey", "--results", results, "--variant", "none")
    assert code == 2
    assert "there is no none" in output

"""Answers are judged mechanically, and each seed reproduces its answer."""

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from model.heinsen import checkpoint
from model.heinsen.network import LanguageModel
from model.network import Loaded
from model.training import answers
from model.training.answers import SUBJECTS, StoryAnswer, answer, repeats, report

TOKENS = tuple(range(40))


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Loaded[LanguageModel]:
    return checkpoint.load(tiny_checkpoint, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        (StoryAnswer("A king?", "king", TOKENS, "The King sat.", True), ()),
        (StoryAnswer("Frogs?", "frog", TOKENS, "Two frogs, and no more.", True), ()),
        (StoryAnswer("A hat?", "hat", TOKENS, "That, chat.", True), ("does not name the hat",)),
        (StoryAnswer("A king?", "king", TOKENS, "king", False), ("does not end",)),
        (StoryAnswer("A king?", "king", TOKENS + TOKENS, "king", True), ("repeats itself",)),
    ],
)
def test_the_faults_of_a_bad_answer_are_named(given: StoryAnswer, faults: tuple[str, ...]) -> None:
    assert given.faults == faults


def test_twenty_tokens_that_come_twice_are_a_loop() -> None:
    assert repeats((*TOKENS[:20], 99, *TOKENS[:20]))
    assert not repeats((*TOKENS[:19], 99, *TOKENS[:19]))
    assert repeats((7,) * 21)
    assert not repeats((7,) * 20)


def test_an_answer_depends_on_its_seed_alone(loaded: Loaded[LanguageModel]) -> None:
    def ask(seed: int, max_tokens: int = 12) -> StoryAnswer:
        return answer(
            loaded.network, loaded.tokenizer, "A cat?", "cat",
            seed=seed, temperature=1.0, max_tokens=max_tokens,
        )  # fmt: skip

    found = [ask(seed) for seed in (1, 2, 3)]
    assert found == [ask(seed) for seed in (1, 2, 3)]
    assert len({each.token_ids for each in found}) > 1
    for each in found:
        assert each.text == loaded.tokenizer.decode(each.token_ids).strip()
        assert each.ended is (len(each.token_ids) < 12)
        assert not set(each.token_ids) & set(loaded.network.config.eos_token_ids)


def test_the_report_counts_and_shows_all() -> None:
    good = StoryAnswer("A king?", "king", TOKENS, "A king.\n\nThe end.", True)
    bad = StoryAnswer("A dog?", "dog", TOKENS, "A cat.", False)
    text = report([good, bad])
    assert text.startswith("1 of 2 answer their request")
    assert "**1. A king?** (an answer)\n\n> A king.\n>\n> The end." in text
    assert "**2. A dog?** (does not name the dog; does not end)" in text


def test_the_command_asks_for_every_subject(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "stories.md"
    application = typer.Typer()
    application.command()(answers.main)
    arguments = [str(tiny_checkpoint), "--out", str(out), "--max-tokens", "3"]
    done = CliRunner().invoke(application, arguments)
    assert done.exit_code == 0, done.output
    assert f" of {len(SUBJECTS)} answer their request" in done.output
    text = out.read_text("utf-8")
    assert all(subject in text for subject in SUBJECTS)
    assert CliRunner().invoke(application, ["/nowhere", "--out", str(out)]).exit_code == 1

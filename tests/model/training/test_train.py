"""Training learns, carries its states from chunk to chunk, and resumes exactly."""

import copy
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from model.checkpoint import fingerprint
from model.heinsen import checkpoint
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.text import byte_level
from model.training import chart, requests, train
from model.training.evaluate import bits_per_byte
from model.training.train import Recipe, Schedule, Trainer, encode_documents, joined
from model.weights import read_tensors

CPU = torch.device("cpu")
CONFIG = ModelConfig(vocab_sz=50, d_emb=16, n_layers=2, n_heads=2, d_key=4, d_val=4)
RECIPE = Recipe(
    train=("tales.txt",),
    tokens=5000,
    lanes=2,
    chunk_tokens=16,
    document_tokens=200,
    learning_rate=1e-2,
    weight_decay=0.1,
    seed=0,
)
WORDS = byte_level.train(["the cat sat on the mat"], 280, ["<|endoftext|>"])


def network(seed: int = 0, **changes: Any) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(CONFIG.model_copy(update=changes))


def documents(*lengths: int) -> list[Tensor]:
    """Random, hence distinct, documents."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(CONFIG.vocab_sz, (length,), generator=generator) for length in lengths]


def recipe(**changes: Any) -> Recipe:
    return dataclasses.replace(RECIPE, **changes)


def total_losses(trainer: Trainer, num_steps: int) -> list[float]:
    """Loss of each step, in nats over all its tokens."""
    found = []
    for _ in range(num_steps):
        before = trainer.tokens
        loss = trainer.step()
        found.append(loss * (trainer.tokens - before))
    return found


@pytest.mark.long
@pytest.mark.parametrize("values", ["log", "linear"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_loss_falls(values: str, bf16: bool) -> None:
    counting = [torch.arange(place, place + 60) % 10 for place in range(7)]
    trainer = Trainer(network(values=values), counting, RECIPE, bf16=bf16)
    losses = [trainer.step() for _ in range(60)]
    assert losses[0] > 0.8 * math.log(CONFIG.vocab_sz)
    assert max(losses[-5:]) < 0.5


def test_matrix_products_in_bfloat16_are_close_but_not_the_same() -> None:
    exact, rough = (
        Trainer(network(), documents(60, 60), RECIPE, bf16=bf16).step() for bf16 in (False, True)
    )
    assert rough == pytest.approx(exact, rel=1e-2)
    assert rough != exact


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
def test_compiled_code_has_the_same_losses() -> None:
    def losses(compiled: bool) -> list[float]:
        made = network(n_layers=1, decay=True, token_shift=True, output_gate=True)
        trainer = Trainer(made, documents(40, 37), RECIPE, compiled=compiled)
        return [trainer.step() for _ in range(5)]

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)


@pytest.mark.parametrize("num_before", [1, 4, 9])
@pytest.mark.parametrize("values", ["log", "linear"])
def test_a_resumed_training_has_exactly_the_same_losses(num_before: int, values: str) -> None:
    texts = documents(40, 25, 70, 3, 18)
    whole = Trainer(network(values=values), texts, RECIPE)
    expected = [whole.step() for _ in range(14)]
    first = Trainer(network(values=values), texts, RECIPE)
    assert [first.step() for _ in range(num_before)] == expected[:num_before]
    file = io.BytesIO()
    torch.save((first.network.state_dict(), first.state_dict()), file)
    for _ in range(2):
        first.step()
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    second = Trainer(network(5, values=values), texts, RECIPE)
    second.network.load_state_dict(weights)
    second.load_state_dict(saved)
    assert [second.step() for _ in range(14 - num_before)] == expected[num_before:]
    assert second.tokens == whole.tokens
    for name, parameter in whole.network.named_parameters():
        assert torch.equal(second.network.get_parameter(name), parameter)


def test_gradients_that_are_not_finite_change_no_weight() -> None:
    trainer = Trainer(network(), documents(400, 400), RECIPE)
    trainer.step()
    saved = trainer.state_dict()
    saved["latent"]["s"].fill_(math.nan)
    trainer.load_state_dict(saved)
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.step()
    assert trainer.num_skipped == 1
    assert all(torch.equal(before[k], v) for k, v in trainer.network.state_dict().items())
    assert math.isfinite(trainer.step())
    assert trainer.num_skipped == 0
    assert not torch.equal(before["embed.weight"], trainer.network.embed.weight)


def test_a_training_that_finds_no_finite_gradient_ends_by_itself() -> None:
    trainer = Trainer(network(), documents(400, 400), RECIPE)
    with torch.no_grad():
        trainer.network.embed.weight.fill_(math.inf)
    for _ in range(train.MOST_SKIPPED - 1):
        trainer.step()
    with pytest.raises(ArithmeticError, match="not finite; try a lower learning rate"):
        trainer.step()


def test_another_recipe_is_refused_by_its_setting() -> None:
    texts = documents(40, 25)
    saved = Trainer(network(), texts, RECIPE).state_dict()
    changes: dict[str, Any] = {
        "train": ("other.txt",),
        "tokens": 6000,
        "lanes": 3,
        "chunk_tokens": 8,
        "document_tokens": 300,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "seed": 1,
        "start_tokens": 100,
        "train_characters": 1000,
        "joined_tokens": 50,
        "hours": 2.0,
        "final_share": 0.0,
    }
    assert list(changes) == [field.name for field in dataclasses.fields(Recipe)]
    for name, value in changes.items():
        reason = re.escape(f"{name} was {getattr(RECIPE, name)}, now it is {value}")
        with pytest.raises(ValueError, match=f"^{reason}$"):
            Trainer(network(), texts, recipe(**{name: value})).load_state_dict(saved)


@pytest.mark.parametrize("chunk_tokens", [7, 16, 33, 98])
def test_carried_states_give_the_loss_of_one_long_chunk(chunk_tokens: int) -> None:
    """With a learning rate of 0, so that the weights stay as they are."""
    texts, still = documents(100, 100), recipe(learning_rate=0.0)
    (expected,) = total_losses(
        Trainer(network(), texts, dataclasses.replace(still, chunk_tokens=500)), 1
    )
    short = dataclasses.replace(still, chunk_tokens=chunk_tokens)
    found = total_losses(Trainer(network(), texts, short), math.ceil(99 / chunk_tokens))
    assert sum(found) == pytest.approx(expected, rel=1e-6)
    forgetful = 0.0
    for place in range(0, 99, chunk_tokens):
        pieces = [text[place : place + chunk_tokens + 1] for text in texts]
        forgetful += sum(total_losses(Trainer(network(), pieces, short), 1))
    assert abs(forgetful - expected) > 1e-4 * expected


def test_a_document_begins_without_the_state_of_the_last_one() -> None:
    first, second = documents(20, 21)
    still = recipe(learning_rate=0.0, lanes=1)
    alone = [sum(total_losses(Trainer(network(), [text], still), 2)) for text in (first, second)]
    both = total_losses(Trainer(network(), [first, second], still), 4)
    found = sorted([sum(both[:2]), sum(both[2:])])
    assert found == pytest.approx(sorted(alone), rel=1e-6)


def test_only_real_targets_count() -> None:
    texts = documents(17, 5)
    still = recipe(learning_rate=0.0)
    trainer = Trainer(network(), texts, still)
    together = sum(total_losses(trainer, 1))
    assert trainer.tokens == 16 + 4
    alone = [
        sum(total_losses(Trainer(network(), [text], dataclasses.replace(still, lanes=1)), 1))
        for text in texts
    ]
    assert together == pytest.approx(sum(alone), rel=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    schedule = Schedule(peak=2.0, warmup_tokens=100, total_tokens=1100)
    assert schedule.learning_rate(0) == pytest.approx(0.02)
    assert schedule.learning_rate(49) == pytest.approx(1.0)
    assert schedule.learning_rate(100) == pytest.approx(2.0)
    assert schedule.learning_rate(600) == pytest.approx(1.1)
    assert schedule.learning_rate(1100) == schedule.learning_rate(9999) == pytest.approx(0.2)
    falling = [schedule.learning_rate(tokens) for tokens in range(100, 1101, 50)]
    assert falling == sorted(falling, reverse=True)
    assert Schedule(2.0, 0, 10).learning_rate(0) == 2.0


def test_weights_that_have_been_trained_warm_up_to_where_the_schedule_is() -> None:
    whole, later = Schedule(2.0, 100, 1100), Schedule(2.0, 100, 1100, start_tokens=600)
    assert later.learning_rate(600) == pytest.approx(whole.learning_rate(600) / 100)
    assert later.learning_rate(649) == pytest.approx(whole.learning_rate(649) / 2)
    for tokens in (700, 900, 1100):
        assert later.learning_rate(tokens) == whole.learning_rate(tokens)
    trainer = Trainer(network(), documents(40), recipe(start_tokens=4990))
    trainer.step()
    assert trainer.tokens == 4990 + 2 * 16


def test_the_learning_rate_may_fall_to_zero_by_tokens_or_by_time() -> None:
    schedule = Schedule(2.0, 0, 1000, final_share=0.0)
    assert schedule.learning_rate(500) == pytest.approx(1.0)
    assert schedule.learning_rate(500, time_share=0.3) == schedule.learning_rate(500)
    assert schedule.learning_rate(300, time_share=0.5) == schedule.learning_rate(500)
    assert schedule.learning_rate(0, time_share=1.5) == pytest.approx(0.0)


def test_a_training_ends_when_its_time_is_over() -> None:
    trainer = Trainer(network(), documents(40), recipe(hours=1e-6))
    assert trainer.time_share == 0
    trainer.step()
    assert trainer.time_share == trainer.elapsed_s / 3.6e-3 > 1
    assert trainer.is_done
    again = Trainer(network(), documents(40), recipe(hours=1e-6))
    again.load_state_dict(trainer.state_dict())
    assert again.elapsed_s == trainer.elapsed_s
    unread = Trainer(network(), documents(40), recipe(hours=1e-6))
    assert not unread.is_done


def test_what_a_saved_training_does_not_say_is_as_by_default() -> None:
    trainer = Trainer(network(), documents(40), RECIPE)
    saved = trainer.state_dict()
    del saved["elapsed_s"], saved["recipe"]["hours"], saved["recipe"]["final_share"]
    trainer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"^final_share was 0\.1, now it is 0\.0$"):
        Trainer(network(), documents(40), recipe(final_share=0.0)).load_state_dict(saved)


def test_short_documents_are_joined_in_their_order() -> None:
    texts = documents(3, 4, 9, 20, 2, 1)
    found = joined(texts, 7)
    assert [len(document) for document in found] == [7, 9, 20, 3]
    assert torch.equal(torch.cat(found), torch.cat(texts))
    assert all(map(torch.equal, joined(texts, 0), texts))


def test_only_matrices_decay() -> None:
    trainer = Trainer(network(), documents(9), RECIPE)
    decay = {
        id(parameter): group["weight_decay"]
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for parameter in trainer.network.parameters():
        assert decay[id(parameter)] == (0.1 if parameter.dim() == 2 else 0.0)


def test_documents_stand_between_their_marks_and_long_ones_are_cut() -> None:
    ids = WORDS.encode("the cat sat on the mat")
    assert len(ids) > 4
    marked = CONFIG.model_copy(update={"vocab_sz": 280, "bos_token_id": 7, "eos_token_ids": (8, 9)})
    (whole,) = encode_documents(WORDS, ["the cat sat on the mat"], marked, 100)
    assert whole.tolist() == [7, *ids, 8]
    pieces = encode_documents(WORDS, ["the cat sat on the mat", "a"], marked, len(ids) - 1)
    expected = [[7, *ids[:-1]], [7, ids[-1], 8], [7, *WORDS.encode("a"), 8]]
    assert [piece.tolist() for piece in pieces] == expected
    bare = encode_documents(WORDS, ["the cat sat on the mat", "a"], CONFIG, len(ids) - 1)
    assert [piece.tolist() for piece in bare] == [ids[:-1]]


@pytest.fixture
def tales(tmp_path: Path) -> Path:
    file = tmp_path / "tales.txt"
    text = "<|endoftext|>".join(f"the cat sat on {i} mats and slept" for i in range(12))
    file.write_text(text, "utf-8")
    return file


def command(tales: Path, out: Path, **changes: Any) -> list[str]:
    options = {
        **{"out": out, "train": tales, "valid": tales, "tokens": 1500, "lanes": 4},
        **{"chunk_tokens": 12, "vocab_sz": 300, "d_emb": 16, "n_layers": 2, "n_heads": 2},
        **{"d_key": 4, "d_val": 4, "device": "cpu", "learning_rate": 0.02, **changes},
    }
    return [x for name, v in options.items() for x in (f"--{name.replace('_', '-')}", str(v))]


def run(arguments: list[str]) -> tuple[int, str]:
    application = typer.Typer()
    application.command()(train.main)
    done = CliRunner().invoke(application, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_the_command_writes_a_checkpoint_that_has_learned(tales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = run(command(tales, out))
    assert code == 0, printed
    loaded = checkpoint.load(out, CPU)
    assert loaded.network.config.n_layers == 2
    assert loaded.chat_template == train.LINES_TEMPLATE
    assert set(loaded.tokenizer.special_tokens) == set(train.SPECIAL_TOKENS)
    special = loaded.tokenizer.special_tokens
    assert loaded.network.config.bos_token_id == special["<|endoftext|>"]
    assert loaded.network.config.eos_token_ids == (special["<|endoftext|>"], special["<|end|>"])
    texts = tales.read_text("utf-8").split("<|endoftext|>")
    measured = bits_per_byte(loaded.network, loaded.tokenizer, texts)
    untrained = bits_per_byte(LanguageModel(loaded.network.config), loaded.tokenizer, texts)
    assert measured < 0.6 * untrained
    assert f"held-out bits per byte {measured:.4f} tales.txt" in printed


def test_an_interrupted_training_resumes_to_the_same_weights(
    tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(command(tales, whole, tokens=800))[0] == 0
    step, collected = Trainer.step, 0

    def interrupted(trainer: Trainer) -> float:
        nonlocal collected
        collected += 1
        if collected == 6:
            raise KeyboardInterrupt
        return step(trainer)

    again = command(tales, parts, tokens=800, save_every_s=-1)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", interrupted)
        code, _ = run(again)
    assert code != 0
    expected = read_tensors(whole / "model.safetensors")
    unfinished = read_tensors(parts / "model.safetensors")
    assert not torch.equal(unfinished["embed.weight"], expected["embed.weight"])
    code, printed = run(again)
    assert code == 0
    finished = read_tensors(parts / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(finished[name], tensor)
    assert fingerprint(parts) == fingerprint(whole)
    curve = [json.loads(line) for line in (parts / train.CURVE).read_text("utf-8").splitlines()]
    tokens = [point["tokens"] for point in curve]
    assert len(tokens) > 6
    assert tokens == sorted(tokens)
    assert f"{tokens[-1]:,} tokens, held-out bits per byte" in printed
    assert f"{curve[-1]['bits_per_byte']['tales.txt']:.4f} tales.txt" in printed.splitlines()[-1]
    assert list(chart.chart(curve).lines) == ["tales.txt"]


def test_a_training_may_start_from_a_checkpoint(
    tales: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    out = tmp_path / "out"
    code, printed = run(command(tales, out, init=tiny_checkpoint, tokens=1))
    assert code == 0, printed
    ours, theirs = (checkpoint.load(folder, CPU) for folder in (out, tiny_checkpoint))
    assert ours.network.config == theirs.network.config
    assert ours.tokenizer.to_json() == theirs.tokenizer.to_json()
    before, after = theirs.network.embed.weight, ours.network.embed.weight
    assert 0 < (after - before).abs().max() < 0.1


def test_the_command_makes_what_it_is_asked_for(tales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"tokens": 100, "train_characters": 50}
    flags = ["--signed-values", "--decay", "--token-shift", "--output-gate", "--chat"]
    code, printed = run([*command(tales, out, **more), *flags])
    assert code == 0, printed
    (num_tokens,) = re.findall(r"(\d+) tokens of text", printed)
    assert 10 < int(num_tokens) <= 50 + 2 * 2
    loaded = checkpoint.load(out, CPU)
    assert loaded.network.config.extensions == ("decay", "token_shift", "output_gate")
    assert not loaded.network.config.log_values
    assert loaded.chat_template == requests.CHAT_TEMPLATE


def test_the_command_refuses_with_a_reason(tales: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty.txt"
    empty.write_text(" \n")
    malformed = tmp_path / "x.jsonl"
    malformed.write_text("{")
    refused = {
        "missing.txt": command(tmp_path / "missing.txt", out),
        "x.jsonl, line 1": command(malformed, out),
        "there is no document": command(tales, out, train=empty),
        "empty.txt: there is no text": command(tales, out, valid=empty),
        "no such checkpoint": command(tales, out, init=tmp_path / "nothing"),
    }
    for reason, arguments in refused.items():
        code, printed = run(arguments)
        assert code == 2
        assert reason in printed
    assert not out.exists()
    assert run(command(tales, out, tokens=50))[0] == 0
    code, printed = run(command(tales, out, tokens=60))
    assert code == 2
    assert "error: tokens was 50, now it is 60" in printed

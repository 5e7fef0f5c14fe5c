"""Bits by position are those of the whole session, and pieces start from a fresh state."""

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from model.heinsen import checkpoint
from model.heinsen.network import LanguageModel
from model.network import Loaded
from model.training import context
from model.training.context import by_position, in_pieces, sessions, token_bits
from model.training.evaluate import bits_per_byte

TEXT = "and then the cat sat on the mät " * 9


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Loaded[LanguageModel]:
    return checkpoint.load_trainable(tiny_checkpoint, torch.device("cpu"))


@pytest.mark.parametrize("chunk_tokens", [1, 10, 512])
def test_their_sum_is_that_of_the_text(
    loaded: Loaded[LanguageModel], monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    monkeypatch.setattr(context, "CHUNK_TOKENS", chunk_tokens)
    (end,) = loaded.network.config.eos_token_ids
    ids = torch.tensor([[*loaded.tokenizer.encode(TEXT), end]])
    bits = token_bits(loaded.network, ids)
    assert bits.shape == ids.shape
    whole = bits_per_byte(loaded.network, loaded.tokenizer, [TEXT]) * len(TEXT.encode())
    assert float(bits.sum()) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("length", [5, 16, 1000])
def test_each_piece_is_a_separate_session(loaded: Loaded[LanguageModel], length: int) -> None:
    ids = torch.tensor(loaded.tokenizer.encode(TEXT))[:64].view(2, 32)
    found = in_pieces(loaded.network, ids, length)
    for row, session in zip(found, ids, strict=True):
        parts = [token_bits(loaded.network, part[None])[0] for part in torch.split(session, length)]
        torch.testing.assert_close(row, torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_running_text_is_cut_into_sessions(loaded: Loaded[LanguageModel]) -> None:
    words = loaded.tokenizer
    ids = words.encode(f"{TEXT}\n\n{TEXT}")
    assert sessions(words, [TEXT, TEXT], 20).tolist() == [
        ids[i : i + 20] for i in range(0, len(ids) - 19, 20)
    ]
    assert sessions(words, [TEXT, TEXT], 10_000).tolist() == [ids]
    with pytest.raises(ValueError, match="no text"):
        sessions(words, [], 5)


def test_positions_are_in_groups_that_double() -> None:
    bits = torch.arange(1.0, 12).repeat(2, 1)
    found = by_position(bits, torch.full((2, 11), 2))
    assert found == [(1, 0.5), (2, 1.0), (4, 1.75), (8, 3.25), (11, 5.0)]


def test_the_command_writes_a_line_for_each_mode(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, results = tmp_path / "book.txt", tmp_path / "context.jsonl"
    file.write_text(TEXT, "utf-8")
    application = typer.Typer()
    application.command()(context.main)
    arguments = [str(tiny_checkpoint), str(file), "--results", str(results), "--tokens", "60"]
    done = CliRunner().invoke(application, arguments)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    assert [line["piece_tokens"] for line in lines] == [None, 256, 1024, 4096]
    assert len({str(line["by_position"]) for line in lines}) == 1  # no piece is shorter
    assert lines[0]["by_position"][-1][0] == 60
    missing = CliRunner().invoke(application, ["/nowhere", str(file), "--results", str(results)])
    assert missing.exit_code == 1

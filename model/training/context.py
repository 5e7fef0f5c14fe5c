"""Bits per byte by position in long sessions of text, and of the same text in pieces.

    python -m model.training.context CHECKPOINT FILE... --results context.jsonl

One line of results per mode: whole, and in pieces that each start from a fresh state. Where a long
context helps, whole is lower than pieces at the same positions.
"""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from model.files import append_line
from model.heinsen import checkpoint
from model.heinsen.network import LanguageModel
from model.network import CheckpointError
from model.text.tokenizer import Tokenizer
from model.training.corpus import read_documents

CHUNK_TOKENS = 512
PIECES = (256, 1024, 4096)


@torch.inference_mode()
def token_bits(network: LanguageModel, ids: Tensor) -> Tensor:
    """-log2 of each token's probability, from a fresh state.

    ids `[sessions, tokens]` -> the same shape, float32.
    """
    before = F.pad(ids[:, :-1], (1, 0), value=network.config.bos_token_id or 0)
    state, bits = network.empty_state(len(ids)), []
    for inputs, targets in zip(
        torch.split(before, CHUNK_TOKENS, 1), torch.split(ids, CHUNK_TOKENS, 1), strict=True
    ):
        logits, state = network.unroll(inputs.to(network.device), state)
        wanted = targets.to(network.device)
        bits.append(F.cross_entropy(logits.mT, wanted, reduction="none").cpu() / math.log(2))
    return torch.cat(bits, 1)


def in_pieces(network: LanguageModel, ids: Tensor, length: int) -> Tensor:
    """`token_bits` with a fresh state at every multiple of `length` tokens."""
    missing = -ids.shape[1] % length
    pieces = F.pad(ids, (0, missing)).view(len(ids), -1, length)
    rows = [token_bits(network, each) for each in pieces.unbind(0)]
    return torch.stack(rows).flatten(1)[:, : ids.shape[1]]


def sessions(words: Tokenizer, texts: list[str], tokens: int) -> Tensor:
    """The text as sessions of `tokens` tokens `[sessions, tokens]`; one shorter session if it is
    short.

    Raises ValueError if there is no text.
    """
    ids = torch.tensor(words.encode("\n\n".join(texts)))
    if not len(ids):
        raise ValueError("there is no text to measure on")
    tokens = min(tokens, len(ids))
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


def by_position(bits: Tensor, num_bytes: Tensor) -> list[tuple[int, float]]:
    """(last position, bits per byte) of the positions 1, 2, 3 to 4, 5 to 8, ...; both `[_, n]`."""
    found, first, tokens = list[tuple[int, float]](), 0, bits.shape[1]
    while first < tokens:
        end = min(max(1, 2 * first), tokens)
        part = slice(first, end)
        found.append((end, float(bits[:, part].double().sum() / num_bytes[:, part].sum())))
        first = end
    return found


def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint.")],
    files: Annotated[list[Path], typer.Argument(help="Running text, as for training.")],
    results: Annotated[Path, typer.Option(help="Lines of JSON are added to this file.")],
    tokens: Annotated[int, typer.Option(min=1, help="Of a session.")] = 131_072,
) -> None:
    """Print and save bits per byte by position."""
    try:
        loaded = checkpoint.load_trainable(folder, torch.device("cpu"))
        network, words = loaded.network.eval(), loaded.tokenizer
        ids = sessions(words, [text for file in files for text in read_documents(file)], tokens)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    sizes = torch.tensor([len(words.bytes_of(i)) for i in range(words.num_tokens)])[ids]
    for length in (None, *PIECES):
        bits = token_bits(network, ids) if length is None else in_pieces(network, ids, length)
        found = by_position(bits, sizes)
        line = {
            "files": [file.name for file in files],
            "sessions": len(ids),
            "piece_tokens": length,
            "bits_per_byte": round(float(bits.double().sum() / sizes.sum()), 4),
            "by_position": [(end, round(value, 4)) for end, value in found],
        }
        append_line(results, line)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    typer.run(main)

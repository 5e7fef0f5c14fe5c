"""Held-out bits per byte, comparable across tokenizers.

python -m model.training.evaluate CHECKPOINT FILE... [--dtype int8]
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from model import WeightDtype
from model.heinsen import checkpoint
from model.heinsen.network import LanguageModel
from model.network import CheckpointError
from model.text.tokenizer import Tokenizer
from model.training.corpus import read_documents

LANES = 16
CHUNK_TOKENS = 512


@torch.inference_mode()
def bits_per_byte(network: LanguageModel, words: Tokenizer, documents: Iterable[str]) -> float:
    """-log2 of the documents' probability, their ends included, over their UTF-8 bytes.

    Each document starts from a fresh state and is read in full. Raises ValueError if there is no
    text.
    """
    ends = network.config.eos_token_ids[:1]
    start = [network.config.bos_token_id or 0]
    texts = sorted(documents, key=len)
    if not any(texts):
        raise ValueError("there is no text to measure on")
    nats = 0.0
    for first in range(0, len(texts), LANES):
        group = texts[first : first + LANES]
        ids = [torch.tensor([*start, *encoded, *ends]) for encoded in words.encode_batch(group)]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        inputs, targets = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
        state = network.empty_state(len(group))
        chunks = zip(
            torch.split(inputs, CHUNK_TOKENS, 1), torch.split(targets, CHUNK_TOKENS, 1), strict=True
        )
        for chunk, target in chunks:
            logits, state = network.unroll(chunk.to(network.device), state)
            wanted = target.to(network.device).flatten()
            nats += float(F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint.")],
    files: Annotated[list[Path], typer.Argument(help="Texts, as for training.")],
    dtype: Annotated[WeightDtype, typer.Option(help="Weights of matrix products.")] = "float32",
) -> None:
    """Print the bits per byte of each file."""
    try:
        loaded = checkpoint.load(folder, torch.device("cpu"), dtype)
        for file in files:
            value = bits_per_byte(loaded.network, loaded.tokenizer, read_documents(file))
            print(f"{value:.4f} bits per byte  {file.name}")
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)

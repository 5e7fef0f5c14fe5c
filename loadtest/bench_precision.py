"""Cost of narrow arithmetic over a long session: how far predictions drift.

    python -m loadtest precision books.txt

One session of a text per weight dtype: the divergence of its next-token distributions from those of
float32, and of float32's from float64's, in bits per token, averaged over the last 1,024 tokens
before each position. Rounding the weights costs the same everywhere; what grew with the position
would be the state's own drift. float64 is slow and ends earlier.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, get_args

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from loadtest import options
from model import PRETRAINED, WeightDtype
from model.batch import Batch
from model.heinsen import checkpoint
from model.heinsen.network import LanguageModel
from model.training.corpus import read_documents

PIECE = 1024
CPU = torch.device("cpu")


def exact(
    network: LanguageModel, pieces: Sequence[Tensor], at: Collection[int]
) -> Iterator[Tensor]:
    """Logits `[PIECE, vocab_sz]` of the pieces with these numbers, from 1, in float64."""
    state = network.double().empty_state(1)
    for number, piece in enumerate(pieces, 1):
        logits, state = network.unroll(piece.unsqueeze(0), state)
        if number in at:
            yield logits[0]


def served(
    network: LanguageModel, pieces: Sequence[Tensor], at: Collection[int]
) -> Iterator[Tensor]:
    """The same by a network as it is served."""
    pool = network.new_pool(1)
    for number, piece in enumerate(pieces, 1):
        wanted = torch.arange(len(piece) if number in at else 0)
        logits = network.forward(Batch.of([piece], [0]).wanting(wanted), pool)
        if number in at:
            yield logits


def divergence(expected: Tensor, found: Tensor) -> str:
    """Mean Kullback-Leibler divergence of the found distributions, in bits."""
    expected, found = (F.log_softmax(x.double(), -1) for x in (expected, found))
    nats = F.kl_div(found, expected, reduction="batchmean", log_target=True)
    return f"{float(nats) / math.log(2):.1e}"


def main(
    files: Annotated[list[Path], typer.Argument(help="Running text, as for training.")],
    tokens: Annotated[int, typer.Option(min=PIECE, help="Of the session.")] = 1_000_000,
    exact_tokens: Annotated[int, typer.Option(min=PIECE, help="Of float64's.")] = 100_000,
    model: options.Checkpoint = PRETRAINED,
) -> None:
    """Measure and print."""
    loaded = [checkpoint.load(model, CPU, dtype) for dtype in get_args(WeightDtype)]
    reference = checkpoint.load_trainable(model, CPU)
    texts = [text for file in files for text in read_documents(file)]
    ids = torch.tensor(reference.tokenizer.encode("\n\n".join(texts)))[:tokens]
    pieces = list(torch.split(ids, PIECE))[: len(ids) // PIECE]
    if not pieces:
        raise typer.BadParameter(f"{len(ids)} tokens of text, not {PIECE}", param_hint="FILES")
    shown = sorted({1, len(pieces)} | {10**i // PIECE for i in range(4, 12)})
    runs = [served(each.network, pieces, shown) for each in loaded]
    doubled = exact(reference.network, pieces[: exact_tokens // PIECE], shown)
    names = [each.network.arithmetic for each in loaded]
    print(f"{'tokens':>12}" + "".join(f"{name:>22}" for name in names))
    with torch.inference_mode():
        for number, logits, whole in itertools.zip_longest(shown, zip(*runs, strict=True), doubled):
            if logits is None:
                return
            first, *others = logits
            found = ["-" if whole is None else divergence(whole, first)]
            found += [divergence(first, each) for each in others]
            print(f"{number * PIECE:12,}" + "".join(f"{bits:>22}" for bits in found), flush=True)

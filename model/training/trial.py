"""Compare networks of equal size, tokens and optimizer: the paper's, extensions, and softmax.

    python -m model.training.trial --results trial.jsonl --train tales.txt --valid held_out.txt

Each run adds a line to the results; finished runs are skipped, so an interrupted trial resumes with
the run it was in.
"""

import bisect
import dataclasses
import json
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer

from model.files import append_line
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.text import byte_level
from model.text.tokenizer import Tokenizer
from model.training.corpus import read_documents
from model.training.evaluate import bits_per_byte
from model.training.softmax import SoftmaxModel
from model.training.train import SPECIAL_TOKENS, Recipe, Trainer, beginning, encode_documents

VARIANTS: dict[str, dict[str, Any]] = {
    "decay + shift + gate": {"decay": True, "token_shift": True, "output_gate": True},
    "paper": {},
    "gate": {"output_gate": True},
    "shift + gate": {"token_shift": True, "output_gate": True},
    "decay + gate": {"decay": True, "output_gate": True},
    "decay + shift": {"decay": True, "token_shift": True},
    "decay": {"decay": True},
    "shift": {"token_shift": True},
    "paper, log values": {"values": "log"},
    "softmax + shift + gate": {"token_shift": True, "output_gate": True},
    "softmax": {},
}
SOFTMAX = ("softmax + shift + gate", "softmax")
"""Variants with softmax attention."""

SHAPE: dict[str, Any] = {"n_layers": 6, "n_heads": 6, "values": "linear"}
WIDTH_STEP = 4
HELD_OUT_CHARACTERS = 200_000
"""Of each file."""

CURVE_STEPS = 50
"""Per point of the curve: the tokens up to it, and the mean loss of these steps."""


def sized(options: dict[str, Any], num_parameters: int, words: Tokenizer) -> ModelConfig:
    """The config with these options and the width that brings its size closest to
    `num_parameters`."""
    special = words.special_tokens["<|endoftext|>"]
    known = {"vocab_sz": words.num_tokens, "bos_token_id": special, "eos_token_ids": (special,)}

    def config(width: int) -> ModelConfig:
        return ModelConfig(**{**known, **SHAPE, **options, "d_emb": width})

    def size(width: int) -> int:
        with torch.device("meta"):
            return LanguageModel(config(width)).num_parameters

    widths = range(WIDTH_STEP, 4096, WIDTH_STEP)
    above = bisect.bisect_left(widths, num_parameters, key=size)
    nearest = widths[max(0, above - 1) : above + 1]
    return config(min(nearest, key=lambda width: abs(size(width) - num_parameters)))


def runs(results: Path, variants: Collection[str], seeds: int) -> Iterator[tuple[str, int]]:
    """Runs without a line in the results, all variants with the first seed first."""
    lines = results.read_text("utf-8").splitlines() if results.exists() else []
    done = {(line["variant"], line["seed"]) for line in map(json.loads, lines)}
    for seed in range(seeds):
        for variant in variants:
            if (variant, seed) not in done:
                yield variant, seed


def main(
    results: Annotated[Path, typer.Option(help="File of one line of JSON a run.")],
    train: Annotated[list[Path], typer.Option(help="Text to train on (.txt, .jsonl); repeatable.")],
    valid: Annotated[list[Path], typer.Option(help="Text held out; repeatable.")],
    num_parameters: int = 2_000_000,
    tokens: int = 1_228_800,
    vocab_sz: Annotated[int, typer.Option(min=300)] = 2048,
    learning_rate: float = 3e-3,
    seeds: int = 2,
    variant: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {'; '.join(VARIANTS)}. Default: all.")
    ] = None,
    train_characters: Annotated[
        int, typer.Option(help="Of each file, from its start.")
    ] = 6_000_000,
    bf16: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = False,
) -> None:
    """Train every variant with every seed, and save the bits per byte of held-out text."""
    variants = variant or list(VARIANTS)
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise typer.BadParameter(f"there is no {unknown[0]}", param_hint="--variant")
    texts = [text for file in train for text in beginning(read_documents(file), train_characters)]
    held_out = {file: beginning(read_documents(file), HELD_OUT_CHARACTERS) for file in valid}
    words = byte_level.train(texts, vocab_sz, SPECIAL_TOKENS)
    documents = encode_documents(words, texts, sized({}, num_parameters, words), 4096)
    print(f"{sum(map(len, documents)):,} tokens of text", flush=True)
    for name, seed in runs(results, variants, seeds):
        torch.manual_seed(seed)
        kind = SoftmaxModel if name in SOFTMAX else LanguageModel
        network = kind(sized(VARIANTS[name], num_parameters, words))
        recipe = Recipe(
            train=tuple(file.name for file in train),
            tokens=tokens,
            lanes=8,
            chunk_tokens=256,
            document_tokens=4096,
            learning_rate=learning_rate,
            weight_decay=0.1,
            seed=seed,
        )
        trainer = Trainer(network, documents, recipe, bf16=bf16)
        started, losses = time.process_time(), list[float]()
        curve = list[tuple[int, float]]()
        while trainer.tokens < tokens:
            losses.append(trainer.step())
            if len(losses) % CURVE_STEPS == 0:
                loss = round(mean(losses[-CURVE_STEPS:]), 3)
                curve.append((trainer.tokens, loss))
                print(f"{name}, seed {seed}: {trainer.tokens:,} tokens, {loss}", flush=True)
        cpu_s = time.process_time() - started
        network.eval()
        line = {
            "task": "trial",
            "variant": name,
            "seed": seed,
            "bits_per_byte": {
                file.name: round(bits_per_byte(network, words, texts), 4)
                for file, texts in held_out.items()
            },
            "parameters": network.num_parameters,
            "d_emb": network.config.d_emb,
            "losses": curve,
            "cpu_s": round(cpu_s),
            "bf16": bf16,
            "recipe": dataclasses.asdict(recipe),
        }
        append_line(results, line)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    typer.run(main)

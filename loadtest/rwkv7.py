"""Checkpoints of RWKV-7 in the published sizes, to be served by the commands that measure."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from model.rwkv7.config import Config
from model.text.world import vocabulary_file
from tests.model.rwkv7.networks import save_hf, weights

VOCABULARY = "rwkv_vocab_v20230424.txt"
"""The name that converters look for."""

SIZES = {
    "tiny": (2_048, 256, 4, (32, 32, 16, 32)),
    "0.1B": (65_536, 768, 12, (64, 64, 32, 128)),
    "0.1B-50k": (50_304, 768, 12, (64, 64, 32, 128)),
    "1.5B": (65_536, 2048, 24, (96, 96, 64, 256)),
}
"""Tokens, width, layers, and the ranks of decay, rate, value and gate."""


def config_of(size: str) -> Config:
    vocab_size, width, layers, ranks = SIZES[size]
    return Config(vocab_size, width, layers, width // 64, 64, 4 * width, *ranks)


def rwkv7(
    folder: Annotated[Path, typer.Argument(help="Where it is written; must not exist.")],
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "0.1B",
) -> None:
    """Write an RWKV-7 network with random weights in Hugging Face's format.

    float32 below a billion parameters, else bfloat16. 0.1B-50k and tiny have only the first tokens
    of the vocabulary: the former is as large as the paper's network.
    """
    if size not in SIZES:
        raise typer.BadParameter(f"one of {', '.join(SIZES)}", param_hint="--size")
    if folder.exists():
        raise typer.BadParameter(f"{folder} exists", param_hint="FOLDER")
    config = config_of(size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if config.d_emb >= 2048 else torch.float32
    save_hf(
        *(folder, config, weights(config, dtype)),
        architectures=["RWKV7ForCausalLM"],
        intermediate_size=config.d_ffn,
        decay_low_rank_dim=config.decay_rank,
        a_low_rank_dim=config.rate_rank,
        v_low_rank_dim=config.value_rank,
        gate_low_rank_dim=config.gate_rank,
        max_position_embeddings=1 << 20,
        eos_token_id=0,
    )
    lines = vocabulary_file(folder).read_text("utf-8").split("\n")
    kept = [line for line in lines if line and int(line.split(" ", 1)[0]) < config.vocab_size]
    (folder / VOCABULARY).write_text("\n".join(kept) + "\n", "utf-8")
    typer.echo(f"{folder}: {size}, {config.num_layers} layers of {config.d_emb}")

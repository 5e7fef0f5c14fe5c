"""Write a checkpoint with matrices in bfloat16: half the size, for distribution and serving.

    python -m model.training.export runs/tales tales

With `--average`, its weights are averaged with those of a checkpoint that it was trained from (or
that was trained from it), which often predicts better than both.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from model.heinsen import checkpoint
from model.network import CheckpointError


def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    average: Annotated[Path | None, typer.Option(help="Checkpoint of the same shape.")] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of its weights.")] = 0.5,
) -> None:
    """Write a copy of the checkpoint with bfloat16 matrices; vectors stay float32."""
    try:
        loaded = checkpoint.load_trainable(folder, torch.device("cpu"))
        weights = loaded.network.state_dict()
        config, words = loaded.network.config, loaded.tokenizer
        if average is not None:
            other = checkpoint.load_trainable(average, torch.device("cpu"))
            if other.network.config != config or other.tokenizer.to_json() != words.to_json():
                raise CheckpointError(f"{average} has not the config and tokenizer of {folder}")
            others = other.network.state_dict()
            weights = {name: weights[name].lerp(others[name], share) for name in weights}
        weights = {
            name: tensor.to(torch.bfloat16) if tensor.dim() > 1 else tensor
            for name, tensor in weights.items()
        }
        checkpoint.save(out, config, weights, words, loaded.chat_template)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    print(f"{loaded.network.num_parameters:,} parameters, {num_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)

"""Write a checkpoint with matrices in bfloat16: half the size, for distribution and serving.

python -m model.training.export runs/tales tales
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
) -> None:
    """Write a copy of the checkpoint with bfloat16 matrices; vectors stay float32."""
    try:
        loaded = checkpoint.load_trainable(folder, torch.device("cpu"))
        weights = {
            name: tensor.to(torch.bfloat16) if tensor.dim() > 1 else tensor
            for name, tensor in loaded.network.state_dict().items()
        }
        config, words = loaded.network.config, loaded.tokenizer
        checkpoint.save(out, config, weights, words, loaded.chat_template)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    print(f"{loaded.network.num_parameters:,} parameters, {num_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)

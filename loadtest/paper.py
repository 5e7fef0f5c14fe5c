"""Writes a checkpoint of the paper's size, to be served and measured."""

from pathlib import Path
from typing import Annotated

import tokenizers
import torch
import typer

from model import PRETRAINED
from model.heinsen.checkpoint import save
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.text.byte_level import ByteLevelTokenizer


def paper(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write the paper's network (124.9 M parameters) with random weights.

    Its tokenizer is the default model's, extended by texts for the additional tokens.
    """
    torch.manual_seed(seed)
    config = ModelConfig()
    words = tokenizers.Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))
    more = range(words.get_vocab_size(), config.vocab_sz)
    words.add_tokens([f" <{number}>" for number in more])
    network = LanguageModel(config)
    save(folder, config, network.state_dict(), ByteLevelTokenizer(words), None)
    typer.echo(f"{folder}: {network.num_parameters:,} parameters")

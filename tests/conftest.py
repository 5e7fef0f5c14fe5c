"""A tiny checkpoint with random weights, made once; one thread for torch.

Threads that wait for each other at every operation of a small network stand still when anything
else runs on the machine. Without a GPU, Triton's kernels run in its interpreter.
"""

import os
from pathlib import Path

import pytest
import torch

from model import checkpoint, tokenizer
from model.config import ModelConfig
from model.network import LanguageModel

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a network of 2 layers and 300 tokens that has learned nothing."""
    words = tokenizer.train(["the cat sat on the mat and then"], 300, ["<|endoftext|>"])
    end = words.special_tokens["<|endoftext|>"]
    config = ModelConfig(
        vocab_sz=300,
        d_emb=32,
        n_layers=2,
        n_heads=2,
        d_key=8,
        d_val=8,
        bos_token_id=end,
        eos_token_ids=(end,),
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    checkpoint.save(folder, config, LanguageModel(config).state_dict(), words, None)
    return folder

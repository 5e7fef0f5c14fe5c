"""A tiny checkpoint with random weights, created once; one thread for torch.

With several threads, which synchronise at every operation of a small network, tests stall when
anything else runs on the machine. Without a GPU, Triton's kernels run in its interpreter.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from model.heinsen import checkpoint
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.text import byte_level

torch.set_num_threads(1)

# The same examples on every machine, so that a change is not held up by what another one did;
# `pytest --hypothesis-profile random` looks for more.
ANY_SPEED: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("random", **ANY_SPEED)
settings.register_profile("repeatable", derandomize=True, **ANY_SPEED)
settings.load_profile("repeatable")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in folders named cuda are for a GPU; interpreted, they are too slow for the quick
    lane."""
    for item in items:
        if item.path.parent.name == "cuda" or item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.gpu)
            if "TRITON_INTERPRET" in os.environ:
                item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Let Triton's interpreter patch a module once, not at each call of a function in it.

    The patches then remain in place. Most of the time of these tests would otherwise go into them.
    """
    if "TRITON_INTERPRET" not in os.environ or sys.modules.get("triton") is None:
        return
    from triton.runtime import interpreter

    prepared = set[int]()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in prepared:
            prepared.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained network with 2 layers and 300 tokens."""
    words = byte_level.train(["the cat sat on the mat and then"], 300, ["<|endoftext|>"])
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

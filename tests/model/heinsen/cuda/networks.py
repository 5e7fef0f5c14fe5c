"""Networks as served on a GPU."""

import torch

from model import WeightDtype
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel

TINY = ModelConfig(vocab_sz=96, d_emb=16, n_layers=2, n_heads=2, d_key=4, d_val=4)


def plain(config: ModelConfig = TINY) -> LanguageModel:
    """Random weights."""
    torch.manual_seed(0)
    return LanguageModel(config).requires_grad_(False).eval()


def fused(
    network: LanguageModel, device: torch.device, dtype: WeightDtype = "float32"
) -> LanguageModel:
    """The same network in kernels."""
    copy = LanguageModel(network.config).requires_grad_(False).eval()
    copy.load_state_dict(network.state_dict())
    return copy.to(device).fuse(dtype)

"""A checkpoint with a chat template, and its rendering of messages."""

from pathlib import Path

import torch

from model.heinsen import checkpoint
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.text import byte_level

TEMPLATE = """\
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
STRICT = (
    '{%- if messages[-1].content == "no" -%}{{ raise_exception("not this") }}{%- endif -%}'
    + TEMPLATE
)
"""Rejects a conversation that ends with "no"."""

THINKING = (
    """\
{%- set answer_stops = ["<|user|>"] -%}
{%- set thinking_marks = ["<think>", "</think>"] -%}
"""
    + TEMPLATE.removesuffix("{%- endif -%}\n")
    + """\
{%- if enable_thinking is defined -%}
{{ "<think>" if enable_thinking else "<think>\\n</think" }}
{%- endif -%}
{%- endif -%}
"""
)
"""The model may think before it answers."""

SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def make_checkpoint(folder: Path, template: str | None = TEMPLATE) -> Path:
    """An untrained network of 2 layers, with tokens for roles."""
    words = byte_level.train(["the cat sat on the mat and then"], 310, SPECIAL)
    config = ModelConfig(
        vocab_sz=310,
        d_emb=32,
        n_layers=2,
        n_heads=2,
        d_key=8,
        d_val=8,
        bos_token_id=words.special_tokens["<|endoftext|>"],
        eos_token_ids=(words.special_tokens["<|endoftext|>"], words.special_tokens["<|end|>"]),
    )
    torch.manual_seed(0)
    checkpoint.save(folder, config, LanguageModel(config).state_dict(), words, template)
    return folder

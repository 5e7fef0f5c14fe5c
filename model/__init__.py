"""The paper's language model in plain torch, with what it takes to train, store and sample it."""

from pathlib import Path

PRETRAINED = Path(__file__).parent / "pretrained"
"""Folder of the default checkpoint."""

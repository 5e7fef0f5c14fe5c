"""The paper's language model, with what it takes to train, serve, store and sample it."""

import os
from pathlib import Path
from typing import Literal

# A step reads all weights: huge pages spare it page walks. torch looks when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

PRETRAINED = Path(__file__).parent / "pretrained"
"""Folder of the default checkpoint."""

WeightDtype = Literal["float32", "bfloat16", "int8"]
"""What the weights of matrix products are kept in. All that is kept besides is float32."""

"""The paper's language model: training, inference, states and sampling."""

import os
from pathlib import Path
from typing import Literal

# Each step reads all weights; huge pages save page walks. torch reads this at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

PRETRAINED = Path(__file__).parent / "pretrained"
"""Folder of the default checkpoint."""

WeightDtype = Literal["float32", "bfloat16", "int8"]
"""Dtypes for the weights of matrix products. All other weights stay float32."""

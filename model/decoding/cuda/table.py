"""Sampling parameters of each pool row, kept on the device between steps."""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.decoder import MAX_END_TOKENS
from model.decoding.sampling import SamplingParams

_ROW = struct.Struct(f"<3dQq2i{MAX_END_TOKENS}i")
"""The fields of a row, in the order of the attributes."""


class SamplerTable:
    """Sampling parameters and position of each pool row.

    The fields are views of one tensor, so rows are written with one copy: fill a table on the CPU
    with `assign` and copy its memory to the one on the device.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.memory = torch.zeros(num_rows, _ROW.size // 8, dtype=torch.int64, device=device)
        doubles, words = self.memory.view(torch.float64), self.memory.view(torch.int32)
        self.temperature, self.top_p, self.min_p = doubles[:, :3].unbind(1)
        self.seed, self.position = self.memory[:, 3:5].unbind(1)
        self.top_k, self.token = words[:, 10:12].unbind(1)
        """The last sampled token; -1 if the row has none to continue from."""

        self.ends = words[:, 12:]
        """`[num_rows, MAX_END_TOKENS]`, padded with -1."""

        self.token.fill_(-1)
        self.ends.fill_(-1)

    def assign(
        self, row: int, params: SamplingParams, position: int, token: int, ends: Sequence[int]
    ) -> None:
        """Set a row of a table on the CPU; `position` is that of the next token, `token` the one
        before it.

        Raises ValueError for more than `MAX_END_TOKENS` ends, and for penalties or biases.
        """
        if params.changes_logits:
            raise ValueError("the device does not apply penalties and biases")
        if len(ends) > MAX_END_TOKENS:
            raise ValueError(f"at most {MAX_END_TOKENS} end tokens, not {len(ends)}")
        _ROW.pack_into(
            self.memory.numpy().data,
            row * _ROW.size,
            params.temperature,
            params.top_p,
            params.min_p,
            params.seed & (1 << 64) - 1,
            position,
            min(params.top_k, (1 << 31) - 1),
            token,
            *ends,
            *[-1] * (MAX_END_TOKENS - len(ends)),
        )

    def write(self, rows: Tensor, memory: Tensor) -> None:
        """Overwrite `rows` `[n]` with the memory of an n-row table, both on the device."""
        self.memory.index_copy_(0, rows, memory)

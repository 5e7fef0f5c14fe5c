"""What those that run a network know of it, whatever its family."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.state import StatePool, StateSpec

TakeLogits = Callable[[Tensor], None]
"""Takes logits `[tokens, vocab_size]` after the next tokens of a sequence, which it may keep."""


class Recordable(Protocol):
    """A network whose step waits for nothing of the host, as a CUDA graph has it."""

    vocab_size: int

    def decode(
        self, token_ids: Tensor, rows: Tensor, pool: StatePool, logits: Tensor | None = None
    ) -> Tensor:
        """Advance rows by one token each: token_ids, rows `[batch]` int32 on the device -> logits
        `[batch, vocab_size]`, in the tensor that is given if one is. A negative row is none."""

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`Network.logits`."""


class Network(Protocol):
    """A network that serves. Rows of a pool are read and written in place."""

    num_parameters: int
    backend: str
    """What it runs as and why, in words."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def bos(self) -> int | None:
        """The token before a text that starts a fresh state, if any is put there."""

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def state_spec(self) -> StateSpec:
        """What one sequence's state consists of, at any length of the sequence."""

    @property
    def cut(self) -> int:
        """Prompts cut after multiples of so many tokens have the same bits as whole ones."""

    @property
    def recordable(self) -> Recordable | None:
        """On a device that works beside the host: what its steps are recorded from."""

    def new_pool(self, num_rows: int) -> StatePool:
        """States before the first token, on the device."""

    def prefill(
        self,
        token_ids: Tensor,
        lengths: Sequence[int],
        pool: StatePool,
        rows: Sequence[int],
        scored: Mapping[int, TakeLogits] | None = None,
    ) -> None:
        """Advance `rows` by the first `lengths[i]` tokens of each sequence `[batch, tokens]`.

        Those in `scored`, by their place in the batch, get the logits after each of their tokens.
        """

    def step(self, token_ids: Tensor, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Advance `rows` by one token each: token_ids `[batch]` -> logits `[batch, vocab_size]`."""

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Logits `[batch, vocab_size]` that the rows' last steps returned. Nothing is read."""

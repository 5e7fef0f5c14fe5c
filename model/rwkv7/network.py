"""RWKV-7 for inference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model import WeightDtype
from model.batch import Batch
from model.kernels import cuda
from model.kernels.cpu.threads import num_threads
from model.network import Recordable
from model.rwkv7.config import Config
from model.rwkv7.layers import Weights
from model.rwkv7.pieces import read_group
from model.rwkv7.recurrence import CHUNK, Recurrence, chunked
from model.rwkv7.weights import AS_ASKED
from model.state import StatePool, StateSpec

if TYPE_CHECKING:
    from model.rwkv7.cpu.serving import CompiledNetwork
    from model.rwkv7.cuda.serving import FusedNetwork


class RWKV7:
    """The `Network`."""

    def __init__(
        self,
        config: Config,
        weights: Weights,
        dtype: WeightDtype,
        num_parameters: int,
        weight_bytes: int,
        why_plain: str = "",
    ) -> None:
        """`dtype`: of the weights. `why_plain`: why it is not compiled; empty if it is, with
        `PackedLinear` maps."""
        self.config, self.weights = config, weights
        self.num_parameters, self.weight_bytes = num_parameters, weight_bytes
        self._compiled: CompiledNetwork | None = None
        self._fused: FusedNetwork | None = None
        self.recurrence: Recurrence = chunked
        """The recurrence of plain torch."""

        self.backend = f"plain torch ({why_plain})"
        self.arithmetic = f"{dtype} x float32"
        if not why_plain:
            self._compile()
        elif self.device.type == "cuda" and why_plain != AS_ASKED and cuda.is_available():
            self.fuse()

    def _compile(self) -> None:
        from model.kernels.cpu.compilation import target
        from model.rwkv7.cpu.serving import CompiledNetwork

        self._compiled = CompiledNetwork(self.config, self.weights, self.num_threads)
        self.backend = f"compiled for {target()}"
        self.arithmetic = self._compiled.arithmetic.name

    def fuse(self) -> None:
        """Compute in Triton's kernels: on a GPU, or on a CPU in Triton's interpreter."""
        from model.rwkv7.cuda.serving import FusedNetwork

        self._fused = FusedNetwork(self.config, self.weights)
        self.backend = "Triton"

    @property
    def recordable(self) -> Recordable | None:
        """On a device that works beside the host: what its steps are recorded from."""
        return self._fused

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def bos(self) -> int | None:
        return self.config.bos

    @property
    def eos(self) -> tuple[int, ...]:
        return self.config.eos

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device

    @property
    def state_spec(self) -> StateSpec:
        """Tensors of one sequence's state, whatever its length."""
        return self.config.state_spec

    @property
    def cut(self) -> int:
        """Compiled code reads token by token; there this is only a size worth a call."""
        return 8 if self.is_compiled else CHUNK

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def num_threads(self, tokens: int, answers: int) -> int:
        """CPU threads for a step of `tokens` tokens and `answers` rows of logits."""
        head = self.weights.embed.numel()
        return num_threads(tokens * (self.num_parameters - 2 * head) + answers * head, answers)

    def new_pool(self, num_rows: int) -> StatePool:
        """A pool in the initial state, on the device of the weights."""
        return StatePool(self.state_spec, num_rows, self.device)

    @torch.inference_mode()
    def forward(self, batch: Batch, pool: StatePool) -> Tensor:
        """Advance the batch's rows by its tokens: the requested logits `[wanted, vocab_size]`.

        In compiled code a row's bits depend neither on the batch nor on how its tokens were split.
        Raises IndexError for token ids and rows out of range.
        """
        if self._compiled is not None:
            return self._compiled.forward(batch, pool)
        if self._fused is not None:
            return self._fused.forward(batch, pool)
        batch.check(self.vocab_size, pool.num_rows)
        x = torch.empty(len(batch.token_ids), self.config.d_emb, device=pool.device)
        for group in batch.groups():
            read_group(self.weights, batch, group, pool, self.recurrence, x)
        return self._logits(x[torch.from_numpy(batch.logits_at).to(pool.device)])

    @torch.inference_mode()
    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Logits `[batch, vocab_size]` after the last token of each row, without reading a
        token."""
        if self._compiled is not None:
            return self._compiled.logits(pool, rows)
        if self._fused is not None:
            return self._fused.logits(pool, rows)
        return self._logits(pool.tensors["last"][0, torch.tensor(rows, device=pool.device)])

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.weights.head(self.weights.norm(x))
        return logits

"""An RWKV-7 network that serves."""

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
from model.rwkv7.layers import Weights, read
from model.rwkv7.recurrence import CHUNK, Recurrence, chunked
from model.state import StatePool, StateSpec

if TYPE_CHECKING:
    from model.rwkv7.cpu.serving import CompiledNetwork


class RWKV7:
    """The `Network`."""

    recordable: Recordable | None = None

    def __init__(
        self,
        config: Config,
        weights: Weights,
        dtype: WeightDtype,
        num_parameters: int,
        weight_bytes: int,
        why_plain: str = "",
    ) -> None:
        """`dtype`: of the weights. `why_plain`: why it is not compiled; nothing if it is, from
        `PackedLinear` maps."""
        self.config, self.weights = config, weights
        self.num_parameters, self.weight_bytes = num_parameters, weight_bytes
        self._compiled: CompiledNetwork | None = None
        self.recurrence: Recurrence = chunked
        """What plain torch reads with."""

        self.backend = f"plain torch ({why_plain})"
        self.arithmetic = f"{dtype} x float32"
        if not why_plain:
            self._compile()
        elif self.device.type == "cuda" and cuda.is_available():
            from model.rwkv7.cuda.recurrence import fused

            self.recurrence = fused
            self.backend = "plain torch, with a Triton kernel for the recurrence"

    def _compile(self) -> None:
        from model.kernels.cpu.compilation import target
        from model.rwkv7.cpu.serving import CompiledNetwork

        self._compiled = CompiledNetwork(self.config, self.weights, self.num_threads)
        self.backend = f"compiled for {target()}"
        self.arithmetic = self._compiled.arithmetic.name

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
        """What one sequence's state consists of, at any length of the sequence."""
        return self.config.state_spec

    @property
    def cut(self) -> int:
        """Compiled code reads token by token; there this is only a size worth a call."""
        return 8 if self.is_compiled else CHUNK

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def num_threads(self, tokens: int, answers: int) -> int:
        """CPU threads of a step that reads so many tokens and computes so many rows of logits."""
        head = self.weights.embed.numel()
        return num_threads(tokens * (self.num_parameters - 2 * head) + answers * head, answers)

    def new_pool(self, num_rows: int) -> StatePool:
        """States before the first token, on the device of the weights."""
        return StatePool(self.state_spec, num_rows, self.device)

    @torch.inference_mode()
    def forward(self, batch: Batch, pool: StatePool) -> Tensor:
        """Advance the batch's rows by its tokens: the logits that it wants `[wanted, vocab_size]`.

        Compiled, a row's bits depend neither on its company nor on how its tokens were cut.
        Raises IndexError for a token or row that there is not.
        """
        if self._compiled is not None:
            return self._compiled.forward(batch, pool)
        batch.check(self.vocab_size, pool.num_rows)
        device = pool.device
        x = torch.empty(len(batch.token_ids), self.config.d_emb, device=device)
        for group in batch.groups():
            padded = batch.padded(group)
            ids = torch.from_numpy(batch.token_ids[padded]).to(device)
            lengths = torch.from_numpy(batch.lengths[group]).to(device)
            places = torch.from_numpy(padded).to(device)
            rows = torch.tensor([batch.rows[i] for i in group], device=device)
            states = {name: values[:, rows] for name, values in pool.tensors.items()}
            read_x, after = read(self.weights, ids, lengths, states, self.recurrence)
            for name, values in after.items():
                pool.tensors[name][:, rows] = values
            x[places[places >= 0]] = read_x[places >= 0]
        return self._logits(x[torch.from_numpy(batch.logits_at).to(device)])

    @torch.inference_mode()
    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Logits `[batch, vocab_size]` after the last token that each row has read; none is."""
        if self._compiled is not None:
            return self._compiled.logits(pool, rows)
        return self._logits(pool.tensors["last"][0, torch.tensor(rows, device=pool.device)])

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.weights.head(self.weights.norm(x))
        return logits

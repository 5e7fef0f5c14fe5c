"""The paper's language model: embedding, latent positions, residual layers of latent attention.

Parameter names are those of the reference implementation, so its state dicts load unchanged. A
sequence's state is the position state h, one vector; one attention state (m, Z, S, n) per layer;
and the last layer's output for the last token, from which the next token is sampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import WeightDtype
from model.batch import Batch
from model.heinsen.attention import CHUNK, EMPTY, Attention, AttentionState, chunked
from model.heinsen.config import ModelConfig
from model.heinsen.layers import LatentPosition, Layer, NetworkState
from model.kernels import cuda
from model.kernels.cpu.threads import num_threads
from model.kernels.linear import NarrowLinear, PackedLinear, as_served, narrow, reason_not_compiled
from model.network import Recordable
from model.state import StatePool, StateSpec, TensorSpec, contiguous_run

if TYPE_CHECKING:
    from model.heinsen.cpu.serving import CompiledNetwork
    from model.heinsen.cuda.serving import FusedNetwork

Narrow = TypeVar("Narrow", NarrowLinear, PackedLinear)


class LanguageModel(nn.Module):
    """The paper's network (section 4): `unroll` for training, `forward` for inference."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # With its weight given, torch neither initialises it twice nor, on the meta device, imports
        # its compiler, which takes as long as importing torch.
        weight = torch.empty(config.vocab_sz, config.d_emb)
        self.embed = nn.Embedding(config.vocab_sz, config.d_emb, _weight=weight)
        self.embed_pos = LatentPosition(config.d_emb)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.lnorm = nn.LayerNorm(config.d_emb)
        bound = config.d_emb**-0.5
        nn.init.uniform_(self.embed.weight, -bound, bound)
        self.num_parameters = sum(p.numel() for p in self.parameters())
        self._unembed: NarrowLinear | PackedLinear | None = None
        self._compiled: CompiledNetwork | None = None
        self._fused: FusedNetwork | None = None
        self.backend = "plain torch"
        """Backend of `forward` and, once packed, the reason for it."""
        self.arithmetic = "float32 x float32"
        """`Network.arithmetic`"""

    def pack(
        self, dtype: WeightDtype = "float32", device: torch.device | None = None
    ) -> "LanguageModel":
        """Convert the network for inference: weights in this dtype and in packed order.

        Weights may be in any floating dtype and in a mapped file; they are converted one at a time.

        On a CPU it is compiled, on a GPU it runs Triton kernels. Results are the same up to the
        rounding of weights; it has no gradients and cannot be saved afterwards.
        """
        where = device or self.device
        reason = reason_not_compiled(where, self.embed.weight.dtype)
        if not reason:
            self._unembed = unembed = self._narrow(PackedLinear, dtype, device)
            from model.heinsen.cpu.serving import CompiledNetwork
            from model.kernels.cpu.compilation import target

            self._compiled = CompiledNetwork(self, unembed)
            self.backend = f"compiled for {target()}"
            self.arithmetic = unembed.arithmetic.name
            return self
        if where.type == "cuda":
            if cuda.is_available():
                return self.fuse(dtype, device)
            reason = "Triton is not installed"
        self.backend = f"plain torch ({reason})"
        self.arithmetic = f"{dtype} x float32"
        if dtype != "float32":
            self._unembed = self._narrow(NarrowLinear, dtype, device)
        else:
            self._convert(device)
        return self

    def fuse(
        self, dtype: WeightDtype = "float32", device: torch.device | None = None
    ) -> "LanguageModel":
        """`pack` into Triton kernels: for a GPU, or for a CPU in Triton's interpreter."""
        from model.heinsen.cuda.serving import FusedNetwork

        self._unembed = unembed = self._narrow(NarrowLinear, dtype, device)
        self._fused = FusedNetwork(self, unembed)
        self.backend = "Triton kernels"
        self.arithmetic = f"{dtype} x float32"
        return self

    def _narrow(
        self, kind: type[Narrow], dtype: WeightDtype, device: torch.device | None
    ) -> Narrow:
        """Replace all linear maps by this kind; returns the last one, to the logits."""
        _replace_linear(self, lambda child: kind(child.weight, child.bias, dtype, device))
        weight = self.embed.weight
        unembed = kind(weight, None, dtype, device)
        if dtype != "float32":
            narrowed, _ = narrow(weight, "bfloat16", device)
            self.embed.weight = nn.Parameter(narrowed, requires_grad=False)
        self._convert(device, keep=self.embed.weight if dtype != "float32" else None)
        return unembed

    def _convert(self, device: torch.device | None, keep: Tensor | None = None) -> None:
        """Convert the remaining parameters, except `keep`."""
        for parameter in self.parameters():
            if parameter is not keep:
                parameter.data = as_served(parameter.data, device)

    @property
    def is_compiled(self) -> bool:
        """Whether `forward` runs compiled code."""
        return self._compiled is not None

    def num_threads(self, tokens: int, answers: int) -> int:
        """CPU threads for a step of `tokens` tokens and `answers` rows of logits."""
        head = self.embed.weight.numel()
        return num_threads(tokens * (self.num_parameters - head) + answers * head, answers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights read per step."""
        bits = 32 if self._unembed is None else self._unembed.weight.dtype.itemsize * 8
        return self.num_parameters * bits // 8

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_sz

    @property
    def bos(self) -> int | None:
        return self.config.bos_token_id

    @property
    def eos(self) -> tuple[int, ...]:
        return self.config.eos_token_ids

    @property
    def recordable(self) -> Recordable | None:
        return self._fused

    @property
    def cut(self) -> int:
        """Splitting prompts at multiples of this does not change the bits.

        A single last token is the exception: it belongs to the piece before. Compiled code reads
        token by token; there this is only a size worth a call.
        """
        return 8 if self.is_compiled else CHUNK

    @property
    def blocks(self) -> list[Layer]:
        """The residual layers, first to last."""
        return cast("list[Layer]", list(self.layers))

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def state_spec(self) -> StateSpec:
        """Tensors of one sequence's state, whatever its length."""
        c = self.config
        dtype = "float64" if self.embed.weight.dtype == torch.float64 else "float32"
        heads = (c.n_layers, c.n_heads)
        keys, sums = (*heads, c.d_key), (*heads, c.d_key, c.d_val)
        tensors = [
            TensorSpec("h", (1, c.d_emb), "float64", 0.0),
            TensorSpec("last", (1, c.d_emb), dtype, 0.0),
            TensorSpec("m", keys, dtype, EMPTY),
            TensorSpec("z", keys, dtype, 0.0),
            TensorSpec("s", sums, dtype, 0.0),
        ]
        if dtype == "float32":
            tensors += [TensorSpec("z_low", keys, "int8", 0), TensorSpec("s_low", sums, "int8", 0)]
        if c.log_values:
            tensors.append(TensorSpec("n", (*heads, c.d_val), dtype, EMPTY))
        if c.token_shift:
            tensors.append(TensorSpec("previous", (c.n_layers, c.d_emb), dtype, 0.0))
        return StateSpec(tuple(tensors))

    def new_pool(self, num_rows: int) -> StatePool:
        """A pool in the initial state, on the device of the weights."""
        return StatePool(self.state_spec, num_rows, self.device)

    def empty_state(self, batch: int) -> NetworkState:
        """The state before the first token, for `unroll`."""
        return self.read_state(self.new_pool(batch))

    def read_state(self, pool: StatePool) -> NetworkState:
        """All rows of a pool as one batch of views."""
        return NetworkState(pool.tensors["h"][0], AttentionState.of_layers(pool))

    def write_state(self, state: NetworkState, pool: StatePool) -> None:
        """Overwrite all rows of a pool."""
        pool.tensors["h"][0] = state.h
        for rows, values in zip(AttentionState.of_layers(pool), state.layers, strict=True):
            _assign(rows, slice(None), values)

    def unroll(
        self, token_ids: Tensor, state: NetworkState, attention: Attention = chunked
    ) -> tuple[Tensor, NetworkState]:
        """Logits of every token, differentiable in the weights and the state.

        token_ids `[batch, tokens]` -> logits `[batch, tokens, vocab_sz]` and the state at the end,
        without compensation terms.
        """
        emb = self._embed(token_ids)
        all_h, h = self.embed_pos(emb, state.h, None)
        x, layers = emb + all_h.to(emb.dtype), []
        for layer, carried in zip(self.blocks, state.layers, strict=True):
            x, after = layer(x, replace(carried, z_low=None, s_low=None), attention, None)
            layers.append(after)
        return self._logits(x), NetworkState(h, tuple(layers))

    @torch.inference_mode()
    def forward(self, batch: Batch, pool: StatePool) -> Tensor:
        """Advance the batch's rows by its tokens: logits `[wanted, vocab_sz]` at the requested
        positions.

        In compiled code a row's bits depend neither on the batch nor on how its tokens were split.
        Raises IndexError for token ids and rows out of range.
        """
        if self._compiled is not None:
            return self._compiled.forward(batch, pool)
        if self._fused is not None:
            return self._fused.forward(batch, pool)
        batch.check(self.config.vocab_sz, pool.num_rows)
        last = pool.tensors["last"][0]
        read = last.new_empty(len(batch.token_ids), self.config.d_emb)
        for group in batch.groups():
            padded = batch.padded(group)
            ids, places = (
                torch.from_numpy(x).to(pool.device) for x in (batch.token_ids[padded], padded)
            )
            padding = places < 0 if (padded < 0).any() else None
            x = self._read(ids, padding, _index(pool, [batch.rows[i] for i in group]), pool)
            read[places[places >= 0]] = x[places >= 0]
        last[_index(pool, batch.rows)] = read[torch.from_numpy(batch.ends).to(pool.device)]
        return self._logits(read[torch.from_numpy(batch.logits_at).to(pool.device)])

    def _read(self, ids: Tensor, padding: Tensor | None, index: "Index", pool: StatePool) -> Tensor:
        """Advance rows: ids and padding `[rows, tokens]` -> the last layer's outputs `[rows,
        tokens, d_emb]`."""
        emb, is_step = self._embed(ids), ids.shape[1] == 1
        h, layers = pool.tensors["h"][0], AttentionState.of_layers(pool)
        if is_step:
            h[index] = after = self.embed_pos.step(emb[:, 0], h[index])
            all_h = after.unsqueeze(1)
        else:
            all_h, h[index] = self.embed_pos(emb, h[index], padding)
        x = emb + all_h.to(emb.dtype)
        for layer, states in zip(self.blocks, layers, strict=True):
            selected = states.select(index)
            if not is_step:
                x, selected = layer(x, selected, chunked, padding)
                _assign(states, index, selected)
                continue
            x = layer.step(x[:, 0], selected).unsqueeze(1)
            if not isinstance(index, slice):
                _assign(states, index, selected)
        return x

    @torch.inference_mode()
    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Logits `[batch, vocab_sz]` after the last token of each row, without reading a token."""
        if self._compiled is not None:
            return self._compiled.logits(pool, rows)
        if self._fused is not None:
            return self._fused.logits(pool, rows)
        return self._logits(pool.tensors["last"][0, _index(pool, rows)])

    def _embed(self, token_ids: Tensor) -> Tensor:
        emb: Tensor = self.embed(token_ids)
        return emb.to(torch.promote_types(emb.dtype, torch.float32))

    def _logits(self, x: Tensor) -> Tensor:
        x = self.lnorm(x)
        return F.linear(x, self.embed.weight) if self._unembed is None else self._unembed(x)


Index = slice | Tensor


def _replace_linear(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every `nn.Linear` in the module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child))
        else:
            _replace_linear(child, make)


def _index(pool: StatePool, rows: Sequence[int]) -> Index:
    """Consecutive rows are used in place, others by gather and scatter."""
    run = contiguous_run(rows)
    return torch.tensor(rows, device=pool.device) if run is None else run


def _assign(state: AttentionState, index: Index, values: AttentionState) -> None:
    for field in fields(AttentionState):
        own, value = getattr(state, field.name), getattr(values, field.name)
        if own is not None:
            own[index] = 0 if value is None else value

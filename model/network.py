"""The paper's language model: embedding, latent positions, residual layers of latent attention.

Parameter names are those of the reference implementation, so its state dicts load unchanged. A
sequence's state is the position state h, one vector, and one attention state (m, Z, S, n) per
layer; and what the last layer made of the last token, from which alone the next one can be chosen.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import WeightDtype, kernels
from model.attention import CHUNK, EMPTY, Attention, AttentionState, absorb, chunked, on_grid, step
from model.config import DECAY_RANK, FASTEST_DECAY, SLOWEST_DECAY, ModelConfig
from model.decoding import Decoder, DirectDecoder
from model.linear import NarrowLinear, PackedLinear, why_not_compiled
from model.state import StatePool, StateSpec, TensorSpec, contiguous_run

if TYPE_CHECKING:
    from model.cpu.serving import CompiledNetwork
    from model.cuda.serving import FusedNetwork

Narrow = TypeVar("Narrow", NarrowLinear, PackedLinear)

TakeLogits = Callable[[Tensor], None]
"""Takes logits `[tokens, vocab_sz]` after the next tokens of a sequence, which it may keep."""


@dataclass(frozen=True)
class NetworkState:
    """The latent state of a batch of sequences."""

    h: Tensor
    """`[batch, d_emb]`"""
    layers: tuple[AttentionState, ...]

    def detach(self) -> "NetworkState":
        """The same values without the graph that computed them."""
        return _combine(lambda x: x.detach(), self)

    def replace(self, chosen: Tensor, other: "NetworkState") -> "NetworkState":
        """`other` for the sequences where `chosen` `[batch]` holds, self for the rest."""

        def select(own: Tensor, others: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (own.dim() - 1)), others, own)

        return _combine(select, self, other)


def _combine(function: Callable[..., Tensor], *states: NetworkState) -> NetworkState:
    """Apply a function to each tensor of a state, or to the same tensors of several."""
    layers = zip(*(state.layers for state in states), strict=True)
    return NetworkState(
        function(*(state.h for state in states)),
        tuple(first.map(function, *others) for first, *others in layers),
    )


class LatentPosition(nn.Module):
    """Position embedding h_t = logaddexp(logsigmoid(a_t) + h_{t-1}, b_t), [a, b] = Linear(emb)."""

    def __init__(self, d_emb: int) -> None:
        super().__init__()
        self.dense = nn.Linear(d_emb, 2 * d_emb)

    def forward(self, emb: Tensor, h: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """emb `[batch, tokens, d_emb]`, h `[batch, d_emb]` -> all h_t, and the last one.

        The composition of two steps (A1, b1) then (A2, b2) is (A1 + A2, logaddexp(A2 + b1, b2)), an
        associative operation: within a chunk the scan doubles its span, and unlike a difference of
        cumulative sums it never subtracts large numbers. Chunks carry h to the next one, in h's
        own precision: where gates forget nothing, h is a logarithm of a sum over all tokens.
        """
        exact = torch.promote_types(emb.dtype, torch.float32)
        decay, b = (x.to(exact) for x in self._gates(emb))
        if padding is not None:
            decay = decay.masked_fill(padding.unsqueeze(-1), 0.0)
            b = b.masked_fill(padding.unsqueeze(-1), EMPTY)
        tokens = emb.shape[1]
        missing = -tokens % CHUNK
        decay, b = (
            F.pad(x, (0, 0, 0, missing), value=fill).view(len(x), -1, CHUNK, x.shape[2])
            for x, fill in ((decay, 0.0), (b, EMPTY))
        )
        span = 1
        while span < CHUNK:
            joined = _logaddexp(decay[:, :, span:] + b[:, :, :-span], b[:, :, span:])
            b = torch.cat([b[:, :, :span], joined], 2)
            decay = torch.cat([decay[:, :, :span], decay[:, :, span:] + decay[:, :, :-span]], 2)
            span *= 2
        before = []
        for whole_decay, whole_b in zip(
            decay[:, :, -1].unbind(1), b[:, :, -1].unbind(1), strict=True
        ):
            before.append(h)
            h = _logaddexp(whole_decay + h, whole_b.to(h.dtype))
        all_h = _logaddexp(decay + torch.stack(before, 1).unsqueeze(2).to(exact), b)
        return all_h.flatten(1, 2)[:, :tokens], h

    def step(self, emb: Tensor, h: Tensor) -> Tensor:
        """One token: emb, h `[batch, d_emb]` -> the next h."""
        decay, b = self._gates(emb)
        return _logaddexp(decay + h, b.to(h.dtype))

    def _gates(self, emb: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.dense(emb).chunk(2, -1)
        return F.logsigmoid(a), b


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)) for finite numbers; the same bits wherever in a tensor they stand.

    `torch.logaddexp` on a CPU computes what is left of its vectors in other instructions.
    """
    return torch.maximum(a, b) + (a - b).abs().neg().exp().log1p()


@dataclass(frozen=True)
class Projected:
    """What a layer makes of its input before attention."""

    q: Tensor
    """`[batch, tokens, heads, d_k]`, like k"""
    k: Tensor
    v: Tensor
    """v, or log v. `[batch, tokens, heads, d_v]`"""
    log_f: Tensor | None
    """What is left of the past in each key channel, with `decay`; the shape of k"""
    gate: Tensor | None
    """`[batch, tokens, heads * d_v]`, with `output_gate`"""
    inputs: Tensor
    """With `token_shift`, first the one before these tokens. `[batch, tokens (+ 1), d_emb]`"""

    def mask(self, padding: Tensor | None, *, log_values: bool) -> "Projected":
        """Make the tokens where `padding` `[batch, tokens]` holds leave a state as it was."""
        if padding is None:
            return self
        mask = padding[..., None, None]
        k, v = mask_padding(self.k, self.v, padding, log_values=log_values)
        log_f = None if self.log_f is None else self.log_f.masked_fill(mask, 0.0)
        return replace(self, q=self.q.masked_fill(mask, 0.0), k=k, v=v, log_f=log_f)

    def last_input(self, padding: Tensor | None) -> Tensor:
        """The input of each sequence's last token, with `token_shift`. `[batch, d_emb]`"""
        if padding is None:
            return self.inputs[:, -1]
        lengths = padding.logical_not().sum(1)
        return self.inputs[torch.arange(len(lengths), device=lengths.device), lengths]


class Layer(nn.Module):
    """x + FF2(attention(FF1(x))): the residual layer of the reference implementation.

    Of the input u = LayerNorm(x), the extensions make

        token_shift   p_t + mix * (p_{t-1} - p_t) of p = Linear(u), before the first token u = 0
        decay         log f = -FASTEST_DECAY * sigmoid(Linear(Linear(u)))
        output_gate   y * silu(Linear(u)) for y
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_emb, heads = config.d_emb, config.n_heads
        self.split = (config.d_key, config.d_key, config.d_val)
        self.heads = heads
        self.feedforward1 = nn.Sequential(
            nn.LayerNorm(d_emb), nn.Linear(d_emb, heads * sum(self.split))
        )
        self.feedforward2 = nn.Sequential(
            nn.Linear(heads * config.d_val, 2 * d_emb),
            nn.GLU(dim=-1),
            nn.Linear(d_emb, d_emb, bias=False),
        )
        self.mix = nn.Parameter(torch.rand(heads * sum(self.split))) if config.token_shift else None
        self.decay = self.gate = None
        if config.decay:
            rates = nn.Linear(DECAY_RANK, heads * config.d_key)
            # Not linspace: for a network without memory it imports hundreds of modules.
            per_key = math.log(SLOWEST_DECAY / FASTEST_DECAY) / max(1, config.d_key - 1)
            spread = torch.tensor([per_key * key for key in range(config.d_key)])
            with torch.no_grad():
                rates.bias.copy_(spread.repeat(heads))
            self.decay = nn.Sequential(nn.Linear(d_emb, DECAY_RANK, bias=False), rates)
        if config.output_gate:
            self.gate = nn.Linear(d_emb, heads * config.d_val, bias=False)

    def project(self, x: Tensor, previous: Tensor | None = None) -> Projected:
        """x `[batch, tokens, d_emb]`; `previous` `[batch, d_emb]` with `token_shift`."""
        norm, linear = self.feedforward1
        u = norm(x)
        if self.mix is None or previous is None:
            inputs, projected = u, linear(u)
        else:
            inputs = torch.cat([previous.to(u.dtype).unsqueeze(1), u], 1)
            projected = linear(inputs)
            before, now = projected[:, :-1], projected[:, 1:]
            projected = now + self.mix * (before - now)
        q, k, v = projected.unflatten(-1, (self.heads, -1)).split(self.split, -1)
        log_f = gate = None
        if self.decay is not None:
            rates: Tensor = self.decay(u).to(x.dtype).sigmoid()
            log_f = on_grid(-FASTEST_DECAY * rates).view(k.shape)
        if self.gate is not None:
            gate = F.silu(self.gate(u))
        return Projected(q, k, v, log_f, gate, inputs)

    def merge(self, x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
        """Add what attention read, y `[..., heads, d_v]`, to x `[..., d_emb]`."""
        y = y.flatten(-2)
        added: Tensor = self.feedforward2(y if gate is None else y * gate)
        return x + added

    def forward(
        self, x: Tensor, state: AttentionState, attention: Attention, padding: Tensor | None
    ) -> tuple[Tensor, AttentionState]:
        """x `[batch, tokens, d_emb]` -> the same shape, and the state after the last token."""
        made = self.project(x, state.previous)
        previous = state.previous
        if previous is not None:
            previous = made.last_input(padding).to(previous.dtype)
        with torch.autocast(x.device.type, enabled=False):
            p = made.mask(padding, log_values=state.n is not None)
            q, k, v = (t.to(state.m.dtype) for t in (p.q, p.k, p.v))
            y, state = attention(q, k, v, state, p.log_f)
        if padding is not None:
            y = y.masked_fill(padding[..., None, None], 0.0)
        return self.merge(x, y.to(x.dtype), made.gate), replace(state, previous=previous)

    def absorb(self, x: Tensor, state: AttentionState, padding: Tensor | None) -> AttentionState:
        """The state that `forward` ends in, without reading it."""
        p = self.project(x, state.previous).mask(padding, log_values=state.n is not None)
        previous = None if state.previous is None else p.last_input(padding)
        return replace(absorb(p.k, p.v, state, p.log_f), previous=previous)

    def step(self, x: Tensor, state: AttentionState) -> Tensor:
        """One token, updating `state` in place: x `[batch, d_emb]` -> the same shape."""
        p = self.project(x.unsqueeze(1), state.previous)
        log_f = None if p.log_f is None else p.log_f[:, 0]
        y = step(p.q[:, 0], p.k[:, 0], p.v[:, 0], state, log_f)
        if state.previous is not None:
            state.previous.copy_(p.last_input(None))
        return self.merge(x, y, None if p.gate is None else p.gate[:, 0])


def mask_padding(
    k: Tensor, v: Tensor, padding: Tensor, *, log_values: bool
) -> tuple[Tensor, Tensor]:
    """Make the tokens where `padding` `[batch, tokens]` holds leave a state as it was."""
    mask = padding[..., None, None]
    return k.masked_fill(mask, -torch.inf), v.masked_fill(mask, -torch.inf if log_values else 0.0)


class LanguageModel(nn.Module):
    """The paper's network (section 4): trained by `forward`, served by `prefill` and `step`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Given its weight: else it is drawn twice, and for that a network without memory imports
        # torch's compiler, which takes as long as torch.
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
        """What prefill and step run as and, once packed, why; in words."""

    def pack(self, dtype: WeightDtype = "float32") -> "LanguageModel":
        """Make the network one that only serves: weights in this dtype, in the order of reading.

        On a CPU it is compiled, on a GPU it becomes Triton kernels, unless it has extensions: then
        it stays plain torch there. It computes the same as before but for the rounding of weights,
        has no gradients, and cannot be saved.
        """
        reason = why_not_compiled(self.device, self.embed.weight.dtype)
        if not reason:
            self._unembed = unembed = self._narrow(PackedLinear, dtype)
            from model.cpu.compilation import target
            from model.cpu.serving import CompiledNetwork

            self._compiled = CompiledNetwork(self, unembed)
            self.backend = f"compiled for {target()}"
            return self
        if self.device.type == "cuda":
            reason = kernels.missing_for(self.config)
            if not reason and kernels.is_available():
                return self.fuse(dtype)
            reason = reason or "Triton is not installed"
        self.backend = f"plain torch ({reason})"
        if dtype != "float32":
            self._unembed = self._narrow(NarrowLinear, dtype)
        return self

    def fuse(self, dtype: WeightDtype = "float32") -> "LanguageModel":
        """`pack` into Triton kernels: for a GPU, or for a CPU in Triton's interpreter.

        Raises ValueError naming what the config has and the kernels have not.
        """
        if missing := kernels.missing_for(self.config):
            raise ValueError(missing)
        from model.cuda.serving import FusedNetwork

        self._unembed = unembed = self._narrow(NarrowLinear, dtype)
        self._fused = FusedNetwork(self, unembed)
        self.backend = "Triton kernels"
        return self

    def _narrow(self, kind: type[Narrow], dtype: WeightDtype) -> Narrow:
        """Put maps of this kind in the place of all linear ones; returns the last, to logits."""
        _replace_linear(self, lambda child: kind(child.weight, child.bias, dtype))
        weight = self.embed.weight
        unembed = kind(weight, None, dtype)
        if dtype != "float32":
            self.embed.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
        return unembed

    @property
    def is_compiled(self) -> bool:
        """Whether prefill and step run as compiled code."""
        return self._compiled is not None

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        bits = 32 if self._unembed is None else self._unembed.weight.dtype.itemsize * 8
        return self.num_parameters * bits // 8

    @property
    def chunk(self) -> int:
        """Prompts cut after multiples of so many tokens have the same bits as whole ones.

        Compiled code reads token by token; there this is only a size worth a call.
        """
        return 16 if self.is_compiled else CHUNK

    @property
    def blocks(self) -> list[Layer]:
        """The residual layers, first to last."""
        return cast("list[Layer]", list(self.layers))

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def state_spec(self) -> StateSpec:
        """What one sequence's state consists of, at any length of the sequence."""
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
        """States before the first token, on the device of the weights."""
        return StatePool(self.state_spec, num_rows, self.device)

    def new_decoder(self, pool: StatePool, most_rows: int) -> Decoder:
        """What launches the steps of up to so many of the pool's rows at a time."""
        if self._fused is None:
            return DirectDecoder(self, pool)
        from model.cuda.decoder import GraphDecoder

        return GraphDecoder(self._fused, pool, most_rows)

    def empty_state(self, batch: int) -> NetworkState:
        """The state before the first token, for `forward`."""
        return self.read_state(self.new_pool(batch))

    def read_state(self, pool: StatePool) -> NetworkState:
        """All rows of a pool as one batch; its tensors are views of the pool's."""
        return NetworkState(pool.tensors["h"][0], AttentionState.of_layers(pool))

    def write_state(self, state: NetworkState, pool: StatePool) -> None:
        """Overwrite all rows of a pool."""
        pool.tensors["h"][0] = state.h
        for rows, values in zip(AttentionState.of_layers(pool), state.layers, strict=True):
            _assign(rows, slice(None), values)

    def forward(
        self, token_ids: Tensor, state: NetworkState, attention: Attention = chunked
    ) -> tuple[Tensor, NetworkState]:
        """Logits of every token, differentiable in the weights and the state.

        The state that comes back keeps no account of what rounding lost.

        token_ids `[batch, tokens]` -> logits `[batch, tokens, vocab_sz]` and the state at the end.
        """
        emb = self._embed(token_ids)
        all_h, h = self.embed_pos(emb, state.h, None)
        x, layers = emb + all_h.to(emb.dtype), []
        for layer, carried in zip(self.blocks, state.layers, strict=True):
            x, after = layer(x, replace(carried, z_low=None, s_low=None), attention, None)
            layers.append(after)
        return self._logits(x), NetworkState(h, tuple(layers))

    @torch.inference_mode()
    def prefill(
        self,
        token_ids: Tensor,
        lengths: Sequence[int],
        pool: StatePool,
        rows: Sequence[int],
        scored: Mapping[int, TakeLogits] | None = None,
    ) -> None:
        """Advance `rows` by the first `lengths[i]` tokens of each sequence.

        token_ids `[batch, tokens]`; what is beyond a sequence's length is ignored. Logits are
        computed for the sequences in `scored` alone, by their place in the batch: after each of
        their tokens, from the first to the last, a few tokens to a call, so that logits of a whole
        prompt are never in memory. Compiled, they are those of `step` to the bit.
        """
        if self._compiled is not None:
            self._compiled.prefill(token_ids, lengths, pool, rows, scored or {})
            return
        if self._fused is not None:
            self._fused.prefill(token_ids, lengths, pool, rows, scored or {})
            return
        token_ids = token_ids.to(pool.device)
        padding = None
        if min(lengths) < token_ids.shape[1]:
            ends = torch.tensor(lengths, device=token_ids.device)
            padding = torch.arange(token_ids.shape[1], device=token_ids.device) >= ends.unsqueeze(1)
        index = _index(pool, rows)
        emb = self._embed(token_ids)
        h = pool.tensors["h"][0]
        all_h, h[index] = self.embed_pos(emb, h[index], padding)
        x = emb + all_h
        *inner, last = zip(self.blocks, AttentionState.of_layers(pool), strict=True)
        for layer, states in inner:
            x, after = layer(x, states.select(index), chunked, padding)
            _assign(states, index, after)
        layer, states = last
        if scored:
            x, after = layer(x, states.select(index), chunked, padding)
            _assign(states, index, after)
            for place, take in scored.items():
                for start in range(0, lengths[place], CHUNK):
                    take(self._logits(x[place, start : min(start + CHUNK, lengths[place])]))
            return
        _assign(states, index, layer.absorb(x, states.select(index), padding))

    @torch.inference_mode()
    def step(self, token_ids: Tensor, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Advance `rows` by one token each: token_ids `[batch]` -> logits `[batch, vocab_sz]`.

        A step alone writes the rows' `last`, for `logits`.
        """
        if self._compiled is not None:
            return self._compiled.step(token_ids, pool, rows)
        if self._fused is not None:
            return self._fused.step(token_ids, pool, rows)
        token_ids = token_ids.to(pool.device)
        index = _index(pool, rows)
        emb = self._embed(token_ids)
        h = pool.tensors["h"][0]
        h[index] = after = self.embed_pos.step(emb, h[index])
        x = emb + after.to(emb.dtype)
        for layer, states in zip(self.blocks, AttentionState.of_layers(pool), strict=True):
            selected = states.select(index)
            x = layer.step(x, selected)
            if not isinstance(index, slice):
                _assign(states, index, selected)
        pool.tensors["last"][0, index] = x
        return self._logits(x)

    @torch.inference_mode()
    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Logits `[batch, vocab_sz]` after the last token of `rows`, which a step has read: those
        that it returned. Nothing is read."""
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
    """Put another module in the place of every `nn.Linear` inside of the module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child))
        else:
            _replace_linear(child, make)


def _index(pool: StatePool, rows: Sequence[int]) -> Index:
    """Consecutive rows are read and written in place; any others by gather and scatter."""
    run = contiguous_run(rows)
    return torch.tensor(rows, device=pool.device) if run is None else run


def _assign(state: AttentionState, index: Index, values: AttentionState) -> None:
    for field in fields(AttentionState):
        own, value = getattr(state, field.name), getattr(values, field.name)
        if own is not None:
            own[index] = 0 if value is None else value

"""Sampling the next token of each row of a batch, with parameters per row.

A token's random number is a hash of (seed, position), so a turn that is repeated gives the same
tokens in any batch.
"""

import functools
import importlib
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from model.kernels.cuda.graphs import move

WINDOW = 1024
"""Number of past tokens the penalties consider."""

LARGEST = 1e30
"""Bound of a penalised logit: a tiny penalty must not make it infinite."""

_GENERATED = 1 << 30
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters. The defaults sample from the model's own distribution."""

    temperature: float = 1.0
    """0: the most probable token."""

    top_k: int = 0
    """Only the k most probable tokens; 0: all."""

    top_p: float = 1.0
    """Only the most probable tokens whose probabilities add up to this."""

    min_p: float = 0.0
    """Only tokens with at least this fraction of the largest probability."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of the tokens in the window."""

    frequency_penalty: float = 0.0
    """Subtracted for each time the token was generated within the window."""

    penalty_decay: float = 1.0
    """Weight of an occurrence, per token since it was generated."""

    presence_penalty: float = 0.0
    """Subtracted once if the token was generated within the window."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these token ids."""

    seed: int = 0
    """64 bits."""

    @functools.cached_property
    def biases(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Token ids and their biases."""
        ids, biases = zip(*self.logit_bias, strict=True) if self.logit_bias else ((), ())
        return np.array(ids, np.int64), np.array(biases, np.float64)

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )

    @property
    def changes_logits(self) -> bool:
        """Whether sampling depends on more than temperature and filters."""
        return self.has_penalties or bool(self.logit_bias)

    @property
    def has_filters(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


class RecentTokens:
    """The last `WINDOW` tokens of a sequence, and which of them were generated."""

    def __init__(self) -> None:
        self._window = np.full(WINDOW, -1, np.int32)
        """Oldest to newest, -1 where there is no token."""

        self._newer = array("i")
        """Newer tokens, fewer than `WINDOW`, merged in batches."""

        self._seen: _TokenCounts | None = None
        self._generated: _TokenCounts | None = None
        """Counts of the window, built on first use; updating them is cheap."""

    @staticmethod
    def from_bytes(data: bytes) -> "RecentTokens":
        """The inverse of `to_bytes`; empty bytes mean no tokens. Raises ValueError for other
        sizes."""
        recent = RecentTokens()
        if data:
            if len(data) != recent._window.nbytes:
                size = recent._window.nbytes
                raise ValueError(f"recent tokens take {size} bytes, not {len(data)}")
            recent._window = np.frombuffer(data, "<i4").astype(np.int32)
        return recent

    def to_bytes(self) -> bytes:
        """Always 4,096 bytes: int32, oldest to newest, -1 where there is no token."""
        return self._known().astype("<i4").tobytes()

    def append(self, token_id: int, *, generated: bool) -> None:
        """Append the newest token and drop the one before the window."""
        self._newer.append(token_id | _GENERATED if generated else token_id)
        if len(self._newer) == WINDOW:
            self._known()

    def seen(self) -> NDArray[np.int64]:
        """Distinct token ids in the window, in any order; invalid after the next `append`."""
        window = self._known()
        if self._seen is None:
            self._seen = _TokenCounts(window[window >= 0] & ~_GENERATED)
        return self._seen.ids

    def generated(
        self, decay: float = 1.0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | NDArray[np.float64]]:
        """Distinct generated token ids and their counts, valid as `seen`; an occurrence n tokens
        ago counts decay^n."""
        window = self._known()
        if decay != 1.0:
            places = np.flatnonzero(window >= _GENERATED)
            ids, which = np.unique(window[places] & ~_GENERATED, return_inverse=True)
            weights = np.power(decay, WINDOW - 1 - places, dtype=np.float64)
            counts = np.bincount(which, weights, len(ids)).astype(np.float64)
            return ids.astype(np.int64), counts
        if self._generated is None:
            self._generated = _TokenCounts(window[window >= _GENERATED] & ~_GENERATED)
        return self._generated.ids, self._generated.counts

    def _known(self) -> NDArray[np.int32]:
        count = len(self._newer)
        if count:
            if self._seen is not None:
                self._seen.remove(t & ~_GENERATED for t in self._window[:count].tolist() if t >= 0)
                self._seen.add(t & ~_GENERATED for t in self._newer)
            if self._generated is not None:
                gone = self._window[:count].tolist()
                self._generated.remove(t & ~_GENERATED for t in gone if t >= _GENERATED)
                self._generated.add(t & ~_GENERATED for t in self._newer if t >= _GENERATED)
            newer = np.array(self._newer, np.int32)
            self._window = np.concatenate([self._window[count:], newer])
            del self._newer[:]
        return self._window


class _TokenCounts:
    """Distinct token ids of a window and their counts."""

    def __init__(self, token_ids: NDArray[np.int32]) -> None:
        self._ids = np.zeros(2 * WINDOW, np.int64)
        self._counts = np.zeros(2 * WINDOW, np.int64)
        self._places: dict[int, int] = {}
        self.add(token_ids.tolist())

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.int64]:
        return self._counts[: len(self._places)]

    def add(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            place = self._places.setdefault(token_id, len(self._places))
            self._ids[place] = token_id
            self._counts[place] += 1

    def remove(self, token_ids: Iterable[int]) -> None:
        """Remove ids that were added; the last entry moves into a freed index."""
        for token_id in token_ids:
            place = self._places[token_id]
            self._counts[place] -= 1
            if not self._counts[place]:
                del self._places[token_id]
                last = len(self._places)
                if place != last:
                    moved = int(self._ids[last])
                    self._ids[place], self._counts[place] = moved, self._counts[last]
                    self._places[moved] = place
                    self._counts[last] = 0


class SampledRow(NamedTuple):
    """Everything besides the logits that one row's token depends on."""

    params: SamplingParams
    position: int
    """Position of the token to sample, in its sequence."""

    recent: RecentTokens
    banned: tuple[int, ...] = ()
    """Distinct banned token ids, whatever their bias."""

    allowed: NDArray[np.int32] | None = None
    """If given, mask of the allowed tokens: one bit each, 32 per word, lowest first `[at least
    vocab / 32]`. Tokens beyond its end are not allowed."""


Sampler = Callable[[Tensor, Sequence[SampledRow]], list[int | None]]
"""Samples the tokens of rows that share a method."""


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SampledRow]) -> list[int | None]:
    """A token id per row; logits `[batch, vocab]` may be overwritten.

    None for rows that are not a distribution (NaN, inf, or only -inf), also after bans and masks.
    """
    _adjust(logits, rows)
    chosen: list[int | None] = [None] * len(rows)
    kinds: dict[Sampler, list[int]] = {}
    for i, row in enumerate(rows):
        kinds.setdefault(_choose_sampler(row.params, logits.device), []).append(i)
    for choose, group in kinds.items():
        some = logits if len(group) == len(rows) else logits[group]
        for i, token_id in zip(group, choose(some, [rows[i] for i in group]), strict=True):
            chosen[i] = token_id
    return chosen


def prepare() -> None:
    """Compile what `sample` needs, so that no request waits for it."""
    kinds = SamplingParams(), SamplingParams(top_k=1)
    sample(torch.zeros(2, 2), [SampledRow(params, 0, RecentTokens()) for params in kinds])


def derive_seed(seed: int, index: int) -> int:
    """Seed of the index-th of several answers to one request; the first keeps the seed."""
    return seed if index == 0 else _mix(_mix(seed & _MASK) ^ index)


def _adjust(logits: Tensor, rows: Sequence[SampledRow]) -> None:
    """Apply penalties, biases, bans and masks in place, each for all rows at once."""
    repeated, penalties, biases = _SparseLogits(), _SparseLogits(), _SparseLogits()
    banned = _SparseLogits()
    for i, row in enumerate(rows):
        params = row.params
        if params.has_penalties:
            if params.repetition_penalty != 1.0:
                repeated.add(i, row.recent.seen(), params.repetition_penalty)
            ids, counts = row.recent.generated(params.penalty_decay)
            penalties.add(i, ids, params.frequency_penalty * counts + params.presence_penalty)
        if params.logit_bias:
            biases.add(i, *params.biases)
        if row.banned:
            banned.add(i, row.banned, -math.inf)
    if repeated:
        places, factor = repeated.on(logits)
        values = logits[places]
        scaled = torch.where(values > 0, values / factor, values * factor)
        logits[places] = torch.where(values.isinf(), values, scaled.clamp(-LARGEST, LARGEST))
    if penalties:
        places, penalty = penalties.on(logits)
        logits[places] -= penalty
    for added in (biases, banned):
        if added:
            places, value = added.on(logits)
            logits.index_put_(places, value, accumulate=True)  # a token may have two biases
    _add_masks(logits, rows)


class _SparseLogits:
    """A value for some of the logits of a batch."""

    def __init__(self) -> None:
        self._rows: list[NDArray[np.int64]] = []
        self._ids: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float64]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, ids: ArrayLike, values: ArrayLike) -> None:
        """values: one per id, or one for all."""
        own = np.asarray(ids, np.int64)
        self._rows.append(np.full(len(own), row))
        self._ids.append(own)
        self._values.append(np.broadcast_to(np.asarray(values, np.float64), own.shape))

    def on(self, logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(rows, ids) and the values in the logits' dtype, on their device."""
        rows, ids, values = (
            move(torch.from_numpy(np.concatenate(parts)), logits.device)
            for parts in (self._rows, self._ids, self._values)
        )
        return (rows, ids), values.to(logits.dtype)


def _add_masks(logits: Tensor, rows: Sequence[SampledRow]) -> None:
    """Add -inf to the tokens that are not allowed."""
    masked = [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
    if not masked:
        return
    vocab = logits.shape[-1]
    if logits.device.type == "cpu":
        for i, allowed in masked:
            logits[i] += torch.from_numpy(_penalties(allowed, vocab))
        return
    words = np.zeros((len(masked), -(-vocab // 32)), np.int32)
    for place, (_, allowed) in enumerate(masked):
        count = min(len(allowed), words.shape[1])
        words[place, :count] = allowed[:count]
    places = move(torch.tensor([i for i, _ in masked]), logits.device)
    logits[places] += _unpack(move(torch.from_numpy(words), logits.device), vocab)


def _unpack(words: Tensor, vocab: int) -> Tensor:
    """`_penalties` for many rows on a device: words `[rows, vocab / 32]` -> `[rows, vocab]`."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    allowed = ((words.unsqueeze(-1) >> bits) & 1).flatten(1)[:, :vocab].bool()
    return torch.zeros(allowed.shape, device=words.device).masked_fill_(~allowed, -torch.inf)


@functools.cache
def _penalties_of_byte() -> NDArray[np.float32]:
    """For each byte: 0 for set bits and -inf for the others, lowest bit first."""
    bytes_ = np.arange(256, dtype=np.uint8)[:, None]
    bits = np.unpackbits(bytes_, axis=1, bitorder="little").astype(bool)
    return np.where(bits, np.float32(0), np.float32(-np.inf))


def _penalties(allowed: NDArray[np.int32], vocab: int) -> NDArray[np.float32]:
    """What to add to the logits `[vocab]`. Addition keeps NaN and inf visible."""
    words = allowed.astype("<i4", copy=False)
    found = np.take(_penalties_of_byte(), words.view(np.uint8), axis=0).ravel()[:vocab]
    if len(found) == vocab:
        return found
    return np.concatenate([found, np.full(vocab - len(found), -np.inf, np.float32)])


def _choose_sampler(params: SamplingParams, device: torch.device) -> Sampler:
    if params.temperature == 0:
        return _greedy
    if device.type != "cpu" or compiled_sampling() is None:
        return _draw
    return _draw_filtered if params.has_filters else _draw_compiled


def _greedy(logits: Tensor, rows: Sequence[SampledRow]) -> list[int | None]:
    del rows
    largest, ids = logits.max(-1)  # NaN counts as the largest
    pairs = zip(largest.tolist(), ids.tolist(), strict=True)
    return [token_id if math.isfinite(value) else None for value, token_id in pairs]


@functools.cache
def compiled_sampling() -> ModuleType | None:
    """`model.decoding.cpu.sampling`, where there is a compiler."""
    try:
        return importlib.import_module("model.decoding.cpu.sampling")
    except ImportError:
        return None


def _draw_compiled(logits: Tensor, rows: Sequence[SampledRow]) -> list[int | None]:
    """`_draw` without filters, on a CPU."""
    compiled, chosen = compiled_sampling(), np.empty(len(rows), np.int64)
    if compiled is None:
        raise RuntimeError("nothing is compiled here")
    temperatures = np.array([row.params.temperature for row in rows])
    draw = compiled.draw_function()
    draw(logits.float().contiguous().numpy(), temperatures, _points(rows), chosen)
    return [token_id if token_id >= 0 else None for token_id in chosen.tolist()]


def _draw_filtered(logits: Tensor, rows: Sequence[SampledRow]) -> list[int | None]:
    """`_draw` with filters, on a CPU: the same tokens, and mostly without sorting."""
    compiled, chosen = compiled_sampling(), np.empty(len(rows), np.int64)
    if compiled is None:
        raise RuntimeError("nothing is compiled here")
    weights = _weights(logits, rows).numpy()
    vocab, params = weights.shape[1], [row.params for row in rows]
    filters = np.array([(min(p.top_k, vocab), p.top_p, p.min_p) for p in params], np.float64)
    ends, points = np.tile([-1.0, 0.0], (len(rows), 1)), _points(rows)
    draw = compiled.draw_filtered_function()
    draw(weights, weights.view(np.int64), filters, ends, points, chosen)
    uncertain = np.flatnonzero(chosen == compiled.UNCERTAIN)
    if len(uncertain):
        some, found = weights[uncertain], np.empty(len(uncertain), np.int64)
        ends = np.array([_end(weights[i], params[i]) for i in uncertain])
        draw(some, some.view(np.int64), filters[uncertain], ends, points[uncertain], found)
        chosen[uncertain] = found
    return [token_id if token_id >= 0 else None for token_id in chosen.tolist()]


def _end(weights: NDArray[np.float64], params: SamplingParams) -> tuple[float, int]:
    """The smallest of the weights `[vocab]` that top_k and top_p leave, and how many are left of
    those that are equal to it: what `_filter` says, to the bit."""
    ordered = np.sort(weights)[::-1].copy()  # without the places it is ten times as fast
    most = params.top_k or len(ordered)
    largest = ordered.copy()
    largest[most:] = 0.0
    before = largest.cumsum() - largest
    beyond = before >= params.top_p * float(torch.from_numpy(largest).sum())
    beyond[0] = False
    count = min(int(beyond.argmax()) if beyond.any() else len(ordered), most)
    limit = ordered[count - 1]
    return float(limit), count - int((ordered > limit).sum())


def _draw(logits: Tensor, rows: Sequence[SampledRow]) -> list[int | None]:
    """Inverse of the cumulative distribution, in the order of the vocabulary, in float64."""
    weights = _weights(logits, rows)
    filtered = [i for i, row in enumerate(rows) if row.params.has_filters]
    if filtered:
        kept = _filter(weights[filtered], [rows[i].params for i in filtered])
        weights[filtered] = kept
    cumulative = weights.cumsum(-1)
    points = torch.from_numpy(_points(rows)).to(logits.device).unsqueeze(-1)
    total = cumulative[:, -1:]
    targets = torch.minimum(points * total, total * (1 - 2**-52))
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    pairs = zip(total.squeeze(-1).tolist(), chosen.tolist(), strict=True)
    return [token_id if 0 < weight < math.inf else None for weight, token_id in pairs]


def _weights(logits: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """exp((logit - largest) / temperature) in float64; NaN beside NaN and inf."""
    temperatures = torch.tensor([row.params.temperature for row in rows], dtype=torch.float64)
    below = logits.double() - logits.amax(-1, keepdim=True)
    return (below / temperatures.to(logits.device).unsqueeze(-1)).exp_()


def _points(rows: Sequence[SampledRow]) -> NDArray[np.float64]:
    return np.array([_uniform(row.params.seed, row.position) for row in rows])


def _filter(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zero the weights that top_k, top_p or min_p exclude; `[batch, vocab]`, largest weight 1."""
    place, vocab = weights.device, weights.shape[-1]
    ordered, ids = weights.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(vocab, device=place)
    top_k = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=place).unsqueeze(-1)
    ordered = ordered.masked_fill(rank >= top_k, 0.0)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=place).unsqueeze(-1)
    before = ordered.cumsum(-1) - ordered
    beyond = (before >= top_p * ordered.sum(-1, keepdim=True)) & (rank > 0) & (top_p < 1)
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=place).unsqueeze(-1)
    ordered = ordered.masked_fill(beyond | (ordered < min_p), 0.0)
    return torch.zeros_like(weights).scatter_(-1, ids, ordered)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (_mix(_mix(seed & _MASK) ^ position) >> 11) / (1 << 53)


def _mix(x: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)

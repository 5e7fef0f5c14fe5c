"""Steps on a GPU: one recorded launch each, the tokens chosen and fed back on the device."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.decoding.cuda.inputs import take_inputs
from model.decoding.cuda.sampling import choose
from model.decoding.cuda.table import SamplerTable
from model.decoding.decoder import Decoded, DecodeInput
from model.decoding.logprobs import Scored, score
from model.decoding.sampling import SampledRow, sample
from model.kernels.cuda.graphs import Aside, Moment, Recorder, Work, host_buffer, move, to_device
from model.network import Recordable
from model.state import StatePool

MOST_UNDER_WAY = 2

NO_ROW = NO_TOKEN = -1


def batch_sizes(most: int) -> list[int]:
    """Sizes for which a step is recorded: powers of two and the middles between them.

    Rows beyond a batch are left out by every kernel, so a larger size than needed costs little.
    """
    sizes, size = [1, 2, 4, 8], 16
    while size < most:
        sizes += [size, size * 3 // 2]
        size *= 2
    return [*(each for each in sizes if each < most), most]


@dataclass(frozen=True)
class Step:
    """A recorded step of up to so many rows."""

    inputs: Tensor
    """int32 `[3, size]`, as `take_inputs` takes them."""

    logits: Tensor
    """float32 `[size, vocab]`, of the last launch."""

    chosen: Tensor
    """int32 `[size]`; -1 where there is no token."""

    launch: Work


class GraphDecoder:
    """A `Decoder` for a pool on the device.

    How a row chooses stays on the device from one step to the next. What the kernels cannot choose
    (penalties, biases, masks) is chosen from a copy of the logits when the step is taken.
    """

    runs_ahead = True

    def __init__(self, network: Recordable, pool: StatePool, most_rows: int) -> None:
        self._network = network
        self._pool = pool
        self._device = pool.device
        self._table = SamplerTable(pool.num_rows, pool.device)
        self._logits = torch.empty(most_rows, network.vocab_size, device=pool.device)
        self._sizes = batch_sizes(most_rows)
        self._steps: dict[int, Step] = {}
        self._recorder = Recorder(pool.device)
        self._aside = Aside(pool.device)
        self._buffers = deque(
            _Buffers.make(most_rows, pool.device) for _ in range(MOST_UNDER_WAY + 1)
        )

    def prepare(self) -> None:
        for size in reversed(self._sizes):  # what a smaller one needs is part of a larger one's
            self._steps[size] = self._record(size)

    def launch(self, inputs: Sequence[DecodeInput]) -> "LaunchedStep":
        size = self._sizes[bisect_left(self._sizes, len(inputs))]
        if size not in self._steps:
            self._steps[size] = self._record(size)
        step, buffers = self._steps[size], self._buffers[0]
        self._buffers.rotate(-1)
        # What runs ahead is what the device chooses, or it would not know what to read.
        on_device = [
            not each.resumes and (each.token_id is None or _on_device(each.sampled))
            for each in inputs
        ]
        self._tell(inputs, on_device)
        buffers.fill(inputs, on_device, size)
        step.inputs.copy_(buffers.inputs[: 3 * size].view(3, size), non_blocking=True)
        step.launch()
        resuming = [i for i, each in enumerate(inputs) if each.resumes]
        if resuming:
            logits = self._network.logits(self._pool, [inputs[i].row for i in resuming])
            step.logits.index_copy_(0, to_device(resuming, torch.int64, self._device), logits)
        buffers.chosen[:size].copy_(step.chosen, non_blocking=True)
        asked = [i for i, each in enumerate(inputs) if each.num_logprobs is not None]
        by_host = [i for i, chooses in enumerate(on_device) if not chooses]
        launched = LaunchedStep(
            inputs=inputs,
            chosen=buffers.chosen[: len(inputs)],
            asked=asked,
            asked_logits=self._copy(step.logits, asked),
            by_host=by_host,
            logits=self._copy(step.logits, by_host),
            aside=self._aside,
            over=buffers.over,
        )
        buffers.over.mark()
        return launched

    def _tell(self, inputs: Sequence[DecodeInput], on_device: Sequence[bool]) -> None:
        """Tell the device how the rows choose that come new to it, with a token of the host's."""
        news = [
            each
            for each, chooses in zip(inputs, on_device, strict=True)
            if chooses and each.token_id is not None
        ]
        if not news:
            return
        told = SamplerTable(len(news), torch.device("cpu"))
        for i, each in enumerate(news):
            told.assign(i, each.sampled.params, each.sampled.position, NO_TOKEN, [*each.ends])
        rows = to_device([each.row for each in news], torch.int64, self._device)
        self._table.write(rows, move(told.memory, self._device))

    def _copy(self, logits: Tensor, places: Sequence[int]) -> Tensor | None:
        """Some rows of the logits, which the next step overwrites."""
        if not places:
            return None
        return logits.index_select(0, to_device(places, torch.int64, self._device))

    def _record(self, size: int) -> Step:
        inputs = torch.full((3, size), NO_ROW, dtype=torch.int32, device=self._device)
        chosen = torch.full((size,), NO_TOKEN, dtype=torch.int32, device=self._device)
        logits = self._logits[:size]

        def work() -> None:
            ids, rows, choosing = take_inputs(inputs, self._table.token)
            self._network.decode(ids, rows, self._pool, logits)
            choose(logits, choosing, self._table, chosen)

        with torch.inference_mode():
            return Step(inputs, logits, chosen, self._recorder.record(work))


@dataclass(frozen=True)
class _Buffers:
    """Host memory of one step under way."""

    inputs: Tensor
    chosen: Tensor
    over: Moment

    @staticmethod
    def make(most_rows: int, device: torch.device) -> "_Buffers":
        return _Buffers(
            host_buffer(3 * most_rows, torch.int32, device),
            host_buffer(most_rows, torch.int32, device),
            Moment(device),
        )

    def fill(self, inputs: Sequence[DecodeInput], on_device: Sequence[bool], size: int) -> None:
        """Write a batch and nothing but it: rows beyond it are none."""
        count = len(inputs)
        places = self.inputs[: 3 * size].view(3, size).numpy()
        places[:, count:] = NO_ROW
        places[0, :count] = [NO_ROW if each.resumes else each.row for each in inputs]
        places[1, :count] = [
            NO_TOKEN if each.token_id is None else each.token_id for each in inputs
        ]
        places[2, :count] = on_device


@dataclass(frozen=True)
class LaunchedStep:
    """A step under way."""

    inputs: Sequence[DecodeInput]
    chosen: Tensor
    asked: Sequence[int]
    """Places where probabilities are asked for."""

    asked_logits: Tensor | None
    by_host: Sequence[int]
    """Places whose tokens the device has not chosen."""

    logits: Tensor | None
    aside: Aside
    over: Moment

    def take(self) -> Decoded:
        self.over.wait()
        token_ids = [None if token_id < 0 else token_id for token_id in self.chosen.tolist()]
        with self.aside():  # what has been launched since need not be over
            if self.logits is not None:
                rows = [self.inputs[i].sampled for i in self.by_host]
                for i, token_id in zip(self.by_host, sample(self.logits, rows), strict=True):
                    token_ids[i] = token_id
            return Decoded(token_ids, self._score(token_ids))

    def _score(self, token_ids: Sequence[int | None]) -> dict[int, Scored | None]:
        if self.asked_logits is None:
            return {}
        chosen = [token_ids[i] or 0 for i in self.asked]
        num_top = [self.inputs[i].num_logprobs or 0 for i in self.asked]
        return dict(zip(self.asked, score(self.asked_logits, chosen, num_top), strict=True))


def _on_device(sampled: SampledRow) -> bool:
    """Whether the kernels can choose the next token."""
    return not (sampled.params.changes_logits or sampled.banned or sampled.allowed is not None)

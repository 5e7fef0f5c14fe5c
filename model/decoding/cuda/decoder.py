"""Steps on a GPU: steps without prompts replay one CUDA graph; tokens are sampled and fed back on
the device."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor

from model.decoding.cuda.inputs import resolve_inputs
from model.decoding.cuda.sampling import choose
from model.decoding.cuda.table import SamplerTable
from model.decoding.decoder import (
    Decoded,
    Piece,
    batch_of,
    score_chosen,
    score_following,
    wants_probability,
)
from model.decoding.sampling import SampledRow, sample
from model.kernels.cuda.graphs import (
    DeviceEvent,
    Recorder,
    SideStream,
    Work,
    host_buffer,
    move,
    to_device,
)
from model.network import Recordable
from model.state import StatePool

MAX_STEPS_IN_FLIGHT = 2

NO_ROW = NO_TOKEN = -1


def batch_sizes(most: int) -> list[int]:
    """Batch sizes to record: powers of two and the midpoints between them.

    Kernels skip the rows beyond a batch, so a larger size than needed costs little.
    """
    sizes, size = [1, 2, 4, 8], 16
    while size < most:
        sizes += [size, size * 3 // 2]
        size *= 2
    return [*(each for each in sizes if each < most), most]


@dataclass(frozen=True)
class RecordedStep:
    """A recorded step of at most `size` rows."""

    inputs: Tensor
    """int32 `[3, size]`, the inputs of `resolve_inputs`."""

    logits: Tensor
    """float32 `[size, vocab]`, from the last launch."""

    chosen: Tensor
    """int32 `[size]`; -1 for no token."""

    launch: Work


class GraphRunner:
    """A `Runner` for a pool on the device.

    Sampling parameters stay on the device between steps. What the kernels cannot sample (penalties,
    biases, masks) is sampled on the host from a copy of the logits when the step is collected.
    """

    runs_ahead = True

    def __init__(self, network: Recordable, pool: StatePool, max_rows: int) -> None:
        self._network = network
        self._pool = pool
        self._device = pool.device
        self._table = SamplerTable(pool.num_rows, pool.device)
        self._logits = torch.empty(max_rows, network.vocab_size, device=pool.device)
        self._sizes = batch_sizes(max_rows)
        self._steps: dict[int, RecordedStep] = {}
        self._recorder = Recorder(pool.device)
        self._side_stream = SideStream(pool.device)
        self._buffers = deque(
            _Buffers.make(max_rows, pool.device) for _ in range(MAX_STEPS_IN_FLIGHT + 1)
        )

    def prepare(self) -> None:
        for size in reversed(self._sizes):  # smaller graphs reuse the memory of larger ones
            self._steps[size] = self._record(size)

    @torch.inference_mode()
    def launch(self, pieces: Sequence[Piece]) -> "LaunchedStep":
        buffers = self._buffers[0]
        self._buffers.rotate(-1)
        choosing = [place for place, each in enumerate(pieces) if each.sampled is not None]
        # Only tokens sampled on the device can run ahead: the next step must find its input there.
        on_device = {
            place
            for place in choosing
            if not pieces[place].resumes
            and (pieces[place].token_ids is None or _on_device(pieces[place].sampled))
        }
        self._assign([pieces[place] for place in choosing if place in on_device])
        if all(each.sampled is not None and _is_single(each) for each in pieces):
            logits, chosen = self._replay(pieces, on_device, buffers)
            of_prompts = logits[:0]
        else:
            logits, chosen, of_prompts = self._run(pieces, on_device, buffers)
        resuming = [i for i, place in enumerate(choosing) if pieces[place].resumes]
        if resuming:
            rows = [pieces[choosing[i]].row for i in resuming]
            again = self._network.logits(self._pool, rows)
            logits.index_copy_(0, self._places(resuming), again)
        buffers.chosen[: len(choosing)].copy_(chosen[: len(choosing)], non_blocking=True)
        asked = [i for i, place in enumerate(choosing) if wants_probability(pieces[place])]
        by_host = [i for i, place in enumerate(choosing) if place not in on_device]
        launched = LaunchedStep(
            pieces=pieces,
            choosing=choosing,
            chosen=buffers.chosen[: len(choosing)],
            asked=asked,
            asked_logits=self._copy(logits, asked),
            by_host=by_host,
            logits=self._copy(logits, by_host),
            of_prompts=of_prompts,
            side_stream=self._side_stream,
            over=buffers.over,
        )
        buffers.over.mark()
        return launched

    def _replay(
        self, pieces: Sequence[Piece], on_device: AbstractSet[int], buffers: "_Buffers"
    ) -> tuple[Tensor, Tensor]:
        """A step in which each row reads at most one token: the logits and the sampled tokens."""
        size = self._sizes[bisect_left(self._sizes, len(pieces))]
        if size not in self._steps:
            self._steps[size] = self._record(size)
        step = self._steps[size]
        buffers.fill(pieces, on_device, size)
        step.inputs.copy_(buffers.inputs[: 3 * size].view(3, size), non_blocking=True)
        step.launch()
        return step.logits, step.chosen

    def _run(
        self, pieces: Sequence[Piece], on_device: AbstractSet[int], buffers: "_Buffers"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A step with prompts: as `_replay`, for the pieces that sample a token, plus the logits
        before the tokens in `following`."""
        reading = [place for place, each in enumerate(pieces) if not each.resumes]
        given = [pieces[place] for place in reading]
        buffers.fill(
            given, {i for i, place in enumerate(reading) if place in on_device}, len(given)
        )
        inputs = buffers.inputs[: 3 * len(given)].view(3, len(given))
        ids, rows, chooses = resolve_inputs(move(inputs, self._device), self._table.token)
        # Only the device knows its last sampled tokens.
        known = [each if each.token_ids else each._replace(token_ids=(0,)) for each in given]
        single = self._places([i for i, each in enumerate(given) if _is_single(each)])
        logits = self._network.forward(batch_of(known), self._pool, (ids[single], rows[single]))
        read = [i for i, each in enumerate(given) if each.sampled is not None]
        logits, of_prompts = logits[: len(read)], logits[len(read) :]
        chosen = ids.new_full((len(read),), NO_TOKEN)
        if read:
            choose(logits, chooses[self._places(read)], self._table, chosen)
        if len(given) == len(pieces):
            return logits, chosen, of_prompts
        choosing = [each for each in pieces if each.sampled is not None]
        there = self._places([i for i, each in enumerate(choosing) if not each.resumes])
        all_logits = logits.new_empty(len(choosing), logits.shape[1])
        all_chosen = ids.new_full((len(choosing),), NO_TOKEN)
        all_logits[there], all_chosen[there] = logits, chosen
        return all_logits, all_chosen, of_prompts

    def _assign(self, pieces: Sequence[Piece]) -> None:
        """Upload the sampling parameters of rows that are new to the device or got a token from the
        host."""
        news = [each for each in pieces if each.token_ids is not None]
        if not news:
            return
        table = SamplerTable(len(news), torch.device("cpu"))
        for i, each in enumerate(news):
            if each.sampled is not None:
                params, position = each.sampled.params, each.sampled.position
                table.assign(i, params, position, NO_TOKEN, [*each.ends])
        rows = self._places([each.row for each in news])
        self._table.write(rows, move(table.memory, self._device))

    def _places(self, values: Sequence[int]) -> Tensor:
        return to_device(values, torch.int64, self._device)

    def _copy(self, logits: Tensor, places: Sequence[int]) -> Tensor | None:
        """A copy of some rows of the logits, which the next step overwrites."""
        if not places:
            return None
        return logits.index_select(0, self._places(places))

    def _record(self, size: int) -> RecordedStep:
        inputs = torch.full((3, size), NO_ROW, dtype=torch.int32, device=self._device)
        chosen = torch.full((size,), NO_TOKEN, dtype=torch.int32, device=self._device)
        logits = self._logits[:size]

        def work() -> None:
            ids, rows, choosing = resolve_inputs(inputs, self._table.token)
            self._network.decode(ids, rows, self._pool, logits)
            choose(logits, choosing, self._table, chosen)

        with torch.inference_mode():
            return RecordedStep(inputs, logits, chosen, self._recorder.record(work))


@dataclass(frozen=True)
class _Buffers:
    """Host memory of one step in flight."""

    inputs: Tensor
    chosen: Tensor
    over: DeviceEvent

    @staticmethod
    def make(max_rows: int, device: torch.device) -> "_Buffers":
        return _Buffers(
            host_buffer(3 * max_rows, torch.int32, device),
            host_buffer(max_rows, torch.int32, device),
            DeviceEvent(device),
        )

    def fill(self, pieces: Sequence[Piece], on_device: AbstractSet[int], size: int) -> None:
        """Write the rows, their tokens and the flags of rows sampled on the device; the rest is
        padding."""
        count = len(pieces)
        places = self.inputs[: 3 * size].view(3, size).numpy()
        places[:, count:] = NO_ROW
        places[0, :count] = [NO_ROW if each.resumes else each.row for each in pieces]
        places[1, :count] = [each.token_ids[0] if each.token_ids else NO_TOKEN for each in pieces]
        places[2, :count] = [place in on_device for place in range(count)]


@dataclass(frozen=True)
class LaunchedStep:
    """A step in flight."""

    pieces: Sequence[Piece]
    choosing: Sequence[int]
    """Indices of the pieces that sample a token; the fields below follow this order."""

    chosen: Tensor
    asked: Sequence[int]
    """For pieces with log-probabilities."""

    asked_logits: Tensor | None
    by_host: Sequence[int]
    """For pieces sampled on the host."""

    logits: Tensor | None
    of_prompts: Tensor
    """Logits before the tokens in `following`."""

    side_stream: SideStream
    over: DeviceEvent

    def collect(self) -> Decoded:
        self.over.wait()
        token_ids = list[int | None]([None] * len(self.pieces))
        for place, token_id in zip(self.choosing, self.chosen.tolist(), strict=True):
            token_ids[place] = None if token_id < 0 else token_id
        with self.side_stream():  # not blocked by steps launched since
            if self.logits is not None:
                places = [self.choosing[i] for i in self.by_host]
                sampled = (self.pieces[place].sampled for place in places)
                rows = [each for each in sampled if each is not None]
                for place, token_id in zip(places, sample(self.logits, rows), strict=True):
                    token_ids[place] = token_id
            scored = {}
            if self.asked_logits is not None:
                places = [self.choosing[i] for i in self.asked]
                scored = score_chosen(self.asked_logits, places, self.pieces, token_ids)
            return Decoded(token_ids, scored, score_following(self.of_prompts, self.pieces))


def _is_single(piece: Piece) -> bool:
    """Whether the piece reads at most one token."""
    return piece.token_ids is None or len(piece.token_ids) < 2


def _on_device(sampled: SampledRow | None) -> bool:
    """Whether the kernels can sample the next token."""
    return sampled is not None and not (
        sampled.params.changes_logits or sampled.banned or sampled.allowed is not None
    )

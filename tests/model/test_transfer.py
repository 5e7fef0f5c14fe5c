"""Rows are copied unchanged between pool and host, and a buffer holds one row at a time.

Without a GPU its streams are simulated: work on the second stream runs when a test says so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from model.state import StatePool
from model.transfer import DirectTransfer, PinnedTransfer, new_transfer
from tests.model.test_state import NARROW, pool

Work = Callable[[], object]


class PlayedStream:
    """Runs its queued work on request, in order."""

    def __init__(self, device: object = None, *, at_once: bool = False) -> None:
        del device
        self.at_once = at_once
        self.work: list[Work] = []

    def add(self, work: Work) -> None:
        self.work.append(work)
        if self.at_once:
            self.run()

    def run(self) -> None:
        while self.work:
            self.work.pop(0)()

    def wait_event(self, event: "PlayedEvent") -> None:
        self.add(event.check)


class PlayedEvent:
    """Completes once the stream that recorded it reaches it."""

    def __init__(self) -> None:
        self.pending = 0
        self.stream: PlayedStream | None = None

    def record(self) -> None:
        self.pending += 1
        self.stream = Played.current
        self.stream.add(self.pass_)

    def pass_(self) -> None:
        self.pending -= 1

    def check(self) -> None:
        if self.pending and self.stream is not None:
            self.stream.run()
        assert not self.pending

    def query(self) -> bool:
        return not self.pending

    def synchronize(self) -> None:
        self.check()


class Played:
    """Replaces torch.cuda."""

    main = PlayedStream(at_once=True)
    current = main

    Stream = PlayedStream
    Event = PlayedEvent

    @staticmethod
    def current_stream() -> PlayedStream:
        return Played.current

    @staticmethod
    @contextmanager
    def stream(stream: PlayedStream) -> Iterator[None]:
        before, Played.current = Played.current, stream
        yield
        Played.current = before


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, empty = Tensor.copy_, torch.empty

    def later(self: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking:
            Played.current.add(lambda: copy(self, other))
            return self
        return copy(self, other)

    def unpinned(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        del pin_memory
        return empty(*arguments, **options).fill_(99)

    monkeypatch.setattr(torch, "cuda", Played)
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(Tensor, "copy_", later)


def test_host_memory_needs_no_transfer() -> None:
    made = pool(spec=NARROW)
    moves = new_transfer(made)
    assert isinstance(moves, DirectTransfer)
    export = moves.export_row(2)
    assert export.is_done
    assert export.collect() == made.export_row(2)
    moves.import_row(0, made.export_row(2))
    assert made.export_row(0) == made.export_row(2)


def check_rows_cross(made: StatePool, moves: PinnedTransfer) -> None:
    expected = [made.export_row(i) for i in range(made.num_rows)]
    for wrong in (b"", expected[0] + b"x"):
        with pytest.raises(ValueError, match="bytes"):
            moves.import_row(0, wrong)
    exports = []
    for row in range(made.num_rows):
        exports.append(moves.export_row(row))
        made.poison(row)  # the row may be reused at once
    assert [export.collect() for export in exports] == expected
    for row, data in enumerate(reversed(expected)):
        moves.import_row(row, data)
    assert [made.export_row(i) for i in range(made.num_rows)] == expected[::-1]


@pytest.mark.usefixtures("played")
def test_rows_are_transferred_concurrently_with_steps() -> None:
    made = pool(spec=NARROW)
    moves = PinnedTransfer(made)
    first = moves.export_row(1)
    done = [first.is_done]
    moves._stream.run()  # type: ignore[attr-defined]
    assert [*done, first.is_done] == [False, True]
    assert first.collect() == made.export_row(1)
    check_rows_cross(made, moves)


@pytest.mark.usefixtures("played")
def test_buffers_are_used_again_once_nothing_is_in_them() -> None:
    made = pool(spec=NARROW)
    moves = PinnedTransfer(made)
    exports = [moves.export_row(i) for i in range(3)]
    buffers = {id(export.buffer) for export in exports}
    assert len(buffers) == 3
    for export in exports:
        export.collect()
    more = [moves.export_row(i) for i in range(3)]
    assert {id(export.buffer) for export in more} == buffers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_cross_on_a_gpu() -> None:
    device = torch.device("cuda")
    made = StatePool(NARROW, 4, device)
    for name, values in pool(spec=NARROW).tensors.items():
        made.tensors[name].copy_(values)
    check_rows_cross(made, PinnedTransfer(made))

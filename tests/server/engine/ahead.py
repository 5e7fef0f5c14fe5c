"""Simulates a device on the CPU: steps that run ahead, states that arrive later."""

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from model.decoding.decoder import CompletedStep, Decoded, DirectRunner, Piece
from model.network import Network
from model.state import StatePool
from model.transfer import DirectTransfer


@dataclass(eq=False)
class Later:
    """A step that is computed, while the host believes that it is not."""

    decoded: Decoded
    line: "deque[weakref.ref[Later]]" = field(repr=False)
    """Steps not yet collected, except those that are dropped after an error."""

    def collect(self) -> Decoded:
        assert self.line.popleft()() is self, "steps are collected in launch order"
        return self.decoded


class AheadRunner:
    """Each row remembers its last sampled token; rows that have ended are skipped."""

    runs_ahead = True

    def __init__(self, network: Network, pool: StatePool) -> None:
        self._direct = DirectRunner(network, pool)
        self._line = deque[weakref.ref[Later]]()
        self._next: dict[int, int | None] = {}
        self._positions: dict[int, int] = {}
        self.num_ahead = 0
        """Tokens that were read before the host knew them."""

    def prepare(self) -> None:
        self._direct.prepare()

    def launch(self, pieces: Sequence[Piece]) -> Later:
        while self._line and self._line[0]() is None:
            self._line.popleft()
        assert len(self._line) < 2
        assert len({each.row for each in pieces}) == len(pieces)
        token_ids = list[int | None]([None] * len(pieces))
        scored, followed = {}, {}
        going = [
            i
            for i, each in enumerate(pieces)
            if each.token_ids is not None or self._next[each.row] is not None
        ]
        if going:
            self.num_ahead += sum(pieces[i].token_ids is None for i in going)
            decoded = self._launch([self._known(pieces[i]) for i in going])
            scored = {going[load]: each for load, each in decoded.scored.items()}
            followed = {going[load]: each for load, each in decoded.followed.items()}
            for i, token_id in zip(going, decoded.token_ids, strict=True):
                token_ids[i] = token_id
                self._next[pieces[i].row] = None if token_id in pieces[i].ends else token_id
        later = Later(Decoded(token_ids, scored, followed), self._line)
        self._line.append(weakref.ref(later))
        return later

    def _known(self, each: Piece) -> Piece:
        """With the token to read, and the position of the one to sample."""
        sampled = each.sampled
        if each.resumes or sampled is None:
            return each
        position = sampled.position
        if each.token_ids is None:
            position = self._positions[each.row] + 1
            token_id = self._next[each.row]
            assert token_id is not None
            each = each._replace(token_ids=(token_id,))
        self._positions[each.row] = position
        return each._replace(sampled=sampled._replace(position=position))

    def _launch(self, step: Sequence[Piece]) -> Decoded:
        done: CompletedStep = self._direct.launch(step)
        return done.collect()


@dataclass
class LateExport:
    """An export that takes some time."""

    data: bytes
    num_asked: int = 0

    @property
    def is_done(self) -> bool:
        self.num_asked += 1
        return self.num_asked > 5

    def collect(self) -> bytes:
        return self.data


class LateTransfer:
    """Exports rows as of the start of the export."""

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool
        self.import_row = DirectTransfer(pool).import_row

    def export_row(self, row: int) -> LateExport:
        return LateExport(self._pool.export_row(row))


@contextmanager
def running_beside() -> Iterator[list[AheadRunner]]:
    """New engines run ahead with delayed states; yields their runners."""
    made = list[AheadRunner]()

    def ahead(network: Network, pool: StatePool, max_rows: int) -> AheadRunner:
        del max_rows
        made.append(AheadRunner(network, pool))
        return made[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("model.decoding.runners.new_runner", ahead)
        patched.setattr("server.engine.rows.new_transfer", LateTransfer)
        yield made

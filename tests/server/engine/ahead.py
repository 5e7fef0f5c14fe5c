"""What a device does beside the host, on the CPU: steps that run ahead, states that come later."""

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from model.decoding.decoder import Decoded, DecodeInput, DirectDecoder, Done
from model.network import Network
from model.state import StatePool
from model.transfer import DirectTransfer


@dataclass(eq=False)
class Later:
    """A step that is computed, while the host is to believe that it is not."""

    decoded: Decoded
    line: "deque[weakref.ref[Later]]" = field(repr=False)
    """Steps whose tokens nobody has taken, but for those that nobody will take after an error."""

    def take(self) -> Decoded:
        assert self.line.popleft()() is self, "steps are taken in the order of their launches"
        return self.decoded


class AheadDecoder:
    """What each row chose last stays with it; a row that has ended is left as it is."""

    runs_ahead = True

    def __init__(self, network: Network, pool: StatePool) -> None:
        self._direct = DirectDecoder(network, pool)
        self._line = deque[weakref.ref[Later]]()
        self._next: dict[int, int | None] = {}
        self._positions: dict[int, int] = {}
        self.num_ahead = 0
        """Tokens that were read before the host knew them."""

    def prepare(self) -> None:
        self._direct.prepare()

    def launch(self, inputs: Sequence[DecodeInput]) -> Later:
        while self._line and self._line[0]() is None:
            self._line.popleft()
        assert len(self._line) < 2
        assert len({each.row for each in inputs}) == len(inputs)
        token_ids = list[int | None]([None] * len(inputs))
        scored = {}
        going = [
            i for i, each in enumerate(inputs) if each.resumes or self._token(each) is not None
        ]
        if going:
            ahead = [i for i in going if not inputs[i].resumes and inputs[i].token_id is None]
            self.num_ahead += len(ahead)
            step = [self._known(inputs[i]) for i in going]
            decoded = self._launch(step)
            scored = {going[place]: each for place, each in decoded.scored.items()}
            for i, token_id in zip(going, decoded.token_ids, strict=True):
                token_ids[i] = token_id
                self._next[inputs[i].row] = None if token_id in inputs[i].ends else token_id
        later = Later(Decoded(token_ids, scored), self._line)
        self._line.append(weakref.ref(later))
        return later

    def _known(self, each: DecodeInput) -> DecodeInput:
        """With the token to read, and the position of the one to choose."""
        if each.resumes:
            return each
        position = each.sampled.position
        if each.token_id is None:
            position = self._positions[each.row] + 1
        self._positions[each.row] = position
        sampled = each.sampled._replace(position=position)
        return each._replace(token_id=self._token(each), sampled=sampled)

    def _launch(self, step: Sequence[DecodeInput]) -> Decoded:
        done: Done = self._direct.launch(step)
        return done.take()

    def _token(self, each: DecodeInput) -> int | None:
        return self._next[each.row] if each.token_id is None else each.token_id


@dataclass
class LateExport:
    """A row that takes its time."""

    data: bytes
    num_asked: int = 0

    @property
    def is_done(self) -> bool:
        self.num_asked += 1
        return self.num_asked > 5

    def take(self) -> bytes:
        return self.data


class LateTransfer:
    """Exports rows as they were when that began."""

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool
        self.import_row = DirectTransfer(pool).import_row

    def export_row(self, row: int) -> LateExport:
        return LateExport(self._pool.export_row(row))


@contextmanager
def running_beside() -> Iterator[list[AheadDecoder]]:
    """Engines that are made now run ahead, and their states come late; the decoders made."""
    made = list[AheadDecoder]()

    def ahead(network: Network, pool: StatePool, most_rows: int) -> AheadDecoder:
        del most_rows
        made.append(AheadDecoder(network, pool))
        return made[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("model.decoding.decoders.new_decoder", ahead)
        patched.setattr("server.engine.rows.new_transfer", LateTransfer)
        yield made

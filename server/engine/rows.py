"""Rows of the pool: loads a turn's initial state, and exports its final one."""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from model.network import Network
from model.transfer import Export, new_transfer
from server.engine.messages import EngineRequest, Finished
from server.engine.slots import Slots

log = logging.getLogger(__name__)


class Rows:
    """The state pool and the owners of its rows. Free rows are erased."""

    def __init__(self, network: Network, slots: Slots, num_retained: int) -> None:
        """`num_retained`: rows in addition to those of running sequences."""
        self.pool = network.new_pool(1 + slots.num_rows)
        self._slots = slots
        self._retains = num_retained > 0
        self._transfer = new_transfer(self.pool)
        self._exports = deque[tuple[Finished, Export]]()
        """Finished turns whose states are being exported, in order."""

        self._erase_all()

    def load(self, request: EngineRequest) -> bool:
        """Assign the request a row with its initial state. Returns whether a retained row was
        continued in place. Raises ValueError for a state of the wrong size."""
        source, owner = request.source, request.request_id
        if source is None:
            self.pool.reset(self._slots.acquire(owner))
        elif self._slots.adopt(source.id, owner):
            return True
        else:
            self._transfer.import_row(self._slots.acquire(owner), source.data)
        return False

    def start_export(self, finished: Finished, retain_as: str, client: str = "") -> None:
        """At the end of a client's turn: export its state, and retain its row if possible."""
        owner = finished.request_id
        self._exports.append((finished, self._transfer.export_row(self._slots.row(owner))))
        if self._retains:
            self._slots.retain(owner, retain_as, client)
        else:
            self.free(owner)

    def finished_exports(self, *, wait: bool) -> Iterator[Finished]:
        """Finished turns whose exports are complete, in order; with `wait`, all."""
        while self._exports and (wait or self._exports[0][1].is_done):
            finished, export = self._exports.popleft()
            retained_as = finished.retained_as
            if retained_as is not None and not self._slots.is_retained(retained_as):
                retained_as = None  # not retained, or evicted meanwhile
            yield replace(finished, state=export.collect(), retained_as=retained_as)

    def release(self, state_id: str) -> None:
        """Free the row retained under this id; unknown ids are ignored."""
        if self._slots.is_retained(state_id):
            self.free(state_id)

    def free(self, owner: str) -> None:
        """Free and erase a row."""
        self.pool.poison(self._slots.release(owner))

    def reset_all(self) -> None:
        """Drop all states after an error, when any of them may be incomplete."""
        self._exports.clear()
        self._slots.release_all()
        try:
            self._erase_all()
        except Exception:  # rows are overwritten when they are assigned
            log.exception("free rows could not be erased")

    def _erase_all(self) -> None:
        for row in range(self.pool.num_rows):
            self.pool.poison(row)

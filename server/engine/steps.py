"""Decoding steps: launched, and what comes back turned into text."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.decoding.decoder import Decoder, Launched
from model.decoding.logprobs import Scored
from model.state import StatePool
from server.engine.messages import (
    Failed,
    GrammarFailed,
    NoProbabilities,
    TextDelta,
    Token,
)
from server.engine.text_sequence import TextSequence
from server.metrics import Metrics, exemplar

log = logging.getLogger(__name__)

FAILED = "the engine failed while computing; see the server's log"


@dataclass(frozen=True)
class End:
    """Why a text ends as it should."""

    reason: Literal["stop", "length"]
    stopped_by: str | int | None = None
    """As in `Finished`."""


Outcome = End | Failed | GrammarFailed | NoProbabilities
"""How a sequence ends."""


@dataclass
class Outcomes:
    """What came of a step."""

    texts: list[TextDelta] = field(default_factory=list)
    ended: list[tuple[TextSequence, Outcome]] = field(default_factory=list)


@dataclass(frozen=True)
class Flight:
    """A step that is under way."""

    batch: Sequence[tuple[int, TextSequence]]
    """The sequences with their rows."""

    launched: Launched
    started: float


class Steps:
    """Launches steps and collects their tokens: later, where the device works beside the host."""

    def __init__(self, decoder: Decoder, pool: StatePool, metrics: Metrics) -> None:
        self._decoder = decoder
        self._pool = pool
        self._metrics = metrics
        self.runs_ahead = decoder.runs_ahead

    def find_ready(
        self, batch: Sequence[tuple[int, TextSequence]], outcomes: Outcomes
    ) -> list[tuple[int, TextSequence]]:
        """Those for which a step can be launched now. Where a grammar says it, find out what may
        come next; what is complete, or cannot go on, is among the outcomes."""
        ready = []
        for row, sequence in batch:
            if sequence.num_in_flight:
                if self.runs_ahead and sequence.can_run_ahead:
                    ready.append((row, sequence))
                continue
            reason = sequence.find_allowed()
            if reason is not None:
                failed = GrammarFailed(sequence.request.request_id, reason)
                outcomes.ended.append((sequence, failed))
            elif sequence.matcher is not None and sequence.matcher.is_complete:
                outcomes.ended.append((sequence, End("stop")))
            else:
                ready.append((row, sequence))
        return ready

    def launch(self, batch: Sequence[tuple[int, TextSequence]]) -> Flight | None:
        """Launch a step of these sequences, if there are any."""
        if not batch:
            return None
        started = time.monotonic()
        launched = self._decoder.launch([sequence.decode_input(row) for row, sequence in batch])
        for _, sequence in batch:
            sequence.num_in_flight += 1
        self._metrics.batch_size.set(len(batch))
        return Flight(batch, launched, started)

    def land(self, flight: Flight, decoding: Mapping[int, TextSequence]) -> Outcomes:
        """The tokens of a step, except of sequences that have ended since its launch."""
        decoded = flight.launched.take()
        now = time.monotonic()
        self._metrics.step_duration_seconds.observe(now - flight.started)
        outcomes, num_tokens, waited = Outcomes(), 0, Counter[float]()
        scored = decoded.scored
        for i, (row, sequence) in enumerate(flight.batch):
            sequence.num_in_flight -= 1
            if decoding.get(row) is not sequence:
                continue
            token_id, request_id = decoded.token_ids[i], sequence.request.request_id
            if token_id is None or (scored and scored.get(i, self) is None):
                outcomes.ended.append((sequence, NoProbabilities(request_id)))
                continue
            num_tokens += 1
            if sequence.first_token_at is None:
                sequence.first_token_at = now
                self._metrics.time_to_first_token_seconds.observe(
                    now - sequence.submitted_at, exemplar(sequence.request.client_id)
                )
            else:
                waited[sequence.last_token_at] += 1
            sequence.last_token_at = now
            end: Outcome | None
            try:
                end = self._advance(sequence, token_id, scored.get(i), row, outcomes.texts)
            except Exception:  # of this sequence's text: the others are as they should be
                log.exception("a token could not be added to its text")
                end = Failed(request_id, FAILED)
            if end is not None:
                outcomes.ended.append((sequence, end))
        self._metrics.generation_tokens_total.inc(num_tokens)
        for since, count in waited.items():
            self._metrics.inter_token_latency_seconds.observe(now - since, count)
        return outcomes

    def _advance(
        self,
        sequence: TextSequence,
        token_id: int,
        scored: Scored | None,
        row: int,
        texts: list[TextDelta],
    ) -> End | None:
        """Add one sampled token to its sequence. Returns why the text ends, if it does."""
        sequence.num_generated += 1
        request = sequence.request
        ends = token_id in sequence.end_token_ids
        if ends and not (request.include_stop and token_id in sequence.stop_token_ids):
            return End("stop", sequence.end_by(token_id))
        if sequence.matcher is not None:
            sequence.matcher.accept(token_id)  # what fails here is reported before the next token
        # The step that was launched ahead reads the token, unless that ends the text.
        is_read = sequence.num_in_flight > 0 and not ends
        stop = None
        if sequence.text.is_never_held:
            texts.append(TextDelta(request.request_id, sequence.text.push_plain(token_id)))
            sequence.append(token_id, is_read=is_read)
        else:
            token = Token(token_id)
            if scored is not None:
                token = Token(token_id, scored.logprob, scored.top)
            step = sequence.push_text(token)
            if step.wants_anchor:
                sequence.set_anchor(self._pool.read_row(row))
            if step.cuts_token:
                state = sequence.cut()
                if state is not None:
                    self._pool.write_row(row, state)
            else:
                sequence.append(token_id, is_read=is_read)
            texts.append(TextDelta(request.request_id, step.text, step.tokens))
            stop = step.stop
        if stop is not None:
            return End("stop", stop)
        if ends:
            return End("stop", sequence.end_by(token_id))
        return End("length") if sequence.num_generated >= request.max_tokens else None

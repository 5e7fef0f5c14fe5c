"""Launching steps, and turning their results into text."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from model.decoding.decoder import Decoded, Launched, Piece, Runner
from model.decoding.logprobs import Scored
from model.state import StatePool
from server.engine.messages import (
    Failed,
    GrammarFailed,
    InvalidLogits,
    TextDelta,
    Token,
)
from server.engine.text_sequence import End, TextSequence
from server.metrics import Metrics, exemplar

log = logging.getLogger(__name__)

FAILED = "the engine failed while computing; see the server's log"


def end_of_prompt(sequence: TextSequence) -> End:
    """How a sequence ends without generating: as requested, or because its grammar allows no
    text."""
    return End("stop" if sequence.request.max_tokens else "length")


Outcome = End | Failed | GrammarFailed | InvalidLogits
"""How a sequence ends."""


@dataclass
class Outcomes:
    """Results of a step."""

    read: list[TextSequence] = field(default_factory=list)
    """Sequences whose prompts are complete; reported before their texts."""

    texts: list[TextDelta] = field(default_factory=list)
    ended: list[tuple[TextSequence, Outcome]] = field(default_factory=list)


@dataclass(frozen=True)
class StepInFlight:
    """A launched step."""

    batch: Sequence[tuple[TextSequence, Piece]]
    """The sequences with their pieces; decoding ones first."""

    num_decoding: int
    ends: frozenset[int]
    """Indices of the pieces that end a prompt."""

    launched: Launched
    started: float

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens it reads."""
        prompts = self.batch[self.num_decoding :]
        return sum(len(piece.token_ids or ()) for _, piece in prompts)


class Steps:
    """Launches steps and collects their tokens, on a GPU one step later."""

    def __init__(self, runner: Runner, pool: StatePool, metrics: Metrics) -> None:
        self._runner = runner
        self._pool = pool
        self._metrics = metrics
        self._last_landed: float | None = None
        self.runs_ahead = runner.runs_ahead
        self.last_s = 0.0
        """Time from the previous collection, or from the launch after a pause, to the last one: the
        inter-token latency."""

    def find_ready(
        self, batch: Sequence[tuple[int, TextSequence]], outcomes: Outcomes
    ) -> list[tuple[int, TextSequence]]:
        """Sequences for which a step can be launched now; computes their token masks. Those that
        are complete or cannot continue are added to the outcomes."""
        ready = []
        for row, sequence in batch:
            if sequence.num_in_flight:
                if self.runs_ahead and sequence.can_run_ahead:
                    ready.append((row, sequence))
                continue
            if self._can_choose(sequence, outcomes):
                if sequence.matcher is not None and sequence.matcher.is_complete:
                    outcomes.ended.append((sequence, End("stop")))
                else:
                    ready.append((row, sequence))
        return ready

    def find_readable(
        self, prompts: Sequence[tuple[int, TextSequence, int]], outcomes: Outcomes
    ) -> list[tuple[int, TextSequence, int]]:
        """Prompts of which the planned tokens can be read now. A token must be sampled at a
        prompt's end: if the grammar allows none, the last token is left unread."""
        readable = []
        for row, sequence, count in prompts:
            if sequence.generates and count == sequence.num_unread:
                if not self._can_choose(sequence, outcomes):
                    continue
                if sequence.matcher is not None and sequence.matcher.is_complete:
                    sequence.generates = False
                    continue  # the next step knows how much is left
            readable.append((row, sequence, count))
        return readable

    def _can_choose(self, sequence: TextSequence, outcomes: Outcomes) -> bool:
        """Whether the grammar allows any token other than the end."""
        reason = sequence.find_allowed()
        if reason is not None:
            failed = GrammarFailed(sequence.request.request_id, reason)
            outcomes.ended.append((sequence, failed))
        return reason is None

    def launch(
        self,
        decoding: Sequence[tuple[int, TextSequence]],
        prompts: Sequence[tuple[int, TextSequence, int]] = (),
    ) -> StepInFlight | None:
        """Launch a step for sequences in their rows: one token of each decoding one, and the
        planned tokens of each prompt. None if there are none."""
        if not decoding and not prompts:
            return None
        started = time.monotonic()
        batch = [(sequence, sequence.next_token(row)) for row, sequence in decoding]
        batch += [(sequence, sequence.next_tokens(row, n)) for row, sequence, n in prompts]
        launched = self._runner.launch([piece for _, piece in batch])
        count = len(decoding)
        ends = frozenset(i for i in range(count, len(batch)) if batch[i][0].is_read)
        for i, (sequence, _) in enumerate(batch):
            if i < count or i in ends:
                sequence.num_in_flight += 1
        self._metrics.batch_size.set(len(batch))
        return StepInFlight(batch, count, ends, launched, started)

    def rest(self) -> None:
        """Restart the latency measurement after a pause."""
        self._last_landed = None

    def collect(self, flight: StepInFlight, running: Mapping[int, TextSequence]) -> Outcomes:
        """The tokens of a step, except for sequences that have ended since its launch: `running`
        maps rows to the others."""
        decoded = flight.launched.collect()
        now = time.monotonic()
        self._metrics.step_duration_seconds.observe(now - flight.started)
        before, self._last_landed = self._last_landed, now
        self.last_s = now - (flight.started if before is None else before)
        outcomes, num_tokens, waited = Outcomes(), 0, Counter[float]()
        scored = decoded.scored
        for i, (sequence, piece) in enumerate(flight.batch):
            is_prompt, row = i >= flight.num_decoding, piece.row
            if not is_prompt or i in flight.ends:
                sequence.num_in_flight -= 1
            if running.get(row) is not sequence:
                continue
            if is_prompt and not self._land_prompt(sequence, piece, i, flight, decoded, outcomes):
                continue
            if sequence.num_outdated:
                sequence.num_outdated -= 1
                continue
            if sequence.num_to_repeat:
                sequence.num_to_repeat -= 1
                if not sequence.num_to_repeat and sequence.end is not None:
                    outcomes.ended.append((sequence, sequence.end))
                continue
            token_id, request_id = decoded.token_ids[i], sequence.request.request_id
            if token_id is None or (scored and scored.get(i, self) is None):
                outcomes.ended.append((sequence, InvalidLogits(request_id)))
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
            except Exception:  # an error in one sequence's text does not affect the others
                log.exception("cannot add a token to its text")
                end = Failed(request_id, FAILED)
            if end is not None:
                outcomes.ended.append((sequence, end))
        self._metrics.generation_tokens_total.inc(num_tokens)
        for since, count in waited.items():
            self._metrics.inter_token_latency_seconds.observe(now - since, count)
        return outcomes

    def _land_prompt(
        self,
        sequence: TextSequence,
        piece: Piece,
        place: int,
        flight: StepInFlight,
        decoded: Decoded,
        outcomes: Outcomes,
    ) -> bool:
        """A piece of a prompt was read. Returns whether a token was sampled after it."""
        scores = sequence.prompt_scores
        if scores is not None and piece.following is not None:
            scores.add(piece.following.token_ids, decoded.followed[place])
        if place not in flight.ends:
            return False
        if scores is not None and scores.is_damaged:
            outcomes.ended.append((sequence, InvalidLogits(sequence.request.request_id)))
            return False
        outcomes.read.append(sequence)
        if not sequence.generates:
            outcomes.ended.append((sequence, end_of_prompt(sequence)))
        return sequence.generates

    def _advance(
        self,
        sequence: TextSequence,
        token_id: int,
        scored: Scored | None,
        row: int,
        texts: list[TextDelta],
    ) -> End | None:
        """Add a sampled token to its sequence. Returns the end, if the text ends."""
        sequence.num_generated += 1
        request = sequence.request
        ends = token_id in sequence.end_token_ids
        if ends and not (request.include_stop and token_id in sequence.stop_token_ids):
            return End("stop", sequence.end_by(token_id))
        if sequence.matcher is not None:
            sequence.matcher.accept(token_id)  # errors are reported before the next token
        # A step launched ahead reads the token, unless it ends the text.
        is_read = sequence.num_in_flight > 0 and not ends
        stop = None
        if sequence.text.is_unbuffered:
            texts.append(TextDelta(request.request_id, sequence.text.push_plain(token_id)))
            sequence.append(token_id, is_read=is_read)
        else:
            token = Token(token_id)
            if scored is not None:
                token = Token(token_id, scored.logprob, scored.top)
            step = sequence.push_text(token)
            if step.wants_anchor:
                sequence.set_anchor(None if is_read else self._pool.read_row(row))
            if step.cuts_token:
                state = sequence.cut()
                if state is not None:
                    self._pool.write_row(row, state)
            else:
                sequence.append(token_id, is_read=is_read)
                if step.stop is not None and is_read:
                    state = sequence.unread_last()
                    if state is not None:
                        self._pool.write_row(row, state)
                elif self.runs_ahead and sequence.wants_snapshot:
                    sequence.set_snapshot(self._pool.read_row(row))
            texts.append(TextDelta(request.request_id, step.text, step.tokens))
            stop = step.stop
        if stop is not None:
            sequence.end = End("stop", stop)
            return None if sequence.num_to_repeat else sequence.end
        if ends:
            return End("stop", sequence.end_by(token_id))
        return End("length") if sequence.num_generated >= request.max_tokens else None

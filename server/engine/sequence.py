"""One request in the engine as the scheduler sees it: tokens to read, and how far that has come."""

from server.engine.messages import EngineRequest


class EngineSequence:
    """Tokens of one turn. The state is in a row of the pool."""

    def __init__(self, request: EngineRequest, submitted_at: float) -> None:
        start = request.continuation
        self.request = request
        self.num_read = 0
        """Tokens of the turn in the state, while the prompt is being read."""

        self.cached_tokens = 0
        """Those of them that the sequence did not read itself."""

        self.digests: tuple[bytes, ...] = ()
        """Names of the prompt's beginnings, chunk by chunk, where they may be shared."""

        self.retain_at = set[int]()
        """Numbers of tokens after which reading stops for the state to be kept."""

        self.keep_text_at = 0
        """Number of tokens after which reading stops for the state to be kept by its text; 0: no
        such stop."""

        self.waits_for: EngineSequence | None = None
        """The sequence that reads a common beginning; nothing is read here until then."""

        self.waits_until = 0
        """Tokens of that beginning; 0: it is to be found by its text."""

        self.generates = request.max_tokens > 0
        """Whether a token is to come after the prompt. If not, its last token is left unread."""

        self.last_planned = 0
        """The scheduler's step in which it read last, or began."""

        self._tokens = [*start.pending, *request.token_ids]
        self.position = start.position + len(request.token_ids)
        """Tokens of the sequence, those unread included."""

        self.is_paused = False
        """Whether it keeps its row, and nothing is computed for it."""

        self.is_adopted = False
        """Whether it goes on in the row where the turn before it ended."""

        self.num_generated = 0
        self.num_in_flight = 0
        """Steps that were launched for it and whose tokens are not known yet."""

        self.submitted_at = submitted_at
        self.admitted_at = self.read_at = submitted_at
        self.first_token_at: float | None = None
        self.last_token_at = submitted_at

    @property
    def unread(self) -> list[int]:
        """Tokens that are not in the state yet."""
        return self._tokens[self.num_read :]

    @property
    def num_unread(self) -> int:
        """Tokens to be read in pieces: one that is left by itself goes with those that decode."""
        num_left = len(self._tokens) - self.num_read
        if self.generates:
            return num_left if num_left > 1 else 0
        return max(0, num_left - 1)

    @property
    def is_read(self) -> bool:
        return self.num_unread == 0

    def next_piece(self, most: int, cut: int) -> int:
        """Tokens of the next piece: as many as there are until the state is to be kept or the
        prompt ends, or a multiple of the network's cut that is not more than `most`.

        A last token by itself belongs to the piece before it: the network would compute other bits.
        The exception is a state to be kept right before it, which nobody asks for.
        """
        places = (*self.retain_at, self.keep_text_at)
        stops = (at - self.num_read for at in places if at > self.num_read)
        stop = min(stops, default=None)
        count = self.num_unread if stop is None else stop
        if count > most:
            count = max(most, 0) // cut * cut
        if count and count != stop and self.num_unread - count == 1:
            count += 1
        return count

    def pop_unread(self, count: int) -> list[int]:
        """The next unread tokens, which the caller puts into the state."""
        popped = self._tokens[self.num_read : self.num_read + count]
        self.num_read += count
        return popped

    def skip_to(self, num_tokens: int) -> None:
        """The caller gives the sequence a state after this many tokens of its turn."""
        self.num_read = self.cached_tokens = num_tokens

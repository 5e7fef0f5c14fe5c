"""One request as the scheduler sees it: its tokens and its progress."""

from server.engine.messages import EngineRequest


class EngineSequence:
    """Tokens of one turn. The state is in a row of the pool."""

    def __init__(self, request: EngineRequest, submitted_at: float) -> None:
        start = request.continuation
        self.request = request
        self.num_read = 0
        """During prefill: tokens of the turn in the state."""

        self.cached_tokens = 0
        """Those of them found in the cache."""

        self.digests: tuple[bytes, ...] = ()
        """Digests of the prompt's prefixes, chunk by chunk, if they may be shared."""

        self.retain_at = set[int]()
        """Token counts at which reading stops to cache the state."""

        self.cache_text_at = 0
        """Token count at which reading stops to cache the state by its text; 0: none."""

        self.waits_for: EngineSequence | None = None
        """The sequence that is reading a shared prefix; this one waits for it."""

        self.waits_until = 0
        """Tokens of that prefix; 0: it is found by its text."""

        self.generates = request.max_tokens > 0
        """Whether a token is sampled after the prompt. If not, the prompt's last token is not
        read."""

        self.last_planned = 0
        """The scheduler's step in which it last read, or started."""

        self._tokens = [*start.pending, *request.token_ids]
        self.position = start.position + len(request.token_ids)
        """Tokens of the sequence, including unread ones."""

        self.is_paused = False
        """Paused sequences keep their row but are not computed."""

        self.is_adopted = False
        """Whether it continues in the row where the previous turn ended."""

        self.num_generated = 0
        self.num_in_flight = 0
        """Launched steps whose tokens are not collected yet."""

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
        """Tokens to read in pieces; a single remaining one is read while decoding."""
        num_left = len(self._tokens) - self.num_read
        if self.generates:
            return num_left if num_left > 1 else 0
        return max(0, num_left - 1)

    @property
    def is_read(self) -> bool:
        return self.num_unread == 0

    def next_piece(self, most: int, cut: int) -> int:
        """Tokens of the next piece: up to where the state is to be cached or the prompt ends,
        otherwise a multiple of the network's cut up to `most`.

        A single last token belongs to the piece before it, since the network would compute other
        bits. The exception is a state cached right before it, which has no further use.
        """
        places = (*self.retain_at, self.cache_text_at)
        stops = (at - self.num_read for at in places if at > self.num_read)
        stop = min(stops, default=None)
        count = self.num_unread if stop is None else stop
        if count > most:
            count = max(most, 0) // cut * cut
        if count and count != stop and self.num_unread - count == 1:
            count += 1
        return count

    def pop_unread(self, count: int) -> list[int]:
        """Remove and return the next unread tokens, which the caller puts into the state."""
        popped = self._tokens[self.num_read : self.num_read + count]
        self.num_read += count
        return popped

    def skip_to(self, num_tokens: int) -> None:
        """The caller sets the sequence's state to that after this many tokens of its turn."""
        self.num_read = self.cached_tokens = num_tokens

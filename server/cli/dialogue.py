"""The turns of a session, one after another: send a text, show the answer, resolve the outcome.

send -> show pieces -> committed; otherwise wait until the session is idle -> check its turn
"""

import secrets
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from enum import Enum

from server.api.schemas.sessions import Session
from server.cli.client import (
    CHAT,
    COMPLETIONS,
    Client,
    ClientError,
    RefusedError,
    TurnEnd,
    TurnRequest,
    UnfinishedError,
)
from server.cli.terminal import Terminal

POLL_S = 0.05
SETTLE_S = 10.0
"""Time limit for a session to become idle after its turn has ended here."""


@dataclass(frozen=True)
class SentTurn:
    """A turn that was sent."""

    text: str
    expected_turn: int
    """The session's turn before it."""

    request: TurnRequest


class TurnOutcome(Enum):
    """Outcome of a turn whose end was not received."""

    ROLLED_BACK = "the turn was rolled back, the session is unchanged"
    COMMITTED = "the turn was committed"
    SUPERSEDED = "the turn was lost: another client has continued the session"


class Dialogue:
    """The user's side of one session. Methods raise ClientError."""

    def __init__(
        self,
        client: Client,
        terminal: Terminal,
        session: Session,
        sampling: Mapping[str, float],
        *,
        raw: bool,
    ) -> None:
        """`sampling`: parameters of every request."""
        self._client = client
        self._terminal = terminal
        self._sampling = sampling
        self._open: SentTurn | None = None
        self._num_shown = 0
        self.raw = raw
        """Whether texts are sent without a chat template."""

        self.system: str | None = None
        """System message of a session's first turn."""

        self.session_id = session.id
        self.turn = session.turn
        """The session's last known turn."""

        self.last: TurnEnd | None = None
        """The last turn of this client."""

    def switch_to(self, session: Session) -> None:
        """Continue with this session."""
        self.session_id, self.turn = session.id, session.turn
        self._open = self.last = None

    def session(self) -> Session:
        """Fetch the session from the server."""
        return self._client.session(self.session_id)

    def say(self, text: str) -> bool:
        """Run a turn. Returns whether it was committed.

        KeyboardInterrupt stops it. If the outcome of the previous turn is unknown, it is resolved
        first; then sending the same text again only fetches its answer.
        """
        before = self._open
        if before is not None:
            outcome = self._resolve(before)
            if outcome is TurnOutcome.COMMITTED and before.text == text:
                return True
        sent = self._prepare(text)
        self._open, self._num_shown = sent, 0
        try:
            self._receive(sent)
        except UnfinishedError as error:
            self._terminal.error(error)
            self._terminal.remark("whether the turn was committed is unknown: checking the session")
            return self._resolve(sent) is TurnOutcome.COMMITTED
        except KeyboardInterrupt:
            self._terminal.remark("stopped")
            self._resolve(sent)
            return False
        except RefusedError as error:
            self._open = None
            return self._handle_rejection(error, text)
        except ClientError:
            self._open = None
            raise
        self._print_summary()
        return True

    def _prepare(self, text: str) -> SentTurn:
        body = {
            **self._sampling,
            "session_id": self.session_id,
            "expected_turn": self.turn,
            "stream": True,
            "stream_options": {"include_usage": True},
            "timings": True,
        }
        if self.raw:
            request = TurnRequest(COMPLETIONS, body | {"prompt": text}, secrets.token_hex(16))
            return SentTurn(text, self.turn, request)
        messages = [{"role": "user", "content": text}]
        if self.system is not None and self.turn == 0:
            messages.insert(0, {"role": "system", "content": self.system})
        request = TurnRequest(CHAT, body | {"messages": messages}, secrets.token_hex(16))
        return SentTurn(text, self.turn, request)

    def _receive(self, sent: SentTurn) -> None:
        """Show the part of the answer that was not shown yet."""
        skip, end = self._num_shown, None
        try:
            with closing(self._client.run_turn(sent.request)) as pieces:
                for piece in pieces:
                    if isinstance(piece, TurnEnd):
                        end = piece
                        continue
                    new, skip = piece[skip:], max(0, skip - len(piece))
                    self._num_shown += len(new)
                    self._terminal.write(new)
        finally:
            self._terminal.end_line()
        if end is not None:
            self._open, self.turn, self.last = None, end.turn, end

    def _print_summary(self) -> None:
        """Print a summary of the last turn."""
        if self.last is not None:
            self._terminal.remark(_summary(self.last, self.session()))

    def _handle_rejection(self, error: RefusedError, text: str) -> bool:
        """Handle a turn that the server rejected."""
        if error.code == "turn_mismatch":
            self.turn = self.session().turn
            raise ClientError(
                f"another client has changed the session, which is now at turn {self.turn}: your "
                "text was not sent; the next one continues from there"
            ) from error
        if error.code == "no_chat_template" and not self.raw:
            self.raw = True
            lost = "" if self.system is None else "; the system message is not sent"
            self._terminal.remark(
                f"this model has no chat template: text is sent without one from now on, as with "
                f"--raw{lost}"
            )
            return self.say(text)
        raise error

    def _resolve(self, sent: SentTurn) -> TurnOutcome:
        """Resolve the outcome of a turn and report it."""
        outcome = self._outcome(sent)
        session = self.session()
        self._terminal.remark(
            f"{outcome.value}: at turn {session.turn}, with {session.tokens:,} tokens"
        )
        return outcome

    def _outcome(self, sent: SentTurn) -> TurnOutcome:
        session = self._wait_until_idle()
        if session.turn == sent.expected_turn:
            self._open = None
            return TurnOutcome.ROLLED_BACK
        try:
            self._receive(sent)  # the session has advanced: replays the turn, or is rejected
        except RefusedError:
            self.switch_to(session)
            return TurnOutcome.SUPERSEDED
        self._print_summary()
        return TurnOutcome.COMMITTED

    def _wait_until_idle(self) -> Session:
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            time.sleep(POLL_S)
            session = self.session()
            if session.status == "idle":
                return session
        raise ClientError(f"session {self.session_id} is still busy after {SETTLE_S:g} seconds")


def speeds(end: TurnEnd) -> dict[str, str]:
    """Speed figures of a turn by name; empty if nothing was generated."""
    timings = end.timings
    if timings is None or timings.first_token_s is None:
        return {}
    facts = {"first token": f"{timings.first_token_s * 1000:,.0f} ms"}
    if timings.per_token_s:
        facts["speed"] = f"{1 / timings.per_token_s:,.0f} tokens/s"
    return facts


def _summary(end: TurnEnd, session: Session) -> str:
    """One line about a turn."""
    resumed = 0 if end.timings is None else end.timings.resumed_tokens
    parts = [
        f"turn {end.turn}: {end.usage.prompt_tokens - resumed:,} + "
        f"{end.usage.completion_tokens:,} tokens",
        f"session: {session.tokens:,} tokens in {session.state_bytes:,} bytes",
        *(f"{name}: {value}" for name, value in speeds(end).items()),
    ]
    if end.reason == "length":
        parts.append("stopped at the token limit")
    return "; ".join(parts)

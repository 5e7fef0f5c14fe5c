"""Limits per caller: requests and tokens per minute, concurrent requests and sequences.

A turn has an allowance: `Limiter.enter`, then `check` and `charge` once its prompt is known, and
`leave` at its end. `Limiter.count` counts other requests.

The windows are the sliding window counters of the library `limits`: the current minute, plus a
share of the previous minute in proportion to its overlap with the last 60 seconds. They keep two
numbers per limit; the library's exact windows would keep an entry per token.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, memory
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from server.api.auth import Caller
from server.errors import InvalidRequest, RateLimited
from server.keys import Limits
from server.settings import Settings

memory.time = SimpleNamespace(time=time.monotonic)  # type: ignore[assignment, attr-defined]
# By default the library counts minutes by the system clock, which may jump.

ALL_CALLERS = "all"
"""Pseudo-owner of the server-wide limits; no owner has this name."""

LimitKind = Literal["requests", "tokens"]
KINDS: tuple[LimitKind, ...] = ("requests", "tokens")


class _Limit(RateLimitItemPerMinute):
    """Requests or tokens per minute, of one caller or of all."""

    __slots__ = ("_owner", "code", "kind")

    def __init__(self, amount: int, kind: LimitKind, whose: str) -> None:
        super().__init__(amount, namespace=f"{kind}/{whose}")
        self.kind = kind
        self.code = f"{kind}_per_minute"
        self._owner = "the server's" if whose == ALL_CALLERS else "your"

    def __str__(self) -> str:
        return f"{self._owner} limit of {self.amount} {self.kind} per minute"


@dataclass(frozen=True)
class Used:
    """An owner's total usage."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


class Limiter:
    """Counts usage by caller. Belongs to the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._storage = MemoryStorage()
        self._windows = SlidingWindowCounterRateLimiter(self._storage)
        self._running = Counter[str]()
        self._sequences = Counter[str]()
        self._used = dict[str, Used]()
        self.started_at = time.time()
        self._overall = Limits(
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
        )

    def enter(self, caller: Caller) -> "Allowance":
        """Begin a request. Raises RateLimited at the limit of concurrent requests."""
        most = caller.limits.concurrent_requests
        if most is not None and self._running[caller.owner] >= most:
            raise RateLimited(
                f"{most} of your requests are running, which is your limit; retry when one ends",
                "concurrent_requests",
                1,
            )
        self._running[caller.owner] += 1
        return Allowance(self, caller)

    def add_sequences(self, caller: Caller, count: int) -> None:
        """Start `count` sequences. Raises RateLimited if they are too many together with those that
        run, and InvalidRequest if they are too many on their own."""
        most = caller.limits.concurrent_sequences
        running = self._sequences[caller.owner]
        if most is not None and count > most:
            raise InvalidRequest(
                f"the request has {count} sequences, n for each prompt; at most {most} "
                "may run at a time",
                code="concurrent_sequences",
            )
        if most is not None and running + count > most:
            raise RateLimited(
                f"{running} of your sequences are running, and at most {most} may; retry when "
                "some have ended",
                "concurrent_sequences",
                1,
            )
        self._sequences[caller.owner] += count

    def leave(self, caller: Caller, num_sequences: int) -> None:
        """End a request of the caller, with its sequences."""
        for counter, count in ((self._running, 1), (self._sequences, num_sequences)):
            counter[caller.owner] -= count
            if not counter[caller.owner]:
                del counter[caller.owner]

    def used(self, owner: str) -> "Used":
        """An owner's usage since `started_at`."""
        return self._used.get(owner, Used())

    async def count(self, caller: Caller, num_tokens: int = 0) -> None:
        """Start a request that reads `num_tokens` and generates nothing. Raises RateLimited and
        InvalidRequest."""
        await self.check(caller, num_tokens)
        await self.record(caller, "requests", 1)
        await self.record(caller, "tokens", num_tokens)

    async def check(self, caller: Caller, num_tokens: int) -> None:
        """Raises RateLimited if a request with `num_tokens` prompt tokens may not start now.

        Raises InvalidRequest if it never may.
        """
        waits = list[tuple[float, _Limit]]()
        for limit in self._limits(caller):
            cost = 1 if limit.kind == "requests" else max(1, num_tokens)
            if cost > limit.amount:
                raise InvalidRequest(
                    f"the prompt has {num_tokens} tokens, counted once per choice, which exceeds "
                    f"{limit}",
                    code=limit.code,
                )
            if not await self._windows.test(limit, cost=cost):
                waits.append((await self._wait_s(limit, cost), limit))
        if waits:
            wait_s, limit = max(waits, key=lambda wait: wait[0])
            seconds = math.floor(wait_s) + 1
            raise RateLimited(
                f"this request would exceed {limit}; retry in {seconds} s",
                limit.code,
                seconds,
            )

    async def record(self, caller: Caller, kind: LimitKind, count: int) -> None:
        """Count usage, even beyond the limits."""
        if kind == "requests":
            self.add_used(caller.owner, num_requests=count)
        for limit in self._limits(caller):
            if limit.kind == kind and count:
                await self._storage.acquire_sliding_window_entry(
                    limit.key_for(), sys.maxsize, limit.get_expiry(), count
                )

    def add_used(self, owner: str, **counts: int) -> None:
        """Add to an owner's usage."""
        used = self._used.get(owner, Used())
        sums = {name: getattr(used, name) + count for name, count in counts.items()}
        self._used[owner] = replace(used, **sums)

    async def headers(self, caller: Caller) -> dict[str, str]:
        """Rate limit headers; of each kind, for the limit with the least left."""
        found = dict[LimitKind, tuple[int, _Limit]]()
        for limit in self._limits(caller):
            stats = await self._windows.get_window_stats(limit)
            if limit.kind not in found or stats.remaining < found[limit.kind][0]:
                found[limit.kind] = stats.remaining, limit
        headers = {}
        for kind, (remaining, limit) in found.items():
            reset_s = await self._wait_s(limit, limit.amount)
            headers[f"x-ratelimit-limit-{kind}"] = str(limit.amount)
            headers[f"x-ratelimit-remaining-{kind}"] = str(remaining)
            headers[f"x-ratelimit-reset-{kind}"] = _duration(reset_s)
        return headers

    def _limits(self, caller: Caller) -> Iterator[_Limit]:
        for whose, limits in ((caller.owner, caller.limits), (ALL_CALLERS, self._overall)):
            for kind in KINDS:
                amount = getattr(limits, f"{kind}_per_minute")
                if amount is not None:
                    yield _Limit(amount, kind, whose)

    async def _wait_s(self, limit: _Limit, cost: int) -> float:
        """Seconds until `cost` fits, without other usage.

        It fits while weighted < space. In this window weighted = previous * left / expiry +
        current, with `left` seconds to go; in the next one current becomes previous.
        """
        expiry = limit.get_expiry()
        window = await self._storage.get_sliding_window(limit.key_for(), expiry)
        previous, left, current, current_left = window
        space = limit.amount - cost + 1
        if previous * left / expiry + current < space:
            return 0.0
        if current < space:
            return left - expiry * (space - current) / previous
        return current_left - expiry * space / current


class Allowance:
    """The usage of one request. Call `check` and `charge` once its prompt is known, `leave`
    always."""

    def __init__(self, limiter: Limiter, caller: Caller) -> None:
        self._limiter = limiter
        self._caller = caller
        self._num_sequences = 0
        self._has_left = False

    async def check_left(self) -> None:
        """Raises RateLimited if nothing is left, before the prompt is known."""
        await self._limiter.check(self._caller, 0)

    async def check(self, num_tokens: int, num_sequences: int = 1) -> None:
        """Reserve the tokens and sequences. Raises RateLimited and InvalidRequest, as
        `Limiter.check` and `Limiter.add_sequences` do."""
        await self._limiter.check(self._caller, num_tokens)
        self._limiter.add_sequences(self._caller, num_sequences)
        self._num_sequences = num_sequences

    async def charge(self, num_tokens: int) -> None:
        """Count the request and its prompt tokens; also for requests rejected after much work."""
        await self._limiter.record(self._caller, "requests", 1)
        await self._limiter.record(self._caller, "tokens", num_tokens)
        self._limiter.add_used(self._caller.owner, num_prompt_tokens=num_tokens)

    async def leave(self, num_generated: int) -> None:
        """End the request and charge its generated tokens. Idempotent."""
        if not self._has_left:
            self._has_left = True
            self._limiter.leave(self._caller, self._num_sequences)
            await self._limiter.record(self._caller, "tokens", num_generated)
            self._limiter.add_used(self._caller.owner, num_generated_tokens=num_generated)


def _duration(seconds: float) -> str:
    """Whole seconds in OpenAI's format: 1s, 6m0s."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"

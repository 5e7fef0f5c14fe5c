"""Rate limits: requests and tokens per minute, and concurrent requests.

A turn holds an `Allowance`: `Limiter.enter`, then `check` and `charge` once its prompt is known,
and `leave` at its end. Windows are the sliding window counters of the library `limits`: the current
minute plus the overlapping share of the previous one, as if that had been used evenly. Each limit
keeps two numbers; the library's exact windows would keep one entry per token.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from server.api.auth import Caller
from server.errors import InvalidRequest, RateLimited
from server.keys import Limits
from server.settings import Settings

EVERY_CALLER = "all"
"""Pseudo-owner of the server-wide limits; no owner has this name."""

Kind = Literal["requests", "tokens"]
KINDS: tuple[Kind, ...] = ("requests", "tokens")


class _Limit(RateLimitItemPerMinute):
    """Requests or tokens per minute, of one caller or of all."""

    __slots__ = ("_owner", "code", "kind")

    def __init__(self, amount: int, kind: Kind, whose: str) -> None:
        super().__init__(amount, namespace=f"{kind}/{whose}")
        self.kind = kind
        self.code = f"{kind}_per_minute"
        self._owner = "the server's" if whose == EVERY_CALLER else "your"

    def __str__(self) -> str:
        return f"{self._owner} limit of {self.amount} {self.kind} per minute"


class Limiter:
    """Counts usage by caller. Belongs to the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._storage = MemoryStorage()
        self._windows = SlidingWindowCounterRateLimiter(self._storage)
        self._running = Counter[str]()
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

    def leave(self, caller: Caller) -> None:
        """End a request."""
        self._running[caller.owner] -= 1
        if not self._running[caller.owner]:
            del self._running[caller.owner]

    async def check(self, caller: Caller, num_tokens: int) -> None:
        """Raises RateLimited if a request with so many prompt tokens may not begin now.

        Raises InvalidRequest if it can never begin.
        """
        waits = list[tuple[float, _Limit]]()
        for limit in self._limits(caller):
            cost = 1 if limit.kind == "requests" else max(1, num_tokens)
            if cost > limit.amount:
                raise InvalidRequest(
                    f"the prompt has {num_tokens} tokens, counted once per choice, and never fits "
                    f"into {limit}",
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

    async def record(self, caller: Caller, kind: Kind, count: int) -> None:
        """Count usage, even beyond the limits."""
        for limit in self._limits(caller):
            if limit.kind == kind and count:
                await self._storage.acquire_sliding_window_entry(
                    limit.key_for(), sys.maxsize, limit.get_expiry(), count
                )

    async def headers(self, caller: Caller) -> dict[str, str]:
        """Rate limit headers: of each kind, the limit that leaves least."""
        found = dict[Kind, tuple[int, _Limit]]()
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
        for whose, limits in ((caller.owner, caller.limits), (EVERY_CALLER, self._overall)):
            for kind in KINDS:
                amount = getattr(limits, f"{kind}_per_minute")
                if amount is not None:
                    yield _Limit(amount, kind, whose)

    async def _wait_s(self, limit: _Limit, cost: int) -> float:
        """Seconds until `cost` fits, if nothing else is used until then.

        It fits while weighted < space. In this window weighted = previous * left / expiry +
        current, with `left` seconds to go; in the next one current takes the place of previous.
        """
        expiry = limit.get_expiry()
        window = await self._storage.get_sliding_window(limit.key_for(), expiry)
        previous, left, current, current_left = window
        room = limit.amount - cost + 1
        if previous * left / expiry + current < room:
            return 0.0
        if current < room:
            return left - expiry * (room - current) / previous
        return current_left - expiry * room / current


class Allowance:
    """The usage of one request. Call `check` and `charge` once its prompt is known, `leave`
    always."""

    def __init__(self, limiter: Limiter, caller: Caller) -> None:
        self._limiter = limiter
        self._caller = caller
        self._has_left = False

    async def check(self, num_tokens: int) -> None:
        """As `Limiter.check`."""
        await self._limiter.check(self._caller, num_tokens)

    async def charge(self, num_tokens: int) -> None:
        """Charge an accepted request and its prompt tokens."""
        await self._limiter.record(self._caller, "requests", 1)
        await self._limiter.record(self._caller, "tokens", num_tokens)

    async def leave(self, num_generated: int) -> None:
        """End the request and charge its generated tokens. Idempotent."""
        if not self._has_left:
            self._has_left = True
            self._limiter.leave(self._caller)
            await self._limiter.record(self._caller, "tokens", num_generated)


def _duration(seconds: float) -> str:
    """Whole seconds in OpenAI's format: 1s, 6m0s."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"

"""Compares a server's counters with what its clients sent and received."""

import asyncio
from dataclasses import dataclass

import httpx

from loadtest.chaos.tally import Tally
from loadtest.processes import Metrics, parse_metrics

EVERY_S = 0.2
"""Seconds between polls of a server's metrics."""

COMPLETIONS = "/v1/completions"


@dataclass
class Totals:
    """Completions since one server's start, as counted by its clients."""

    sent: int = 0
    answered: int = 0
    """Completions received to their end."""

    tokens: int = 0
    """Tokens of answers received to their end and not replayed."""

    async def count(self, request: httpx.Request) -> None:
        """Event hook of httpx, called before a request is sent."""
        if request.url.path == COMPLETIONS:
            self.sent += 1

    def acknowledge(self, tokens: int) -> None:
        """A completion was received to its end."""
        self.answered += 1
        self.tokens += tokens


async def watch(http: httpx.AsyncClient, totals: Totals, tally: Tally) -> None:
    """Poll until cancelled or until the server is gone.

    Whatever a client has received before one poll must be counted in the next, and nothing that was
    not sent.
    """
    answered = tokens = 0
    try:
        while True:
            before = (totals.answered, totals.tokens)
            metrics = parse_metrics((await http.get("/metrics")).text)
            requests, generated = completions(metrics), metrics["latentd_answer_tokens_total"]
            if not answered <= requests <= totals.sent:
                story = f"{requests:g} completions; answered {answered}, sent {totals.sent}"
                tally.problems.append(("wrong metrics", story))
            if generated < tokens:
                story = f"{generated:g} tokens of answers; acknowledged {tokens}"
                tally.problems.append(("wrong metrics", story))
            tally.verified["metrics"] += 1
            answered, tokens = before
            await asyncio.sleep(EVERY_S)
    except httpx.TransportError:
        pass


def completions(metrics: Metrics) -> float:
    """Requests counted by the server, with any outcome."""
    name = f'latentd_requests_total{{endpoint="{COMPLETIONS}"'
    return sum(value for key, value in metrics.items() if key.startswith(name))

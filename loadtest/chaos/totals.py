"""What a server counts, held against what its clients sent and were answered."""

import asyncio
from dataclasses import dataclass

import httpx

from loadtest.chaos.tally import Tally
from loadtest.processes import Metrics, parse_metrics

EVERY_S = 0.2
"""Between two looks at a server's metrics."""

COMPLETIONS = "/v1/completions"


@dataclass
class Totals:
    """Of completions, since one server's start, as its clients know them."""

    sent: int = 0
    answered: int = 0
    """Seen to their end."""

    tokens: int = 0
    """Of answers that were seen to their end and made anew."""

    async def count(self, request: httpx.Request) -> None:
        """An event hook of httpx, called before a request is sent."""
        if request.url.path == COMPLETIONS:
            self.sent += 1

    def acknowledge(self, tokens: int) -> None:
        """A completion was seen to its end."""
        self.answered += 1
        self.tokens += tokens


async def watch(http: httpx.AsyncClient, totals: Totals, tally: Tally) -> None:
    """Look until cancelled or until the server is gone.

    What a client saw the end of before one look must be counted in the next, and nothing that was
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
    """Requests that the server has counted, whatever came of them."""
    name = f'latentd_requests_total{{endpoint="{COMPLETIONS}"'
    return sum(value for key, value in metrics.items() if key.startswith(name))

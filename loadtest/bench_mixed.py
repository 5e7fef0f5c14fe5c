"""Prefill and decode mixed over HTTP, next to each alone; a long prompt among streams.

    python -m loadtest.bench_mixed --dtype float32 --dtype int8

A network of the published size with random weights. With `--against FOLDER`, another checkout of
this repository, its server does the same in turn, and ratios are those of one run. Every round
starts each server anew, alone, and the one that is first in a round is second in the next: what
memory and how warm a machine a server gets depends on what ran before it.
"""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from loadtest.bench_http import stream
from loadtest.gpu_server import write_checkpoint
from loadtest.processes import started
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel

FLAGS = ("--prefix-cache-bytes", "0", "--log-level", "warning", "--device", "cpu")


class Streams(NamedTuple):
    """A client's view of streams that began together."""

    seconds: float
    num_tokens: int
    first_s: list[float]
    """Seconds to the first token, per stream."""

    gaps_s: list[float]
    """Seconds between tokens, over all streams."""


@dataclass
class Server:
    """A server under measurement, with its measurements by name, one per round."""

    name: str
    checkout: Path
    flags: tuple[str, ...]
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    port: int = 0
    found: dict[str, list[float]] = field(default_factory=dict)

    facts: tuple[str, ...] = ()
    """What it printed of its device and backend."""

    def note(self, **values: float) -> None:
        for name, value in values.items():
            self.found.setdefault(name, []).append(value)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Its process, on a free port."""
        with started("server", "serve", *FLAGS, *self.flags, checkout=self.checkout) as found:
            self.port, self.facts = found.port, found.facts
            yield

    async def streams(self, count: int, prompt_tokens: int, tokens: int) -> Streams:
        """`count` streams of random prompts, each with `tokens` tokens."""
        times: list[list[float]] = [[] for _ in range(count)]
        started = time.perf_counter()
        done = [self._stream(prompt_tokens, tokens, own) for own in times]
        num_tokens = sum(await asyncio.gather(*done))
        seconds = time.perf_counter() - started
        own = [each[:tokens] for each in times]
        gaps = [b - a for each in own for a, b in pairwise(each)]
        return Streams(seconds, num_tokens, [each[0] - started for each in own if each], gaps)

    async def long_prompt(self, prompt_tokens: int, running: int) -> tuple[list[float], float]:
        """While a long prompt is read among running streams: the gaps between their tokens, and
        their tokens per second."""
        times: list[list[float]] = [[] for _ in range(running)]
        tasks = [asyncio.create_task(self._stream(4, 20_000, own)) for own in times]
        await self._stream(4, 30, [])  # until all of them run
        began = time.perf_counter()
        await self._stream(prompt_tokens, 1, [])
        ended = time.perf_counter()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        during = [[at for at in own if began <= at <= ended] for own in times]
        gaps = [b - a for own in during for a, b in pairwise(own)]
        return gaps, sum(map(len, during)) / (ended - began)

    async def _stream(self, prompt_tokens: int, tokens: int, times: list[float]) -> int:
        prompt = self.chance.choices(range(1, 50_000), k=prompt_tokens)
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": 1}
        return await stream(self.port, body, times)


async def mixed(each: Server) -> None:
    """Eight prompts of 512 tokens with answers of 64, and each of both alone."""
    both = await each.streams(8, 512, 64)
    prompts = await each.streams(8, 512, 0)
    answers = await each.streams(8, 1, 64)
    each.note(
        tokens_per_s=both.num_tokens / both.seconds,
        over_alone=both.seconds / (prompts.seconds + answers.seconds),
        first_p50_s=statistics.median(both.first_s),
        first_p99_s=max(both.first_s),
        gap_p99_ms=1e3 * _p99(both.gaps_s),
        prompts_s=prompts.seconds,
        answers_s=answers.seconds,
    )


async def long(each: Server) -> None:
    """A prompt of 4,096 tokens among 8 streams."""
    gaps, rate = await each.long_prompt(4096, 8)
    alone = await each.streams(8, 1, 32)
    each.note(
        gap_p50_ms=1e3 * statistics.median(gaps),
        gap_p99_ms=1e3 * _p99(gaps),
        streams_tokens_per_s=rate,
        streams_alone_tokens_per_s=8 / statistics.median(alone.gaps_s),
    )


async def rates(each: Server) -> None:
    """Sessions that only decode."""
    one = await each.streams(1, 1, 48)
    many = await each.streams(32, 1, 24)
    each.note(
        one_tokens_per_s=1 / statistics.median(one.gaps_s),
        of_32_tokens_per_s=32 / statistics.median(many.gaps_s),
    )


PARTS: dict[str, Callable[[Server], Coroutine[None, None, None]]] = {
    "mixed": mixed,
    "long": long,
    "rates": rates,
}


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def report(servers: Sequence[Server]) -> None:
    """Medians with the smallest and the largest value; ratios of the first server to the second."""
    ours, *others = servers
    for each in servers:
        print("\n".join(f"  {each.name}: {fact}" for fact in each.facts))
    for name, values in ours.found.items():
        line = f"  {name:22} {_spread(values)}"
        for other in others:
            pairs = zip(values, other.found[name], strict=True)
            ratios = [mine / theirs for mine, theirs in pairs]
            line += f"   {other.name} {_spread(other.found[name])}   ratio {_spread(ratios)}"
        print(line, flush=True)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.3f} ({min(values):.3f} to {max(values):.3f})"


def main(
    dtype: Annotated[list[str], typer.Option(help="Of the weights; several may be given.")],
    rounds: Annotated[
        int, typer.Option(help="Repetitions, better an even number; medians are shown.")
    ] = 4,
    part: Annotated[list[str], typer.Option(help="Of what is measured.")] = [*PARTS],  # noqa: B006
    latency_ms: Annotated[float, typer.Option(help="--inter-token-latency-ms.")] = 100.0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of another model of 50,000 tokens or more.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Another checkout.")] = None,
) -> None:
    """Measure and print."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint or Path(folder) / "model"
        if checkpoint is None:
            write_checkpoint(LanguageModel(ModelConfig()), model)
        for each in dtype:
            flags = (str(model), "--dtype", each)
            own = (*flags, "--inter-token-latency-ms", str(latency_ms))
            servers = [Server("ours", Path.cwd(), own)]
            if against is not None:
                servers.append(Server("theirs", against, flags))
            for number in range(rounds):
                for measured in servers if number % 2 == 0 else reversed(servers):
                    with measured.running():
                        asyncio.run(measured.streams(2, 64, 8))  # the first ones are slower
                        for name in part:
                            asyncio.run(PARTS[name](measured))
            print(f"{each}:")
            report(servers)


if __name__ == "__main__":
    typer.run(main)

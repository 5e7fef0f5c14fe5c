"""Memory and time per token of one session as it grows to a million tokens.

    python -m loadtest.bench_flat [--svg docs/flat.svg]

The session is kept at each length that is shown; then all of them take steps in turn, so that the
ratio of their times does not depend on how busy the machine is.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from model import PRETRAINED
from model.batch import Batch
from model.heinsen.checkpoint import load
from model.heinsen.network import LanguageModel
from server.engine.device import choose_threads

CHUNK_TOKENS = 2048
STEPS = 50


def grow(network: LanguageModel, lengths: list[int], seed: int) -> list[bytes]:
    """The state of one session after each of these numbers of tokens."""
    chance = torch.Generator().manual_seed(seed)
    pool, states, seen = network.new_pool(1), [], 0
    for length in lengths:
        while seen < length:
            count = min(CHUNK_TOKENS, length - seen)
            ids = torch.randint(4, network.config.vocab_sz, (1, count), generator=chance)
            network.forward(Batch.of(ids.unbind(), [0]), pool)
            seen += count
        states.append(pool.export_row(0))
    return states


def step_times(network: LanguageModel, states: list[bytes], rounds: int) -> list[float]:
    """Median seconds of a decoding step from each state."""
    pools, taken = [network.new_pool(1) for _ in states], [list[float]() for _ in states]
    for pool, state in zip(pools, states, strict=True):
        pool.import_row(0, state)
    ids = torch.tensor([5])
    for _ in range(rounds):
        for pool, times in zip(pools, taken, strict=True):
            network.forward(Batch.of_tokens(ids, [0]), pool)
            started = time.perf_counter()
            for _ in range(STEPS):
                network.forward(Batch.of_tokens(ids, [0]), pool)
            times.append((time.perf_counter() - started) / STEPS)
    return [statistics.median(times) for times in taken]


def draw(network: LanguageModel, lengths: list[int], sizes: list[int]) -> str:
    """An SVG: bytes of a session, and of a key-value cache of the same width, by tokens."""
    c = network.config
    cache = [2 * 4 * c.n_layers * c.d_emb * length for length in lengths]
    top, left, width, height = 40, 70, 540, 240
    most = max(cache)

    def line(values: list[int]) -> str:
        points = (
            f"{left + width * n / lengths[-1]:.1f},{top + height * (1 - v / most):.1f}"
            for n, v in zip([0, *lengths], values, strict=True)
        )
        return " ".join(points)

    text = "font-family='sans-serif' font-size='13'"
    marks = []
    for part in range(5):
        y = top + height * (1 - part / 4)
        x = left + width * part / 4
        marks.append(
            f"<path d='M{left} {y}h{width}' stroke='#ddd'/>"
            f"<text x='{left - 8}' y='{y + 4}' {text} text-anchor='end' fill='#666'>"
            f"{most * part / 4 / 2**30:.1f} GiB</text>"
            f"<text x='{x}' y='{top + height + 20}' {text} text-anchor='middle' fill='#666'>"
            f"{lengths[-1] * part // 4:,}</text>"
        )
    return "\n".join(
        [
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 660 330'>",
            "<rect width='660' height='330' fill='white'/>",
            *marks,
            f"<polyline points='{line([0, *cache])}' fill='none' stroke='#c55' stroke-width='2' "
            "stroke-dasharray='5 4'/>",
            f"<polyline points='{line([sizes[0], *sizes])}' fill='none' stroke='#159' "
            "stroke-width='4'/>",
            f"<text x='{left + 235}' y='{top + 175}' {text} fill='#c55'>key-value cache of the "
            "same width (computed)</text>",
            f"<text x='{left + 150}' y='{top + height - 12}' {text} fill='#159'>a latentd session: "
            f"{sizes[-1]:,} bytes (measured)</text>",
            f"<text x='{left}' y='24' {text} font-weight='bold' fill='#222'>memory of one session "
            "by tokens in its context</text>",
            "</svg>\n",
        ]
    )


def main(
    tokens: Annotated[int, typer.Option(min=1000, help="The longest context.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are shown.")] = 30,
    folder: Annotated[Path, typer.Option("--checkpoint", help="Folder of the model.")] = PRETRAINED,
    svg: Annotated[Path | None, typer.Option(help="Draw the memory here.")] = None,
) -> None:
    """Measure and print."""
    network = load(folder, torch.device("cpu")).network
    choose_threads(None, network)
    lengths = [n for n in (1_000, 10_000, 100_000, 1_000_000, 10_000_000) if n < tokens] + [tokens]
    states = grow(network, lengths, seed=0)
    times = step_times(network, states, rounds)
    for length, state, seconds in zip(lengths, states, times, strict=True):
        print(f"{length:10,} tokens: {len(state):,} bytes, {1e6 * seconds:6.0f} µs a token")
    print(f"time per token, last over first: {times[-1] / times[0]:.3f}")
    if svg is not None:
        svg.write_text(draw(network, lengths, [len(state) for state in states]))


if __name__ == "__main__":
    typer.run(main)

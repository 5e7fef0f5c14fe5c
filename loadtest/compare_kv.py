"""A session next to a transformer's key-value cache: bytes, and time per token, by context
length."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table

from loadtest import charts, options
from loadtest.results import console, write_result
from model import PRETRAINED, checkpoint
from model.batch import Batch
from model.network import Description, Network
from model.state import StatePool
from server.engine.device import choose_threads

if TYPE_CHECKING:
    from transformers import GPT2Config

CONTEXTS = (128, 512, 2_048, 8_192, 32_768, 131_072, 1_000_000)
CHUNK_TOKENS = 2_048
STEPS = 10
"""Steps timed together; the median of the rounds is shown."""

HEAD_CHANNELS = 64
"""Of GPT-2."""


@dataclass(frozen=True)
class Measured:
    """Results at one context length."""

    tokens: int
    session_bytes: int
    session_s: float
    """Seconds per token."""

    cache_bytes: int | None
    """None where the transformer was not run."""

    cache_s: float | None


def transformer_config(network: Network, num_parameters: int, width: int, most: int) -> Any:
    """GPT-2's shape with this width, and the number of layers that comes closest to
    `num_parameters`.

    Its position embedding, which grows with the longest context, is not counted.
    """
    from transformers import GPT2Config

    embedding, layer = network.vocab_size * width, 12 * width**2 + 13 * width
    return GPT2Config(
        vocab_size=network.vocab_size,
        n_positions=most + 1,
        n_embd=width,
        n_layer=max(1, round((num_parameters - embedding) / layer)),
        n_head=max(1, width // HEAD_CHANNELS),
        bos_token_id=None,
        eos_token_id=None,
    )


def width_of(size: Description) -> int:
    """Width of the residual stream. Raises RuntimeError if the family does not name it."""
    for name in ("d_emb", "hidden_size", "d_model"):
        if isinstance(width := size.sizes.get(name), int):
            return width
    raise RuntimeError(f"this model's sizes do not include a width: {', '.join(size.sizes)}")


class Transformer:
    """GPT-2 with random weights, decoding one sequence with torch's fused attention."""

    def __init__(self, config: "GPT2Config") -> None:
        from transformers import GPT2LMHeadModel

        self.config = config
        self.model: Any = GPT2LMHeadModel(config).eval()
        positions = self.model.transformer.wpe.weight.numel()
        self.num_parameters = sum(p.numel() for p in self.model.parameters()) - positions

    def cache(self, tokens: int) -> Any:
        """A cache with `tokens` tokens of random numbers; the values do not affect the cost."""
        from transformers import StaticCache

        made: Any = StaticCache(config=self.config, max_cache_len=tokens + 1)
        heads = self.config.n_head
        made.early_initialization(
            1, heads, self.config.n_embd // heads, torch.float32, torch.device("cpu")
        )
        for layer in made.layers:
            layer.keys.normal_()
            layer.values.normal_()
        return made

    def step(self, cache: Any, tokens: int) -> None:
        """Decode the token after the first `tokens`."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(tokens)
        token, position = torch.tensor([[5]]), torch.tensor([[tokens]])
        with torch.inference_mode():
            self.model(token, cache=cache, use_cache=True, position_ids=position)


def cache_bytes(cache: Any, tokens: int) -> int:
    """Size of the first `tokens` tokens."""
    layers = cache.layers
    return sum(
        each.nbytes * tokens // each.shape[2]
        for layer in layers
        for each in (layer.keys, layer.values)
    )


def grown(network: Network, contexts: Sequence[int], seed: int) -> list[StatePool]:
    """One session per context length, after reading that many tokens: a pool for each."""
    chance = torch.Generator().manual_seed(seed)
    pool, found, seen = network.new_pool(1), list[StatePool](), 0
    for length in contexts:
        while seen < length:
            count = min(CHUNK_TOKENS, length - seen)
            ids = torch.randint(4, network.vocab_size, (count,), generator=chance)
            network.forward(Batch.of([ids.numpy()], [0]), pool)
            seen += count
        copy = network.new_pool(1)
        copy.import_row(0, pool.export_row(0))
        found.append(copy)
    return found


def alternate(rounds: int, tasks: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each task: alternating, each STEPS times after one warm-up.

    The order changes each round: a task after a long cache finds cold processor caches.
    """
    times: list[list[float]] = [[] for _ in tasks]
    both, chance = list(zip(tasks, times, strict=True)), random.Random(0)
    for _ in range(rounds):
        for task, measured in chance.sample(both, len(both)):
            task()
            started = time.perf_counter()
            for _ in range(STEPS):
                task()
            measured.append((time.perf_counter() - started) / STEPS)
    return [statistics.median(measured) for measured in times]


def measure(
    network: Network,
    transformer: Transformer,
    ours: Sequence[int],
    theirs: Sequence[int],
    rounds: int,
    seed: int,
) -> list[Measured]:
    """All lengths of both in turn, so that ratios do not depend on other load of the machine."""
    pools, token = grown(network, ours, seed), Batch.of_tokens([5], [0])
    caches = [transformer.cache(length) for length in theirs]

    tasks: list[Callable[[], object]] = [partial(network.forward, token, pool) for pool in pools]
    tasks += [
        partial(transformer.step, cache, length)
        for cache, length in zip(caches, theirs, strict=True)
    ]
    seconds = alternate(rounds, tasks)
    of_cache = {
        length: (cache_bytes(cache, length), measured)
        for length, cache, measured in zip(theirs, caches, seconds[len(ours) :], strict=True)
    }
    return [
        Measured(length, len(pool.export_row(0)), measured, *of_cache.get(length, (None, None)))
        for length, pool, measured in zip(ours, pools, seconds, strict=False)
    ]


def draw(path: Path, found: Sequence[Measured], names: tuple[str, str]) -> None:
    """Both by context length."""
    session, cache = names
    both = [each for each in found if each.cache_bytes is not None]
    x = charts.Axis("tokens in the context", log=True)
    with charts.figure(path, 2, "One session by the tokens in its context") as (sizes, times):
        lines = {
            session: [(m.tokens, m.session_bytes / 2**20) for m in found],
            cache: [(m.tokens, (m.cache_bytes or 0) / 2**20) for m in both],
        }
        charts.draw_lines(sizes, "memory", x, charts.Axis("MiB", log=True), lines)
        lines = {
            session: [(m.tokens, 1e3 * m.session_s) for m in found],
            cache: [(m.tokens, 1e3 * (m.cache_s or 0)) for m in both],
        }
        charts.draw_lines(times, "time of a token", x, charts.Axis("ms", log=True), lines)


def compare_kv(
    tokens: Annotated[
        int, typer.Option(min=128, help="Tokens of the longest session.")
    ] = 1_000_000,
    cache_tokens: Annotated[
        int, typer.Option(min=128, help="Tokens of the longest cache.")
    ] = 32_768,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 15,
    folder: Annotated[Path, typer.Option("--checkpoint", help="Folder of the model.")] = PRETRAINED,
    picture: Annotated[
        Path | None, typer.Option(help="Also write a chart to this file (SVG or PNG).")
    ] = None,
    out: options.Out = None,
    seed: options.Seed = 0,
) -> None:
    """A session next to the key-value cache of a transformer of the same size, in one run.

    The session's tokens are prefilled; the cache is filled with random numbers. Both decode.
    """
    if out is not None or picture is not None:
        charts.require()
    try:
        import transformers
    except ImportError:
        typer.echo("needs transformers: pip install 'latentd[loadtest]'", err=True)
        raise typer.Exit(1) from None
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    network = checkpoint.load(folder, torch.device("cpu")).network
    size = checkpoint.describe(folder)
    choose_threads(None, network)
    ours = [*(n for n in CONTEXTS if n < tokens), tokens]
    theirs = [n for n in ours if n <= cache_tokens]
    shape = transformer_config(network, size.num_parameters, width_of(size), max(theirs))
    transformer = Transformer(shape)
    console.print(f"reading {tokens:,} tokens")
    found = measure(network, transformer, ours, theirs, rounds, seed)
    names = (
        f"latentd, {size.num_parameters / 1e6:.1f} M parameters",
        f"GPT-2's shape, {transformer.num_parameters / 1e6:.1f} M, its key-value cache",
    )
    table = Table(title=", ".join(names), title_justify="left")
    for column in ("tokens", "session bytes", "ms a token", "cache bytes", "ms a token"):
        table.add_column(column, justify="right")
    for m in found:
        cache = ("-", "-")
        if m.cache_bytes is not None and m.cache_s is not None:
            cache = (f"{m.cache_bytes:,}", f"{1e3 * m.cache_s:.3f}")
        table.add_row(f"{m.tokens:,}", f"{m.session_bytes:,}", f"{1e3 * m.session_s:.3f}", *cache)
    console.print(table)
    console.print(
        f"time per token, last over first: {found[-1].session_s / found[0].session_s:.3f}"
    )
    if out is not None:
        result = {
            "parameters": [size.num_parameters, transformer.num_parameters],
            "transformer": {"layers": shape.n_layer, "width": shape.n_embd, "heads": shape.n_head},
            "measured": [asdict(each) for each in found],
        }
        write_result(out, result)
        draw(out / "compare-kv.png", found, names)
    if picture is not None:
        draw(picture, found, names)

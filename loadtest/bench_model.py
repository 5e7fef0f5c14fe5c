"""Prefill and decode of the paper's network on this machine, next to its own log-space form.

    python -m loadtest.bench_model

Random weights, the published configuration (124.9 M parameters), its weights in each dtype. Both
forms run in turn in one process, so that a ratio does not depend on how busy the machine is. Or
another model of any family, by itself, with `--model`.
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from loadtest.log_space import LogSpaceForm
from model import WeightDtype, checkpoint
from model.batch import Batch
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.memory import large_pages
from model.network import Network

NUM_SESSIONS = (1, 8, 32)
DTYPES: tuple[WeightDtype, ...] = ("float32", "bfloat16", "int8")


def alternate(rounds: int, *tasks: Callable[[], object]) -> list[float]:
    """Median seconds of each task, run in turn."""
    times: list[list[float]] = [[] for _ in tasks]
    for task in tasks:
        task()
    for _ in range(rounds):
        for task, measured in zip(tasks, times, strict=True):
            started = time.perf_counter()
            task()
            measured.append(time.perf_counter() - started)
    return [statistics.median(measured) for measured in times]


def read_bandwidth() -> float:
    """Bytes per second that summing a large array reaches, in memory like that of weights."""
    x = large_pages().zeros((64 << 20,), torch.float32).fill_(1)
    [seconds] = alternate(7, lambda: x.sum())
    return x.nbytes / seconds


def product_rate(network: LanguageModel, tokens: int) -> float:
    """Multiply-adds per second, times two, of the plain matrix products of a prefill."""
    weights = [p for p in network.parameters() if p.dim() == 2][1:]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1]) for w in weights}

    @torch.inference_mode()
    def products() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    [seconds] = alternate(3, products)
    return 2 * tokens * sum(w.numel() for w in weights) / seconds


def measure(
    dtype: WeightDtype,
    served: Network,
    prompt_tokens: int,
    rounds: int,
    network: LanguageModel | None = None,
) -> None:
    """Print what a network does with its weights in one dtype. `network` is the one that it was
    packed from, if its plain products are to be measured beside, and in float32 its log-space form.
    """
    ids = torch.randint(served.vocab_size, (1, prompt_tokens))
    pool = served.new_pool(max(NUM_SESSIONS))
    paper = network if dtype == "float32" else None

    def prefill() -> None:
        served.forward(Batch.of(ids.unbind(), [0]).wanting([prompt_tokens - 1]), pool)

    def against(task: Callable[[], object], theirs: Callable[[], object] | None, n: int) -> float:
        if theirs is None:
            return alternate(n, task)[0]
        ours, paper = alternate(n, task, theirs)
        print(f"  log-space form {1e3 * paper:.1f} ms, so {paper / ours:.1f}x:")
        return ours

    print(f"{dtype}:")
    form = paper and partial(LogSpaceForm(paper, 1).prefill, ids)
    ours = against(prefill, form, rounds)
    words = (
        f"  prefill of {prompt_tokens}: {1e3 * ours:.1f} ms, {prompt_tokens / ours:.0f} tokens/s"
    )
    if network is not None:
        products = 2 * prompt_tokens * (network.num_parameters - network.embed.weight.numel())
        share = products / ours / product_rate(network, prompt_tokens)
        words += f", {100 * share:.0f}% of float32 products"
    print(words)
    single = None
    for count in NUM_SESSIONS:
        tokens = torch.randint(served.vocab_size, (count,))
        step = partial(served.forward, Batch.of_tokens(tokens, range(count)), pool)
        form = paper and partial(LogSpaceForm(paper, count).step, tokens)
        ours = against(step, form, 4 * rounds)
        single = single or ours
        print(
            f"  decode, {count:2} sessions: {1e3 * ours:.1f} ms a step, "
            f"{count / ours:.1f} tokens/s, {count * single / ours:.1f}x of one"
        )
        if count == 1:
            rates = []
            for _ in range(rounds):  # what the memory gives changes within seconds
                [ours] = alternate(8, step)
                rates.append(served.weight_bytes / ours / read_bandwidth())
            print(f"  weights read at {100 * statistics.median(rates):.0f}% of the bandwidth")


def main(
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prefill.")] = 512,
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are shown.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    model: Annotated[Path | None, typer.Option(help="Another one, of any family.")] = None,
    dtype: Annotated[list[str], typer.Option(help="Of the weights.")] = [*DTYPES],  # noqa: B006
) -> None:
    """Measure and print."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    chosen = [each for each in DTYPES if each in dtype]
    if model is not None:
        for each in chosen:
            served = checkpoint.load(model, torch.device("cpu"), each).network
            print(f"{served.num_parameters:,} parameters, {torch.get_num_threads()} threads")
            print(f"one session: {served.state_spec.num_bytes:,} bytes")
            measure(each, served, prompt_tokens, rounds)
        return
    network = LanguageModel(ModelConfig()).requires_grad_(False).eval()
    print(f"{network.num_parameters:,} parameters, {torch.get_num_threads()} threads")
    print(f"one session: {network.state_spec.num_bytes:,} bytes")
    for each in chosen:
        measure(each, copy.deepcopy(network).pack(each), prompt_tokens, rounds, network)


if __name__ == "__main__":
    typer.run(main)

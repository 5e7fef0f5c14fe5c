"""Prefill and decode of the paper's network on this machine, next to its own log-space form.

    python -m loadtest.bench_model

Random weights, the published configuration (124.9 M parameters), in each dtype. Both forms
alternate in one process, so that ratios do not depend on other load.
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from loadtest.log_space import LogSpaceForm
from model import WeightDtype
from model.batch import Batch
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel

NUM_SESSIONS = (1, 8, 32)


def alternate(rounds: int, *tasks: Callable[[], object]) -> list[float]:
    """Median seconds of each task, alternating."""
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
    """Bytes per second when summing a large array."""
    x = torch.ones(64 << 20)
    [seconds] = alternate(7, lambda: x.sum())
    return x.nbytes / seconds


def product_rate(network: LanguageModel, tokens: int) -> float:
    """Floating-point operations per second of the plain matrix products of a prefill."""
    weights = [p for p in network.parameters() if p.dim() == 2][1:]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1]) for w in weights}

    @torch.inference_mode()
    def products() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    [seconds] = alternate(3, products)
    return 2 * tokens * sum(w.numel() for w in weights) / seconds


def measure(
    dtype: WeightDtype, network: LanguageModel, prompt_tokens: int, rounds: int, *, compare: bool
) -> None:
    """Measure and print one weight dtype."""
    config, served = network.config, copy.deepcopy(network).pack(dtype)
    ids = torch.randint(config.vocab_sz, (1, prompt_tokens))
    pool = served.new_pool(max(NUM_SESSIONS))

    def prefill() -> None:
        served.forward(Batch.of(ids.unbind(), [0]).wanting([prompt_tokens - 1]), pool)

    def against(task: Callable[[], object], theirs: Callable[[], object], times: int) -> float:
        if not compare:
            return alternate(times, task)[0]
        ours, paper = alternate(times, task, theirs)
        print(f"  log-space form {1e3 * paper:.1f} ms, so {paper / ours:.1f}x:")
        return ours

    print(f"{dtype}:")
    ours = against(prefill, lambda: LogSpaceForm(network, 1).prefill(ids), rounds)
    products = 2 * prompt_tokens * (network.num_parameters - network.embed.weight.numel())
    print(
        f"  prefill of {prompt_tokens}: {1e3 * ours:.1f} ms, {prompt_tokens / ours:.0f} tokens/s, "
        f"{100 * products / ours / product_rate(network, prompt_tokens):.0f}% of float32 products"
    )
    single = None
    for count in NUM_SESSIONS:
        tokens = torch.randint(config.vocab_sz, (count,))
        theirs = LogSpaceForm(network, count)
        step = partial(served.forward, Batch.of_tokens(tokens, range(count)), pool)
        ours = against(step, partial(theirs.step, tokens), 4 * rounds)
        single = single or ours
        print(
            f"  decode, {count:2} sessions: {1e3 * ours:.1f} ms per step, "
            f"{count / ours:.1f} tokens/s, {count * single / ours:.1f}x of one"
        )
        if count == 1:
            rate = served.weight_bytes / ours / read_bandwidth()
            print(f"  weights read at {100 * rate:.0f}% of the bandwidth")


def main(
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prefill.")] = 512,
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are shown.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Measure and print."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = LanguageModel(ModelConfig()).requires_grad_(False).eval()
    print(f"{network.num_parameters:,} parameters, {torch.get_num_threads()} threads")
    print(f"one session: {network.state_spec.num_bytes:,} bytes")
    measure("float32", network, prompt_tokens, rounds, compare=True)
    measure("bfloat16", network, prompt_tokens, rounds, compare=False)
    measure("int8", network, prompt_tokens, rounds, compare=False)


if __name__ == "__main__":
    typer.run(main)

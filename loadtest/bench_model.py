"""Prefill and decode of the paper's network on this machine, next to its own log-space form.

    python -m loadtest.bench_model

Random weights, the published configuration (124.9 M parameters), its weights in each dtype. Both
forms run in turn in one process, so that a ratio does not depend on how busy the machine is.
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
from torch import Tensor

from model import WeightDtype
from model.config import ModelConfig
from model.network import LanguageModel

NUM_SESSIONS = (1, 8, 32)


class LogSpaceForm:
    """The same network as the paper writes it: (H_S, H_Z) as logarithms of sums, eqs. 2, 5 and 6.

    Prefill materialises the scan of all states, as the reference implementation does.
    """

    def __init__(self, network: LanguageModel, batch: int) -> None:
        c = network.config
        shape = (c.n_layers, batch, c.n_heads, c.d_key)
        self.network = network
        self.h = torch.zeros(batch, c.d_emb)
        self.h_s = torch.full((*shape, c.d_val), -torch.inf)
        self.h_z = torch.full(shape, -torch.inf)

    @torch.inference_mode()
    def prefill(self, token_ids: Tensor) -> Tensor:
        """token_ids `[1, tokens]`, from an empty state -> logits of the last token."""
        network = self.network
        emb = network.embed(token_ids)
        a, b = network.embed_pos.dense(emb).chunk(2, -1)
        decay = F.logsigmoid(a).cumsum(1)
        x = emb + decay + torch.logaddexp(self.h.unsqueeze(1), (b - decay).logcumsumexp(1))
        for layer in network.blocks:
            q, k, log_v = layer.project(x)
            h_s = (k.unsqueeze(-1) + log_v.unsqueeze(-2)).logcumsumexp(1)
            h_z = k.logcumsumexp(1)
            x = layer.merge(x, _read(q, h_s, h_z))
        return F.linear(network.lnorm(x[:, -1]), network.embed.weight)

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """One token of every sequence: `[batch]` -> logits."""
        network = self.network
        emb = network.embed(token_ids)
        a, b = network.embed_pos.dense(emb).chunk(2, -1)
        self.h = torch.logaddexp(F.logsigmoid(a) + self.h, b)
        x = emb + self.h
        for number, layer in enumerate(network.blocks):
            q, k, log_v = layer.project(x)
            h_s, h_z = self.h_s[number], self.h_z[number]
            torch.logaddexp(h_s, k.unsqueeze(-1) + log_v.unsqueeze(-2), out=h_s)
            torch.logaddexp(h_z, k, out=h_z)
            x = layer.merge(x, _read(q, h_s, h_z))
        return F.linear(network.lnorm(x), network.embed.weight)


def _read(q: Tensor, h_s: Tensor, h_z: Tensor) -> Tensor:
    return (q.unsqueeze(-1) + h_s).logsumexp(-2) - (q + h_z).logsumexp(-1, keepdim=True)


def alternate(rounds: int, *tasks: Callable[[], object]) -> list[float]:
    """Median seconds of each task, run in turn."""
    times: list[list[float]] = [[] for _ in tasks]
    for task in tasks:
        task()
    for _ in range(rounds):
        for task, taken in zip(tasks, times, strict=True):
            started = time.perf_counter()
            task()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def read_bandwidth() -> float:
    """Bytes per second that summing a large array reaches."""
    x = torch.ones(64 << 20)
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
    dtype: WeightDtype, network: LanguageModel, prompt_tokens: int, rounds: int, *, compare: bool
) -> None:
    """Print what the network does with its weights in one dtype."""
    config, served = network.config, copy.deepcopy(network).pack(dtype)
    ids = torch.randint(config.vocab_sz, (1, prompt_tokens))
    pool = served.new_pool(max(NUM_SESSIONS))

    def prefill() -> None:
        served.prefill(ids[:, :-1], [prompt_tokens - 1], pool, [0])
        served.step(ids[:, -1], pool, [0])

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
        step = partial(served.step, tokens, pool, range(count))
        ours = against(step, partial(theirs.step, tokens), 4 * rounds)
        single = single or ours
        print(
            f"  decode, {count:2} sessions: {1e3 * ours:.1f} ms a step, "
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

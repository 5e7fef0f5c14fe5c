"""Recall of networks trained on a synthetic task, by state size.

    python -m model.training.recall associative --results recall.jsonl
    python -m model.training.recall passkey --results recall.jsonl

associative   pairs of a key and its value, then all keys in another order, each of which asks for
              its value (multi-query associative recall, arXiv 2312.04927); trained on all numbers
              of pairs up to the largest, small ones as often as large ones
passkey       a marked key somewhere in noise, asked for at the end; also at lengths never trained

Each run adds a line to the results.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from model.files import append_line
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.training.corpus import IGNORED
from model.training.softmax import SoftmaxModel
from model.training.train import Schedule, new_optimizers
from model.training.trial import SOFTMAX, VARIANTS

VOCAB = 66
FILLER, MARK, FIRST = 0, 1, 2
"""Token ids: the filler between pairs and their questions, the mark before a passkey, the first of
the others."""

DIGITS = 5
"""Tokens of a passkey."""

TRAINED_GAP = 32
"""Most fillers between pairs and their questions in training."""

EXAMPLES = 64
"""Of each kind, for measurement."""

HELD_OUT_SEED = 2**40
"""Seed of the evaluation examples; training uses the run's seed."""

Examples = tuple[Tensor, Tensor]
"""Inputs and targets `[batch, tokens]`; targets are IGNORED except at questions."""


def associative(generator: torch.Generator, batch: int, pairs: int, gap: int) -> Examples:
    """Half of the vocabulary are keys, the other half values; `gap` fillers before the questions.

    Raises ValueError for more pairs than there are keys.
    """
    first_value = (VOCAB + FIRST) // 2
    if pairs > first_value - FIRST:
        raise ValueError(f"{pairs} pairs: there are {first_value - FIRST} keys")
    order = torch.rand(batch, first_value - FIRST, generator=generator).argsort(1)
    keys = order[:, :pairs] + FIRST
    values = torch.randint(first_value, VOCAB, (batch, pairs), generator=generator)
    given = torch.stack([keys, values], 2).flatten(1)
    asked_for = torch.rand(batch, pairs, generator=generator).argsort(1)
    asked = torch.stack([keys.gather(1, asked_for), values.gather(1, asked_for)], 2).flatten(1)
    inputs = torch.cat([given, torch.full((batch, gap), FILLER), asked], 1)
    targets = torch.full_like(inputs, IGNORED)
    targets[:, 2 * pairs + gap :: 2] = asked[:, 1::2]
    return inputs[:, :-1], targets[:, :-1]


def passkey(
    generator: torch.Generator, batch: int, length: int, depth: float | None = None
) -> Examples:
    """`length` tokens of noise, then `depth` (a fraction; None: random) of the way into it a
    key."""
    noise = torch.randint(FIRST, VOCAB, (batch, length), generator=generator)
    key = torch.randint(FIRST, VOCAB, (batch, DIGITS), generator=generator)
    shares = (
        torch.rand(batch, generator=generator) if depth is None else torch.full((batch,), depth)
    )
    mark = torch.full((batch, 1), MARK)
    rows = [
        torch.cat([row[:place], mark[0], digits, row[place:], mark[0], digits])
        for row, digits, place in zip(noise, key, (shares * length).long().tolist(), strict=True)
    ]
    inputs = torch.stack(rows)
    targets = torch.full_like(inputs, IGNORED)
    targets[:, -DIGITS - 1 : -1] = key
    return inputs[:, :-1], targets[:, :-1]


@dataclass(frozen=True)
class Run:
    """A network and its training parameters."""

    variant: str
    d_key: int = 32
    d_emb: int = 64
    n_layers: int = 2
    n_heads: int = 2
    steps: int = 1500
    step_tokens: int = 1024
    learning_rate: float = 5e-3
    gain: float = 4.0
    """Of the initial queries, keys and values. At torch's, keys differ by less than a nat, so that
    attention without exp(q k) averages all values, and learns recall far more slowly."""
    seed: int = 0


def build(run: Run) -> LanguageModel:
    """A new network."""
    shape = {"vocab_sz": VOCAB, "d_emb": run.d_emb, "n_layers": run.n_layers, "values": "linear"}
    sizes = {"n_heads": run.n_heads, "d_key": run.d_key, "d_val": run.d_key}
    config = ModelConfig.model_validate({**shape, **sizes, **VARIANTS[run.variant]})
    torch.manual_seed(run.seed)
    network = SoftmaxModel(config, 0) if run.variant in SOFTMAX else LanguageModel(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("feedforward1.1.weight"):
                parameter.mul_(run.gain)
    return network


def state_bytes(network: LanguageModel, tokens: int) -> int:
    """State size of one sequence after `tokens` tokens, in float32; for softmax, its keys and
    values."""
    c = network.config
    if isinstance(network, SoftmaxModel):
        return 4 * tokens * c.n_layers * c.n_heads * (c.d_key + c.d_val)
    return network.state_spec.num_bytes


def fit(network: LanguageModel, run: Run, examples: Callable[[torch.Generator], Examples]) -> float:
    """Train on new examples each step; returns the mean loss of the last steps in nats per
    answer."""
    optimizers = new_optimizers(network, 0.1)
    schedule = Schedule(run.learning_rate, run.steps // 20, run.steps)
    generator, smooth = torch.Generator().manual_seed(run.seed), 0.0
    for step in range(run.steps):
        inputs, targets = examples(generator)
        logits, _ = network.unroll(inputs, network.empty_state(len(inputs)))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        network.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(step)
            optimizer.step()
        smooth += (float(loss.detach()) - smooth) / min(step + 1, 50)
    return smooth


@torch.inference_mode()
def accuracy(network: LanguageModel, examples: Examples) -> float:
    """Fraction of answers that are the network's first choice."""
    inputs, targets = examples
    logits, _ = network.unroll(inputs, network.empty_state(len(inputs)))
    asked = targets != IGNORED
    return float((logits.argmax(-1) == targets)[asked].float().mean())


def measure_associative(run: Run, pairs: list[int], gaps: list[int]) -> dict[str, object]:
    """Train at up to the most pairs and `TRAINED_GAP` fillers, measure at several of both."""
    network = build(run)

    def examples(generator: torch.Generator) -> Examples:
        count = int(max(pairs) ** float(torch.rand(1, generator=generator)) + 0.5)
        gap = int(torch.randint(TRAINED_GAP + 1, (1,), generator=generator))
        return associative(generator, max(1, run.step_tokens // (4 * count + gap)), count, gap)

    loss = fit(network, run, examples)
    found = []
    for count, gap in itertools.product(pairs, gaps):
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        test = associative(generator, EXAMPLES, count, gap)
        found.append({
            **{"pairs": count, "gap": gap},
            "state_bytes": state_bytes(network, 4 * count + gap),
            "accuracy": round(accuracy(network, test), 4),
        })  # fmt: skip
    return {
        **{"task": "associative", **asdict(run), "parameters": network.num_parameters},
        "loss": round(loss, 4),
        "found": found,
    }


def measure_passkey(
    run: Run, trained_length: int, lengths: list[int], depths: list[float]
) -> dict[str, object]:
    """Train at lengths up to `trained_length`, measure at several lengths and depths of the key."""
    network = build(run)

    def examples(generator: torch.Generator) -> Examples:
        (length,) = torch.randint(1, trained_length + 1, (1,), generator=generator).tolist()
        return passkey(generator, max(1, run.step_tokens // length), length)

    loss = fit(network, run, examples)
    found = []
    for length in lengths:
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        tests = [(depth, passkey(generator, EXAMPLES, length, depth)) for depth in depths]
        found += [
            {
                **{"length": length, "depth": depth},
                "state_bytes": state_bytes(network, length),
                "accuracy": round(accuracy(network, test), 4),
            }
            for depth, test in tests
        ]
    return {
        **{"task": "passkey", "trained_length": trained_length, **asdict(run)},
        "parameters": network.num_parameters,
        "loss": round(loss, 4),
        "found": found,
    }


def main(
    task: Annotated[Literal["associative", "passkey"], typer.Argument()],
    results: Annotated[Path, typer.Option(help="Lines of JSON are added to this file.")],
    variant: Annotated[
        list[str] | None, typer.Option(help="Of model.training.trial; repeatable.")
    ] = None,
    d_key: Annotated[
        list[int] | None, typer.Option(help="Key and value channels of a head; repeatable.")
    ] = None,
    pairs: Annotated[list[int] | None, typer.Option(help="Associative; repeatable.")] = None,
    gap: Annotated[list[int] | None, typer.Option(help="Associative; repeatable.")] = None,
    trained_length: Annotated[int, typer.Option(min=1, help="Passkey.")] = 256,
    length: Annotated[list[int] | None, typer.Option(help="Passkey; repeatable.")] = None,
    depth: Annotated[list[float] | None, typer.Option(help="Passkey; repeatable.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = Run.steps,
    gain: Annotated[float, typer.Option(help="Of the initial queries, keys, values.")] = Run.gain,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train each network on the task and save its recall."""
    names = variant or ["paper", "shift + gate", "decay + shift + gate", "softmax + shift + gate"]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise typer.BadParameter(f"there is no {unknown[0]}", param_hint="--variant")
    for seed, name, channels in itertools.product(range(seeds), names, d_key or [8, 32]):
        run = Run(name, channels, steps=steps, gain=gain, seed=seed)
        if task == "associative":
            line = measure_associative(run, pairs or [1, 2, 4, 8, 16, 32], gap or [0, 32, 512])
        else:
            lengths, depths = length or [128, 256, 512, 2048], depth or [0.0, 0.25, 0.5, 0.75, 1.0]
            line = measure_passkey(run, trained_length, lengths, depths)
        append_line(results, line)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    typer.run(main)

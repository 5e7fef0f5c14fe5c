"""What the compact form of a state costs in bytes, in time, and in what the model says next.

    python -m loadtest.bench_compact

The texts are the default checkpoint's own, drawn at temperature 1 with fixed seeds. At each length
of history one row goes on from the state as it is and one from its compact form; both read the
same next tokens of the text, and their distributions are compared at each of them.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from model import PRETRAINED, checkpoint
from model.compact import BOUND, STEP, CompactForm
from model.config import ModelConfig
from model.network import LanguageModel
from model.sampling import RecentTokens, SampledRow, SamplingParams, sample
from model.state import StateSpec

LENGTHS = (10, 100, 1_000, 10_000)
FOLLOWING = 64
"""Tokens of the text at which distributions are compared."""

LIKELY = 0.01
"""Probability of the tokens whose log p is compared."""

TURN_TOKENS, TURNS = 32, (1, 10, 100)
CHUNK_TOKENS = 512

Values = dict[str, NDArray[Any]]


def write(network: LanguageModel, texts: int, num_tokens: int) -> Tensor:
    """Token ids `[texts, num_tokens]` that the model draws one by one."""
    rows = list(range(texts))
    pool = network.new_pool(texts)
    written = [[network.config.bos_token_id or 0] * texts]
    while len(written) < num_tokens:
        logits = network.step(torch.tensor(written[-1]), pool, rows)
        settings = (SamplingParams(seed=row) for row in rows)
        chances = [SampledRow(params, len(written), RecentTokens()) for params in settings]
        written.append([token_id for token_id in sample(logits, chances) if token_id is not None])
    return torch.tensor(written).T


def read(network: LanguageModel, ids: Tensor, state: bytes | None = None) -> bytes:
    """The state after these tokens `[tokens]`, from another state or the first one."""
    pool = network.new_pool(1)
    if state is not None:
        pool.import_row(0, state)
    for some in torch.split(ids, CHUNK_TOKENS):
        network.prefill(some.unsqueeze(0), [len(some)], pool, [0])
    return pool.export_row(0)


def rested(form: CompactForm, state: bytes) -> bytes:
    """The state after it was packed. Raises ValueError when it does not fit."""
    packed = form.pack(state)
    if packed is None:
        raise ValueError("this state has no compact form")
    return form.unpack(packed)


def split(spec: StateSpec, state: bytes) -> Values:
    """The tensors of a row in float64."""
    values, start = {}, 0
    for tensor in spec.tensors:
        array = np.frombuffer(state, tensor.dtype, math.prod(tensor.shape), start)
        values[tensor.name] = array.reshape(tensor.shape).astype(np.float64)
        start += tensor.num_bytes
    return values


def log_y(values: Values, q: NDArray[Any]) -> NDArray[Any]:
    """Answers of all heads to queries `[queries, 1, 1, d_k]`, without n, which does not change."""
    e = np.exp(q + values["m"] - (q + values["m"]).max(-1, keepdims=True))
    numerator = np.einsum("qlhk,lhkv->qlhv", e, values["s"])
    found: NDArray[Any] = np.log(numerator / (e * values["z"]).sum(-1)[..., None])
    return found


def moved(spec: StateSpec, before: bytes, after: bytes) -> tuple[float, float]:
    """The largest change of log S, and of log y for ordinary and steep queries."""
    ours, theirs = split(spec, before), split(spec, after)
    sums = np.abs(np.log(theirs["s"] / ours["s"])).max()
    q = np.random.default_rng(0).standard_normal((16, 1, 1, ours["m"].shape[-1]))
    answers = (np.abs(log_y(theirs, x) - log_y(ours, x)).max() for x in (q, 10 * q))
    return float(sums), float(max(answers))


def distributions(network: LanguageModel, ids: Tensor, states: list[bytes]) -> Tensor:
    """log p `[states, tokens, vocab]` of what follows each of the tokens."""
    pool = network.new_pool(len(states))
    for row, state in enumerate(states):
        pool.import_row(row, state)
    rows = list(range(len(states)))
    steps = [network.step(token.expand(len(states)), pool, rows).double() for token in ids]
    return torch.stack(steps, 1).log_softmax(-1)


def compare(pairs: list[Tensor]) -> str:
    """How the second distribution of each pair differs from the first."""
    exact, compact = torch.cat(pairs, 1)
    p = exact.exp()
    variation = (p - compact.exp()).abs().sum(-1) / 2
    likely = (exact - compact).abs()[p >= LIKELY].max()
    divergence = (p * (exact - compact)).sum(-1).mean()
    other = int((exact.argmax(-1) != compact.argmax(-1)).sum())
    return (
        f"{variation.max():8.4f} {variation.mean():8.4f} {likely:8.3f} {divergence:8.1e}"
        f" {other:4d} of {len(p)}"
    )


def milliseconds(task: Callable[[], object], rounds: int) -> float:
    """Median time of a task."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        task()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def sizes(name: str, config: ModelConfig) -> None:
    """Print the bytes of a state in each form, and how long packing takes."""
    with torch.device("meta"):
        spec = LanguageModel(config).state_spec
    form = CompactForm(spec)
    plain = 4 * sum(math.prod(t.shape) for t in spec.tensors if not t.name.endswith("_low"))
    print(
        f"{name}: {spec.num_bytes:,} bytes exact, {plain:,} in float32 alone, "
        f"{form.num_bytes:,} compact, {100 * form.num_bytes / plain:.1f} %"
    )


def times(name: str, form: CompactForm, state: bytes, rounds: int) -> None:
    """Print how long packing and unpacking take."""
    packed = form.pack(state)
    if packed is None:
        raise ValueError("this state has no compact form")
    pack, unpack = (
        milliseconds(task, rounds)
        for task in (lambda: form.pack(state), lambda: form.unpack(packed))
    )
    print(f"{name}: pack {pack:.2f} ms, unpack {unpack:.2f} ms")


def enlarged(spec: StateSpec, state: bytes, larger: StateSpec) -> bytes:
    """A state of a larger network whose heads are those of the smaller one, again and again."""
    values = split(spec, state)
    return b"".join(
        np.resize(values[tensor.name], tensor.shape).astype(tensor.dtype).tobytes()
        for tensor in larger.tensors
    )


def main(
    texts: Annotated[int, typer.Option(help="Texts that the model writes.")] = 4,
    rounds: Annotated[int, typer.Option(help="Times that packing is timed.")] = 100,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    network = checkpoint.load(PRETRAINED, torch.device("cpu")).network
    spec = network.state_spec
    form = CompactForm(spec)
    sizes("default checkpoint", network.config)
    sizes("the paper's network", ModelConfig())
    print(f"bound of a change of log y: {BOUND}; half a step of the lattice: {STEP / 2:.5f}")

    ids = write(network, texts, LENGTHS[-1] + max(TURNS) * TURN_TOKENS + FOLLOWING)
    heading = f"{'max TV':>8} {'mean TV':>8} {'log p':>8} {'KL':>8} other first choice"
    print(f"\n{texts} texts, {FOLLOWING} tokens after the history; TV: total variation distance;")
    print(f"log p: largest change for tokens of p >= {LIKELY}; log S, log y: largest change")
    print(f"{'history':>8} {'log S':>8} {'log y':>8} {heading}")
    for length in LENGTHS:
        pairs, changes = [], []
        for text in ids:
            exact = read(network, text[:length])
            compact = rested(form, exact)
            changes.append(moved(spec, exact, compact))
            after = text[length : length + FOLLOWING]
            pairs.append(distributions(network, after, [exact, compact]))
        sums, answers = map(max, zip(*changes, strict=True))
        print(f"{length:8,} {sums:8.5f} {answers:8.5f} {compare(pairs)}")

    print(f"\nafter {LENGTHS[-1]:,} tokens, turns of {TURN_TOKENS} tokens, at rest after each")
    print(f"{'turns':>8} {'':>17} {heading}")
    for turns in TURNS:
        pairs = []
        for text in ids:
            place = LENGTHS[-1]
            exact = read(network, text[:place])
            compact = rested(form, exact)
            for _ in range(turns):
                turn = text[place : place + TURN_TOKENS]
                exact, compact = read(network, turn, exact), read(network, turn, compact)
                compact = rested(form, compact)
                place += TURN_TOKENS
            after = text[place : place + FOLLOWING]
            pairs.append(distributions(network, after, [exact, compact]))
        print(f"{turns:8,} {'':>17} {compare(pairs)}")

    print()
    times("default checkpoint", form, exact, rounds)
    with torch.device("meta"):
        larger = LanguageModel(ModelConfig()).state_spec
    times("the paper's network", CompactForm(larger), enlarged(spec, exact, larger), rounds)


if __name__ == "__main__":
    typer.run(main)

"""Verifies a checkpoint against its publisher's implementation.

A file of expected outputs is a safetensors file with `ids` `[tokens]`, `logits` `[tokens, vocab]`
after each of them, read from the empty state, `greedy` `[count]`, the greedy continuation, and the
state after `ids` under the publisher's names and in its layout.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model import checkpoint
from model.batch import Batch
from model.files import check_file
from model.network import Network
from model.state import StatePool
from model.verify import VerifyError

LOGITS_TOLERANCE = 1e-4
"""Absolute, with float32 weights."""

STATE_TOLERANCE = 1e-4
"""Relative to max(1, |value|)."""

OUTPUTS = ("ids", "logits", "greedy")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Comparison:
    """Result of one reading mode on one backend."""

    backend: str
    pieces: str
    logits_error: float
    state_error: float
    greedy_agrees: bool
    faults: tuple[str, ...]
    """Where the error exceeds its tolerance most, in words."""

    @property
    def ok(self) -> bool:
        return not self.faults


def compare(file: Path, model: Path) -> Iterator[Comparison]:
    """Read the tokens one by one, in one piece, and in random pieces, in plain torch and with the
    CPU serving backend. Weights are float32.

    Raises VerifyError for a file that does not belong to this model, and CheckpointError.
    """
    expected = _read(file)
    served = checkpoint.load_network(model, CPU, "float32")
    _check(expected, served, model, file)
    yield from _compare(served, model, expected)
    if served.is_compiled:
        del served
        plain = checkpoint.load_network(model, CPU, "float32", plain=True)
        yield from _compare(plain, model, expected)


def _compare(network: Network, model: Path, expected: Mapping[str, Tensor]) -> Iterator[Comparison]:
    backend = "compiled" if network.is_compiled else "plain torch"
    count = len(expected["ids"])
    inner = range(1, count)
    chance = random.Random(0)
    cuts = {
        "token by token": inner,
        "in one piece": (),
        "in random pieces": sorted(chance.sample(inner, min(len(inner), 1 + count // 20))),
    }
    for name, ends in cuts.items():
        pool = network.new_pool(1)
        logits = _logits(network, pool, expected["ids"], [0, *ends, count])
        state = checkpoint.published_state(model, pool, 0)
        state = {name: values.clone() for name, values in state.items()}
        greedy = _continue(network, pool, logits[-1], len(expected["greedy"]))
        yield _comparison(backend, name, logits, state, greedy, expected)


def _logits(network: Network, pool: StatePool, ids: Tensor, ends: list[int]) -> Tensor:
    """Logits after each token, read in pieces with these ends. `[tokens, vocab]`"""
    parts = []
    for start, end in itertools.pairwise(ends):
        batch = Batch.of([ids[start:end]], [0]).wanting(np.arange(end - start))
        parts.append(network.forward(batch, pool))
    return torch.cat(parts)


def _continue(network: Network, pool: StatePool, logits: Tensor, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        found.append(int(logits.argmax()))
        [logits] = network.forward(Batch.of_tokens(found[-1:], [0]), pool)
    return found


def _comparison(
    backend: str,
    pieces: str,
    logits: Tensor,
    state: Mapping[str, Tensor],
    greedy: list[int],
    expected: Mapping[str, Tensor],
) -> Comparison:
    faults = []
    errors = (logits.double() - expected["logits"]).abs().nan_to_num(nan=torch.inf)
    if (logits_error := float(errors.max())) > LOGITS_TOLERANCE:
        after, token_id = _place(errors)
        wanted = float(expected["logits"][after, token_id])
        found = float(logits[after, token_id])
        faults.append(
            f"logit of id {token_id} after token {after} is {found:.6g}, expected {wanted:.6g}"
        )
    state_error = 0.0
    for name, values in state.items():
        wanted_values = expected[name].double()
        errors = (values.double() - wanted_values).abs() / wanted_values.abs().clamp(min=1)
        errors = errors.nan_to_num(nan=torch.inf)
        state_error = max(state_error, error := float(errors.max()))
        if error > STATE_TOLERANCE:
            place = _place(errors)
            faults.append(
                f"{name}{list(place)} is {float(values[place]):.6g}, "
                f"expected {float(wanted_values[place]):.6g}"
            )
    wanted_ids = expected["greedy"].tolist()
    if greedy != wanted_ids:
        at = next(
            i for i, pair in enumerate(zip(greedy, wanted_ids, strict=True)) if len({*pair}) > 1
        )
        faults.append(f"greedy token {at} is {greedy[at]}, expected {wanted_ids[at]}")
    return Comparison(
        backend, pieces, logits_error, state_error, greedy == wanted_ids, tuple(faults)
    )


def _place(errors: Tensor) -> tuple[int, ...]:
    """Index of the largest error."""
    return tuple(int(i) for i in np.unravel_index(int(errors.argmax()), errors.shape))


def _read(file: Path) -> dict[str, Tensor]:
    try:
        check_file(file)  # not every library error names the file
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _not_expected(file, str(error)) from error
    if missing := [name for name in OUTPUTS if name not in tensors]:
        raise _not_expected(file, f"it has no {missing[0]}")
    return tensors


def _check(expected: Mapping[str, Tensor], network: Network, model: Path, file: Path) -> None:
    """Raises VerifyError unless the tensors match the network."""
    state = checkpoint.published_state(model, network.new_pool(1), 0)
    ids, vocab = expected["ids"], network.vocab_size
    for name in ("ids", "greedy"):
        values = expected[name]
        if values.dim() != 1 or not len(values) or values.is_floating_point():
            raise _not_expected(file, f"{name} must be a non-empty vector of integers")
        if int(values.min()) < 0 or int(values.max()) >= vocab:
            raise _not_expected(file, f"{name} must be from 0 to {vocab - 1} for {model}")
    shapes = {"logits": (len(ids), vocab)} | {name: each.shape for name, each in state.items()}
    for name, shape in shapes.items():
        if name not in expected:
            raise _not_expected(file, f"it has no {name}")
        if expected[name].shape != shape:
            raise _not_expected(
                file, f"{name} is {list(expected[name].shape)}, of {model} it is {list(shape)}"
            )
    if others := expected.keys() - shapes.keys() - {*OUTPUTS}:
        raise _not_expected(file, f"{min(others)} does not exist in {model}")


def _not_expected(file: Path, reason: str) -> VerifyError:
    return VerifyError(f"{file}: not a file of expected outputs: {reason}")

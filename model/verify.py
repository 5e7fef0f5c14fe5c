"""Verifies a network against the reference implementation.

A file of reference outputs is a safetensors file with `weights.*`, `token_ids` `[batch, tokens]`,
`logits` `[batch, tokens, vocab_sz]`, the end state per layer `state.layers.N.H_S` and `.H_Z`, the
position state `state.embed_pos`, `greedy_ids` `[1, count]` that continue the first sequence, and in
its metadata `config` and `chunk_lengths`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.batch import Batch
from model.files import check_file
from model.heinsen import checkpoint
from model.heinsen.attention import Attention, chunked, quadratic
from model.heinsen.config import ModelConfig
from model.heinsen.layers import NetworkState
from model.heinsen.network import LanguageModel

LOGITS_TOLERANCE = 2e-5
"""Absolute."""

STATE_TOLERANCE = 1e-4
"""Relative to max(1, |value|), as the values are logarithms."""


LONGEST_REASON = 300

MAX_LOGITS = 1 << 28
"""Size limit of a file, so that slow modes finish."""


class VerifyError(ValueError):
    """Not a file of reference outputs; the message names the file and the reason."""


@dataclass(frozen=True)
class ModeReport:
    """Result of one evaluation mode."""

    mode: str
    logits_error: float
    state_error: float
    greedy_agrees: bool

    @property
    def ok(self) -> bool:
        return (
            self.logits_error <= LOGITS_TOLERANCE
            and self.state_error <= STATE_TOLERANCE
            and self.greedy_agrees
        )


@dataclass(frozen=True)
class _Reference:
    network: LanguageModel
    served: LanguageModel
    """The same weights, packed as in the server."""

    tensors: dict[str, Tensor]
    chunk_lengths: list[int]

    @property
    def token_ids(self) -> Tensor:
        return self.tensors["token_ids"]


Evaluation = tuple[Tensor, NetworkState]
"""Logits of the last tokens, possibly of all, and the state at the end."""


def verify_file(path: Path) -> list[ModeReport]:
    """Compare every evaluation mode, in float32, with a file. Raises VerifyError."""
    try:
        reference = _read(path)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise VerifyError(f"{path}: not a file of reference outputs: {reason}") from error
    with torch.no_grad():
        return [
            _report(mode, reference, evaluate(reference), greedy)
            for mode, evaluate, greedy in _modes()
        ]


def _modes() -> Iterator[
    tuple[
        str,
        Callable[[_Reference], Evaluation],
        Callable[[_Reference, Tensor, NetworkState], Evaluation],
    ]
]:
    """Name, function for all tokens, and function for one more token."""
    yield "quadratic", lambda r: _forward(r, quadratic), _forward_one(quadratic)
    yield "parallel", lambda r: _forward(r, chunked), _forward_one(chunked)
    yield "chunked", _in_chunks, _forward_one(chunked)
    yield "recurrent", lambda r: _recurrent(r, 0), _step_one
    yield "mixed", lambda r: _recurrent(r, r.token_ids.shape[1] // 2), _step_one


def _forward(reference: _Reference, attention: Attention) -> Evaluation:
    network, ids = reference.network, reference.token_ids
    logits, state = network.unroll(ids, network.empty_state(len(ids)), attention)
    return logits, state


def _in_chunks(reference: _Reference) -> Evaluation:
    network, parts = reference.network, []
    state = network.empty_state(len(reference.token_ids))
    for ids in torch.split(reference.token_ids, reference.chunk_lengths, 1):
        logits, state = network.unroll(ids, state)
        parts.append(logits)
    return torch.cat(parts, 1), state


def _recurrent(reference: _Reference, num_prefilled: int) -> Evaluation:
    """Prefill `num_prefilled` tokens in a pool, then decode token by token."""
    network, ids = reference.served, reference.token_ids
    rows = range(len(ids))
    pool = network.new_pool(len(ids))
    if num_prefilled:
        network.forward(Batch.of(ids[:, :num_prefilled].unbind(), rows), pool)
    later = ids[:, num_prefilled:].unbind(1)
    logits = torch.stack(
        [network.forward(Batch.of_tokens(column, rows), pool) for column in later], 1
    )
    return logits, network.read_state(pool)


def _forward_one(
    attention: Attention,
) -> Callable[[_Reference, Tensor, NetworkState], Evaluation]:
    return lambda reference, ids, state: reference.network.unroll(ids, state, attention)


def _step_one(reference: _Reference, ids: Tensor, state: NetworkState) -> Evaluation:
    network = reference.served
    pool = network.new_pool(len(ids))
    network.write_state(state, pool)
    logits = network.forward(Batch.of_tokens(ids[:, 0], range(len(ids))), pool)
    return logits.unsqueeze(1), network.read_state(pool)


def _report(
    mode: str,
    reference: _Reference,
    evaluation: Evaluation,
    one_more: Callable[[_Reference, Tensor, NetworkState], Evaluation],
) -> ModeReport:
    logits, state = evaluation
    expected = reference.tensors["logits"][:, -logits.shape[1] :]
    wanted = reference.tensors["greedy_ids"][0].tolist()
    found = []
    for _ in wanted:
        best = logits[:, -1:].argmax(-1)
        found.append(int(best[0, 0]))
        logits, state = one_more(reference, best, state)
    return ModeReport(
        mode=mode,
        logits_error=_worst(evaluation[0].double() - expected),
        state_error=_state_error(reference.tensors, evaluation[1]),
        greedy_agrees=found == wanted,
    )


def _state_error(tensors: dict[str, Tensor], state: NetworkState) -> float:
    pairs = [(state.h, tensors["state.embed_pos"])]
    for number, layer in enumerate(state.layers):
        h_s, h_z = layer.to_paper()
        pairs.append((h_s, tensors[f"state.layers.{number}.H_S"]))
        pairs.append((h_z, tensors[f"state.layers.{number}.H_Z"]))
    return max(
        _worst((ours.double() - theirs) / theirs.abs().clamp(min=1)) for ours, theirs in pairs
    )


def _worst(error: Tensor) -> float:
    """Largest magnitude; NaN counts as infinite."""
    return float(error.abs().nan_to_num(nan=torch.inf).max())


def _read(path: Path) -> _Reference:
    """Shapes are checked before anything large is read."""
    check_file(path)
    with safe_open(path, "pt") as file:
        facts = file.metadata() or {}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        config = ModelConfig.model_validate_json(facts["config"])
        prefix = "weights."
        names = {n.removeprefix(prefix): n for n in shapes if n.startswith(prefix)}
        checkpoint.network_of_shapes(config, {n: shapes[of] for n, of in names.items()}, path)
        expected = _expected_shapes(config, shapes)
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise ValueError(f"{name} is {list(shapes[name])}, not {list(shape)}")
        tensors = {name: file.get_tensor(name) for name in ("token_ids", *expected)}
        weights = {name: file.get_tensor(of) for name, of in names.items()}
    network = checkpoint.build(config, weights, path, torch.device("cpu"))
    lengths = [int(length) for length in json.loads(facts["chunk_lengths"])]
    ids = tensors["token_ids"]
    if ids.dtype != torch.int64 or not ids.numel():
        raise ValueError("token_ids are not at least one int64 number")
    if min(lengths) < 1 or sum(lengths) != ids.shape[1]:
        raise ValueError(f"chunk_lengths are not positive with a sum of {ids.shape[1]} tokens")
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_sz:
        raise ValueError(f"token_ids are not all from 0 to {config.vocab_sz - 1}")
    served = checkpoint.build(config, weights, path, torch.device("cpu")).pack()
    return _Reference(network, served, tensors, lengths)


def _expected_shapes(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes by name that follow from the config and the token ids. Raises ValueError."""
    batch, num_tokens = shapes["token_ids"]
    count = shapes["greedy_ids"][-1]
    if batch * (num_tokens + count) * config.vocab_sz > MAX_LOGITS:
        raise ValueError(f"{batch} sequences of {num_tokens + count} tokens are too many")
    expected: dict[str, tuple[int, ...]] = {
        "logits": (batch, num_tokens, config.vocab_sz),
        "greedy_ids": (1, count),
        "state.embed_pos": (batch, config.d_emb),
    }
    heads = (batch, config.n_heads, config.d_key)
    for number in range(config.n_layers):
        expected[f"state.layers.{number}.H_Z"] = heads
        expected[f"state.layers.{number}.H_S"] = (*heads, config.d_val)
    return expected

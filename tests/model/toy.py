"""A third family: each network is a decaying mean of embeddings, and a linear head.

mean = keep * mean + (1 - keep) * embed[token]        logits = head @ mean / (1 - keep^count)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import WeightDtype
from model.batch import Batch
from model.network import CheckpointError, Description, Loaded, checkpoint_errors
from model.state import StatePool, StateSpec, TensorSpec
from model.text import byte_level, formats
from model.text.tokenizer import Tokenizer

name = "toy"


@dataclass(frozen=True)
class Config:
    vocab_size: int = 500
    width: int = 5
    keep: float = 0.75
    end: int = 0

    @property
    def state_spec(self) -> StateSpec:
        """Too short for the second tensor to be aligned."""
        mean = TensorSpec("mean", (1, self.width), "float32", 0.0)
        return StateSpec((mean, TensorSpec("count", (1, 1), "float64", 0.0)))


class Toy:
    """The `Network`: one sequence after another, one token after another."""

    backend = "plain torch"
    arithmetic = "float32 x float32"
    recordable = None
    cut = 1
    is_compiled = False
    device = torch.device("cpu")

    def __init__(self, config: Config, embed: Tensor, head: Tensor) -> None:
        """embed, head `[vocab_size, width]`"""
        self._keep, self._embed, self._head = config.keep, embed, head
        self.vocab_size, self.bos, self.eos = config.vocab_size, config.end, (config.end,)
        self.state_spec = config.state_spec
        self.num_parameters = embed.numel() + head.numel()
        self.weight_bytes = embed.nbytes + head.nbytes

    def new_pool(self, num_rows: int) -> StatePool:
        return StatePool(self.state_spec, num_rows, self.device)

    def num_threads(self, tokens: int, answers: int) -> int:
        del tokens, answers
        return 1

    def forward(self, batch: Batch, pool: StatePool) -> Tensor:
        batch.check(self.vocab_size, pool.num_rows)
        found = torch.empty(len(batch.token_ids), self.vocab_size)
        for row, start, end in zip(batch.rows, batch.starts, batch.starts[1:], strict=False):
            mean, count = pool.tensors["mean"][0, row], pool.tensors["count"][0, row]
            for place in range(start, end):
                token = self._embed[batch.token_ids[place]]
                mean.mul_(self._keep).add_(token, alpha=1 - self._keep)
                count.add_(1)
                found[place] = self._logits(pool, row)
        return found[torch.from_numpy(batch.logits_at)]

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        return torch.stack([self._logits(pool, row) for row in rows])

    def _logits(self, pool: StatePool, row: int) -> Tensor:
        seen = 1 - self._keep ** pool.tensors["count"][0, row]
        return (self._head * (pool.tensors["mean"][0, row] / seen.float())).sum(1)


def make(config: Config) -> Toy:
    """An untrained network."""
    chance = torch.Generator().manual_seed(0)
    embed, head = torch.randn(2, config.vocab_size, config.width, generator=chance)
    return Toy(config, embed, head)


def save(path: Path, words: Tokenizer | None = None, template: str | None = None) -> Path:
    """A checkpoint with the tokenizer of a few words, or another one whose first token is the end
    token."""
    if words is None:
        words = byte_level.train(["the cat sat on the mat and then"], 300, ["<|endoftext|>"])
    config = Config(vocab_size=words.num_tokens, end=0)
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": name} | asdict(config)))
    (path / "tokenizer.json").write_text(words.to_json())
    if template is not None:
        (path / "template").write_text(template)
    network = make(config)
    save_file({"embed": network._embed, "head": network._head}, path / "toy.safetensors")
    return path


def matches(path: Path) -> bool:
    try:
        return bool(json.loads((path / "config.json").read_bytes())["model_type"] == name)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def files(path: Path) -> tuple[Path, ...]:
    return path / "config.json", path / "toy.safetensors", path / "tokenizer.json"


@checkpoint_errors()
def describe(path: Path) -> Description:
    config, weights = _config(path), path / "toy.safetensors"
    with safetensors.safe_open(weights, "pt") as file:
        shapes = [file.get_slice(each).get_shape() for each in ("embed", "head")]
    return Description(
        sizes=asdict(config),
        num_parameters=sum(rows * width for rows, width in shapes),
        weight_bytes=weights.stat().st_size,
        weight_dtypes=["F32"],
        vocab_size=config.vocab_size,
        state_spec=config.state_spec,
        tokenizer=_words(path),
        chat_template=_template(path),
    )


@checkpoint_errors()
def load(path: Path, device: torch.device, dtype: WeightDtype | None) -> Loaded[Toy]:
    if (device.type, dtype or "float32") != ("cpu", "float32"):
        raise CheckpointError(f"{path}: a toy is float32 on a CPU, not {dtype} on {device}")
    network = Toy(_config(path), **load_file(path / "toy.safetensors"))
    return Loaded(network, _words(path), _template(path))


def _words(path: Path) -> Tokenizer:
    return formats.from_json((path / "tokenizer.json").read_text())


def _template(path: Path) -> str | None:
    file = path / "template"
    return file.read_text() if file.exists() else None


def load_network(
    path: Path, device: torch.device, dtype: WeightDtype, *, plain: bool = False
) -> Toy:
    del plain
    return load(path, device, dtype).network


def published_state(pool: StatePool, row: int) -> dict[str, Tensor]:
    return {"mean": pool.tensors["mean"][0, row]}


def initial_state(
    tensors: Mapping[str, Tensor], spec: StateSpec, source: Path
) -> Mapping[str, Tensor]:
    del spec, source
    return tensors


def _config(path: Path) -> Config:
    fields = json.loads((path / "config.json").read_bytes())
    del fields["model_type"]
    return Config(**fields)

"""Interfaces of networks and families."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from model import WeightDtype
from model.batch import Batch
from model.state import StatePool, StateSpec
from model.text.tokenizer import Tokenizer, TokenizerError


class Recordable(Protocol):
    """A network whose step never synchronises with the host, so that CUDA graphs can record it."""

    vocab_size: int

    def decode(
        self, token_ids: Tensor, rows: Tensor, pool: StatePool, logits: Tensor | None = None
    ) -> Tensor:
        """Advance rows by one token each: token_ids, rows `[batch]` int32 on the device -> logits
        `[batch, vocab_size]`, written to `logits` if given. Negative rows are skipped."""

    def forward(
        self, batch: Batch, pool: StatePool, single: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """`Network.forward`. `single`: ids and rows of the single-token pieces on the device, int32
        `[pieces]` each; negative rows are skipped."""

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`Network.logits`."""


class Network(Protocol):
    """A network for inference. Rows of a pool are read and written in place."""

    num_parameters: int
    backend: str
    """Its backend and the reason for it."""

    arithmetic: str
    """Arithmetic of its matrix products, weights x inputs: "int8 x float32". Sums are wider,
    outputs float32. States may continue under another one, but not bit for bit."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def bos(self) -> int | None:
        """Token prepended to a text prompt on a fresh state, if any."""

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights read per step."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def state_spec(self) -> StateSpec:
        """Tensors of one sequence's state, whatever its length."""

    @property
    def cut(self) -> int:
        """Splitting prompts at multiples of this does not change the bits.

        A single last token is the exception: it belongs to the piece before.
        """

    @property
    def is_compiled(self) -> bool:
        """Whether the number of threads depends on the step's size."""

    def num_threads(self, tokens: int, answers: int) -> int:
        """CPU threads for a step of `tokens` tokens and `answers` rows of logits."""

    @property
    def recordable(self) -> Recordable | None:
        """On a GPU, the network to record steps from; else None."""

    def new_pool(self, num_rows: int) -> StatePool:
        """A pool in the initial state, on the network's device."""

    def forward(self, batch: Batch, pool: StatePool) -> Tensor:
        """Advance the batch's rows by its tokens: the requested logits `[wanted, vocab_size]`.

        Raises IndexError for token ids and rows out of range.
        """

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Logits `[batch, vocab_size]` after the last token of each row, without reading a
        token."""


class CheckpointError(ValueError):
    """The checkpoint is not usable; the message names the file and the reason."""


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Converts file errors to CheckpointError."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: missing from the checkpoint") from error
    except MemoryError as error:
        raise CheckpointError(f"the checkpoint does not fit into memory: {error}") from error
    except (OSError, TokenizerError) as error:
        raise CheckpointError(str(error)) from error


@dataclass(frozen=True)
class Description:
    """What is known of a checkpoint without reading its weights."""

    sizes: Mapping[str, object]
    """In the family's terms."""

    num_parameters: int
    weight_bytes: int
    """Size of the weight files."""

    weight_dtypes: Sequence[str]
    """Names as in the files."""

    vocab_size: int
    state_spec: StateSpec
    tokenizer: Tokenizer | None
    """None if there is none that fits."""

    chat_template: str | None


N = TypeVar("N", bound=Network, covariant=True)


@dataclass(frozen=True)
class Loaded(Generic[N]):
    """A checkpoint ready to run."""

    network: N
    tokenizer: Tokenizer
    chat_template: str | None


class Family(Protocol):
    """A kind of network and its published file formats; each family is a module."""

    name: str

    def matches(self, path: Path) -> bool:
        """Whether the path is a checkpoint of this family, complete or not."""

    def files(self, path: Path) -> Sequence[Path]:
        """Files that determine which states are compatible."""

    def describe(self, path: Path) -> Description:
        """Describe without reading weights. Raises CheckpointError."""

    def load(self, path: Path, device: torch.device, dtype: WeightDtype | None) -> Loaded[Network]:
        """Load with weights in this dtype, by default the family's choice.

        Each weight is converted as it is read, so that memory holds the weights once. Raises
        CheckpointError.
        """

    def load_network(
        self, path: Path, device: torch.device, dtype: WeightDtype, *, plain: bool = False
    ) -> Network:
        """The network alone; `plain`: in plain torch. Raises CheckpointError."""

    def initial_state(
        self, tensors: Mapping[str, Tensor], spec: StateSpec, source: Path
    ) -> Mapping[str, Tensor]:
        """Tensors of one state, by the names of the spec, from those that the family's tuned states
        are published as; what is not there is as before the first token.

        Raises CheckpointError, naming the source.
        """

    def published_state(self, pool: StatePool, row: int) -> dict[str, Tensor]:
        """A row's tensors under the publisher's names and in its layout; may be views."""

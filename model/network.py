"""What a network and its family are to those that load, describe and run them."""

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
    """A network whose step waits for nothing of the host, as a CUDA graph has it."""

    vocab_size: int

    def decode(
        self, token_ids: Tensor, rows: Tensor, pool: StatePool, logits: Tensor | None = None
    ) -> Tensor:
        """Advance rows by one token each: token_ids, rows `[batch]` int32 on the device -> logits
        `[batch, vocab_size]`, in the tensor that is given if one is. A negative row is none."""

    def forward(
        self, batch: Batch, pool: StatePool, single: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """`Network.forward`. `single`: the ids and rows of the pieces of one token, as the device
        has them, int32 `[pieces]` each; where a row is negative, nothing is read."""

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """`Network.logits`."""


class Network(Protocol):
    """A network that serves. Rows of a pool are read and written in place."""

    num_parameters: int
    backend: str
    """What it runs as and why, in words."""

    arithmetic: str
    """What its products multiply, weights x inputs: "int8 x float32". Sums are wider, outputs
    float32. States go on in another one, but not to the bit."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def bos(self) -> int | None:
        """The token before a text that starts a fresh state, if any is put there."""

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def state_spec(self) -> StateSpec:
        """What one sequence's state consists of, at any length of the sequence."""

    @property
    def cut(self) -> int:
        """Prompts cut after multiples of so many tokens have the same bits as whole ones.

        But for a last token by itself: it belongs to the piece before.
        """

    @property
    def is_compiled(self) -> bool:
        """Whether it chooses its threads by a step's work."""

    def num_threads(self, tokens: int, answers: int) -> int:
        """CPU threads for reading so many tokens and computing so many rows of logits."""

    @property
    def recordable(self) -> Recordable | None:
        """On a device that works beside the host: what its steps are recorded from."""

    def new_pool(self, num_rows: int) -> StatePool:
        """States before the first token, on the device."""

    def forward(self, batch: Batch, pool: StatePool) -> Tensor:
        """Advance the batch's rows by its tokens: the logits that it wants `[wanted, vocab_size]`.

        Raises IndexError for a token or row that there is not.
        """

    def logits(self, pool: StatePool, rows: Sequence[int]) -> Tensor:
        """Logits `[batch, vocab_size]` after the last token that each row has read; none is."""


class CheckpointError(ValueError):
    """The checkpoint cannot be used; the message names the file and what is wrong with it."""


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Raises CheckpointError for what else may be wrong with files."""
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
    """What a checkpoint is, as far as is known without reading its weights."""

    sizes: Mapping[str, object]
    """As the family names them."""

    num_parameters: int
    weight_bytes: int
    """Of the weights' files."""

    weight_dtypes: Sequence[str]
    """In them, as they are called there."""

    vocab_size: int
    state_spec: StateSpec
    tokenizer: Tokenizer | None
    """None if there is no such with it that fits."""

    chat_template: str | None


N = TypeVar("N", bound=Network, covariant=True)


@dataclass(frozen=True)
class Loaded(Generic[N]):
    """A checkpoint ready to run."""

    network: N
    tokenizer: Tokenizer
    chat_template: str | None


class Family(Protocol):
    """Networks of one kind, and the files that they are published in; a module is one."""

    name: str

    def matches(self, path: Path) -> bool:
        """Whether the checkpoint is this family's, be it whole or not."""

    def files(self, path: Path) -> Sequence[Path]:
        """Those that decide which states are the checkpoint's."""

    def describe(self, path: Path) -> Description:
        """Without reading weights. Raises CheckpointError."""

    def load(self, path: Path, device: torch.device, dtype: WeightDtype | None) -> Loaded[Network]:
        """Each weight comes in the dtype that it is served in, so that memory holds them once.

        Without one, it is the family's choice. Raises CheckpointError.
        """

    def load_network(
        self, path: Path, device: torch.device, dtype: WeightDtype, *, plain: bool = False
    ) -> Network:
        """Only the network, in plain torch if so asked for. Raises CheckpointError."""

    def read_initial_state(self, file: Path, spec: StateSpec) -> Mapping[str, Tensor]:
        """Tensors of one state, by the names of the spec, from a file in which the family's tuned
        states are published; those that are not there are as before the first token.

        Raises CheckpointError and OSError.
        """

    def published_state(self, pool: StatePool, row: int) -> dict[str, Tensor]:
        """A row's tensors as the network's publisher names and arranges them; maybe views."""

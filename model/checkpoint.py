"""Checkpoints of all families: detection, description and loading for inference."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

from model import WeightDtype
from model.files import check_file, read_file, write_file
from model.heinsen import checkpoint as heinsen
from model.heinsen.checkpoint import import_state_dict
from model.network import (
    CheckpointError,
    Description,
    Family,
    Loaded,
    Network,
    checkpoint_errors,
)
from model.rwkv7 import checkpoint as rwkv7
from model.state import DamagedState, StatePool, StateSpec
from model.weights import parse_tensors, read_tensors

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "describe",
    "fingerprint",
    "import_state_dict",
    "is_checkpoint",
    "load",
    "load_network",
    "parse_initial_state",
    "published_state",
    "read_initial_state",
]

FAMILIES: tuple[Family, ...] = (heinsen, rwkv7)

DIGESTS = platformdirs.user_cache_path("latentd") / "digests.json"
"""Digests of large files, keyed by file identity."""

LARGE_BYTES = 64 << 20
"""Digests of files of at least this size are cached."""

MAX_DIGESTS = 64
SETTLED_S = 2
"""A file modified less than this before it was read may change again within the same timestamp."""


@dataclass(frozen=True)
class Checkpoint(Loaded[Network]):
    """A model ready to run."""

    fingerprint: str
    """Hash of config, weights and tokenizer; states are compatible if it is equal."""

    modified_at: float
    """Modification time of the first file, in seconds of Unix time."""


def load(path: Path, device: torch.device, dtype: WeightDtype | None = None) -> Checkpoint:
    """Load a network for inference, with weights of this dtype or of the one that suits it best.

    Raises CheckpointError.
    """
    family = _family_of(path)
    _check_memory(family, path, device)
    loaded = family.load(path, device, dtype)
    with checkpoint_errors():
        modified_at = family.files(path)[0].stat().st_mtime
    return Checkpoint(
        loaded.network, loaded.tokenizer, loaded.chat_template, fingerprint(path), modified_at
    )


def read_initial_state(path: Path, file: Path, spec: StateSpec) -> bytes:
    """The bytes of a row, read from an initial state file of the checkpoint's family.

    Raises CheckpointError for a file that is not a state of this network.
    """
    with checkpoint_errors():
        return _initial_row(path, read_tensors(file), spec, file)


def parse_initial_state(path: Path, blob: bytes, spec: StateSpec) -> bytes:
    """`read_initial_state` of a safetensors file in memory."""
    source = Path("tuned state")
    return _initial_row(path, parse_tensors(blob, source), spec, source)


def _initial_row(
    path: Path, published: Mapping[str, Tensor], spec: StateSpec, source: Path
) -> bytes:
    tensors = _family_of(path).initial_state(published, spec, source)
    pool = StatePool(spec, 1, torch.device("cpu"))
    known = {tensor.name: tensor for tensor in spec.tensors}
    if unknown := sorted(tensors.keys() - known.keys()):
        raise CheckpointError(f"{source}: {unknown[0]} is not a tensor of this network's state")
    for name, values in tensors.items():
        if tuple(values.shape) != known[name].shape:
            raise CheckpointError(
                f"{source}: {name} is {list(values.shape)}, this network's state has "
                f"{list(known[name].shape)}"
            )
        pool.tensors[name][:, 0] = values.to(pool.tensors[name].dtype)
    try:
        pool.check_row(0)
    except DamagedState as error:
        raise CheckpointError(f"{source}: {error}") from error
    return pool.export_row(0)


def describe(path: Path) -> Description:
    """Sizes and names of a checkpoint, without reading its weights. Raises CheckpointError."""
    return _family_of(path).describe(path)


def load_network(
    path: Path, device: torch.device, dtype: WeightDtype, *, plain: bool = False
) -> Network:
    """Load only the network, optionally in plain torch. Raises CheckpointError."""
    family = _family_of(path)
    _check_memory(family, path, device)
    return family.load_network(path, device, dtype, plain=plain)


def published_state(path: Path, pool: StatePool, row: int) -> dict[str, Tensor]:
    """A row's tensors under the publisher's names and in its layout."""
    return _family_of(path).published_state(pool, row)


def fingerprint(path: Path) -> str:
    """Fingerprint that `load` would return. Raises CheckpointError."""
    digest = hashlib.sha256()
    with checkpoint_errors():
        for file in _family_of(path).files(path):
            digest.update(bytes.fromhex(_file_digest(file)))
    return digest.hexdigest()


def is_checkpoint(path: Path) -> bool:
    """Whether a family recognises the path, complete or not."""
    return _is_gguf(path) or any(family.matches(path) for family in FAMILIES)


def _family_of(path: Path) -> Family:
    """Raises CheckpointError if no family matches."""
    if _is_gguf(path):
        raise CheckpointError(
            f"{path}: GGUF files (llama.cpp) are not supported; "
            "serve the publisher's files, with --dtype int8 to save memory"
        )
    for family in FAMILIES:
        if family.matches(path):
            return family
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint folder or file")
    names = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(f"{path}: not a checkpoint of a known family ({names})")


def _check_memory(family: Family, path: Path, device: torch.device) -> None:
    """Raises CheckpointError for files that no memory of a CPU could hold: they may be sparse."""
    if device.type != "cpu":
        return
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with checkpoint_errors():
        sizes = {file: file.stat().st_size for file in family.files(path)}
    if sum(sizes.values()) > most:
        largest = max(sizes, key=lambda file: sizes[file])
        raise CheckpointError(
            f"{largest}: the checkpoint has {sum(sizes.values())} bytes, and this machine's memory "
            f"{most}"
        )


def _is_gguf(path: Path) -> bool:
    """Detected by the first bytes, whatever the name."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _file_digest(path: Path) -> str:
    """SHA-256 of the file, cached for large files."""
    check_file(path)
    with path.open("rb") as file:
        if path.stat().st_size < LARGE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        identity, kept = _identity(path), _load_digests()
        if identity in kept:
            return kept[identity]
        settled = time.time() - path.stat().st_ctime > SETTLED_S
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if settled and _identity(path) == identity:
        _save_digests({identity: digest} | kept)
    return digest


def _identity(path: Path) -> str:
    """Changes whenever the content may have changed: programs cannot set the ctime."""
    s = path.stat()
    return f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"


def _load_digests() -> dict[str, str]:
    try:
        kept = json.loads(read_file(DIGESTS))
        return {identity: bytes.fromhex(digest).hex() for identity, digest in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save_digests(digests: dict[str, str]) -> None:
    """Newest first. Where nothing can be written, large files are hashed at each start."""
    content = json.dumps(dict(list(digests.items())[:MAX_DIGESTS]), indent=1)
    with suppress(OSError):
        DIGESTS.parent.mkdir(parents=True, exist_ok=True)
        write_file(DIGESTS, content.encode())

"""The key file: API keys and their limits.

The command line writes it, the server reads it.

A key is 256 random bits and is shown once; the file stores its SHA-256. A slow hash, as for
passwords, would gain nothing: 256 bits cannot be guessed.
"""

import fcntl
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.files import read_file, write_file

PREFIX = "lk_"
"""Prefix by which people and secret scanners recognize a key."""

ID = re.compile(r"key_[0-9a-f]{32}")
Count = Annotated[int, Field(ge=1)] | None


class KeyFileError(Exception):
    """The key file cannot be read or changed; the message is one line."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Limits(_Stored):
    """A key's limits; None: the server's setting."""

    requests_per_minute: Count = None
    tokens_per_minute: Count = None
    concurrent_requests: Count = None
    concurrent_sequences: Count = None


class Key(_Stored):
    """A key, without its secret."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the key, in hexadecimal."""

    created_at: int
    """Unix seconds."""

    limits: Limits = Limits()

    @property
    def id(self) -> str:
        """The key's id, also the owner of its sessions."""
        return owner_of(self.hash)


class _KeyFile(_Stored):
    version: Literal[1] = 1
    keys: list[Key] = []

    @model_validator(mode="after")
    def _check_unique(self) -> "_KeyFile":
        for what in ("name", "hash"):
            if len({getattr(key, what) for key in self.keys}) < len(self.keys):
                raise ValueError(f"two keys have the same {what}")
        return self


def digest(key: str) -> str:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def owner_of(key_digest: str) -> str:
    """Owner of a key's sessions; reveals nothing about the key."""
    return f"key_{key_digest[:32]}"


def read_keys(path: Path) -> list[Key]:
    """Raises KeyFileError."""
    try:
        content = read_file(path)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error
    return _parse(path, content)


def add_key(path: Path, name: str, limits: Limits) -> tuple[Key, str]:
    """Add a new key, creating the file if necessary. Returns it with its secret.

    Raises KeyFileError.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key(name=name, hash=digest(secret), created_at=int(time.time()), limits=limits)
    except ValidationError as error:
        raise KeyFileError(
            f"{name!r} is not a valid key name: use 1 to 64 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        ) from error

    def added(keys: list[Key]) -> list[Key]:
        if any(name in (known.name, known.id) for known in keys):
            raise KeyFileError(f"{path}: there is a key {name!r} already")
        return [*keys, key]

    _change(path, added)
    return key, secret


def revoke_key(path: Path, name_or_id: str) -> Key:
    """Remove a key from the file. Raises KeyFileError."""
    revoked = list[Key]()

    def rest(keys: list[Key]) -> list[Key]:
        revoked.extend(key for key in keys if name_or_id in (key.name, key.id))
        if not revoked:
            raise KeyFileError(f"{path}: there is no key {name_or_id!r}")
        return [key for key in keys if key not in revoked]

    read_keys(path)  # fails if there is no file, instead of creating one
    _change(path, rest)
    return revoked[0]


def key_id_of(path: Path, name_or_id: str) -> str:
    """The id of a key in the file, or the given id. Raises KeyFileError."""
    if ID.fullmatch(name_or_id):
        return name_or_id
    for key in read_keys(path):
        if key.name == name_or_id:
            return key.id
    raise KeyFileError(
        f"{path}: there is no key {name_or_id!r}; a revoked key is only known by its id, "
        "key_ and 32 digits"
    )


def _change(path: Path, change: Callable[[list[Key]], list[Key]]) -> None:
    """Change the file under a lock."""
    path = path.resolve()  # keep symbolic links
    try:
        with _locked(path):
            keys = read_keys(path) if path.exists() else []
            changed = _KeyFile(keys=change(keys)).model_dump_json(indent=2, exclude_none=True)
            write_file(path, changed.encode() + b"\n", 0o600)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Uses a separate lock file: the key file itself is replaced under the lock."""
    with path.with_name(f".{path.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _parse(path: Path, content: bytes) -> list[Key]:
    try:
        return _KeyFile.model_validate_json(content).keys
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        reason = " ".join(f"{where}: {problem['msg']}".lstrip(": ").split())
        raise KeyFileError(f"{path}: {reason}") from error

"""Prefix cache: states after shared prompt prefixes, each read once.

The chunks of a prompt are identified by a chain of digests, each covering all tokens up to its
chunk, so one lookup shows whether two prompts share a prefix. A state is cached

* after the last whole chunk of a prompt, for prompts that extend it;
* where a prompt diverges from an earlier one, since others will diverge there, too.

A sequence does not read a prefix that another is about to read: it waits for that state, and looks
again if the other ends first. A sequence only waits for a shorter prefix than others wait for on
it, so there are no cycles. States are opaque here.

States are also cached at the start and the end of an answer. These are found by the bytes of the
text: the model may have generated the answer as other tokens than those its text is encoded to.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from model.shares import SharedCache
from server.engine.messages import EngineRequest
from server.engine.sequence import EngineSequence

MAX_SEEN = 1 << 12
"""Prefixes remembered without a state, at about 350 bytes each: several times those with one."""

State = TypeVar("State")


def chain(token_ids: Sequence[int], chunk: int, salt: bytes = b"") -> tuple[bytes, ...]:
    """The digest of the salt and all previous tokens after each whole chunk.

    256 bits of BLAKE2b, so that nobody can construct a collision to get another prompt's state. The
    salt is hashed separately, so that it cannot stand in for tokens.
    """
    digests = list[bytes]()
    digest = hashlib.blake2b(salt, digest_size=32, person=b"prefix salt").digest()
    for end in range(chunk, len(token_ids) + 1, chunk):
        tokens = array("q", token_ids[end - chunk : end]).tobytes()
        digest = hashlib.blake2b(digest + tokens, digest_size=32).digest()
        digests.append(digest)
    return tuple(digests)


@dataclass(frozen=True)
class CachedText:
    """A text with a cached state after it."""

    salt: bytes
    num_bytes: int
    pending: tuple[int, ...]
    """Its last tokens, not yet in the state."""


@dataclass(frozen=True)
class _CachedState(Generic[State]):
    state: State
    text: CachedText | None = None
    """Set if it is found by text."""


def _text_hash(salt: bytes) -> "hashlib.blake2b":
    """Separate from the digests of tokens."""
    digest = hashlib.blake2b(salt, digest_size=32, person=b"text salt").digest()
    return hashlib.blake2b(digest, digest_size=32, person=b"text")


def _salt(request: EngineRequest) -> bytes:
    """Separates prefixes by owner and by the state before them."""
    owner, source = request.owner.encode(), request.source
    return owner if source is None else owner + b"\0" + source.id.encode()


class SharedPrefixes(Generic[State]):
    """Cached states, and which sequence is reading which prefix. Evicts the least recently used
    state of the owner with the most."""

    def __init__(self, capacity_bytes: int, state_bytes: int, chunk: int) -> None:
        self.may_cache = capacity_bytes >= state_bytes
        self._state_bytes = state_bytes
        self._chunk = chunk
        self._states = SharedCache[bytes, _CachedState[State]](capacity_bytes // state_bytes)
        self._lengths: dict[bytes, Counter[int]] = {}
        """Number of cached texts per salt and length in bytes."""

        self._seen = SharedCache[bytes, None](MAX_SEEN)
        self._readers: dict[bytes, EngineSequence] = {}
        self._followers: list[EngineSequence] = []
        self._anticipated: dict[EngineSequence, tuple[bytes, bytes]] = {}
        """Sequences that read what is expected, with the salts and the texts of their prompts."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the cached states."""
        return len(self._states) * self._state_bytes

    def begin(self, sequence: EngineSequence) -> State | None:
        """Decide what a new sequence reads, and which other sequence it waits for.

        Returns the cached state to start from, if one is ahead of it. A sequence whose prompt is
        scored needs the logits of every token and never uses a cached state; others may use its
        states. May be called again for a sequence returned by `leave`.
        """
        if not self.may_cache:
            return None
        self._name_chunks(sequence)
        digests, depth = sequence.digests, len(sequence.digests)
        have = sequence.num_read // self._chunk
        kept = coming = have
        if not sequence.request.score_prompt:
            kept = next((i for i in range(depth, have, -1) if digests[i - 1] in self._states), have)
            coming = next((i for i in range(depth, kept, -1) if self._is_coming(sequence, i)), kept)
        parting = self._see(digests, sequence.request.owner)
        news = (i for i in (parting, depth) if i > coming and digests[i - 1] not in self._states)
        sequence.retain_at |= {i * self._chunk for i in news}
        if coming > kept:
            reader = self._readers[digests[coming - 1]]
            sequence.waits_for, sequence.waits_until = reader, coming * self._chunk
            reader.retain_at.add(sequence.waits_until)
            self._followers.append(sequence)
        for i in range(coming, depth):
            if not self._is_coming(sequence, i + 1):
                self._readers[digests[i]] = sequence
        if kept == have:
            return None
        sequence.skip_to(kept * self._chunk)
        found = self._states.get(digests[kept - 1])
        return None if found is None else found.state

    def retain(self, sequence: EngineSequence, state: State) -> list[EngineSequence]:
        """Cache the state where a sequence stopped for it.

        Returns the sequences that waited for it, for the caller to copy it to them.
        """
        digest = sequence.digests[sequence.num_read // self._chunk - 1]
        self._put(digest, _CachedState(state), sequence.request.owner)
        ready = [s for s in self._waiting_for(sequence) if s.waits_until == sequence.num_read]
        for follower in ready:
            self._stop_waiting(follower)
            follower.skip_to(sequence.num_read)
        return ready

    def leave(self, sequence: EngineSequence) -> list[EngineSequence]:
        """A sequence has stopped reading. Returns those that waited for it, to begin again."""
        self._anticipated.pop(sequence, None)
        for digest in sequence.digests:
            if self._readers.get(digest) is sequence:
                del self._readers[digest]
        if sequence.waits_for is not None:
            self._stop_waiting(sequence)
        orphans = self._waiting_for(sequence)
        for orphan in orphans:
            self._stop_waiting(orphan)
        return orphans

    def forget_readers(self) -> None:
        """Forget all sequences."""
        self._readers.clear()
        self._followers.clear()
        self._anticipated.clear()

    def forget_owner(self, owner: str) -> None:
        """Drop an owner's states and remembered prefixes."""
        self._forget_texts(self._states.remove_all(owner))
        self._seen.remove_all(owner)

    def drop_retained(self) -> None:
        """Drop all cached states."""
        self._states.clear()
        self._lengths.clear()

    def cache_text(
        self, request: EngineRequest, text: bytes, pending: Sequence[int], state: State
    ) -> None:
        """Cache the state after a text, except for its last tokens."""
        if not self.may_cache:
            return
        salt = _salt(request)
        digest = _text_hash(salt)
        digest.update(text)
        key = digest.digest()
        if key not in self._states:
            self._lengths.setdefault(salt, Counter())[len(text)] += 1
        kept = _CachedState(state, CachedText(salt, len(text), tuple(pending)))
        self._put(key, kept, request.owner)

    def find_text(self, request: EngineRequest, text: bytes) -> tuple[CachedText, State] | None:
        """The longest cached text that is a proper prefix of this one."""
        salt = _salt(request)
        key, at, digest = None, 0, _text_hash(salt)
        for length in sorted(self._lengths.get(salt, ())):
            if length >= len(text):
                break
            digest.update(text[at:length])
            at = length
            if (here := digest.digest()) in self._states:
                key = here
        found = None if key is None else self._states.get(key)
        return None if found is None or found.text is None else (found.text, found.state)

    def anticipate(self, sequence: EngineSequence, text: bytes) -> None:
        """The sequence reads a text so that others find the state after it."""
        self._anticipated[sequence] = _salt(sequence.request), text

    def await_text(self, sequence: EngineSequence, text: bytes, num_bytes: int) -> bool:
        """Wait for the state after a beginning of the text that is longer than so many bytes, if
        one is being read in anticipation. False if none is."""
        salt = _salt(sequence.request)
        readers = (
            (len(theirs), reader)
            for reader, (their_salt, theirs) in self._anticipated.items()
            if their_salt == salt and len(theirs) < len(text) and text.startswith(theirs)
        )
        length, reader = max(readers, key=lambda found: found[0], default=(0, None))
        if reader is None or length <= num_bytes:
            return False
        sequence.waits_for, sequence.waits_until = reader, 0
        self._followers.append(sequence)
        return True

    def num_retained(self, sequence: EngineSequence) -> int:
        """Tokens of the sequence's longest prefix with a cached state."""
        self._name_chunks(sequence)
        digests = sequence.digests
        depths = range(len(digests), 0, -1)
        return next((i for i in depths if digests[i - 1] in self._states), 0) * self._chunk

    def _name_chunks(self, sequence: EngineSequence) -> None:
        if not sequence.digests:
            # At least two tokens must remain: a single one would not be a piece of a prompt.
            shared = sequence.unread[: max(0, sequence.num_unread - 2)]
            sequence.digests = chain(shared, self._chunk, _salt(sequence.request))

    def _put(self, key: bytes, kept: _CachedState[State], owner: str) -> None:
        self._forget_texts(self._states.put(key, kept, owner))

    def _forget_texts(self, evicted: Iterable[_CachedState[State]]) -> None:
        for text in (kept.text for kept in evicted):
            if text is not None:
                lengths = self._lengths[text.salt]
                lengths[text.num_bytes] -= 1
                if not lengths[text.num_bytes]:
                    del lengths[text.num_bytes]
                if not lengths:
                    del self._lengths[text.salt]

    def _is_coming(self, sequence: EngineSequence, num_chunks: int) -> bool:
        """Whether another sequence is about to read this prefix."""
        reader = self._readers.get(sequence.digests[num_chunks - 1])
        if reader is None or reader is sequence:
            return False
        return reader.num_read < num_chunks * self._chunk

    def _see(self, digests: Sequence[bytes], owner: str) -> int:
        """Remember a prompt's prefixes; returns how many of them were seen before."""
        num_seen = next((i for i, d in enumerate(digests) if d not in self._seen), len(digests))
        for digest in reversed(digests):  # the longest are evicted first
            self._seen.put(digest, None, owner)
        return num_seen

    def _waiting_for(self, sequence: EngineSequence) -> list[EngineSequence]:
        return [follower for follower in self._followers if follower.waits_for is sequence]

    def _stop_waiting(self, follower: EngineSequence) -> None:
        self._followers.remove(follower)
        follower.waits_for = None

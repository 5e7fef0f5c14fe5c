"""Compilation of grammar sources, with a cache."""

import asyncio
import concurrent.futures
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from model.decoding.grammar.errors import GrammarBusyError, GrammarError
from model.decoding.grammar.matching import Grammar
from model.decoding.grammar.source import GrammarSpec
from model.decoding.grammar.trial import TrialProcess
from model.decoding.grammar.vocabulary import Vocabulary
from model.shares import SharedCache, has_space
from model.text.tokenizer import Tokenizer

CACHED_GRAMMARS, CACHED_BYTES = 64, 4 * 1024 * 1024
"""Maximum number of cached sources and their total size. llguidance uses about 0.2 MiB per source,
and more for one whose tokens it explores; that one is recompiled after `GRAMMAR_S` of matching, at
about 50 MiB."""

COMPILE_S = 5.0
PROCESSES, MAX_WAITING = 4, 32
"""Processes start on demand. An owner gets fewer than are idle: two if there is no other owner, so
that one is always left for the next. `MAX_WAITING` is shared likewise."""

MAX_THREADS = 4 * MAX_WAITING

CompileResult = Grammar | GrammarError


class GrammarCompiler:
    """Compiles sources for one tokenizer and network. Thread-safe.

    `vocab_sz` is the network's and may exceed the number of tokens; a text ends with one of
    `eos_token_ids`. Construction takes 0.03 s for 4,096 tokens and 0.5 s for 50,000. A new source
    is compiled in a subprocess first, then here; `close` ends the subprocesses.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_sz: int, eos_token_ids: Sequence[int]) -> None:
        self._vocabulary = Vocabulary(tokenizer, vocab_sz, eos_token_ids)
        self._cache = _Cache()
        self._trials = [TrialProcess(self._vocabulary) for _ in range(PROCESSES)]
        self._idle = list(self._trials)  # the last one is used first: it may be running already
        self._compiling = Counter[str]()
        self._seconds = defaultdict[str, float](float)
        self._changed = threading.Condition()
        self._threads = concurrent.futures.ThreadPoolExecutor(MAX_THREADS, "grammar")
        self._waiting = Counter[str]()
        """Pending `compile_within` calls, by owner."""

    def pop_seconds(self, owner: str) -> int:
        """Whole seconds of compilation charged to an owner since the last call."""
        with self._changed:
            seconds = int(self._seconds[owner])
            self._seconds[owner] -= seconds
            return seconds

    def is_known(self, spec: GrammarSpec) -> bool:
        """Whether the source is in the cache."""
        return self._cache.get(spec) is not None

    def compile(self, spec: GrammarSpec, timeout_s: float = COMPILE_S, owner: str = "") -> Grammar:
        """Compile a source. Blocks for at most `timeout_s` until a process is idle, as long again
        for the process to compile it, and then for as long as that took.

        Raises GrammarError if the source is invalid, too large or too slow, and GrammarBusyError.
        """
        spec.check_size()
        if (known := self._cache.get(spec)) is not None:
            return _granted(known)
        with self._process(owner, timeout_s) as trial:
            if (known := self._cache.get(spec)) is not None:
                return _granted(known)
            return _granted(self._first(spec, trial, timeout_s, owner))

    async def compile_within(
        self, spec: GrammarSpec, timeout_s: float = COMPILE_S, owner: str = ""
    ) -> Grammar:
        """`compile` without blocking the event loop."""
        if (known := self._cache.get(spec)) is not None:
            return _granted(known)
        with self._changed:
            own, total = self._waiting[owner], self._waiting.total()
            num_owners = len(self._waiting.keys() | {owner})
            if not has_space(own, total, 1, MAX_WAITING, num_owners):
                raise GrammarBusyError("too many new grammars are being compiled")
            self._waiting[owner] += 1
        task = self._threads.submit(self.compile, spec, timeout_s, owner)
        task.add_done_callback(lambda _: self._release(self._waiting, owner))
        return await asyncio.wrap_future(task)

    def forget(self, owner: str) -> None:
        """Drop the cached sources that an owner was the first to use."""
        self._cache.forget(owner)

    def close(self) -> None:
        """End the processes. Pending compilations fail; nothing may be compiled afterwards."""
        for trial in self._trials:
            trial.kill()
        self._threads.shutdown(cancel_futures=True)
        for trial in self._trials:
            trial.close()

    @contextmanager
    def _process(self, owner: str, timeout_s: float) -> Iterator[TrialProcess]:
        """A process for one source. Raises GrammarBusyError if none is idle in time."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: len(self._idle) > self._compiling[owner], timeout_s
            ):
                raise GrammarBusyError("too many new grammars are being compiled")
            self._compiling[owner] += 1
            trial = self._idle.pop()
        try:
            yield trial
        finally:
            with self._changed:
                self._idle.append(trial)
            self._release(self._compiling, owner)

    def _release(self, counts: Counter[str], owner: str) -> None:
        with self._changed:
            counts[owner] -= 1
            if not counts[owner]:
                del counts[owner]
            self._changed.notify_all()

    def _first(
        self, spec: GrammarSpec, trial: TrialProcess, timeout_s: float, owner: str
    ) -> CompileResult:
        """Compile an uncached source. Raises GrammarError for failures that should not be
        cached."""
        trial.start()
        began = time.monotonic()
        try:
            answer = trial.run(spec, timeout_s)
        finally:
            with self._changed:
                self._seconds[owner] += time.monotonic() - began
        outcome: CompileResult
        if answer.error is not None:
            outcome = GrammarError(answer.error)
        else:
            compiled = self._vocabulary.begin(answer.source)
            outcome = Grammar(spec, self._vocabulary, compiled)
        self._cache.put(spec, outcome, owner)
        return outcome


class _Cache:
    """The most recently used outcomes."""

    def __init__(self) -> None:
        self._outcomes = SharedCache[GrammarSpec, CompileResult](CACHED_BYTES)
        self._least = CACHED_BYTES // CACHED_GRAMMARS
        """Minimum size charged for a source."""

        self._lock = threading.Lock()

    def get(self, spec: GrammarSpec) -> CompileResult | None:
        with self._lock:
            found = self._outcomes.get(spec)
            if isinstance(found, Grammar) and found.is_spent:
                self._outcomes.remove(spec)
                return None
            return found

    def put(self, spec: GrammarSpec, outcome: CompileResult, owner: str) -> None:
        with self._lock:
            self._outcomes.put(spec, outcome, owner, max(self._least, spec.num_bytes))

    def forget(self, owner: str) -> None:
        with self._lock:
            self._outcomes.remove_all(owner)


def _granted(outcome: CompileResult) -> Grammar:
    if isinstance(outcome, GrammarError):
        raise GrammarError(str(outcome))
    return outcome

"""Compiled sources: made once, kept while they are used."""

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
"""Compiled sources that are kept, and the size of their sources together. What the library holds
for one is 0.2 MiB as a rule, and more for one that finds out much about its tokens; that one is
compiled anew when its texts have taken `GRAMMAR_S`, after 50 MiB or so."""

COMPILE_S = 5.0
PROCESSES, MAX_WAITING = 4, 32
"""Processes start when they are needed. An owner has fewer of them than are idle: two if nobody
else has any, so that there is always one for the next owner. `MAX_WAITING` is shared likewise."""

MOST_THREADS = 4 * MAX_WAITING

Outcome = Grammar | GrammarError


class GrammarCompiler:
    """Compiles sources for one tokenizer and network. Any thread may use it.

    `vocab_sz` is the network's, which may have more ids than there are tokens; a text ends with one
    of `eos_token_ids`. Building it takes 0.03 s for 4,096 tokens and 0.5 s for 50,000. A new source
    is compiled in a process first, then here; `close` ends the processes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_sz: int, eos_token_ids: Sequence[int]) -> None:
        self._vocabulary = Vocabulary(tokenizer, vocab_sz, eos_token_ids)
        self._cache = _Cache()
        self._trials = [TrialProcess(self._vocabulary) for _ in range(PROCESSES)]
        self._idle = list(self._trials)  # the last one is next, which may run already
        self._compiling = Counter[str]()
        self._seconds = defaultdict[str, float](float)
        self._changed = threading.Condition()
        self._threads = concurrent.futures.ThreadPoolExecutor(MOST_THREADS, "grammar")
        self._waiting = Counter[str]()
        """What `compile_within` waits for, by owner."""

    def pop_seconds(self, owner: str) -> int:
        """Whole seconds for which sources of an owner were compiled since the last call."""
        with self._changed:
            seconds = int(self._seconds[owner])
            self._seconds[owner] -= seconds
            return seconds

    def is_known(self, spec: GrammarSpec) -> bool:
        """Whether the source need not be compiled."""
        return self._cache.get(spec) is not None

    def compile(self, spec: GrammarSpec, timeout_s: float = COMPILE_S, owner: str = "") -> Grammar:
        """The grammar of a source. Blocks for at most `timeout_s` until a process is idle, then for
        as long until the source is compiled, then for as long as that took.

        Raises GrammarError if it is wrong, too large or takes too long, and GrammarBusyError.
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
        """Keep nothing that an owner was the first to have compiled."""
        self._cache.forget(owner)

    def close(self) -> None:
        """End the processes. What is being compiled is refused; nothing may be compiled after."""
        for trial in self._trials:
            trial.kill()
        self._threads.shutdown(cancel_futures=True)
        for trial in self._trials:
            trial.close()

    @contextmanager
    def _process(self, owner: str, timeout_s: float) -> Iterator[TrialProcess]:
        """A process for one source. Raises GrammarBusyError when there is none in time."""
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
    ) -> Outcome:
        """Compile what is not known. Raises GrammarError if it may be otherwise another time."""
        trial.start()
        began = time.monotonic()
        try:
            answer = trial.run(spec, timeout_s)
        finally:
            with self._changed:
                self._seconds[owner] += time.monotonic() - began
        outcome: Outcome
        if answer.error is not None:
            outcome = GrammarError(answer.error)
        else:
            compiled = self._vocabulary.begin(answer.source)
            outcome = Grammar(spec, self._vocabulary, compiled)
        self._cache.put(spec, outcome, owner)
        return outcome


class _Cache:
    """The outcomes that were used last."""

    def __init__(self) -> None:
        self._outcomes = SharedCache[GrammarSpec, Outcome](CACHED_BYTES)
        self._least = CACHED_BYTES // CACHED_GRAMMARS
        """What a source counts for at least."""

        self._lock = threading.Lock()

    def get(self, spec: GrammarSpec) -> Outcome | None:
        with self._lock:
            found = self._outcomes.get(spec)
            if isinstance(found, Grammar) and found.is_spent:
                self._outcomes.remove(spec)
                return None
            return found

    def put(self, spec: GrammarSpec, outcome: Outcome, owner: str) -> None:
        with self._lock:
            self._outcomes.put(spec, outcome, owner, max(self._least, spec.num_bytes))

    def forget(self, owner: str) -> None:
        with self._lock:
            self._outcomes.remove_all(owner)


def _granted(outcome: Outcome) -> Grammar:
    if isinstance(outcome, GrammarError):
        raise GrammarError(str(outcome))
    return outcome

"""Compiled sources: made once, kept while they are used."""

import asyncio
import concurrent.futures
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence

from model.decoding.grammar.errors import GrammarBusyError, GrammarError
from model.decoding.grammar.matching import Grammar
from model.decoding.grammar.source import GrammarSpec
from model.decoding.grammar.trial import TrialProcess
from model.decoding.grammar.vocabulary import Vocabulary
from model.text.tokenizer import Tokenizer

KEPT_GRAMMARS, KEPT_BYTES = 64, 4 * 1024 * 1024
"""Compiled sources that are kept, and the size of their sources together. What the library holds
for one is 0.2 MiB as a rule, and more for one that finds out much about its tokens; that one is
compiled anew when its texts have taken `GRAMMAR_S`, after 50 MiB or so."""

COMPILE_S = 5.0
PROCESSES, MAX_WAITING = 2, 32

Outcome = Grammar | GrammarError


class GrammarCompiler:
    """Compiles sources for one tokenizer and network. Any thread may use it.

    `vocab_sz` is the network's, which may have more ids than there are tokens; a text ends with one
    of `eos_token_ids`. Building it takes 0.03 s for 4,096 tokens and 0.5 s for 50,000. A new source
    is compiled in a process first, then here; `close` ends the processes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_sz: int, eos_token_ids: Sequence[int]) -> None:
        self._vocabulary = Vocabulary(tokenizer, vocab_sz, eos_token_ids)
        self._kept = _Kept()
        self._trials = [TrialProcess(self._vocabulary) for _ in range(PROCESSES)]
        self._idle: queue.LifoQueue[TrialProcess] = queue.LifoQueue()  # one that runs is first
        for trial in self._trials:
            self._idle.put(trial)
        self._threads = concurrent.futures.ThreadPoolExecutor(MAX_WAITING, "grammar")
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)

    def compile(self, spec: GrammarSpec, timeout_s: float = COMPILE_S) -> Grammar:
        """The grammar of a source. Blocks for at most `timeout_s` until a process is idle, then for
        as long until the source is compiled, then for as long as that took.

        Raises GrammarError if it is wrong, too large or takes too long, and GrammarBusyError.
        """
        spec.check_size()
        if (known := self._kept.get(spec)) is not None:
            return _granted(known)
        try:
            trial = self._idle.get(timeout=timeout_s)
        except queue.Empty:
            raise GrammarBusyError("too many new grammars are being compiled") from None
        try:
            if (known := self._kept.get(spec)) is not None:
                return _granted(known)
            return _granted(self._first(spec, trial, timeout_s))
        finally:
            self._idle.put(trial)

    async def compile_within(self, spec: GrammarSpec, timeout_s: float = COMPILE_S) -> Grammar:
        """`compile` without blocking the event loop."""
        if (known := self._kept.get(spec)) is not None:
            return _granted(known)
        if not self._waiting.acquire(blocking=False):
            raise GrammarBusyError("too many new grammars are being compiled")
        task = self._threads.submit(self.compile, spec, timeout_s)
        task.add_done_callback(lambda _: self._waiting.release())
        return await asyncio.wrap_future(task)

    def close(self) -> None:
        """End the processes. What is being compiled is refused; nothing may be compiled after."""
        for trial in self._trials:
            trial.kill()
        self._threads.shutdown(cancel_futures=True)
        for trial in self._trials:
            trial.close()

    def _first(self, spec: GrammarSpec, trial: TrialProcess, timeout_s: float) -> Outcome:
        """Compile what is not known. Raises GrammarError if it may be otherwise another time."""
        answer = trial.run(spec, timeout_s)
        outcome: Outcome
        if answer.error is not None:
            outcome = GrammarError(answer.error)
        else:
            compiled = self._vocabulary.begin(answer.source)
            outcome = Grammar(spec, self._vocabulary, compiled)
        self._kept.put(spec, outcome)
        return outcome


class _Kept:
    """The outcomes that were used last."""

    def __init__(self) -> None:
        self._outcomes: OrderedDict[GrammarSpec, Outcome] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, spec: GrammarSpec) -> Outcome | None:
        with self._lock:
            found = self._outcomes.get(spec)
            if isinstance(found, Grammar) and found.is_spent:
                self._remove(spec)
                return None
            if found is not None:
                self._outcomes.move_to_end(spec)
            return found

    def put(self, spec: GrammarSpec, outcome: Outcome) -> None:
        with self._lock:
            self._remove(spec)
            self._outcomes[spec] = outcome
            self._num_bytes += spec.num_bytes
            while len(self._outcomes) > KEPT_GRAMMARS or self._num_bytes > KEPT_BYTES:
                self._remove(next(iter(self._outcomes)))

    def _remove(self, spec: GrammarSpec) -> None:
        if self._outcomes.pop(spec, None) is not None:
            self._num_bytes -= spec.num_bytes


def _granted(outcome: Outcome) -> Grammar:
    if isinstance(outcome, GrammarError):
        raise GrammarError(str(outcome))
    return outcome

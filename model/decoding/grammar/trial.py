"""First compilation of a source, in a subprocess that can be killed.

llguidance limits most of what a source can cost, but not all: a one-line schema can keep it busy
for hours, and it cannot be interrupted. Only what compiles here within the time and memory limits
is compiled in the server.

The process is `python -m model.decoding.grammar.trial`. It reads lines of JSON, first the
vocabulary, then sources, and answers each with a line: the source in llguidance's form, or an
error. It exits at end of input, hence with the server, and in any case after `CPU_S` on one source.
"""

import json
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass

from model.decoding.grammar.errors import GrammarBusyError, GrammarError
from model.decoding.grammar.source import GrammarSpec, library_source
from model.decoding.grammar.vocabulary import Vocabulary
from model.text import formats

CPU_S = 60
"""Processor time limit of one source, in case the parent cannot kill the process."""

MEMORY_BYTES = 1 << 30
"""Memory limit on top of what the process uses at its start."""


@dataclass(frozen=True)
class Trial:
    """Result for a source: its form for llguidance, or the error."""

    source: str = ""
    error: str | None = None


class TrialProcess:
    """The process; starts on first use and again after it had to be killed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._hello = {
            "tokenizer": vocabulary.tokenizer.to_json(),
            "vocab_sz": vocabulary.vocab_sz,
            "end_ids": sorted(vocabulary.end_ids),
        }
        self._process: subprocess.Popen[str] | None = None
        self._killed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process if it is not running. Raises GrammarBusyError after `kill`."""
        self._running()

    def run(self, spec: GrammarSpec, timeout_s: float) -> Trial:
        """Compile a source. Raises GrammarError if the process had to be killed, GrammarBusyError
        after `kill`. One thread at a time."""
        process = self._running()
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout_s, end)
        timer.start()
        try:
            answer = _ask(process, {"kind": spec.kind, "source": spec.source})
        finally:
            timer.cancel()
        if answer is not None and not late.is_set():
            return Trial(**json.loads(answer))
        self.close()
        if self._killed:
            raise GrammarBusyError("the server is stopping")
        if late.is_set():
            raise GrammarError(f"the source was not compiled within {timeout_s:.3g} seconds")
        raise GrammarError("the source takes too much memory to compile")

    def kill(self) -> None:
        """Interrupt `run` in another thread and reject later calls."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """End the process; `run` starts another one."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is not None:
            return self._process
        command = [sys.executable, "-m", "model.decoding.grammar.trial"]
        with self._lock:
            if self._killed:
                raise GrammarBusyError("the server is stopping")
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,
            )
        if _ask(process, self._hello) is None and not self._killed:
            self.close()
            raise RuntimeError(f"{' '.join(command)} failed to start")
        return process


def _ask(process: subprocess.Popen[str], question: object) -> str | None:
    """The reply; None if the process exited."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    try:
        process.stdin.write(f"{json.dumps(question)}\n")
        process.stdin.flush()
        return process.stdout.readline() or None
    except OSError:
        return None


def limit_memory() -> None:
    """Limits this process's memory, on Linux."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as file:
        present = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + MEMORY_BYTES,) * 2)


def _limit_time() -> None:
    if sys.platform != "linux":
        return
    import resource

    spent = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent.ru_utime + spent.ru_stime) + CPU_S, hard))


def _compile(vocabulary: Vocabulary, spec: GrammarSpec) -> Trial:
    try:
        source = library_source(spec)
        vocabulary.begin(source)
    except GrammarError as error:
        return Trial(error=str(error))
    return Trial(source)


def main() -> None:
    """Compile sources until end of input."""
    hello = json.loads(sys.stdin.readline())
    tokenizer = formats.from_json(hello["tokenizer"])
    vocabulary = Vocabulary(tokenizer, hello["vocab_sz"], hello["end_ids"])
    limit_memory()
    print("ready", flush=True)
    for line in sys.stdin:
        _limit_time()
        asked = json.loads(line)
        source = asked["source"]
        spec = GrammarSpec(asked["kind"], source if isinstance(source, str) else tuple(source))
        print(json.dumps(asdict(_compile(vocabulary, spec))), flush=True)


if __name__ == "__main__":
    main()

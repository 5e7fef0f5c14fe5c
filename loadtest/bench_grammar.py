"""Libraries that keep a model's text to a grammar, measured beside each other.

    python -m loadtest.bench_grammar

Needs llguidance, xgrammar or both; what is not installed is left out. The large vocabulary is
trained on the source text of Python's standard library. Each library runs in a process of its
own, as does each hostile source, which is ended when that takes too long. Times of masks are
processor time in microseconds, those of compiling the shortest of five in milliseconds.
"""

import importlib
import importlib.metadata
import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import typer
from numpy.typing import NDArray

from loadtest.grammar_cases import BREAKING, HOSTILE, UNSUPPORTED, USEFUL, Case
from loadtest.grammar_libraries import (
    SPECIAL,
    WAYS,
    Library,
    Mask,
    RefusedError,
    Walker,
    build,
)
from model import PRETRAINED, tokenizer
from model.tokenizer import Tokenizer

LIBRARIES = ("llguidance", "xgrammar")
LARGE = 50_000
PATIENCE_S = 30
WALKS, WALK_TOKENS = 10, 200
HOSTILE_TOKENS = 1_000
HARMLESS = Case("", "regex", "first things first")
ROUNDS = 50
MASKS_AT_ONCE = 32


def new_mask(tokens: Tokenizer, rows: int | None = None) -> Mask:
    words = (tokens.num_tokens + 31) // 32
    return np.zeros(words if rows is None else (rows, words), np.int32)


def allowed(mask: Mask) -> NDArray[np.intp]:
    """The token ids of a mask."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def busy_seconds(work: Callable[[], object]) -> float:
    """Processor time of this thread: other programs do not count."""
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def read(walker: Walker, tokens: Tokenizer, text: str) -> Iterator[float]:
    """Seconds of each mask on the way through a text that the grammar accepts."""
    mask = new_mask(tokens)
    for token_id in tokens.encode(text):
        yield busy_seconds(lambda: walker.fill(mask))
        if not walker.accept(token_id):
            raise RefusedError(f"{tokens.bytes_of(token_id)!r} of {text!r}")


def walk(walker: Walker, tokens: Tokenizer, seed: int, length: int) -> Iterator[float]:
    """Seconds of each mask, and of taking the token, where tokens are drawn from the mask."""
    chance, mask, end = random.Random(seed), new_mask(tokens), tokens.special_tokens[SPECIAL]
    for _ in range(length):
        took = busy_seconds(lambda: walker.fill(mask))
        ids = [token_id for token_id in allowed(mask) if token_id != end]
        if not ids:
            yield took
            return
        begin = time.thread_time()
        taken = walker.accept(int(chance.choice(ids)))
        yield took + time.thread_time() - begin
        if not taken:
            raise RefusedError("a token of the mask")


def spread(times: list[float]) -> str:
    """p50, p99 and the largest, in microseconds."""
    ordered = sorted(times)
    values = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)], ordered[-1]
    return " ".join(f"{value * 1e6:8.0f}" for value in values)


def measure_useful(library: Library, tokens: Tokenizer) -> None:
    print(f"{'':24} {'ms':>8} {'MiB':>6}  {'text: p50, p99, max':>26}  {'walk: p50, p99, max':>26}")
    for case in USEFUL:
        if case.kind not in library.kinds:
            continue
        library.compile(case)
        times = [seconds(lambda case=case: library.compile(case)) for _ in range(5)]  # type: ignore[misc]
        before, kept = resident_mib(), [library.compile(case) for _ in range(20)]
        grown = (resident_mib() - before) / len(kept)
        compiled = kept[0]
        text = [t for _ in range(10) for t in read(library.walker(compiled), tokens, case.text)]
        walked = [
            t
            for seed in range(WALKS)
            for t in walk(library.walker(compiled), tokens, seed, WALK_TOKENS)
        ]
        print(
            f"{case.name:24} {min(times) * 1e3:8.2f} {grown:6.2f}  {spread(text)}  {spread(walked)}"
        )


def measure_batch(library: Library, tokens: Tokenizer) -> None:
    """Masks of many texts that are at different places of one document."""
    case = USEFUL[1]
    compiled, ids = library.compile(case), tokens.encode(case.text)
    walkers = [library.walker(compiled) for _ in range(MASKS_AT_ONCE)]
    for i, walker in enumerate(walkers):
        for token_id in ids[: i * len(ids) // MASKS_AT_ONCE]:
            walker.accept(token_id)
    masks = new_mask(tokens, MASKS_AT_ONCE)
    together = sorted(seconds(lambda: library.fill_all(walkers, masks)) for _ in range(ROUNDS))

    def one_by_one() -> None:
        for walker, mask in zip(walkers, masks, strict=True):
            walker.fill(mask)

    alone = sorted(seconds(one_by_one) for _ in range(ROUNDS))
    print(
        f"{MASKS_AT_ONCE} masks: {together[ROUNDS // 2] * 1e3:.2f} ms at once,"
        f" {alone[ROUNDS // 2] * 1e3:.2f} ms one after another"
    )


def longest_pause(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that the work takes in a thread, and the longest that this one stood still."""
    thread = threading.Thread(target=work)
    begin = last = time.perf_counter()
    longest = 0.0
    thread.start()
    while thread.is_alive():
        time.sleep(0.0005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    thread.join()
    return time.perf_counter() - begin, longest


def measure_lock(library: Library) -> None:
    """Whether others run while a grammar is compiled."""
    words = json.dumps([f"{i * 7919 % 99991} is the answer" for i in range(20_000)])
    slow = Case("20,000 choices", "choice", words)
    took, pause = longest_pause(lambda: library.compile(slow))
    print(f"compile of {slow.name}: {took * 1e3:.0f} ms; others stood still {pause * 1e3:.0f} ms")


def measure_refusals(library: Library, tokens: Tokenizer) -> None:
    """What becomes of schemas that are seldom supported."""
    for case in UNSUPPORTED:
        try:
            walker = library.walker(library.compile(case))
        except RefusedError as error:
            lines = str(error).strip().splitlines()
            print(f"{case.name:24} refused: {lines[-1][-70:]}")
            continue
        taken = all(walker.accept(token_id) for token_id in tokens.encode(BREAKING[case.name]))
        print(f"{case.name:24} {'IGNORED' if taken else 'enforced'}")


def measure_hostile(library: Library, tokens: Tokenizer, case: Case) -> None:
    """One source: compile it, then a walk of random tokens."""
    library.compile(HARMLESS)
    before = resident_mib()
    begin = time.perf_counter()
    times: list[float] = []
    took, ending = 0.0, ""
    try:
        compiled = library.compile(case)
        took = time.perf_counter() - begin
        for step in walk(library.walker(compiled), tokens, 0, HOSTILE_TOKENS):
            times.append(step)  # noqa: PERF402 - those before an error count, too
    except RefusedError as error:
        lines = str(error).strip().splitlines()
        ending = f"{'stopped' if took else 'refused'}: {lines[0][:70]}"
        took = took or time.perf_counter() - begin
    print(
        f"{took * 1e3:10.1f} {max(times, default=0) * 1e3:10.1f} {sum(times) * 1e3:8.0f}"
        f" {len(times):6} {resident_mib() - before:6.0f}  {ending}".rstrip()
    )


def measure_library(name: str, path: Path) -> None:
    """All measurements of one library and vocabulary but the hostile ones."""
    command = [sys.executable, "-c", f"import numpy, {name}"]
    without = [sys.executable, "-c", "import numpy"]
    importing = seconds(lambda: subprocess.run(command)) - seconds(lambda: subprocess.run(without))
    importlib.import_module(name)
    after = resident_mib()
    tokens = tokenizer.read(path)
    begin = time.perf_counter()
    library = build(name, tokens)
    print(
        f"import {importing:.2f} s with what it imports, {after:.0f} MiB resident;"
        f" tables of {tokens.num_tokens:,} tokens: {(time.perf_counter() - begin) * 1e3:.0f} ms,"
        f" {resident_mib() - after:.0f} MiB"
    )
    measure_useful(library, tokens)
    measure_batch(library, tokens)
    measure_lock(library)
    if tokens.num_tokens < LARGE:
        measure_refusals(library, tokens)


def child(*arguments: str) -> str:
    """What this program prints when it measures a part; an ending line when it takes too long."""
    command = [sys.executable, "-m", "loadtest.bench_grammar", *arguments]
    shown = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ
    )
    try:
        text, _ = shown.communicate(timeout=PATIENCE_S if len(arguments) == 3 else 600)
    except subprocess.TimeoutExpired:
        shown.kill()
        shown.communicate()
        return f"{f'ended after {PATIENCE_S} s':>21}\n"
    died = "" if shown.returncode == 0 else f"died with status {shown.returncode}\n"
    return text + died


def closure(name: str, seen: set[str]) -> None:
    """The distributions that come with this one."""
    requirement = importlib.import_module("packaging.requirements").Requirement
    seen.add(name)
    for line in importlib.metadata.requires(name) or []:
        needed = requirement(line)
        wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if wanted and needed.name.lower() not in seen and installed(needed.name):
            closure(needed.name.lower(), seen)


def installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def describe(name: str) -> None:
    """Version, and what it needs that this project does not need anyway."""
    ours: set[str] = set()
    for line in importlib.metadata.requires("latentd") or []:
        needed = importlib.import_module("packaging.requirements").Requirement(line)
        if needed.marker is None and needed.name.lower() not in ours and needed.name != name:
            closure(needed.name.lower(), ours)
    added: set[str] = set()
    closure(name, added)
    print(f"\n## {name} {importlib.metadata.version(name)}")
    for distribution in sorted(added - ours):
        files = importlib.metadata.files(distribution) or []
        size = sum(f.size or 0 for f in files) / 2**20
        print(f"brings {distribution}: {size:.1f} MiB")


def large_vocabulary(path: Path) -> None:
    """Train it on the source of the standard library."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = (
        source.read_text("utf-8", "replace")
        for source in sources
        if "site-packages" not in source.parts
    )
    path.write_text(tokenizer.train(texts, LARGE, [SPECIAL]).to_json(), "utf-8")


def hostile_sources(name: str, vocabulary: Path) -> None:
    """What each hostile source costs; processor time, but for compiling."""
    heads = f"{'compile ms':>10} {'worst step':>10} {'text':>8} {'steps':>6} {'MiB':>6}"
    print(f"\n{'hostile, times in ms':34} {heads}")
    for i, case in enumerate(HOSTILE):
        if case.kind in WAYS[name].kinds:
            part = child(f"--library={name}", f"--vocabulary={vocabulary}", f"--hostile={i}")
            print(f"{case.name:34} {part}", end="", flush=True)


def main(library: str = "", vocabulary: str = "", hostile: int = -1) -> None:
    """Measure and print. The options are for the processes that this one starts."""
    if library and hostile >= 0:
        tokens = tokenizer.read(Path(vocabulary))
        measure_hostile(build(library, tokens), tokens, HOSTILE[hostile])
        return
    if library:
        measure_library(library, Path(vocabulary))
        return
    small = PRETRAINED / "tokenizer.json"
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "tokenizer.json"
        large_vocabulary(large)
        for name in filter(installed, LIBRARIES):
            describe(name)
            for path in (small, large):
                print(f"\n{child(f'--library={name}', f'--vocabulary={path}')}", end="", flush=True)
            hostile_sources(name, small)
        print("\n## model.grammar: llguidance within this project's limits")
        hostile_sources("model.grammar", small)


if __name__ == "__main__":
    typer.run(main)

"""Compiled sources are cached; those that are too slow or too large are rejected."""

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import pytest

from model.decoding.grammar import (
    GrammarBusyError,
    GrammarCompiler,
    GrammarError,
    GrammarSpec,
    compiler,
    matching,
)
from model.decoding.grammar.trial import TrialProcess
from model.decoding.grammar.vocabulary import Vocabulary
from model.text.tokenizer import Tokenizer
from tests.model.decoding.grammar.texts import ENDS, VOCAB_SZ, allowed, schema
from tests.patience import PATIENCE_S, PROGRAM_S, until

ENDLESS = json.dumps({"type": "integer", "multipleOf": 99_999_989})
EXPLODING = "((a{1,100}){1,100}){1,100}"


def test_a_source_that_compiles_for_ever_is_given_up(grammars: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match=r"not compiled within 0\.5 seconds"):
        grammars.compile(GrammarSpec("json_schema", ENDLESS), 0.5)
    assert grammars.compile(GrammarSpec("regex", "after that")).matcher()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_the_trial_process_cannot_use_all_memory() -> None:
    script = "from model.decoding.grammar import trial; trial.limit_memory(); bytearray(2 << 30)"
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "MemoryError" in died.stderr


def test_a_trial_process_that_died_is_started_again(tokens: Tokenizer) -> None:
    trial = TrialProcess(Vocabulary(tokens, VOCAB_SZ, ENDS))
    try:
        for letter in "ab":
            assert trial.run(GrammarSpec("regex", letter), PATIENCE_S).error is None
            assert trial._process is not None
            trial._process.kill()
            trial._process.wait()
    finally:
        trial.close()


def test_a_grammar_whose_tables_are_full_is_recompiled(grammars: GrammarCompiler) -> None:
    spec = GrammarSpec("regex", EXPLODING)
    grammar = grammars.compile(spec, PATIENCE_S)
    assert grammars.compile(spec) is grammar
    matcher = grammar.matcher()
    while ids := [i for i in allowed(matcher) if i not in ENDS]:
        matcher.accept(ids[-1])
    assert matcher.failure is not None
    assert grammar.is_spent
    fresh = grammars.compile(spec)
    assert fresh is not grammar
    assert allowed(fresh.matcher())


def test_a_grammar_that_was_used_long_is_recompiled(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts already begun with it continue."""
    monkeypatch.setattr(matching, "GRAMMAR_S", 0.01)
    spec = GrammarSpec("regex", "a used one( again)*")
    grammar = grammars.compile(spec)
    matcher = grammar.matcher()
    while not grammar.is_spent:
        assert matcher.accept(next(i for i in allowed(matcher) if i not in ENDS))
    assert grammars.compile(spec) is not grammar
    assert matcher.failure is None
    assert allowed(matcher)


def test_the_cache_of_compiled_sources_is_bounded(
    tokens: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "CACHED_GRAMMARS", 3)
    monkeypatch.setattr(compiler, "CACHED_BYTES", 1000)
    made = GrammarCompiler(tokens, VOCAB_SZ, ENDS)
    try:
        a, b, c, d = (GrammarSpec("choice", (letter,)) for letter in "abcd")
        first = made.compile(a)
        second = made.compile(b)
        made.compile(c)
        assert made.compile(a) is first
        made.compile(d)
        assert made.compile(a) is first
        assert made.compile(b) is not second
        large = GrammarSpec("choice", ("x" * 999,))
        kept = made.compile(large)
        assert made.compile(large) is kept
        assert made.compile(a) is not first
    finally:
        made.close()


def test_the_event_loop_runs_while_sources_are_compiled(grammars: GrammarCompiler) -> None:
    async def ticking(task: asyncio.Task[Any]) -> tuple[int, float]:
        """Number of ticks, and the longest time between two, counting only time when this process
        runs."""
        count, longest, last = 0, 0.0, time.process_time()
        while not task.done():
            await asyncio.sleep(0.001)
            count, now = count + 1, time.process_time()
            longest, last = max(longest, now - last), now
        return count, longest

    async def run() -> tuple[int, float]:
        words = tuple(f"{i * 7919 % 9973} is the answer" for i in range(8000))
        spec = GrammarSpec("choice", words)
        slow = asyncio.create_task(grammars.compile_within(spec, PATIENCE_S))
        ticks = await ticking(slow)
        assert await slow is await grammars.compile_within(GrammarSpec("choice", words))
        with pytest.raises(GrammarError, match="not compiled within"):
            await grammars.compile_within(GrammarSpec("json_schema", ENDLESS), 0.3)
        return ticks

    count, longest = asyncio.run(run())
    assert count > 10
    assert longest < 0.5


@pytest.mark.long
def test_hostile_sources_do_not_make_others_wait_for_ever(grammars: GrammarCompiler) -> None:
    async def run() -> list[Any]:
        hostile = [
            grammars.compile_within(
                schema({"type": "integer", "multipleOf": 99_999_989 - 2 * i}), 0.5
            )
            for i in range(compiler.MAX_WAITING + 5)
        ]
        async with asyncio.timeout(PROGRAM_S):
            return await asyncio.gather(*hostile, return_exceptions=True)

    outcomes = asyncio.run(run())
    assert {type(outcome) for outcome in outcomes} == {GrammarError, GrammarBusyError}
    given_up = [str(outcome) for outcome in outcomes if type(outcome) is GrammarError]
    assert set(given_up) == {"the source was not compiled within 0.5 seconds"}
    assert grammars.compile(GrammarSpec("regex", "and then")).matcher()


@pytest.mark.parametrize("moment", ["at once", "starting", "at work"])
def test_a_closed_compiler_compiles_nothing(moment: str, tokens: Tokenizer) -> None:
    """Whether its process is starting, ready or compiling."""
    made = GrammarCompiler(tokens, VOCAB_SZ, ENDS)

    async def run() -> None:
        if moment == "at work":
            await made.compile_within(GrammarSpec("regex", "b"), PATIENCE_S)
        hostile = asyncio.create_task(
            made.compile_within(GrammarSpec("json_schema", ENDLESS), PROGRAM_S)
        )
        await asyncio.sleep(0)
        if moment != "at once":
            await until(
                lambda: len(made._idle) == compiler.PROCESSES - 1 and made._trials[-1]._process
            )
        if moment == "at work":
            await asyncio.sleep(0.1)
        made.close()
        with pytest.raises((GrammarBusyError, asyncio.CancelledError)):
            await hostile

    asyncio.run(run())
    with pytest.raises(GrammarBusyError):
        made.compile(GrammarSpec("regex", "a"))

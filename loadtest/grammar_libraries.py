"""The libraries for structured output, each behind the same few calls."""

import importlib
import json
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loadtest.grammar_cases import Case, Kind
from model.grammar import GrammarCompiler, GrammarError, GrammarSpec, Matcher, fill_masks
from model.tokenizer import Tokenizer

SPECIAL = "<|endoftext|>"

Mask = NDArray[np.int32]


class RefusedError(Exception):
    """The library does not take this source."""


class Walker(Protocol):
    """One text that is made under a grammar."""

    def fill(self, mask: Mask) -> None:
        """Which tokens may come next."""

    def accept(self, token_id: int) -> bool:
        """Whether the token may come next; goes on if so."""


class Library(Protocol):
    """What is measured."""

    kinds: tuple[Kind, ...]

    def compile(self, case: Case) -> Any:
        """Raises RefusedError."""

    def walker(self, compiled: Any) -> Walker:
        """A text that has not begun."""

    def fill_all(self, walkers: list[Any], masks: Mask) -> None:
        """Masks of many texts, as the library does it best."""


class Guidance:
    """llguidance."""

    kinds: tuple[Kind, ...] = ("json_schema", "regex", "lark", "choice")

    def __init__(self, tokens: Tokenizer, end: int) -> None:
        self.library = importlib.import_module("llguidance")
        numbers = importlib.import_module("llguidance.numpy")
        self._fill_all = numbers.fill_next_token_bitmask_par
        self._executor = self.library.LLExecutor(num_threads=2)

        class Wrapper:
            is_tokenizer_wrapper = True
            bos_token_id = None
            special_token_ids: tuple[int, ...] = ()
            eos_token_id = end

            def __init__(self) -> None:
                self.tokens = list(tokens.token_bytes)

            def __call__(self, text: bytes | str) -> list[int]:
                return tokens.encode(text if isinstance(text, str) else text.decode())

        self.tokenizer = self.library.LLTokenizer(Wrapper(), n_vocab=tokens.num_tokens)
        self._limits = self.library.LLParserLimits(verbose_errors=False)

    def compile(self, case: Case) -> Any:
        matcher = self.library.LLMatcher
        try:
            if case.kind == "json_schema":
                options = {
                    "whitespace_flexible": False,
                    "item_separator": ", ?",
                    "key_separator": ": ?",
                }
                grammar = matcher.grammar_from_json_schema(case.source, overrides=options)
            elif case.kind == "regex":
                grammar = matcher.grammar_from_regex(case.source)
            elif case.kind == "choice":
                words = " | ".join(json.dumps(word) for word in json.loads(case.source))
                grammar = matcher.grammar_from_lark(f"start: WORD\nWORD: {words}")
            else:
                grammar = matcher.grammar_from_lark(case.source)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        compiled = matcher(self.tokenizer, grammar, log_level=0, limits=self._limits)
        if compiled.is_error():
            raise RefusedError(compiled.get_error())
        return compiled

    def walker(self, compiled: Any) -> "GuidedWalker":
        return GuidedWalker(compiled.deep_copy())

    def fill_all(self, walkers: list[Any], masks: Mask) -> None:
        self._fill_all(self._executor, [(w.matcher, i) for i, w in enumerate(walkers)], masks)


class GuidedWalker:
    """A text under llguidance."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def fill(self, mask: Mask) -> None:
        self.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self.matcher.is_error():
            raise RefusedError(self.matcher.get_error())

    def accept(self, token_id: int) -> bool:
        return bool(self.matcher.consume_token(token_id))


class XGrammar:
    """xgrammar."""

    kinds: tuple[Kind, ...] = ("json_schema", "regex", "gbnf", "choice")

    def __init__(self, tokens: Tokenizer, end: int) -> None:
        self.library = importlib.import_module("xgrammar")
        info = self.library.TokenizerInfo(
            list(tokens.token_bytes),
            vocab_type=self.library.VocabType.RAW,
            vocab_size=tokens.num_tokens,
            stop_token_ids=[end],
        )
        self._compiler = self.library.GrammarCompiler(info, max_threads=2, cache_enabled=False)
        self._batch = self.library.BatchGrammarMatcher(max_threads=2)

    def compile(self, case: Case) -> Any:
        compiler = self._compiler
        try:
            if case.kind == "json_schema":
                return compiler.compile_json_schema(
                    case.source, strict_mode=False, max_whitespace_cnt=1
                )
            if case.kind == "regex":
                return compiler.compile_regex(case.source)
            if case.kind == "choice":
                words = " | ".join(json.dumps(word) for word in json.loads(case.source))
                return compiler.compile_grammar(f"root ::= {words}")
            return compiler.compile_grammar(case.source)
        except (RuntimeError, ValueError) as error:
            raise RefusedError(str(error)) from error

    def walker(self, compiled: Any) -> "XWalker":
        return XWalker(self.library.GrammarMatcher(compiled))

    def fill_all(self, walkers: list[Any], masks: Mask) -> None:
        torch = importlib.import_module("torch")
        batch = [walker.matcher for walker in walkers]
        self._batch.batch_fill_next_token_bitmask(batch, torch.from_numpy(masks))


class XWalker:
    """A text under xgrammar."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher
        self._torch = importlib.import_module("torch")

    def fill(self, mask: Mask) -> None:
        mask[:] = -1
        self.matcher.fill_next_token_bitmask(self._torch.from_numpy(mask[None]))

    def accept(self, token_id: int) -> bool:
        return bool(self.matcher.accept_token(token_id))


class Ours:
    """This project's use of llguidance, with limits of its own and a trial of each source."""

    kinds: tuple[Kind, ...] = ("json_schema", "regex", "lark", "gbnf", "choice")

    def __init__(self, tokens: Tokenizer, end: int) -> None:
        self._compiler = GrammarCompiler(tokens, tokens.num_tokens, (end,))

    def compile(self, case: Case) -> Any:
        try:
            if case.kind == "json_schema" or case.kind == "regex":
                return self._compiler.compile(GrammarSpec(case.kind, case.source))
            if case.kind == "choice":
                words = tuple(json.loads(case.source))
                return self._compiler.compile(GrammarSpec("choice", words))
            return self._compiler.compile(GrammarSpec("grammar", case.source))
        except GrammarError as error:
            raise RefusedError(str(error)) from error

    def walker(self, compiled: Any) -> "OurWalker":
        return OurWalker(compiled.matcher())

    def fill_all(self, walkers: list[Any], masks: Mask) -> None:
        fill_masks([walker.matcher for walker in walkers], masks)


class OurWalker:
    """A text under this project's limits."""

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher

    def fill(self, mask: Mask) -> None:
        self.matcher.fill(mask)
        self._check()

    def accept(self, token_id: int) -> bool:
        self.matcher.accept(token_id)
        self._check()
        return True

    def _check(self) -> None:
        if self.matcher.failure is not None:
            raise RefusedError(self.matcher.failure)


WAYS: dict[str, type[Guidance | XGrammar | Ours]] = {
    "llguidance": Guidance,
    "xgrammar": XGrammar,
    "model.grammar": Ours,
}


def build(name: str, tokens: Tokenizer) -> Library:
    """The library of this name with its tables of the tokens."""
    return WAYS[name](tokens, tokens.special_tokens[SPECIAL])

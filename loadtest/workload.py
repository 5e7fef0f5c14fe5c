"""The load: prompts, lengths of answers, and which turns resume sessions."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Endpoint = Literal["completions", "chat"]

TEXT = (
    "the a one little old big red green small happy sad good girl boy dog cat fox bird tree "
    "house and but so then when while after said saw went ran found gave took made was had "
    "liked wanted to in on under with from home day time friend mother father water garden "
    "story "
)
WORDS = TEXT.split()
"""Short and common words, about one token each in most tokenizers."""

KINDS = {"constant": 1, "uniform": 2, "normal": 2, "lognormal": 2}
"""Distributions and their number of parameters."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of integers, at least 1.

    `constant:N`, or only N; `uniform:LOW:HIGH`; `normal:MEAN:SD`; `lognormal:MEDIAN:SIGMA`, where
    SIGMA is the standard deviation of the logarithm.
    """

    kind: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Raises ValueError with the reason."""
        kind, *rest = text.split(":") if ":" in text else ("constant", text)
        if KINDS.get(kind) != len(rest):
            known = "N, uniform:LOW:HIGH, normal:MEAN:SD or lognormal:MEDIAN:SIGMA"
            raise ValueError(f"{text!r} is not a distribution of lengths: {known}")
        try:
            numbers = tuple(float(number) for number in rest)
        except ValueError:
            raise ValueError(f"{text!r}: the parameters of {kind} must be numbers") from None
        if not all(math.isfinite(number) for number in numbers) or numbers[0] < 1:
            raise ValueError(f"{text!r}: lengths are finite, and at least 1")
        if (numbers[1:] and numbers[1] < 0) or (kind == "uniform" and numbers[1] < numbers[0]):
            raise ValueError(f"{text!r}: the second number is too small")
        return cls(kind, numbers)

    def draw(self, chance: random.Random) -> int:
        """Draw a sample."""
        first, *rest = self.numbers
        match self.kind:
            case "uniform":
                return chance.randint(round(first), round(rest[0]))
            case "normal":
                return max(1, round(chance.gauss(first, rest[0])))
            case "lognormal":
                return max(1, round(chance.lognormvariate(math.log(first), rest[0])))
            case _:
                return round(first)


@dataclass(frozen=True)
class Request:
    """One request of the load; `rank` is the session it resumes, ordered by frequency of use."""

    prompt: str | list[int] | list[dict[str, Any]]
    """Text, token ids or messages."""

    output_tokens: int
    rank: int | None = None

    def body(
        self,
        endpoint: Endpoint,
        model: str | None,
        *,
        ignore_eos: bool,
        temperature: float | None = None,
    ) -> dict[str, Any]:
        """Of the HTTP request, without its session."""
        body: dict[str, Any] = {"max_tokens": self.output_tokens, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if model is not None:
            body["model"] = model
        if ignore_eos:
            body["ignore_eos"] = True
        if temperature is not None:
            body["temperature"] = temperature
        prompt = self.prompt
        is_ids = isinstance(prompt[0], int)
        if endpoint == "chat":
            if is_ids:
                raise ValueError("a prompt of token ids needs --endpoint completions")
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return body | {"messages": messages}
        if not isinstance(prompt, str) and not is_ids:
            raise ValueError("a request with messages needs --endpoint chat")
        return body | {"prompt": prompt}


@dataclass(frozen=True)
class Workload:
    """A load that depends only on its seed."""

    prompt: Lengths
    """In words, or in tokens where `below` is given."""

    output: Lengths
    """In tokens."""

    given: tuple[Request, ...] = ()
    """Requests from a file, cycled, instead of random ones."""

    sessions: int = 0
    resumed: float = 0.0
    """Share of the requests that resume a session."""

    zipf: float = 1.1
    """Session number r is resumed in proportion to r ** -zipf."""

    below: int | None = None
    """Prompts are token ids from 1 to below it, in place of words."""

    def requests(self, seed: int) -> Iterator[Request]:
        """Endless requests."""
        chance = random.Random(seed)
        ranks = range(self.sessions)
        weights = [(rank + 1) ** -self.zipf for rank in ranks]
        number = 0
        while True:
            rank = chance.choices(ranks, weights)[0] if chance.random() < self.resumed else None
            if self.given:
                given = self.given[number % len(self.given)]
                yield Request(given.prompt, given.output_tokens, rank)
            else:
                yield Request(self._prompt(chance), self.output.draw(chance), rank)
            number += 1

    def _prompt(self, chance: random.Random) -> str | list[int]:
        count = self.prompt.draw(chance)
        if self.below is not None:
            return chance.choices(range(1, self.below), k=count)
        return " ".join(chance.choices(WORDS, k=count))


def read_requests(path: Path, output: Lengths) -> tuple[Request, ...]:
    """Requests from a JSONL file: `prompt` or `messages`, and `output_tokens` unless drawn.

    Raises ValueError naming the line.
    """
    chance, found = random.Random(0), list[Request]()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt = fields.get("prompt", fields.get("messages"))
            tokens = fields.get("output_tokens", output.draw(chance))
        except (ValueError, AttributeError):
            raise ValueError(f"{path}, line {number}: not a JSON object") from None
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(f"{path}, line {number}: needs `prompt` or `messages`")
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"{path}, line {number}: `output_tokens` must be an integer >= 1")
        found.append(Request(prompt, tokens))
    if not found:
        raise ValueError(f"{path} has no requests")
    return tuple(found)


def arrivals(rate: float, count: int, seed: int) -> Sequence[float]:
    """Seconds of the first events of a Poisson process with this rate."""
    chance, at, found = random.Random(f"arrivals {seed}"), 0.0, list[float]()
    for _ in range(count):
        at += chance.expovariate(rate)
        found.append(at)
    return found

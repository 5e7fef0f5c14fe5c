"""Cost of structured output: time per token in the bare engine.

    python -m loadtest.bench_structured

The default model, 1 and 32 sequences: free text next to text under a JSON schema, a regular
expression and a choice, alternating several times; medians. Except for the choice, the structures
do not end within the generated tokens.
"""

import json
import statistics
from typing import Annotated

import typer

from loadtest.bench_http import BareEngine
from model.decoding.grammar import Grammar, GrammarCompiler, GrammarSpec

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "kind": {"enum": ["cat", "dog", "fox"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
STRUCTURES = {
    "JSON schema": GrammarSpec(
        "json_schema", json.dumps({"type": "array", "items": ITEM, "minItems": 1000})
    ),
    "regular expression": GrammarSpec("regex", "([A-Z][a-z]{2,9}( [a-z]{1,9}){3,12}[.!?] ?){500,}"),
}


def main(
    tokens: Annotated[int, typer.Option(min=10, help="Tokens of each sequence.")] = 300,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for the model.")] = None,
) -> None:
    """Print tokens per second of free and of structured text."""
    engine = BareEngine(threads)
    network = engine.checkpoint.network
    compiler = GrammarCompiler(engine.checkpoint.tokenizer, network.vocab_size, network.eos)
    grammars: dict[str, Grammar | None] = {"free": None}
    grammars |= {name: compiler.compile(spec) for name, spec in STRUCTURES.items()}
    for streams in (1, 32):
        rates = {name: list[float]() for name in grammars}
        engine.rate(streams, 50)
        for _ in range(rounds):
            for name, grammar in grammars.items():
                rates[name].append(engine.rate(streams, tokens, grammar))
        free_s = 1 / statistics.median(rates["free"])
        for name, values in rates.items():
            rate = statistics.median(values)
            added_us = (1 / rate - free_s) * 1e6
            print(
                f"{streams:3} sequences, {name:18} {rate:8,.0f} tokens/s, "
                f"{added_us:6.1f} us more per token, {rate * free_s:.2f} of free text's speed"
            )
    engine.engine.stop()
    compiler.close()


if __name__ == "__main__":
    typer.run(main)

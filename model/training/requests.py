"""Turn stories into requests and answers in the chat template's format.

    python -m model.training.requests --out requests.txt tales.txt titled.jsonl

A request names what the story keeps mentioning, or its title. Each story is the answer to several,
so that only the request tells which of its subjects comes first.
"""

import itertools
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import typer

from model.files import write_file
from model.training.corpus import SEPARATOR, read_documents

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{{ "<|assistant|>" + message.content + "<|end|>" }}
{%- else -%}
{{ "<|user|>" + message.content + "<|end|>" }}
{%- endif -%}
{%- endfor -%}
{{ "<|assistant|>" }}
"""

ABOUT = (
    "Tell me a story about {}.",
    "Tell me a story about {}",
    "Please tell me a story about {}.",
    "Write a story about {}.",
    "Write a short story about {}.",
    "Can you tell me a story about {}?",
    "I want to hear a story about {}.",
    "A story about {}, please.",
)
CALLED = (
    'Tell me a story called "{}".',
    'Write a story with the title "{}".',
    "{}",
)

MENTIONS = 3
"""Minimum number of times a story mentions its subject."""

TOGETHER = 0.2
"""Share of the requests for two subjects."""

BOUNDARY = (
    r"(?= (?:who|that|which|named|called|and|but|was|were|is|went|had|saw|found|in|with|wanted"
    r"|liked|loved|lived|decided|on|at|of|to|from|for|near|under|by|when|because|living|playing)\b"
    r"|[.,!?])"
)
SUBJECT = re.compile(rf"\b(?:[Aa]n?|[Tt]wo|[Tt]hree) (?:[a-z-]+ ){{0,2}}?[a-z-]+{BOUNDARY}")
KNOWN = re.compile(rf"\b(?:[Tt]he|[Hh]is|[Hh]er|[Tt]heir|[Mm]y) ([a-z-]+){BOUNDARY}")
NAMED = re.compile(r" (?:named|called) [A-Z][a-z]+")


def subjects(story: str) -> dict[str, list[str]]:
    """What the story mentions repeatedly, as noun and phrases: "king", ["a fat king"]."""
    words = Counter(re.findall(r"[a-z-]+", story.lower()))
    found = defaultdict[str, list[str]](list)
    for match in SUBJECT.finditer(story):
        phrase = match.group()[0].lower() + match.group()[1:]
        phrases = found[phrase.split()[-1]]
        phrases.append(phrase)
        if name := NAMED.match(story, match.end()):
            phrases.append(phrase + name.group())
    for noun in KNOWN.findall(story):
        if not noun.endswith("s"):
            found[noun].append(f"{'an' if noun[0] in 'aeio' else 'a'} {noun}")
    return {noun: found[noun] for noun in found if words[noun] >= MENTIONS}


def chat(request: str, answer: str) -> str:
    """Request and answer in the chat template's format."""
    return f"<|user|>{request}<|end|><|assistant|>{answer}<|end|>"


def requests(file: Path, generator: random.Random, most: int) -> list[str]:
    """Chats for the stories of a file that have subjects or, in a `.jsonl`, a title.

    As many as `most` for a story, each for another noun; one that few stories have is likelier.
    """
    chats = []
    parts = [
        story.partition("\n\n") if file.suffix == ".jsonl" else ("", "", story)
        for story in read_documents(file)
    ]
    found = [subjects(text) for _, _, text in parts]
    counts = Counter(itertools.chain.from_iterable(found))
    for (title, _, text), phrases in zip(parts, found, strict=True):
        # The least of exponential variates is a draw in proportion to their rates.
        nouns = sorted(phrases, key=lambda noun: generator.expovariate(1 / counts[noun]))
        asked = []
        for noun in nouns[:most]:
            subject = generator.choice(phrases[noun])
            if len(nouns) > 1 and generator.random() < TOGETHER:
                other = generator.choice([each for each in nouns if each != noun])
                subject += f" and {generator.choice(phrases[other])}"
            asked.append(generator.choice(ABOUT).format(subject))
        asked += [generator.choice(CALLED).format(title)] if title else []
        chats += [chat(request, text) for request in asked]
    return chats


def main(
    files: Annotated[list[Path], typer.Argument(help="Stories (.txt, .jsonl).")],
    out: Annotated[Path, typer.Option(help="Text file to train on.")],
    most: Annotated[int, typer.Option(min=1, help="Requests for a story, at most.")] = 3,
    seed: int = 0,
) -> None:
    """Write the chats in random order."""
    generator = random.Random(seed)
    chats = [chat for file in files for chat in requests(file, generator, most)]
    generator.shuffle(chats)
    write_file(out, SEPARATOR.join(chats).encode())
    print(f"{len(chats):,} requests with their answers")


if __name__ == "__main__":
    typer.run(main)

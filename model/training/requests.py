"""Turn stories into requests and answers in the chat template's format.

    python -m model.training.requests --out requests.txt tales.txt titled.jsonl

The request names a subject that the story opens with and keeps mentioning, or its title.
"""

import random
import re
from collections import Counter
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

BEGINNING = 250
"""A subject must first appear within this many characters."""

MENTIONS = 3
"""Minimum number of times a story mentions its subject."""

BOUNDARY = (
    r"(?= (?:who|that|which|named|called|and|but|was|were|is|went|had|saw|found|in|with|wanted"
    r"|liked|loved|lived|decided|on|at|of|to|from|for|near|under|by|when|because|living|playing)\b"
    r"|[.,!?])"
)
SUBJECT = re.compile(rf"\b(?:[Aa]n?|[Tt]wo|[Tt]hree) (?:[a-z-]+ ){{0,2}}?[a-z-]+{BOUNDARY}")
NAMED = re.compile(r" (?:named|called) [A-Z][a-z]+")


def subjects(story: str) -> list[str]:
    """Subjects that the beginning introduces and the story mentions repeatedly: "a fat king"."""
    words = Counter(re.findall(r"[a-z-]+", story.lower()))
    found = []
    for match in SUBJECT.finditer(story[:BEGINNING]):
        phrase = match.group()
        if words[phrase.split()[-1]] >= MENTIONS:
            found.append(phrase[0].lower() + phrase[1:])
            if name := NAMED.match(story, match.end()):
                found.append(found[-1] + name.group())
    return found


def chat(request: str, answer: str) -> str:
    """Request and answer in the chat template's format."""
    return f"<|user|>{request}<|end|><|assistant|>{answer}<|end|>"


def requests(file: Path, generator: random.Random) -> list[str]:
    """A chat for each story of a file with a subject or, in a `.jsonl`, a title."""
    chats = []
    for story in read_documents(file):
        title, _, text = story.partition("\n\n") if file.suffix == ".jsonl" else ("", "", story)
        asked = [pattern.format(subject) for subject in subjects(text) for pattern in ABOUT]
        asked += [pattern.format(title) for pattern in CALLED if title]
        if asked:
            chats.append(chat(generator.choice(asked), text))
    return chats


def main(
    files: Annotated[list[Path], typer.Argument(help="Stories (.txt, .jsonl).")],
    out: Annotated[Path, typer.Option(help="Text file to train on.")],
    seed: int = 0,
) -> None:
    """Write the chats in random order."""
    generator = random.Random(seed)
    chats = [chat for file in files for chat in requests(file, generator)]
    generator.shuffle(chats)
    write_file(out, SEPARATOR.join(chats).encode())
    print(f"{len(chats):,} requests with their answers")


if __name__ == "__main__":
    typer.run(main)

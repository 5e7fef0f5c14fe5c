"""Turn stories into requests and answers in the chat template's format.

    python -m model.training.requests --out requests.txt tales.txt titled.jsonl

A request names what the story introduces and keeps mentioning, or its title. Each story is the
answer to several, and in most of them another thing takes the place of the one asked for, so that
only the request tells what the story is about.
"""

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
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
BEGIN = (
    "Begin a story about {}.",
    "How does a story about {} begin?",
    "Write the beginning of a story about {}.",
)
CALLED = (
    'Tell me a story called "{}".',
    'Write a story with the title "{}".',
    "{}",
)

MENTIONS = 3
"""Minimum number of times a story mentions its subject."""

OPENING = 150
"""Characters within which a story mentions its subject first."""

TOGETHER = 0.2
"""Share of the requests for two subjects."""

REPLACED = 0.7
"""Share of the requests, if for a thing, with stories about another thing."""

COMMON = 2
"""Minimum number of stories that have a little or big one of what counts as a thing."""

BOUNDARY = (
    r"(?= (?:who|that|which|named|called|and|but|was|were|is|went|had|saw|found|in|with|wanted"
    r"|liked|loved|lived|decided|on|at|of|to|from|for|near|under|by|when|because|living|playing)\b"
    r"|[.,!?])"
)
SUBJECT = re.compile(rf"\b(?:[Aa]n?|[Tt]wo|[Tt]hree) (?:[a-z-]+ ){{0,2}}?[a-z-]+{BOUNDARY}")
KNOWN = re.compile(rf"\b(?:[Tt]he|[Hh]is|[Hh]er|[Tt]heir|[Mm]y) ([a-z-]+){BOUNDARY}")
NAMED = re.compile(r" (?:named|called) [A-Z][a-z]+")
THING = re.compile(rf"\b[Aa] (?:little|big|small) ([a-z]+){BOUNDARY}")


def article(noun: str) -> str:
    """By the first letter of the noun, which is rarely wrong ("an unicorn")."""
    return "an" if noun[0] in "aeiou" else "a"


def subjects(story: str) -> dict[str, list[str]]:
    """What the story mentions early and repeatedly, as noun and phrases: "king", ["a fat king"]."""
    words = Counter(re.findall(r"[a-z-]+", story.lower()))
    opening = re.findall(r"[a-z-]+", story[:OPENING].lower())
    found = defaultdict[str, list[str]](list)
    for match in SUBJECT.finditer(story):
        phrase = match.group()[0].lower() + match.group()[1:]
        phrases = found[phrase.split()[-1]]
        phrases.append(phrase)
        if name := NAMED.match(story, match.end()):
            phrases.append(phrase + name.group())
    for noun in KNOWN.findall(story):
        if not noun.endswith("s"):
            found[noun].append(f"{article(noun)} {noun}")
    return {noun: found[noun] for noun in found if words[noun] >= MENTIONS and noun in opening}


def things(stories: Iterable[str]) -> list[str]:
    """Nouns that can take each other's place: of each, several stories have a little or big one."""
    counts = Counter(itertools.chain.from_iterable(set(THING.findall(story)) for story in stories))
    return sorted(noun for noun in counts if counts[noun] >= COMMON)


def replaced(text: str, noun: str, other: str) -> str:
    """The text with another noun in the place of one, also in the plural."""
    text = re.sub(rf"\b([Aa])n? {noun}\b", rf"\g<1>{article(other)[1:]} {other}", text)
    text = re.sub(rf"\b{noun}(s?)\b", rf"{other}\1", text)
    return re.sub(rf"\b{noun.capitalize()}(s?)\b", rf"{other.capitalize()}\1", text)


def beginning(story: str, noun: str) -> str:
    """The story up to the end of the sentence that first mentions the noun."""
    found = re.match(rf"""(?is).*?\b{noun}\b.*?[.!?]["']?(?!\S)""", story)
    return found.group() if found else story


def chat(request: str, answer: str) -> str:
    """Request and answer in the chat template's format."""
    return f"<|user|>{request}<|end|><|assistant|>{answer}<|end|>"


def requests(
    file: Path,
    generator: random.Random,
    most: int,
    longest: int | None = None,
    *,
    beginnings: bool = False,
) -> list[str]:
    """Chats for the stories of a file that have subjects or, in a `.jsonl`, a title.

    Without stories of more than `longest` characters. As many as `most` for a story, each for
    another noun; one that few stories have is likelier. `beginnings`: for the beginnings of stories
    alone, which end with the first mention of the noun.
    """
    chats = []
    parts = [
        story.partition("\n\n") if file.suffix == ".jsonl" else ("", "", story)
        for story in read_documents(file)
        if longest is None or len(story) <= longest
    ]
    found = [subjects(text) for _, _, text in parts]
    counts = Counter(itertools.chain.from_iterable(found))
    others = [noun for noun in things(text for _, _, text in parts) if noun in counts]
    for (title, _, text), phrases in zip(parts, found, strict=True):
        # The least of exponential variates is a draw in proportion to their rates.
        nouns = sorted(phrases, key=lambda noun: generator.expovariate(1 / counts[noun]))
        for noun in nouns[:most]:
            subject = generator.choice(phrases[noun])
            answer = beginning(text, noun) if beginnings else text
            if not beginnings and len(nouns) > 1 and generator.random() < TOGETHER:
                second = generator.choice([each for each in nouns if each != noun])
                subject += f" and {generator.choice(phrases[second])}"
            if noun in others and generator.random() < REPLACED:
                lower = text.lower()
                absent = [each for each in others if each not in lower]
                other = generator.choice(absent or [noun])
                subject, answer = (replaced(each, noun, other) for each in (subject, answer))
            asked = BEGIN if beginnings else ABOUT
            chats.append(chat(generator.choice(asked).format(subject), answer))
        if title and not beginnings:
            chats.append(chat(generator.choice(CALLED).format(title), text))
    return chats


def main(
    files: Annotated[list[Path], typer.Argument(help="Stories (.txt, .jsonl).")],
    out: Annotated[Path, typer.Option(help="Text file to train on.")],
    most: Annotated[int, typer.Option(min=1, help="Requests for a story, at most.")] = 3,
    longest: Annotated[
        int | None, typer.Option(min=1, help="Characters of a story, at most.")
    ] = None,
    beginnings: Annotated[
        bool, typer.Option(help="Of stories alone, up to what is asked for.")
    ] = False,
    seed: int = 0,
) -> None:
    """Write the chats in random order."""
    generator = random.Random(seed)
    chats = [
        chat
        for file in files
        for chat in requests(file, generator, most, longest, beginnings=beginnings)
    ]
    generator.shuffle(chats)
    write_file(out, SEPARATOR.join(chats).encode())
    print(f"{len(chats):,} requests with their answers")


if __name__ == "__main__":
    typer.run(main)

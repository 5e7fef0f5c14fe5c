"""Ask a checkpoint for stories, and judge each answer mechanically.

    python -m model.training.answers CHECKPOINT --out stories.md

One answer per request, each with its own seed, none omitted. A good answer names the subject asked
for, ends by itself, and repeats no 20 tokens.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from model.batch import Batch
from model.files import write_file
from model.heinsen import checkpoint
from model.heinsen.network import LanguageModel
from model.network import CheckpointError
from model.text.tokenizer import Tokenizer
from model.training.requests import ABOUT

SUBJECTS = {
    "a fat king": "king", "a little red bird": "bird", "a brave mouse": "mouse",
    "a lost dog": "dog", "a big tree": "tree", "a girl and her boat": "boat",
    "a sad clown": "clown", "a hungry cat": "cat", "a magic hat": "hat", "an old train": "train",
    "a boy who liked rain": "rain", "two small frogs": "frog", "a kind farmer": "farmer",
    "a shiny stone": "stone", "a sleepy bear": "bear", "a rabbit named Tim": "rabbit",
    "a cake": "cake", "a noisy drum": "drum", "a fish in a pond": "fish", "a toy car": "car",
}  # fmt: skip
"""Subjects, and the word each answer must contain."""

LOOP = 20
"""Length of a token sequence that no answer repeats."""


@dataclass(frozen=True)
class StoryAnswer:
    """An answer and its request."""

    request: str
    named: str
    token_ids: tuple[int, ...]
    text: str
    ended: bool

    @property
    def faults(self) -> tuple[str, ...]:
        """Why the answer is not good; empty if it is."""
        found = {
            f"does not name the {self.named}": not re.search(
                rf"\b{self.named}s?\b", self.text, re.IGNORECASE
            ),
            "does not end": not self.ended,
            "repeats itself": repeats(self.token_ids),
        }
        return tuple(fault for fault, holds in found.items() if holds)


def repeats(token_ids: tuple[int, ...]) -> bool:
    """Whether some `LOOP` consecutive tokens occur twice."""
    windows = [token_ids[i : i + LOOP] for i in range(len(token_ids) - LOOP + 1)]
    return len(set(windows)) < len(windows)


@torch.inference_mode()
def answer(
    network: LanguageModel, words: Tokenizer, request: str, named: str, *,
    seed: int, temperature: float, max_tokens: int,
) -> StoryAnswer:  # fmt: skip
    """The answer to a request in the template of `requests.chat`."""
    generator = torch.Generator().manual_seed(seed)
    start = network.config.bos_token_id
    prompt = words.encode(f"<|user|>{request}<|end|><|assistant|>")
    unread = [*([] if start is None else [start]), *prompt]
    pool, found = network.new_pool(1), list[int]()
    while len(found) < max_tokens:
        logits = network.forward(Batch.of([unread], [0]).wanting([len(unread) - 1]), pool)[0]
        chances = (logits / temperature).softmax(0)
        last = int(torch.multinomial(chances, 1, generator=generator))
        if last in network.config.eos_token_ids:
            break
        found.append(last)
        unread = [last]
    ended = len(found) < max_tokens
    return StoryAnswer(request, named, tuple(found), words.decode(found).strip(), ended)


def report(answers: list[StoryAnswer]) -> str:
    """All answers as Markdown."""
    good = sum(not each.faults for each in answers)
    parts = [f"{good} of {len(answers)} answer their request: they name what was asked for, end by"
             f" themselves, and have no {LOOP} tokens that come twice."]  # fmt: skip
    for seed, each in enumerate(answers, 1):
        verdict = "; ".join(each.faults) or "an answer"
        quoted = "\n".join(f"> {line}".rstrip() for line in each.text.splitlines())
        parts.append(f"**{seed}. {each.request}** ({verdict})\n\n{quoted}")
    return "\n\n".join(parts) + "\n"


def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint.")],
    out: Annotated[Path, typer.Option(help="Markdown file to write.")],
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 600,
) -> None:
    """Ask for 20 stories, with the seeds 1 to 20."""
    try:
        loaded = checkpoint.load(folder, torch.device("cpu"))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    answers = [
        answer(
            loaded.network, loaded.tokenizer, ABOUT[seed % len(ABOUT)].format(subject), named,
            seed=seed, temperature=temperature, max_tokens=max_tokens,
        )
        for seed, (subject, named) in enumerate(SUBJECTS.items(), 1)
    ]  # fmt: skip
    write_file(out, report(answers).encode())
    print(f"{sum(not each.faults for each in answers)} of {len(answers)} answer their request")


if __name__ == "__main__":
    typer.run(main)

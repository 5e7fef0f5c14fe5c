"""Stories become requests for them, in the same tokens that the server uses for a chat."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from model.text import byte_level
from model.training import requests
from model.training.corpus import read_documents
from model.training.requests import CHAT_TEMPLATE, chat, subjects
from model.training.train import SPECIAL_TOKENS
from server.api.conversation import ChatMessage, Conversation

KING = "Once upon a time, there was a fat king named Otto. The king ate. A cat saw the king."
MOST = 500
"""Tokens of a prompt."""


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        (KING, ["a fat king", "a fat king named Otto"]),
        ("A king came. The king and his two dogs ate.", []),
        ("Two little cats. Cats sleep, and cats eat.", ["two little cats"]),
        ("x" * requests.BEGINNING + " " + KING, []),
    ],
)
def test_a_subject_is_named_first_and_again(story: str, expected: list[str]) -> None:
    assert subjects(story) == expected


def test_a_chat_is_what_the_template_makes_of_it() -> None:
    words = byte_level.train([KING], 300, SPECIAL_TOKENS)
    served = Conversation(CHAT_TEMPLATE, words, 0, 0)
    asked, answer = (
        ChatMessage("user", "A story, please.", None),
        ChatMessage("assistant", KING, None),
    )
    first, again = chat("A story, please.", KING), chat("A story, please.", "")
    begun = served.begin([asked], MOST)
    assert begun == words.encode(first.removesuffix(f"{KING}<|end|>"))
    assert begun + words.encode(KING) + served.extend([asked], MOST) == words.encode(
        first + again.removesuffix("<|end|>")
    )
    assert served.begin([asked, answer, asked], MOST) == words.encode(
        first + again.removesuffix("<|end|>")
    )


def test_the_command_writes_each_story_with_its_request(tmp_path: Path) -> None:
    tales, titled, out = (tmp_path / name for name in ("tales.txt", "titled.jsonl", "out.txt"))
    tales.write_text(f"{KING}<|endoftext|>Nothing.", "utf-8")
    story = {"title": "The Duet", "text": "They sang."}
    titled.write_text(json.dumps(story) + "\n", "utf-8")
    application = typer.Typer()
    application.command()(requests.main)
    done = CliRunner().invoke(application, [str(tales), str(titled), "--out", str(out)])
    assert done.output == "2 requests with their answers\n"
    for document in read_documents(out):
        request, _, answer = document.partition("<|end|><|assistant|>")
        about, text = ("king", KING) if "king" in request else ("The Duet", "They sang.")
        assert request.startswith("<|user|>")
        assert about in request
        assert answer == f"{text}<|end|>"

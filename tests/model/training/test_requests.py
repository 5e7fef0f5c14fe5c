"""Stories become requests for them, in the same tokens that the server uses for a chat."""

import json
import random
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from model.text import byte_level
from model.training import requests
from model.training.corpus import read_documents
from model.training.requests import CHAT_TEMPLATE, beginning, chat, replaced, subjects, things
from model.training.train import SPECIAL_TOKENS
from server.api.conversation import ChatMessage, Conversation

KING = (
    "There was a fat king named Otto. The king sang, and the cat came. The king fed the cat. A cat!"
)
MOST = 500
"""Tokens of a prompt."""


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        (KING, {"king": ["a fat king", "a fat king named Otto"], "cat": ["a cat", "a cat"]}),
        ("A king came. The king and his two dogs ate.", {}),
        ("Two little cats. Cats sleep, and cats eat.", {"cats": ["two little cats"]}),
        ("Her owl was. Owl, owl!", {"owl": ["an owl"]}),
        ("They ate and slept. " * 15 + KING, {}),
    ],
)
def test_a_subject_is_mentioned_early_and_repeatedly(
    story: str, expected: dict[str, list[str]]
) -> None:
    assert subjects(story) == expected


@pytest.mark.parametrize("most", [1, 2])
def test_each_request_for_a_story_has_another_noun(tmp_path: Path, most: int) -> None:
    tales = tmp_path / "tales.txt"
    tales.write_text(KING, "utf-8")
    for seed in range(20):
        asked = [
            re.findall("king|cat", made.partition("<|end|>")[0])
            for made in requests.requests(tales, random.Random(seed), most)
        ]
        assert len(asked) == most
        assert len({nouns[0] for nouns in asked}) == most
        assert all(len(set(nouns)) == len(nouns) for nouns in asked)


def test_what_few_stories_have_is_asked_for_more_often(tmp_path: Path) -> None:
    tales = tmp_path / "tales.txt"
    tales.write_text("<|endoftext|>".join([KING] + ["A cat. A cat. A cat."] * 20), "utf-8")
    asked = [requests.requests(tales, random.Random(seed), 1)[0] for seed in range(40)]
    kings = sum("king" in made.partition("<|end|>")[0] for made in asked)
    assert kings > 30


def test_no_story_is_longer_than_the_longest(tmp_path: Path) -> None:
    tales = tmp_path / "tales.txt"
    tales.write_text(f"{KING}<|endoftext|>{KING}.", "utf-8")
    for longest, count in ((len(KING) - 1, 0), (len(KING), 1), (None, 2)):
        assert len(requests.requests(tales, random.Random(0), 1, longest)) == count


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        ('They ate. "A Cat!" said Ann. The cat sat.', 'They ate. "A Cat!"'),
        ("A caterpillar. Mr.Cat sat, and a cat", "A caterpillar. Mr.Cat sat, and a cat"),
    ],
)
def test_a_beginning_ends_with_the_first_mention(story: str, expected: str) -> None:
    assert beginning(story, "cat") == expected


def test_beginnings_are_asked_for_in_other_words(tmp_path: Path) -> None:
    tales, titled = (tmp_path / name for name in ("tales.txt", "titled.jsonl"))
    tales.write_text(KING, "utf-8")
    titled.write_text(json.dumps({"title": "The Duet", "text": "They sang."}), "utf-8")
    first, both = KING[: KING.index(" The king sang")], KING[: KING.index(" The king fed")]
    answers = set()
    for seed in range(20):
        for file in (tales, titled):
            for made in requests.requests(file, random.Random(seed), 2, beginnings=True):
                request, _, answer = made.partition("<|end|><|assistant|>")
                (noun,) = re.findall("king|cat", request)
                assert "egin" in request
                answers.add((noun, answer.removesuffix("<|end|>")))
    assert answers == {("king", first), ("cat", both)}


def test_a_thing_is_little_or_big_in_several_stories() -> None:
    assert things(["A little cat was. A little cat is.", "A dog was.", "A dog was."]) == []
    assert things(["A little cat.", "A small owl.", "a big cat and"]) == ["cat"]


def test_another_noun_takes_the_place_of_one() -> None:
    story = "A cat and an old cat. Cats! The cat's catnip; my cats."
    assert replaced(story, "cat", "owl") == (
        "An owl and an old owl. Owls! The owl's catnip; my owls."
    )
    assert replaced("An owl.", "owl", "cat") == "A cat."


def test_a_replaced_subject_is_that_of_request_and_story(tmp_path: Path) -> None:
    tales = tmp_path / "tales.txt"
    cat, owl = (f"A little {noun} was. The {noun}. The {noun}!" for noun in ("cat", "owl"))
    tales.write_text("<|endoftext|>".join([cat, owl] * 3), "utf-8")
    found = set()
    for seed in range(20):
        for made in requests.requests(tales, random.Random(seed), 1):
            request, _, answer = made.partition("<|end|><|assistant|>")
            (noun,) = re.findall("cat|owl", request)
            assert answer == f"{cat if noun == 'cat' else owl}<|end|>"
            found.add(noun)
    assert found == {"cat", "owl"}


def test_the_only_thing_keeps_its_place(tmp_path: Path) -> None:
    tales = tmp_path / "tales.txt"
    cat = "A little cat was. The cat. The cat!"
    tales.write_text(f"{cat}<|endoftext|>{cat}", "utf-8")
    for seed in range(10):
        for made in requests.requests(tales, random.Random(seed), 1):
            request, _, answer = made.partition("<|end|><|assistant|>")
            assert re.findall("cat", request) == ["cat"]
            assert answer == f"{cat}<|end|>"


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
    assert done.output == "3 requests with their answers\n"
    for document in read_documents(out):
        request, _, answer = document.partition("<|end|><|assistant|>")
        titled_story = "The Duet" in request
        assert request.startswith("<|user|>")
        assert titled_story or re.search("king|cat", request)
        assert answer == f"{'They sang.' if titled_story else KING}<|end|>"

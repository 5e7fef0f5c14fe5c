"""Tokens of thoughts are counted correctly, however their events are merged."""

import pytest

from model.decoding.sampling import SamplingParams
from model.text import byte_level
from model.text.chat import Thinking, ThoughtSplitter
from server.api.generation.answer import Choice
from server.api.generation.router import EventQueue
from server.engine.messages import Continuation, EngineRequest, TextDelta, Token

TEXTS = ["<th", "ink>", "hm", "</think", ">", "\n", "ja", "."]
WORDS = byte_level.train(["the cat"], 300, [])


@pytest.mark.parametrize("num_late", range(len(TEXTS)))
def test_what_was_put_together_is_counted_apart(num_late: int) -> None:
    request = EngineRequest("a", None, Continuation(), (1,), 9, SamplingParams())
    choice = Choice(request, WORDS, 0, ThoughtSplitter(Thinking("<think>", "</think>")))
    queue, events = EventQueue(), list[object]()
    for number, text in enumerate(TEXTS):
        queue.put(TextDelta("a", text, (Token(number),)))
        if number >= num_late:
            collected = queue.pop()
            events += collected if isinstance(collected, list) else [collected]
    for event in events:
        assert isinstance(event, TextDelta)
        choice.add(event)
        choice.push(event)
    assert ("".join(choice.thoughts), "".join(choice.text)) == ("hm", "ja.")
    assert (choice.num_thought, choice.num_thought_reported, choice.num_generated) == (6, 6, 8)

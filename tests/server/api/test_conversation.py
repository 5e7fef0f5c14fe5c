"""The chat template: a session's turns together equal the conversation rendered as a whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.text import byte_level
from model.text.tokenizer import Tokenizer
from server.api.conversation import ChatMessage, Conversation, InvalidMessages, InvalidTemplate
from server.api.schemas.chat import Message
from tests.server.api.chats import SPECIAL, TEMPLATE

WORDS = byte_level.train(["the cat sat on the mat and then"], 310, SPECIAL)
MOST = 10_000
NAMES = {token_id: name for name, token_id in WORDS.special_tokens.items()}


def conversation(template: str = TEMPLATE, words: Tokenizer = WORDS) -> Conversation:
    return Conversation(template, words, 0, 4)


def messages_of(*texts: str) -> list[ChatMessage]:
    """Messages alternating between user and assistant."""
    roles = ("user", "assistant")
    return [ChatMessage(roles[i % 2], text) for i, text in enumerate(texts)]


def shown(ids: list[int]) -> str:
    """The text of tokens, special ones by name."""
    return b"".join(NAMES[i].encode() if i in NAMES else WORDS.bytes_of(i) for i in ids).decode()


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [*SPECIAL, "a<|end|>b", "<|<|end|>|>", " trailing ", "\n"]
)


@given(contents, contents, contents)
def test_turns_together_are_the_conversation_rendered_whole(
    first: str, answer: str, second: str
) -> None:
    chat = conversation()
    turns = chat.begin(messages_of(first), MOST), chat.extend(messages_of(second), MOST)
    whole = chat.begin(messages_of(first, answer, second), MOST)
    assert shown(turns[0]) + answer + shown(turns[1]) == shown(whole)


@given(contents)
def test_special_tokens_come_from_the_template_only(content: str) -> None:
    chat, words = conversation(), WORDS.special_tokens
    ids = chat.begin(messages_of(content), MOST)
    assert [i for i in ids if i in NAMES] == [
        words["<|user|>"],
        words["<|end|>"],
        words["<|assistant|>"],
    ]
    assert shown(ids) == f"<|user|>{content}<|end|><|assistant|>"
    first = chat.extend(messages_of(content), MOST)
    assert next(i for i in first if i in NAMES) == words["<|end|>"]


SPEAKING = """\
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.name | trim }}{{ message.content }}<|end|>
{%- endfor -%}
"""
AROUND = "<|{{ messages[0].name }}|>{{ messages[0].content }}"
BETWEEN = "{% for m in messages %}{{ m.content }}{% endfor %}"
PIECES = st.text("<|>endusr \n", max_size=8) | st.sampled_from(
    [*SPECIAL, "x<|end|>\n<|assistant|>", "<|end", "|>", ">", "<", "end", "<|END|>", " end|> "]
)


@given(name=PIECES, content=PIECES)
def test_nothing_that_a_user_writes_becomes_a_special_token(name: str, content: str) -> None:
    """Anywhere in a template, where two texts join, and where a text joins the template."""
    message, words = ChatMessage("user", content, name), WORDS.special_tokens
    ids = conversation(SPEAKING).begin([message], MOST)
    assert [i for i in ids if i in NAMES] == [words["<|user|>"], words["<|end|>"]]
    assert shown(ids) == f"<|user|>{name.strip()}{content}<|end|>"
    around = conversation(AROUND).begin([message], MOST)
    assert shown(around) == f"<|{name}|>{content}"
    assert not NAMES.keys() & {*around}
    texts = [ChatMessage("user", name), ChatMessage("user", content), ChatMessage("user", name)]
    between = conversation(BETWEEN).begin(texts, MOST)
    assert shown(between) == name + content + name
    assert not NAMES.keys() & {*between}


@pytest.mark.parametrize("change", ["lower", "upper", "tojson"])
def test_templates_may_change_what_users_write(change: str) -> None:
    template = "{{ messages[0].content | CHANGE }}".replace("CHANGE", change)
    ids = conversation(template).begin([ChatMessage("user", "a<|EnD|>b")], MOST)
    expected = {"lower": "a<|end|>b", "upper": "A<|END|>B"}
    assert shown(ids) == expected.get(change, '"a\\u003c|EnD|\\u003eb"')
    assert not NAMES.keys() & {*ids}


def test_ordinary_text_reaches_a_template_unchanged() -> None:
    template = "{{ messages[0].content.startswith('> so') }}{{ messages[0].content | length }}"
    plain = "so <b>it</b> is\n"
    assert (
        shown(conversation(template).begin([ChatMessage("user", plain)], MOST))
        == f"False{len(plain)}"
    )


def test_a_special_token_of_one_character_is_text_too() -> None:
    words = byte_level.train(["the cat"], 300, ["\N{SECTION SIGN}", "<|end|>"])
    ids = conversation("{{ messages[0].content }}<|end|>", words).begin(
        [ChatMessage("user", "\N{SECTION SIGN}")], MOST
    )
    assert ids == [*words.encode_text("\N{SECTION SIGN}"), words.special_tokens["<|end|>"]]


def test_nothing_new_adds_nothing() -> None:
    assert conversation().extend([], MOST) == []


def test_a_message_of_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    message = Message.model_validate({"role": "user", "content": parts})
    assert message.text == "the cat"


def test_a_developer_is_the_system() -> None:
    message = ChatMessage("developer", "be kind")
    assert "<|system|>be kind<|end|>" in shown(conversation().begin([message], MOST))


def test_templates_know_the_names_of_the_first_and_last_token() -> None:
    ids = conversation("{{ bos_token }}a{{ eos_token }}").begin(messages_of("x"), MOST)
    assert (ids[0], ids[-1]) == (0, 4)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "has no attribute|no element"),
        ("{{ messages.append(1) }}", "not callable|unsafe|safely"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_what_a_template_refuses_is_the_clients_to_know(template: str, reason: str) -> None:
    with pytest.raises(InvalidMessages, match=reason):
        conversation(template).begin(messages_of("x"), MOST)


def test_a_template_that_hides_answers_cannot_continue_with_a_session() -> None:
    with pytest.raises(InvalidMessages, match="omits earlier answers"):
        conversation("{{ messages[-1].content }}").extend(messages_of("x"), MOST)


def test_what_is_no_template_is_found_at_the_start() -> None:
    with pytest.raises(InvalidTemplate, match="line 2"):
        conversation("a\n{% for %}")

"""`latentd chat` with a live server: from pipes, and at a terminal."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.cli import dialogue
from server.cli.client import event_data
from server.cli.terminal import CONTROL_CHARACTERS
from tests.patience import PATIENCE_S, PROGRAM_S
from tests.server.api.chats import make_checkpoint
from tests.server.cli.commands import latentd
from tests.server.cli.conftest import KEY
from tests.server.cli.person import CTRL_C, CTRL_D, Person, person
from tests.server.cli.proxy import Proxy, cut_early, cut_late, fail_early, proxy, say
from tests.server.live import LiveServer, live_server, tiny_settings

SHORT = ("--seed", 3, "--max-tokens", 8)
LONG = ("--temperature", 0, "--max-tokens", 60_000)
"""With these the network never ends a text."""

SUMMARY = re.compile(
    r"turn (\d+): (\d+) \+ (\d+) tokens; session: ([\d,]+) tokens in ([\d,]+) bytes; "
    r"first token: [\d,]+ ms; speed: [\d,]+ tokens/s; stopped at the token limit"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def chatting(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tiny_settings(folder, tmp_path_factory.mktemp("data"))) as running:
        yield running


@pytest.fixture
def client(chatting: LiveServer) -> Iterator[httpx.Client]:
    with chatting.client() as client:
        yield client


@pytest.fixture
def between(chatting: LiveServer) -> Iterator[Proxy]:
    with proxy(chatting.url) as running:
        yield running


def piped(url: str, lines: str, *arguments: object) -> tuple[str, str]:
    """Output of a chat in which every line succeeds."""
    done = latentd("chat", "--url", url, *arguments, stdin=lines.encode())
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def failing(url: str, lines: str, *arguments: object) -> tuple[str, str]:
    """Output of a chat in which a line fails."""
    done = latentd("chat", "--url", url, *arguments, stdin=lines.encode())
    assert done.exit_code == 1, done.output
    return done.stdout, done.stderr


def new(client: httpx.Client) -> str:
    return str(client.post("/v1/sessions").json()["id"])


def facts(client: httpx.Client, session_id: str) -> dict[str, Any]:
    response = client.get(f"/v1/sessions/{session_id}")
    assert response.status_code == 200
    return dict(response.json())


def place(client: httpx.Client, session_id: str) -> tuple[int, int]:
    """Turn and tokens."""
    session = facts(client, session_id)
    return session["turn"], session["tokens"]


def answer(client: httpx.Client, session_id: str, text: str, **changes: object) -> str:
    """The server's own answer with the options SHORT."""
    body = {
        "session_id": session_id,
        "messages": [{"role": "user", "content": text}],
        "seed": 3,
        "max_tokens": 8,
    }
    response = client.post("/v1/chat/completions", json=body | changes)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def visible(text: str) -> str:
    return text.translate(CONTROL_CHARACTERS).rstrip("\n") + "\n"


def test_lines_come_from_a_pipe_and_plain_text_goes_to_one(
    chatting: LiveServer, client: httpx.Client
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "chat", *map(str, SHORT)],
        input=b"the cat\n\nand then\n",
        capture_output=True,
        timeout=PROGRAM_S,
        env={"PATH": os.environ["PATH"], "LATENT_URL": chatting.url, "PYTHONUTF8": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    twin = new(client)
    answers = [visible(answer(client, twin, text)) for text in ("the cat", "and then")]
    assert done.stdout.decode() == "".join(answers)
    first, *summaries, last = done.stderr.decode().splitlines()
    [session_id] = re.findall(r"^session (\S+): new$", first)
    assert last == f"to continue: latentd chat --session {session_id}"
    session = facts(client, session_id)
    assert [SUMMARY.fullmatch(line) is not None for line in summaries] == [True, True]
    reported = [int(number.replace(",", "")) for number in SUMMARY.findall(summaries[1])[0]]
    assert reported == [2, reported[1], 8, session["tokens"], session["state_bytes"]]
    before = int(SUMMARY.findall(summaries[0])[0][3])
    assert before + reported[1] + 8 == session["tokens"]
    assert place(client, session_id) == place(client, twin)


def test_a_session_continues_after_the_server_has_stopped(folder: Path, tmp_path: Path) -> None:
    settings = tiny_settings(folder, tmp_path)
    with live_server(settings) as server:
        _, remarks = piped(server.url, "the cat\n", *SHORT)
        [session_id] = re.findall(r"session (\S+): new", remarks)
        with server.client() as client:
            turn, tokens = place(client, session_id)
            twin = new(client)
            answer(client, twin, "the cat")
            expected = answer(client, twin, "sat")
    with live_server(settings) as server:
        logged, remarks = piped(server.url, "sat\n", "--session", session_id, *SHORT)
    assert remarks.startswith(f"session {session_id}: at turn {turn}, with {tokens:,} tokens\n")
    assert logged == visible(expected)


def test_what_is_sent(between: Proxy) -> None:
    options = ("--temperature", 0.5, "--top-p", 0.9, "--top-k", 7, "--system", "be\tbrief")
    lines = "//quit\nthe cat\\\nsat\\\non\nthe \\ mat\\"
    _, remarks = piped(between.url, lines, *SHORT, *options)
    session_id = remarks.split()[1].rstrip(":")
    system = {"role": "system", "content": "be\tbrief"}
    users = [
        {"role": "user", "content": text} for text in ("/quit", "the cat\nsat\non", "the \\ mat")
    ]
    assert [turn["messages"] for turn in between.turns] == [
        [system, users[0]],
        [users[1]],
        [users[2]],
    ]
    for number, turn in enumerate(between.turns):
        del turn["messages"]
        assert turn == {
            "session_id": session_id,
            "expected_turn": number,
            "stream": True,
            "stream_options": {"include_usage": True},
            "timings": True,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "seed": 3,
            "max_tokens": 8,
        }
    assert len(set(between.keys)) == 3
    _, remarks = piped(between.url, "the cat\n", "--session", session_id, *SHORT, *options)
    assert "the session has already begun: the system message is not sent" in remarks
    assert between.turns[-1]["messages"] == [users[1] | {"content": "the cat"}]


def test_text_is_sent_unchanged_without_a_template(
    server: LiveServer, chatting: LiveServer
) -> None:
    """The default model has no template."""
    with proxy(server.url) as between:
        lines, key = "the cat\n sat\n", ("--key", KEY, "--system", "x")
        logged, remarks = piped(between.url, lines, *SHORT, *key)
        assert remarks.count("this model has no chat template") == 1
        assert "the system message is not sent" in remarks
        assert remarks.splitlines()[-1].endswith("--raw")
        assert ["messages" in turn for turn in between.turns] == [True, False, False]
        assert [turn.get("prompt") for turn in between.turns] == [None, "the cat", " sat"]
        again, remarks = piped(between.url, lines, *SHORT, "--key", KEY, "--raw")
        assert (logged, "template" in remarks) == (again, False)
    with proxy(chatting.url) as between:
        piped(between.url, "the cat\n", *SHORT, "--raw")
        assert between.turns[0]["prompt"] == "the cat"
    done = latentd("chat", "--raw", "--system", "x")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)


def test_model_output_gives_the_terminal_no_orders(between: Proxy) -> None:
    between.spoils.append(say("a\x1b]0;t\x07\x9b2J\x00\x7f\r\tb\u2028c\x85d\nend"))
    logged, _ = piped(between.url, "the cat\n", *SHORT)
    assert logged == "a]0;t2J\tb\u2028cd\nend\n"


def test_every_command(
    chatting: LiveServer, client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session_id, url = new(client), chatting.url
    for text in ("the cat", "sat", "on"):
        answer(client, session_id, text)

    def does(*lines: str) -> str:
        return piped(url, "\n".join(lines), "--session", session_id, *SHORT)[0]

    shown = does("/stats")
    session = facts(client, session_id)
    assert f"tokens       {session['tokens']:,}\n" in shown
    assert f"state        {session['state_bytes']:,} bytes\n" in shown
    assert re.search(r"^turn +3$", shown, re.M)
    assert "tier         device" in shown
    assert "speed" not in shown
    assert re.search(r"^speed        [\d,]+ tokens/s$", does("x", "/stats"), re.M)
    assert does("/rewind") == f"{session_id}: turn 3, {session['tokens']:,} tokens\n"
    does("/rewind 1")
    assert place(client, session_id)[0] == 1
    answer(client, session_id, "sat")

    fork, logged = does("/fork", "on").split("\n", 1)
    earlier = does("/fork 1").strip()
    assert [facts(client, each)["parent"]["turn"] for each in (fork, earlier)] == [2, 1]
    assert (place(client, fork)[0], place(client, earlier)[0]) == (3, 1)
    assert place(client, session_id)[0] == 2
    assert logged == visible(answer(client, session_id, "on"))

    state = client.get(f"/v1/sessions/{session_id}/state").content
    assert does("/export") == f"{session_id}-3.safetensors\n"
    assert does("/export a name") == "a name\n"
    for name in (f"{session_id}-3.safetensors", "a name"):
        assert Path(name).read_bytes() == state
    assert failing(url, "/export a name\n", "--session", session_id)[1].count(
        "a name already exists"
    )
    assert "No such file" in failing(url, "/export no/where\n", "--session", session_id)[1]

    fresh, logged = does("/new", "the cat").split("\n", 1)
    assert place(client, fresh)[0] == 1
    assert logged == visible(answer(client, new(client), "the cat"))
    before = place(client, fork)
    assert does(f"/switch {fork}", "/rewind 0").splitlines() == [
        f"{fork}: turn {before[0]}, {before[1]:,} tokens",
        f"{fork}: turn 0, 0 tokens",
    ]
    listed = does("/sessions")
    assert all(each in listed for each in (session_id, fork, earlier, fresh))
    with proxy(url) as between:
        lines = "/system be brief\n/system\n/new\nx\n/quit\ny\n"
        logged, _ = piped(between.url, lines, *SHORT)
        assert logged.startswith("be brief\nbe brief\n")
        assert [turn["messages"][0]["content"] for turn in between.turns] == ["be brief"]
    helped = does("/help")
    for name in ("new", "switch", "fork", "rewind", "export", "stats", "system", "help", "quit"):
        assert re.search(rf"^/{name} ", helped, re.M)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/foo bar", "unknown command /foo: use /sessions, /new,"),
        ("/", "unknown command /: use"),
        ("/new x", "/new takes no argument"),
        ("/switch", "needs a session ID"),
        ("/switch nobody", "nobody"),
        ("/fork x", "x is not a turn number"),
        ("/fork 9", "9"),
        ("/rewind", "at its first turn"),
        ("/rewind 9", "9"),
    ],
)
def test_a_line_that_fails_ends_a_pipe(
    chatting: LiveServer, client: httpx.Client, line: str, why: str
) -> None:
    session_id = new(client)
    logged, remarks = failing(chatting.url, f"{line}\nthe cat\n", "--session", session_id)
    assert logged == ""
    [error] = [remark for remark in remarks.splitlines() if remark.startswith("latentd: ")]
    assert why in error
    assert place(client, session_id) == (0, 0)


def test_a_server_that_is_not_there(chatting: LiveServer) -> None:
    nowhere = "http://127.0.0.1:1"
    assert failing(nowhere, "the cat\n")[1].startswith(f"latentd: {nowhere}: ")
    assert "nobody" in failing(chatting.url, "the cat\n", "--session", "nobody")[1]


def test_rejections_are_shown_and_the_chat_continues(between: Proxy, client: httpx.Client) -> None:
    session_id = new(client)
    with person(between.url, "--session", session_id, "--max-tokens", 8) as somebody:
        somebody.read("> ")
        somebody.type("/nothing\n")
        somebody.read(r"latentd: unknown command /nothing")
        between.upstream, upstream = "http://127.0.0.1:1", between.upstream
        somebody.type("/stats\n")
        somebody.read(r"latentd: [^\r]*\r\n> ")
        between.upstream = upstream
        somebody.type("the cat\n")
        somebody.read(r"turn 1: ")
    assert place(client, session_id)[0] == 1


def test_another_clients_turn_is_noticed(chatting: LiveServer, client: httpx.Client) -> None:
    session_id = new(client)
    with person(chatting.url, "--session", session_id, *SHORT) as somebody:
        somebody.read("> ")
        answer(client, session_id, "on")
        before = place(client, session_id)
        somebody.type("the cat\n")
        somebody.read(r"another client has changed the session, which is now at turn 1")
        somebody.read("> ")
        assert place(client, session_id) == before
        somebody.type("the cat\n")
        somebody.read(r"turn 2: ")
    assert place(client, session_id)[0] == 2


def test_ctrl_c_leaves_the_session_unchanged(chatting: LiveServer, client: httpx.Client) -> None:
    session_id, twin = new(client), new(client)
    for each in (session_id, twin):
        answer(client, each, "the cat")
    before = facts(client, session_id)
    with person(chatting.url, "--session", session_id, *LONG) as somebody:
        somebody.read("> ")
        for _ in range(2):
            somebody.type("sat\n")
            somebody.read("\N{REPLACEMENT CHARACTER}{20}")
            assert facts(client, session_id)["status"] == "busy"
            somebody.type(CTRL_C)
            reported = somebody.read(
                r"the turn was rolled back, the session is unchanged: at turn (\d+), with "
                r"(\d+) tokens"
            )
            somebody.read("> ")
            after = facts(client, session_id)
            assert after["status"] == "idle"
            assert (after["turn"], after["tokens"]) == (before["turn"], before["tokens"])
            assert [int(number) for number in reported.groups()] == [after["turn"], after["tokens"]]
        ends(somebody, CTRL_C, session_id)
    assert answer(client, session_id, "sat") == answer(client, twin, "sat")


def test_ctrl_d_ends_the_chat(chatting: LiveServer, client: httpx.Client) -> None:
    session_id = new(client)
    with person(chatting.url, "--session", session_id, *SHORT) as somebody:
        somebody.read("> ")
        somebody.type("the cat\n")
        somebody.read(r"\x1b\[2mturn 1: .*\x1b\[0m\r\n.*> ")
        ends(somebody, CTRL_D, session_id)


def ends(somebody: Person, key: str, session_id: str) -> None:
    somebody.type(key)
    somebody.read(f"latentd chat --session {session_id}", again=key)
    assert somebody.leave() == 0


def test_a_turn_committed_when_the_connection_broke_is_shown_to_its_end(
    between: Proxy, client: httpx.Client
) -> None:
    expected = answer(client, new(client), "the cat")
    between.spoils.append(cut_late)
    logged, remarks = piped(between.url, "the cat\nsat\n", *SHORT)
    assert between.turns[0] == between.turns[1]
    assert between.keys[0] == between.keys[1] != between.keys[2]
    assert "whether the turn was committed is unknown" in remarks
    assert "the turn was committed" in remarks
    # The error stands between the two parts of the answer, and begins a line.
    assert logged.replace("\n", "").startswith(visible(expected).replace("\n", ""))
    assert [turn["expected_turn"] for turn in between.turns] == [0, 0, 1]


@pytest.mark.parametrize("spoil", [cut_early, fail_early])
def test_a_turn_that_broke_off_was_rolled_back(
    between: Proxy, client: httpx.Client, spoil: Any
) -> None:
    session_id = new(client)
    between.spoils.append(spoil)
    _, remarks = failing(between.url, "the cat\nsat\n", "--session", session_id, *LONG)
    assert "the turn was rolled back, the session is unchanged: at turn 0" in remarks
    assert ("latentd: the engine[2J broke\n" in remarks) is (spoil is fail_early)
    assert len(between.turns) == 1
    assert place(client, session_id) == (0, 0)


def test_a_turn_of_unknown_fate_is_looked_up_before_the_next(
    between: Proxy, client: httpx.Client
) -> None:
    session_id, upstream = new(client), between.upstream

    def cut_and_go(chunks: Iterator[bytes]) -> Iterator[bytes]:
        yield from cut_late(chunks)
        between.upstream = "http://127.0.0.1:1"

    between.spoils.append(cut_and_go)
    with person(between.url, "--session", session_id, *SHORT) as somebody:
        somebody.read("> ")
        somebody.type("the cat\n")
        somebody.read(r"is unknown: checking")
        somebody.read(r"latentd: [^\r]*\r\n> ")
        between.upstream = upstream
        somebody.type("the cat\n")
        somebody.read(r"the turn was committed: at turn 1")
        somebody.read("> ")
        assert place(client, session_id)[0] == 1
        somebody.type("the cat\n")
        somebody.read("turn 2: ")
    assert len(between.turns) == 3


def test_a_turn_of_unknown_fate_may_be_superseded(between: Proxy, client: httpx.Client) -> None:
    session_id = new(client)

    def cut_and_mix(chunks: Iterator[bytes]) -> Iterator[bytes]:
        yield from cut_late(chunks)
        client.post(f"/v1/sessions/{session_id}/rewind", json={"turn": 0})
        for _ in range(2):
            answer(client, session_id, "on")

    between.spoils.append(cut_and_mix)
    _, remarks = failing(between.url, "the cat\n", "--session", session_id, *SHORT)
    assert "the turn was lost: another client has continued the session: at turn 2" in remarks
    assert place(client, session_id)[0] == 2


def test_a_stream_without_its_end_has_broken_off(between: Proxy) -> None:
    between.is_polite = True
    between.spoils.append(cut_early)
    _, remarks = failing(between.url, "the cat\n", *LONG)
    assert f"latentd: {between.url}: the answer ended early\n" in remarks
    assert "the turn was rolled back" in remarks


def test_a_session_that_stays_busy(
    between: Proxy, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialogue, "SETTLE_S", 0.5)
    session_id, released = new(client), threading.Event()

    def stay(chunks: Iterator[bytes]) -> Iterator[bytes]:
        yield from fail_early(chunks)
        released.wait(PATIENCE_S)  # and the server's connection stays open

    between.spoils.append(stay)
    try:
        _, remarks = failing(between.url, "the cat\n", "--session", session_id, *LONG)
        assert f"latentd: session {session_id} is still busy after 0.5 seconds" in remarks
        _, remarks = failing(between.url, "the cat\n", "--session", session_id, *LONG)
        assert f"latentd: session {session_id} is busy with another turn" in remarks
    finally:
        released.set()
    assert place(client, session_id) == (0, 0)


@settings(deadline=None)
@given(st.data())
def test_events_may_be_cut_anywhere(data: st.DataObject) -> None:
    wire = (
        b': keep-alive\ndata: {"a": "\xe2\x80\xa8\xc2\x85"}\nid: 0\n\n: keep-alive\n: keep-alive\n'
        b"data:[DONE]\r\nid: 1\r\n\r\n"
    )
    cuts = sorted(data.draw(st.sets(st.integers(0, len(wire)))))
    chunks = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    expected = ['{"a": "\u2028\x85"}'.encode(), b"[DONE]"]
    assert list(event_data(chunks)) == expected

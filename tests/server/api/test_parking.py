"""Compact parking: fewer bytes at rest, and still the same tokens wherever the state was."""

from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from model import checkpoint, tokenizer
from model.config import ModelConfig
from model.network import LanguageModel
from server.__main__ import app as cli
from server.sessions.codec import COMPACT, read
from tests.server.api.calls import complete, text_of
from tests.server.api.test_session_calls import content
from tests.server.live import live_server, tiny_settings

NOWHERE_ELSE = {"host_cache_bytes": 0, "warm_sessions": 0}


Content = tuple[dict[str, str], dict[str, bytes]]


def converse(client: httpx.Client) -> tuple[list[str], list[Content]]:
    """Texts and states of a few turns."""
    session_id = client.post("/v1/sessions").json()["id"]
    texts, states = list[str](), list[Content]()
    for number in range(6):
        prompt = "the cat sat" if number == 0 else ""
        texts.append(text_of(client, session_id=session_id, prompt=prompt))
        states.append(content(client, session_id))
    return texts, states


def test_the_tokens_depend_on_no_tier(tiny_checkpoint: Path, tmp_path: Path) -> None:
    results = []
    for name, changes in (("all", {}), ("store", NOWHERE_ELSE)):
        compact = tiny_settings(tiny_checkpoint, tmp_path / name, parking="compact", **changes)
        with live_server(compact) as server, server.client() as client:
            results.append(converse(client))
    assert results[0] == results[1]
    assert all(facts["form"] == COMPACT for facts, _ in results[0][1])


def test_less_is_stored_and_either_server_reads_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    sizes = {}
    for parking in ("exact", "compact"):
        settings = tiny_settings(tiny_checkpoint, tmp_path, parking=parking)
        with live_server(settings) as server, server.client() as client:
            for session in client.get("/v1/sessions").json()["data"]:
                assert text_of(client, session_id=session["id"], prompt=" sat")
                assert client.delete(f"/v1/sessions/{session['id']}").status_code == 200
            session_id = client.post("/v1/sessions", json={"prompt": "the cat"}).json()["id"]
            [turn] = client.get(f"/v1/sessions/{session_id}/turns").json()["data"]
            sizes[parking] = turn["bytes"]
            blob = client.get(f"/v1/sessions/{session_id}/state").content
            moved = client.post("/v1/sessions/import", content=blob)
            assert moved.status_code == 201
            complete(client, session_id=moved.json()["id"])
            held = client.get(f"/v1/sessions/{moved.json()['id']}").json()
            assert held["tier"] == ("device" if parking == "exact" else "host")
            assert read(blob)[0]["form"] == parking
    settings = tiny_settings(tiny_checkpoint, tmp_path)
    with live_server(settings) as server, server.client() as client:
        for session in client.get("/v1/sessions").json()["data"]:
            assert text_of(client, session_id=session["id"], prompt=" sat")
    assert sizes["compact"] < sizes["exact"]


def test_a_model_without_a_compact_form_is_refused_at_the_start(tmp_path: Path) -> None:
    words = tokenizer.train(["the cat sat on the mat"], 280, ["<|endoftext|>"])
    config = ModelConfig(
        vocab_sz=280, d_emb=16, n_layers=1, n_heads=1, d_key=8, d_val=8, values="linear"
    )
    folder = tmp_path / "linear"
    checkpoint.save(folder, config, LanguageModel(config).state_dict(), words, None)
    arguments = ["serve", str(folder), "--data-dir", str(tmp_path / "data")]
    ended = CliRunner().invoke(cli, [*arguments, "--port", "0", "--parking", "compact"])
    assert ended.exit_code == 2
    [line] = ended.stderr.splitlines()
    assert line.startswith("latentd: --parking compact: ")
    assert "linear" in line


@pytest.mark.parametrize("parking", ["exact", "compact"])
def test_a_forked_state_is_that_of_the_turn(
    tiny_checkpoint: Path, tmp_path: Path, parking: str
) -> None:
    settings = tiny_settings(tiny_checkpoint, tmp_path, parking=parking)
    with live_server(settings) as server, server.client() as client:
        session_id = client.post("/v1/sessions", json={"prompt": "the cat"}).json()["id"]
        fork = client.post(f"/v1/sessions/{session_id}/fork").json()["id"]
        assert text_of(client, session_id=session_id) == text_of(client, session_id=fork)

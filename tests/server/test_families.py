"""Every family of networks runs through the whole server, which knows none of them."""

from pathlib import Path

import httpx
import pytest

from model import checkpoint
from tests.model import toy
from tests.server.api.calls import complete, text_of
from tests.server.cli.commands import latentd
from tests.server.live import live_server, tiny_settings


@pytest.fixture(params=["heinsen", "toy"])
def folder(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A checkpoint of a family; the toy's is known for as long as the test runs."""
    if request.param == "heinsen":
        return tiny_checkpoint
    monkeypatch.setattr(checkpoint, "FAMILIES", (*checkpoint.FAMILIES, toy))
    return toy.save(tmp_path / "toy")


def post(client: httpx.Client, path: str, **body: object) -> str:
    answer = client.post(f"/v1/sessions{path}", json=body)
    assert answer.is_success, answer.text
    return str(answer.json()["id"])


@pytest.mark.long
def test_a_session_is_cut_kept_forked_rewound_moved_and_resumed(
    folder: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(folder, tmp_path, warm_sessions=1, max_running=4)
    with live_server(settings) as server, server.client() as client:
        whole = text_of(client, max_tokens=40, temperature=0.9)
        session_id = post(client, "")
        turn = {"temperature": 0.9, "session_id": session_id}
        first = text_of(client, max_tokens=15, **turn)
        second = text_of(client, prompt="", max_tokens=25, **turn)
        assert first + second == whole
        fork = post(client, f"/{session_id}/fork", turn=1)
        assert text_of(client, prompt="", max_tokens=25, **turn | {"session_id": fork}) == second
        post(client, f"/{session_id}/rewind", turn=1)
        blob = client.get(f"/v1/sessions/{session_id}/state").content
    with live_server(settings) as server, server.client() as client:
        assert text_of(client, prompt="", max_tokens=25, **turn) == second
        headers = {"content-type": "application/octet-stream"}
        moved = client.post("/v1/sessions/import", content=blob, headers=headers).json()["id"]
        assert text_of(client, prompt="", max_tokens=25, **turn | {"session_id": moved}) == second
        spec = checkpoint.describe(folder).state_spec
        assert client.get(f"/v1/sessions/{moved}").json()["state_bytes"] == spec.num_bytes


def test_common_prompts_structure_and_probabilities_need_no_family(
    folder: Path, tmp_path: Path
) -> None:
    prompt = [*range(5, 205), 7]
    with (
        live_server(tiny_settings(folder, tmp_path)) as server,
        server.client() as client,
    ):
        scored = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=3)
        first, again = (text_of(client, prompt=prompt, max_tokens=9) for _ in range(2))
        assert first == again
        assert len(scored["choices"][0]["logprobs"]["tokens"]) == 204
        choice = {"structured_outputs": {"choice": ["the cat", "the mat"]}}
        assert text_of(client, **choice) in ("the cat", "the mat")


def test_a_model_is_described_whatever_its_family(folder: Path) -> None:
    report = latentd("inspect", folder).stdout
    assert f"{checkpoint.describe(folder).state_spec.num_bytes:,} bytes, at any length" in report

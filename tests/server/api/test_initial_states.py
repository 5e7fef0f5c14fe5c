"""Tuned initial states, selected by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from model import checkpoint
from model.batch import Batch
from model.checkpoint import CheckpointError
from tests.server.api.calls import complete, text_of
from tests.server.api.chats import make_checkpoint
from tests.server.live import LiveServer, live_server, tiny_settings

PROMPT = [*range(5, 205), 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tuned") / "model")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    """The model's state after a text, as a file."""
    loaded = checkpoint.load(folder, torch.device("cpu"))
    network, ids = loaded.network, loaded.tokenizer.encode("the cat sat on the mat")
    pool = network.new_pool(2)
    network.forward(Batch.of([ids], [1]), pool)
    tensors = zip(network.state_spec.tensors, pool.read_row(1), strict=True)
    file = folder.parent / "poet.safetensors"
    save_file({spec.name: values.contiguous() for spec, values in tensors}, file)
    return file


@pytest.fixture(scope="module")
def server(
    folder: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    given = {"initial_state": (f"poet={tuned}",)}
    with live_server(tiny_settings(folder, tmp_path_factory.mktemp("data"), **given)) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_a_request_begins_with_a_state(client: httpx.Client) -> None:
    ids = client.post(
        "/tokenize", json={"prompt": "the cat sat on the mat", "add_special_tokens": False}
    ).json()["tokens"]
    tuned = {"prompt": PROMPT, "initial_state": "poet", "max_tokens": 9, "temperature": 0}
    text = text_of(client, **tuned)
    assert text == text_of(client, **tuned | {"prompt": [*ids, *PROMPT], "initial_state": None})
    short = {"prompt": [7], "max_tokens": 1, "logprobs": 1, "temperature": 0}
    probable = [
        complete(client, **short, initial_state=name)["choices"][0]["logprobs"]["token_logprobs"]
        for name in (None, "poet")
    ]
    assert probable[0] != probable[1]


def test_prefixes_are_shared_after_one_state_only(client: httpx.Client) -> None:
    prompt = [*PROMPT[::-1], 9]
    cached = []
    for name in (None, None, "poet", "poet", None):
        usage = complete(client, prompt=prompt, initial_state=name, max_tokens=1)["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"] > 0)
    assert cached == [False, True, False, True, True]


def test_a_session_begins_with_a_state(client: httpx.Client) -> None:
    turn: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    text = text_of(client, **turn, initial_state="poet")
    made = client.post("/v1/sessions", json={"initial_state": "poet"})
    assert made.status_code == 201, made.text
    assert made.json()["tokens"] == 0
    assert text_of(client, **turn, session_id=made.json()["id"]) == text
    read = client.post("/v1/sessions", json={"initial_state": "poet", "prompt": PROMPT}).json()
    assert text_of(client, **turn | {"prompt": ""}, session_id=read["id"]) == text
    fresh = client.post("/v1/sessions").json()["id"]
    assert text_of(client, **turn, session_id=fresh, initial_state="poet") == text
    again = client.post(
        "/v1/completions", json=turn | {"session_id": fresh, "initial_state": "poet"}
    )
    assert again.status_code == 400
    assert again.json()["error"]["param"] == "initial_state"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_an_unknown_name_is_refused(client: httpx.Client, path: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/responses": {"input": "a"},
    }
    answer = client.post(path, json=bodies[path] | {"initial_state": "nobody"})
    assert answer.status_code == 400
    assert "'nobody'; this server has: poet" in answer.json()["error"]["message"]
    assert client.post("/v1/sessions", json={"initial_state": "nobody"}).status_code == 400


def test_wrong_files_are_refused_by_name(folder: Path, tuned: Path, tmp_path: Path) -> None:
    spec = checkpoint.describe(folder).state_spec
    file = tmp_path / "wrong.safetensors"
    name, shape = spec.tensors[0].name, spec.tensors[0].shape
    for tensors, message in (
        ({name: torch.zeros(*shape, 2)}, f"{name} is "),
        ({name: torch.zeros(*shape), "other": torch.zeros(1)}, "other is not a tensor"),
        ({"other": torch.zeros(1)}, "none of the tensors"),
        ({name: torch.full(shape, float("nan"))}, "not finite"),
    ):
        save_file(tensors, file)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read_initial_state(folder, file, spec)
        assert str(caught.value).startswith(f"{file}: ")
        assert message in str(caught.value)
    for missing in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(CheckpointError):
            checkpoint.read_initial_state(folder, missing, spec)
    with (
        pytest.raises(CheckpointError),
        live_server(tiny_settings(folder, tmp_path, initial_state=(f"x={file}",))),
    ):
        pass
    for given in (("x",), ("=x",), ("x=",), (f"x={tuned}", f"x={tuned}")):
        with pytest.raises(ValueError, match="initial state"):
            tiny_settings(folder, tmp_path, initial_state=given)

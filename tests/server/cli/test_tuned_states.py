"""`latentd session import` of tuned initial states, as their publishers save them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.model.rwkv7 import networks
from tests.server.api.calls import complete
from tests.server.cli import commands
from tests.server.live import LiveServer, live_server, tiny_settings

TURN: dict[str, Any] = {"prompt": "the cat", "max_tokens": 6, "temperature": 0, "logprobs": 2}


def tuned() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(5)
    return {
        f"blocks.{layer}.att.time_state": torch.randn(1, 64, 64, generator=chance)
        for layer in range(3)
    }


@pytest.fixture(scope="module")
def poet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tuned") / "poet.pth"
    torch.save(tuned(), file)
    return file


@pytest.fixture(scope="module")
def server(poet: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = networks.save_with_vocabulary(tmp_path_factory.mktemp("rwkv7") / "model")
    given = {"initial_state": (f"poet={poet}",)}
    with live_server(tiny_settings(model, tmp_path_factory.mktemp("data"), **given)) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def imported(server: LiveServer, file: Path, *options: object) -> str:
    arguments = ("session", "import", file, *options)
    return commands.stdout_of(*arguments, LATENT_URL=server.url).strip()


def refused(server: LiveServer, file: Path) -> str:
    return commands.refused("session", "import", file, LATENT_URL=server.url)


@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "legacy"])
def test_the_session_begins_with_the_tuned_state(
    server: LiveServer, client: httpx.Client, tmp_path: Path, is_legacy: bool
) -> None:
    file = tmp_path / "poet.pth"
    torch.save(tuned(), file, _use_new_zipfile_serialization=not is_legacy)
    session_id = imported(server, file, "--metadata", "who=poet")
    session = client.get(f"/v1/sessions/{session_id}").json()
    assert (session["tokens"], session["turn"]) == (0, 1)
    assert session["metadata"] == {"who": "poet"}
    found, expected, plain = (
        complete(client, **TURN, **how)["choices"][0]
        for how in ({"session_id": session_id}, {"initial_state": "poet"}, {})
    )
    assert found["text"] == expected["text"]
    assert found["logprobs"] == expected["logprobs"] != plain["logprobs"]


def test_narrow_numbers_are_widened(
    server: LiveServer, client: httpx.Client, tmp_path: Path
) -> None:
    narrow = {name: tensor.bfloat16() for name, tensor in tuned().items()}
    texts = []
    for name, tensors in (("narrow", narrow), ("wide", {n: t.float() for n, t in narrow.items()})):
        torch.save(tensors, tmp_path / f"{name}.pth")
        session_id = imported(server, tmp_path / f"{name}.pth")
        texts.append(complete(client, **TURN, session_id=session_id)["choices"][0])
    assert texts[0] == texts[1]


def test_over_http_it_is_a_safetensors_file(client: httpx.Client, tmp_path: Path) -> None:
    file = tmp_path / "poet.safetensors"
    save_file(tuned(), file, {"format": "pt"})
    answer = client.post(
        "/v1/sessions/import",
        content=file.read_bytes(),
        headers={"Content-Type": "application/octet-stream"},
    )
    assert (answer.status_code, answer.json()["tokens"]) == (201, 0)


def test_others_are_refused_in_a_line(server: LiveServer, tmp_path: Path) -> None:
    def without_a_layer(tensors: dict[str, Tensor]) -> None:
        del tensors["blocks.1.att.time_state"]

    def of_other_heads(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.2.att.time_state"] = torch.zeros(2, 32, 32)

    def not_finite(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.att.time_state"][0, 1, 2] = torch.inf

    def far_too_large(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.att.time_state"][0, 1, 2] = 1e37

    def something_else(tensors: dict[str, Tensor]) -> None:
        tensors["emb.weight"] = tensors.pop("blocks.2.att.time_state")

    file = tmp_path / "other.pth"
    for change, reason in (
        (without_a_layer, "blocks.1.att.time_state missing"),
        (of_other_heads, "blocks.2.att.time_state is [2, 32, 32], not [1, 64, 64] as in"),
        (not_finite, "blocks.0.att.time_state has values that are not finite"),
        (far_too_large, "it has numbers up to 1e+37"),
        (something_else, "blocks.2.att.time_state missing"),
        (dict.clear, "not a tuned initial state"),
    ):
        tensors = tuned()
        change(tensors)
        torch.save(tensors, file)
        assert f"this is not a state for this server: {reason}" in refused(server, file).replace(
            "tuned state: ", ""
        )
    file.write_bytes(b"nothing")
    assert f"{file}: not a file of plain tensors" in refused(server, file)
    assert f"{tmp_path / 'none.pth'}: No such file" in refused(server, tmp_path / "none.pth")

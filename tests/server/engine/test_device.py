"""Where the model runs, and on how many threads."""

from collections.abc import Iterator

import pytest
import torch

from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.kernels import cuda
from server.engine import device
from server.engine.device import DeviceError, choose_device, choose_dtype, choose_threads


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def network() -> LanguageModel:
    config = ModelConfig(vocab_sz=50, d_emb=16, n_layers=1, n_heads=1, d_key=4, d_val=4)
    return LanguageModel(config).requires_grad_(False).eval()


def test_a_small_network_has_one_thread(network: LanguageModel) -> None:
    assert choose_threads(None, network.pack()) == "1 thread"
    assert torch.get_num_threads() == 1


def test_a_large_network_has_as_many_as_torch_wants(
    network: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.pack("int8")
    monkeypatch.setattr(device, "FEW_BYTES", network.num_parameters + 1)
    assert choose_threads(None, network) == "1 thread"
    torch.set_num_threads(2)
    monkeypatch.setattr(device, "FEW_BYTES", network.num_parameters)
    assert choose_threads(None, network) == "2 threads"


def test_what_is_asked_for_is_done(network: LanguageModel) -> None:
    assert choose_threads(3, network) == "3 threads"
    assert torch.get_num_threads() == 3


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == (torch.device("cpu"), "cpu, no CUDA device found")
    assert choose_device("cpu") == (torch.device("cpu"), "cpu")
    with pytest.raises(DeviceError, match="no CUDA device"):
        choose_device("cuda")


def test_a_gpu_has_bfloat16_weights_unless_others_are_asked_for() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [choose_dtype(None, each) for each in (cpu, gpu)] == ["float32", "bfloat16"]
    assert [choose_dtype("int8", each) for each in (cpu, gpu)] == ["int8", "int8"]


@pytest.mark.skipif(not cuda.is_available(), reason="needs Triton")
def test_the_kernels_are_a_backend(network: LanguageModel) -> None:
    assert network.fuse().backend == "Triton kernels"


def test_a_gpu_without_triton_says_so(
    network: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
    assert network.pack().backend == "plain torch (Triton is not installed)"

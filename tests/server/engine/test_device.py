"""The model's device and number of threads."""

import copy
from collections.abc import Iterator

import pytest
import torch

from model import compiled
from model.batch import Batch
from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.kernels import cuda
from model.kernels.cpu import threads
from server.engine.device import DeviceError, choose_device, choose_threads


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


@pytest.mark.long  # compiles the network twice
def test_threads_are_those_that_a_step_has_work_for(
    network: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work per token counts, not the bytes of the weights."""
    head, body = network.embed.weight.numel(), network.num_parameters - network.embed.weight.numel()
    monkeypatch.setattr(threads, "WORTH_A_THREAD", body + head)
    for packed in (copy.deepcopy(network).pack(), copy.deepcopy(network).pack("int8")):
        assert packed.num_threads(1, 1) == 2
        assert packed.num_threads(32, 32) == 2
        monkeypatch.setattr(threads, "WORTH_A_THREAD", body + head + 1)
        assert packed.num_threads(1, 1) == packed.num_threads(32, 32) == 1
        assert packed.num_threads(2, 1) == packed.num_threads(100, 1) == 2
        assert packed.num_threads(100, 100) == 1
        monkeypatch.setattr(threads, "WORTH_A_THREAD", body + head)


def test_a_step_runs_on_the_threads_that_it_has_work_for(
    network: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = list[int]()
    monkeypatch.setattr(
        compiled, "run_on_threads", lambda _function, _a, threads: used.append(threads)
    )
    monkeypatch.setattr(threads, "WORTH_A_THREAD", 2 * network.num_parameters)
    packed = network.pack()
    pool = packed.new_pool(1)
    packed.forward(Batch.of_tokens([5], [0]), pool)
    packed.forward(Batch.of([[5] * 40], [0]), pool)
    assert used == [1, 2]


def test_a_core_is_left_for_the_clients_where_there_are_more_than_two(
    network: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "WORTH_A_THREAD", network.num_parameters)
    packed = network.pack()
    for cores, most in ((1, 1), (2, 2), (3, 2), (8, 7)):
        torch.set_num_threads(cores)
        words = choose_threads(None, packed)
        assert torch.get_num_threads() == most
        assert words.startswith("1 thread" if most == 1 else f"up to {most} threads")


def test_without_compiled_code_a_small_network_has_one_thread(
    network: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_threads(None, network) == "1 thread"
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "WORTH_A_THREAD", network.num_parameters)
    assert choose_threads(None, network) == "2 threads"


def test_what_is_asked_for_is_the_most(network: LanguageModel) -> None:
    assert choose_threads(3, network) == "3 threads"
    assert choose_threads(1, network.pack()) == "1 thread"
    assert torch.get_num_threads() == 1


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == (torch.device("cpu"), "cpu, no CUDA device found")
    assert choose_device("cpu") == (torch.device("cpu"), "cpu")
    with pytest.raises(DeviceError, match="no CUDA device"):
        choose_device("cuda")


@pytest.mark.skipif(not cuda.is_available(), reason="needs Triton")
def test_the_kernels_are_a_backend(network: LanguageModel) -> None:
    assert network.fuse().backend == "Triton kernels"


def test_a_gpu_without_triton_says_so(
    network: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
    assert network.pack().backend == "plain torch (Triton is not installed)"

"""The compiled network is the one in torch."""

import copy
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from model.heinsen.config import ModelConfig
from model.heinsen.network import LanguageModel
from model.kernels.cpu import workers
from model.state import StatePool
from tests.model.calls import prefill, step

VOCAB = 120
CONFIGS = {
    "log": ModelConfig(vocab_sz=VOCAB, d_emb=40, n_layers=3, n_heads=3, d_key=9, d_val=7),
    "linear": ModelConfig(vocab_sz=VOCAB, d_emb=64, n_layers=2, n_heads=2, values="linear"),
}
IDS = torch.randint(VOCAB, (6, 700), generator=torch.Generator().manual_seed(2))
TOLERANCE = 2e-5
"""What the reference vectors are held to."""


@pytest.fixture(params=CONFIGS)
def network(request: pytest.FixtureRequest) -> LanguageModel:
    torch.manual_seed(4)
    return LanguageModel(CONFIGS[request.param]).requires_grad_(False).eval()


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def advanced(network: LanguageModel, lengths: Sequence[int]) -> tuple[StatePool, Tensor]:
    """Every second row has read so many tokens, then one more; the logits after that."""
    pool, rows = network.new_pool(13), [2 * i + 1 for i in range(len(lengths))][::-1]
    prefill(network, IDS[: len(rows)], lengths, pool, rows)
    return pool, step(network, IDS[: len(rows), -1], pool, rows)


@pytest.mark.usefixtures("threads")
def test_compiled_code_computes_what_torch_does(network: LanguageModel) -> None:
    compiled = copy.deepcopy(network).pack()
    assert compiled.is_compiled
    lengths = [1, 2, 700, 65, 64, 3]
    (expected, logits), (found, compiled_logits) = (
        advanced(each, lengths) for each in (network, compiled)
    )
    torch.testing.assert_close(compiled_logits, logits, rtol=0, atol=TOLERANCE)
    for name in ("h", "m", "z", "s", "n"):
        if name in expected.tensors:
            torch.testing.assert_close(
                found.tensors[name], expected.tensors[name], rtol=TOLERANCE, atol=TOLERANCE
            )
    assert found.export_row(0) == compiled.new_pool(1).export_row(0)


def test_the_number_of_threads_changes_no_bit(network: LanguageModel) -> None:
    network.pack()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        pool, logits = advanced(network, [5, 300])
        found.append((logits.numpy().tobytes(), pool.export_row(1), pool.export_row(3)))
    torch.set_num_threads(1)
    assert found[0] == found[1] == found[2]


def test_where_no_thread_can_let_others_have_its_core_the_callers_works_alone(
    network: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.pack()
    _, expected = advanced(network, [5, 30])
    monkeypatch.setattr(workers, "_workers", lambda _process: None)
    torch.set_num_threads(2)
    _, found = advanced(network, [5, 30])
    torch.set_num_threads(1)
    assert torch.equal(found, expected)


def test_several_threads_may_use_one_network(network: LanguageModel) -> None:
    network.pack()
    alone = [advanced(network, [200 + i])[1] for i in range(4)]
    found: dict[int, list[Tensor]] = {}

    def run(i: int) -> None:
        found[i] = [advanced(network, [200 + i])[1] for _ in range(10)]

    running = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert all(torch.equal(each, alone[i]) for i in range(4) for each in found[i])


@pytest.mark.parametrize(
    ("ids", "rows", "problem"),
    [
        ([5, VOCAB], [0, 1], "token ids"),
        ([5, -1], [0, 1], "token ids"),
        ([5, 6], [0, 4], "rows"),
        ([5, 6], [-1, 0], "rows"),
        ([5, 6], [1, 1], "twice"),
        ([5, 6], [1], "pieces of"),
    ],
)
def test_what_is_not_there_is_not_read(
    network: LanguageModel, ids: list[int], rows: list[int], problem: str
) -> None:
    """Compiled code checks no bounds: its callers' mistakes must not reach it."""
    network.pack()
    pool = network.new_pool(4)
    before = pool.export_row(1)
    with pytest.raises((IndexError, ValueError), match=problem):
        step(network, torch.tensor(ids), pool, rows)
    assert pool.export_row(1) == before


def test_a_pool_of_another_network_is_refused(network: LanguageModel) -> None:
    network.pack()
    other = LanguageModel(ModelConfig(vocab_sz=VOCAB, d_emb=8, n_layers=1, n_heads=1))
    with pytest.raises(ValueError, match="pool"):
        step(network, IDS[:1, 0], other.new_pool(1), [0])

"""The network in kernels matches the paper's."""

import pytest
import torch

from model import WeightDtype
from model.batch import Batch
from model.kernels.cpu import arithmetic
from model.state import StatePool
from tests.model.calls import prefill, step
from tests.model.heinsen.cuda.networks import TINY, fused, plain
from tests.model.heinsen.test_network import (
    LOGITS_TOLERANCE,
    NAMES,
    assert_logits,
    assert_state,
    linear_network,
    reference,
)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_steps_are_the_reference(name: str, device: torch.device) -> None:
    """Prompts of two lengths in rows that are not adjacent, then a step of both, then the rest."""
    found = reference(name)
    network, ids, expected = fused(found.network, device), found.token_ids, found.tensors["logits"]
    pool, lengths, rows = network.new_pool(4), [found.length // 2, 3], [3, 1]
    scored = prefill(network, ids[:, : lengths[0]], lengths, pool, rows, (0, 1))
    for sequence, length in enumerate(lengths):
        assert_logits(scored[sequence].cpu(), expected[sequence, :length])
    logits = step(network, ids[[0, 1], lengths], pool, rows).cpu()
    assert_logits(logits, expected[[0, 1], lengths])
    prefill(network, ids[:1, lengths[0] + 1 :], [found.length - lengths[0] - 1], pool, [3])
    end = StatePool(pool.spec, 1, torch.device("cpu"))
    end.import_row(0, pool.export_row(3))
    assert_state(found.network.read_state(end), found.tensors, (0,))


def test_pieces_of_all_lengths_in_one_batch_are_as_in_plain_torch(device: torch.device) -> None:
    exact = plain()
    network, ids = fused(exact, device), torch.arange(300).view(3, 100) * 7 % 96
    pieces = [[ids[0, :1], ids[1, :70], ids[2, :3]], [ids[0, 1:3], ids[1, 70:71], ids[2, 3:4]]]
    ours, theirs, rows = network.new_pool(4), exact.new_pool(4), [3, 0, 2]
    for parts in pieces:
        batch = Batch.of(parts, rows).wanting([2, 0, len(parts[0]) + len(parts[1]) - 1])
        found, expected = network.forward(batch, ours).cpu(), exact.forward(batch, theirs)
        torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_TOLERANCE)
    again, expected = network.logits(ours, rows).cpu(), exact.logits(theirs, rows)
    torch.testing.assert_close(again, expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_linear_values_are_right(device: torch.device) -> None:
    exact = linear_network()
    network, ids = fused(exact, device), torch.arange(20).view(2, 10) * 3
    ours, theirs = network.new_pool(2), exact.new_pool(2)
    prefill(network, ids[:, :9], [9, 4], ours, [0, 1])
    prefill(exact, ids[:, :9], [9, 4], theirs, [0, 1])
    found = step(network, ids[:, 9], ours, [0, 1]).cpu()
    expected = step(exact, ids[:, 9], theirs, [0, 1])
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS_TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_only_weights_are_rounded(
    dtype: WeightDtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equals plain torch with the same rounded weights and float32 inputs, up to the bits that two
    bfloat16 numbers lack of a float32 one: bfloat16 inputs would be 100 times as far away."""
    config = TINY.model_copy(update={"n_layers": 1})
    monkeypatch.setattr(arithmetic, "features", list)
    ours, theirs = fused(plain(config), device, dtype), plain(config).pack(dtype)
    ids, pools = torch.arange(6).view(2, 3), (ours.new_pool(2), theirs.new_pool(2))
    for each, pool in zip((ours, theirs), pools, strict=True):
        prefill(each, ids[:, :2], [2, 2], pool, [0, 1])
    found = step(ours, ids[:, 2], pools[0], [0, 1]).cpu()
    expected = step(theirs, ids[:, 2], pools[1], [0, 1])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    assert ours.weight_bytes == theirs.weight_bytes


def test_rows_that_are_not_named_are_not_touched(device: torch.device) -> None:
    network = fused(plain(), device)
    pool = network.new_pool(4)
    for row in (0, 2):
        pool.poison(row)
    before = [pool.export_row(row) for row in range(4)]
    ids = torch.arange(10).view(2, 5)
    prefill(network, ids[:, :4], [4, 2], pool, [3, 1])
    logits = step(network, ids[:, 4], pool, [3, 1])
    assert torch.isfinite(logits).all()
    after = [pool.export_row(row) for row in range(4)]
    assert [after[row] == before[row] for row in range(4)] == [True, False, True, False]


def test_what_cannot_be_is_refused(device: torch.device) -> None:
    network = fused(plain(), device)
    pool, ids = network.new_pool(2), torch.tensor([1, 2])
    for rows in ([0, 2], [-1, 0], [1, 1]):
        with pytest.raises(IndexError, match="rows"):
            step(network, ids, pool, rows)
        with pytest.raises(IndexError, match="rows"):
            prefill(network, ids.view(2, 1), [1, 1], pool, rows)
    other = StatePool(linear_network().state_spec, 2, device)
    with pytest.raises(ValueError, match="new_pool"):
        step(network, ids, other, [0, 1])

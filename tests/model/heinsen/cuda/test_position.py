"""The recurrence of positions in Triton against the network's own, and float64 step by step."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.heinsen.cuda.position import scan, step
from model.heinsen.layers import LatentPosition

D_EMB, VOCAB, POOL = 44, 11, 6
EACH_SIZE = [(1, 1), (3, 63), (2, 64), (2, 65), (1, 200)]


def randn(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def gates_of(*shape: int, seed: int = 0, device: torch.device) -> Tensor:
    """Gates of all kinds: channels that forget at once, never, and anything in between."""
    size = torch.logspace(-1, 1.5, 2 * D_EMB, device=device)
    return randn(*shape, 2 * D_EMB, seed=seed, device=device) * size


def ids_of(*shape: int, device: torch.device) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(5)).int().to(device)


def table_of(device: torch.device) -> Tensor:
    return randn(VOCAB, D_EMB, seed=6, device=device)


def pool_of(device: torch.device, *rows: int) -> Tensor:
    """h of these rows; all others are poison."""
    h = torch.full((POOL, D_EMB), torch.nan, dtype=torch.float64, device=device)
    h[list(rows)] = randn(POOL, D_EMB, seed=7, device=device)[list(rows)].double() * 3
    return h


def int32(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def by_hand(gates: Tensor, h: Tensor) -> Tensor:
    """All h of one sequence in float64: gates `[tokens, 2 * d]`, h `[d]` -> `[tokens, d]`."""
    found = []
    for a, b in (pair.double().chunk(2) for pair in gates):
        h = torch.logaddexp(F.logsigmoid(a) + h, b)
        found.append(h)
    return torch.stack(found)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_a_step_is_the_recurrence(
    table_dtype: torch.dtype, id_dtype: torch.dtype, device: torch.device
) -> None:
    gates, rows = gates_of(3, device=device), [4, 0, 3]
    table, ids = table_of(device).to(table_dtype), ids_of(3, device=device).to(id_dtype)
    h = pool_of(device, *rows)
    before = h.clone()
    x = step(gates, table, ids, h, int32(rows, device))
    for i, row in enumerate(rows):
        expected = by_hand(gates[i : i + 1], before[row])[0]
        torch.testing.assert_close(h[row], expected, rtol=1e-14, atol=1e-14)
        assert torch.equal(x[i], table[ids[i]].float() + h[row].float())
    others = [row for row in range(POOL) if row not in rows]
    assert h[others].isnan().all()


def test_a_step_leaves_out_rows_and_tokens_that_are_none(device: torch.device) -> None:
    gates, h = gates_of(4, device=device), pool_of(device, 1, 2)
    before = h.clone()
    gates[[0, 3]] = torch.nan
    rows, ids = int32([-1, 1, 2, 0], device), int32([7, 1, -1, -1], device)
    x = step(gates, table_of(device), ids, h, rows)
    assert (x[[0, 2, 3]] == 0).all()
    assert torch.equal(h[2], before[2])
    assert not torch.equal(h[1], before[1])
    assert h[[0, 3, 4, 5]].isnan().all()


@pytest.mark.parametrize(("batch", "tokens"), EACH_SIZE)
def test_a_scan_is_the_recurrence(batch: int, tokens: int, device: torch.device) -> None:
    gates, ids, table = (
        gates_of(batch, tokens, device=device),
        ids_of(batch, tokens, device=device),
        table_of(device),
    )
    rows, lengths = [5, 2, 0][:batch], [tokens, tokens // 2, 1][:batch]
    h = pool_of(device, *rows)
    before = h.clone()
    for i, length in enumerate(lengths):
        gates[i, length:] = torch.nan
        ids[i, length:] = 10**9
    x = scan(gates, table, ids, h, int32(rows, device), int32(lengths, device))
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        expected = by_hand(gates[i, :length], before[row])
        torch.testing.assert_close(h[row], expected[-1], rtol=1e-13, atol=1e-13)
        wanted = table[ids[i, :length].long()] + expected.float()
        torch.testing.assert_close(x[i, :length], wanted, rtol=1e-6, atol=1e-6)
        assert (x[i, length:] == 0).all()
    others = [row for row in range(POOL) if row not in rows]
    assert h[others].isnan().all()


def test_both_are_what_the_network_computes(device: torch.device) -> None:
    position, tokens = LatentPosition(D_EMB).to(device), 130
    table, ids = table_of(device), ids_of(2, tokens + 1, device=device)
    emb = table[ids.long()]
    h, rows = pool_of(device, 1, 3), int32([3, 1], device)
    lengths = torch.tensor([tokens, 70], device=device)
    padding = torch.arange(tokens, device=device) >= lengths.unsqueeze(1)
    with torch.no_grad():
        gates = position.dense(emb)
        all_h, after = position(emb[:, :tokens], h[[3, 1]], padding)
        last = position.step(emb[:, tokens], after)
    x = scan(
        gates[:, :tokens].contiguous(), table, ids[:, :tokens].contiguous(), h, rows, lengths.int()
    )
    torch.testing.assert_close(h[[3, 1]], after, rtol=1e-6, atol=1e-6)
    wanted = (emb[:, :tokens] + all_h) * ~padding.unsqueeze(2)
    torch.testing.assert_close(x, wanted, rtol=1e-6, atol=2e-6)
    x = step(gates[:, tokens].contiguous(), table, ids[:, tokens].contiguous(), h, rows)
    torch.testing.assert_close(h[[3, 1]], last, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x, emb[:, tokens] + last.float(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("cut", [64, 128])
def test_a_cut_between_spans_and_padding_leave_all_bits(cut: int, device: torch.device) -> None:
    gates, ids, table = (
        gates_of(1, 150, device=device),
        ids_of(1, 150, device=device),
        table_of(device),
    )
    whole, parts, padded = (pool_of(device, 2) for _ in range(3))
    row = int32([2], device)
    expected = scan(gates, table, ids, whole, row, int32([150], device))
    found = []
    for start, end in ((0, cut), (cut, 150)):
        some = gates[:, start:end].contiguous(), table, ids[:, start:end].contiguous()
        found.append(scan(*some, parts, row, int32([end - start], device)))
    assert torch.equal(torch.cat(found, 1), expected)
    assert torch.equal(parts[2], whole[2])
    longer, more = gates_of(3, 260, device=device), ids_of(3, 260, device=device)
    longer[1, :150], more[1, :150] = gates[0], ids[0]
    x = scan(longer, table, more, padded, int32([-1, 2, -1], device), int32([260, 150, 0], device))
    assert torch.equal(x[1, :150], expected[0])
    assert (x[[0, 2]] == 0).all()
    assert torch.equal(padded[2], whole[2])


def test_no_tokens_leave_a_state_unchanged(device: torch.device) -> None:
    h, row = pool_of(device, 1), int32([1], device)
    before = h.clone()
    x = scan(
        torch.full((1, 3, 2 * D_EMB), torch.nan, device=device),
        table_of(device), ids_of(1, 3, device=device), h, row, int32([0], device),
    )  # fmt: skip
    assert (x == 0).all()
    assert torch.equal(h[1], before[1])


@pytest.mark.parametrize("size", [0.0, 1e-30, 100.0, 1e4, 1e30, 3e38])
def test_any_finite_gates_give_finite_states(size: float, device: torch.device) -> None:
    signs = torch.randint(2, (1, 70, 2 * D_EMB), generator=torch.Generator().manual_seed(1)) * 2 - 1
    gates = (signs * size).to(device)
    once, twice = pool_of(device, 0), pool_of(device, 0)
    table, ids, row = table_of(device), ids_of(1, 70, device=device), int32([0], device)
    expected = by_hand(gates[0], once[0])
    x = scan(gates, table, ids, once, row, int32([70], device))
    rounding = 1e-13 * max(size, 1.0)  # h goes up and down by as much as that
    torch.testing.assert_close(once[0], expected[-1], rtol=0, atol=rounding)
    wanted = table[ids[0].long()] + expected.float()
    torch.testing.assert_close(x[0], wanted, rtol=1e-6, atol=1e-6 + rounding)
    for token in range(2):
        step(gates[:, token].contiguous(), table, ids[:, token].contiguous(), twice, row)
    torch.testing.assert_close(twice[0], expected[1], rtol=1e-13, atol=1e-13)


def test_what_is_not_a_number_shows(device: torch.device) -> None:
    gates, h = gates_of(1, 3, device=device), pool_of(device, 0)
    gates[0, 1, 0], gates[0, 1, D_EMB + 1] = torch.nan, torch.nan
    table, ids, row = table_of(device), ids_of(1, 3, device=device), int32([0], device)
    x = scan(gates, table, ids, h, row, int32([3], device))
    assert h[0].isnan().nonzero().flatten().tolist() == [0, 1]
    assert x.isnan().nonzero().tolist() == [[0, t, c] for t in (1, 2) for c in (0, 1)]


def test_what_a_kernel_cannot_read_is_an_error(device: torch.device) -> None:
    gates, h, table = gates_of(2, device=device), pool_of(device, 0), table_of(device)
    ids, rows = ids_of(2, device=device), int32([0, -1], device)
    wrong = [
        (gates.double(), table, ids, h, rows),
        (gates[:, 1:], table, ids, h, rows),
        (gates, table.double(), ids, h, rows),
        (gates, table[:, :-1], ids, h, rows),
        (gates, table, ids.float(), h, rows),
        (gates, table, ids[:1], h, rows),
        (gates, table, ids, h.float(), rows),
        (gates, table, ids, h, rows.long()),
        (gates.T.contiguous().T, table, ids, h, rows),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="must be contiguous"):
            step(*arguments)
    with pytest.raises(ValueError, match="lengths"):
        scan(gates.unsqueeze(1), table, ids.unsqueeze(1), h, rows, rows.long())

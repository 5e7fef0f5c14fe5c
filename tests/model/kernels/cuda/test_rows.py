"""Vectors are written to their rows of a pool, and to no others."""

import pytest
import torch

from model.kernels.cuda.rows import write_rows


@pytest.mark.parametrize("size", [1, 44, 1024, 1025])
def test_each_row_gets_its_own_and_the_others_stay(size: int, device: torch.device) -> None:
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(device)
    pool = torch.full((6, size), torch.nan, device=device)
    write_rows(x, pool, torch.tensor([5, -1, 0, 3], dtype=torch.int32, device=device))
    assert torch.equal(pool[[5, 0, 3]], x[[0, 2, 3]])
    assert pool[[1, 2, 4]].isnan().all()


def test_other_shapes_and_dtypes_are_refused(device: torch.device) -> None:
    x, pool = torch.zeros(2, 3, device=device), torch.zeros(5, 3, device=device)
    rows = torch.zeros(2, dtype=torch.int32, device=device)
    for wrong in (
        (x[:1], pool, rows),
        (x, pool[:, :2], rows),
        (x.double(), pool, rows),
        (x, pool.half(), rows),
        (x, pool, rows.long()),
    ):
        with pytest.raises(ValueError, match="contiguous"):
            write_rows(*wrong)

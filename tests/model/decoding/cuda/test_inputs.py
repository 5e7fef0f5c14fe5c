"""Which token a row reads, and which rows are skipped."""

import pytest
import torch

from model.decoding.cuda.inputs import resolve_inputs


def test_a_row_reads_what_it_is_given_or_its_own_token(device: torch.device) -> None:
    token = torch.tensor([70, 71, -1, 73], dtype=torch.int32, device=device)
    token = torch.stack([token, token * 0 + 5], 1)[:, 0]  # a column of a table
    inputs = torch.tensor(
        [
            [1, 3, 2, 2, 0, -1, -1],  # rows
            [-1, 5, -1, 6, -1, -1, 9],  # given
            [1, 0, 1, 1, 0, 1, 1],  # chooses
        ],
        dtype=torch.int32,
        device=device,
    )
    resolved = [found.tolist() for found in resolve_inputs(inputs, token)]
    assert resolved == [
        [71, 5, -1, 6, 70, -1, -1],
        [1, 3, -1, 2, 0, -1, -1],
        [1, -1, -1, 2, -1, -1, -1],
    ]


@pytest.mark.parametrize("batch", [1, 255, 257, 600])
def test_any_number_of_rows(batch: int, device: torch.device) -> None:
    token = torch.arange(1000, dtype=torch.int32, device=device)
    rows = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:batch].int()
    given = torch.full_like(rows, -1)
    inputs = torch.stack([rows, given, torch.ones_like(rows)]).to(device)
    for found in resolve_inputs(inputs, token):
        assert torch.equal(found.cpu(), rows)


def test_other_inputs_are_refused(device: torch.device) -> None:
    token = torch.zeros(3, dtype=torch.int32, device=device)
    for wrong in (torch.zeros(3, 2, device=device), torch.zeros(2, 3, device=device).int()):
        with pytest.raises(ValueError, match="int32"):
            resolve_inputs(wrong, token)

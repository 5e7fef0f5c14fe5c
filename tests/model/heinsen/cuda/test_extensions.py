"""Extensions beyond the paper compute the same in kernels."""

import torch

from model.batch import Batch
from tests.model.calls import prefill, step
from tests.model.heinsen.cuda.networks import fused
from tests.model.heinsen.test_extensions import (
    IDS,
    assert_logits,
    both_values,
    each_network,
    expected,
    network,
)


@each_network
@both_values
def test_it_is_the_definition_in_kernels(
    chosen: tuple[str, ...], values: str, device: torch.device
) -> None:
    """A prompt and a single token in one batch, in rows that are not adjacent; then the reverse;
    then a step of both."""
    made, wanted = fused(network(chosen, values), device), expected(chosen, values)
    assert made.backend == "Triton kernels"
    pool = made.new_pool(4)
    for first, second in (((0, 70), (0, 1)), ((70, 71), (1, 71))):
        pieces = [IDS[0, slice(*first)], IDS[1, slice(*second)]]
        batch = Batch.of(pieces, [3, 1])
        found = made.forward(batch.wanting(batch.ends), pool).cpu()
        assert_logits(found, wanted[[0, 1], [first[1] - 1, second[1] - 1]])
    assert_logits(step(made, IDS[:, 71], pool, [3, 1]).cpu(), wanted[:, 71])


def test_rows_that_are_skipped_keep_their_previous_inputs(device: torch.device) -> None:
    made = fused(network(("token_shift",)), device)
    pool = made.new_pool(2)
    prefill(made, IDS[:, :3], [3, 3], pool, [0, 1])
    before = pool.export_row(0)
    assert made.recordable is not None
    ids, rows = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([1, 2], [-1, 1]))
    made.recordable.decode(ids, rows, pool)
    assert pool.export_row(0) == before

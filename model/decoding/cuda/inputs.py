"""Resolves the input tokens of a step on the device: given by the host, or the row's last token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


def resolve_inputs(inputs: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, pool rows and rows to sample, each int32 `[batch]`.

    inputs int32 `[3, batch]`: rows; tokens from the host, negative for the row's own last token,
    `token[row]`; and 1 where the device samples the next token. token int32 `[pool_rows]`, may be
    strided: negative once the row's text has ended, and the row is then skipped. Skipped rows, and
    rows that are negative in inputs, are returned as -1 with token -1.
    """
    if inputs.dtype != torch.int32 or inputs.shape[0] != 3 or not inputs.is_contiguous():
        raise ValueError(f"inputs must be contiguous int32 [3, batch], not {[*inputs.shape]}")
    batch = inputs.shape[1]
    resolved = torch.empty_like(inputs)
    _resolve_inputs[(triton.cdiv(batch, BLOCK),)](
        inputs, token, resolved, batch, token.stride(0), BLOCK=BLOCK
    )
    ids, rows, choosing = resolved.unbind()
    return ids, rows, choosing


@triton.jit
def _resolve_inputs(
    inputs_ptr: tl.tensor,
    token_ptr: tl.tensor,
    resolved_ptr: tl.tensor,
    batch: tl.tensor,
    token_stride: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < batch
    row = tl.load(inputs_ptr + i, here, -1)
    given = tl.load(inputs_ptr + batch + i, here, -1)
    chooses = tl.load(inputs_ptr + 2 * batch + i, here, 0)
    own = tl.load(token_ptr + row * token_stride, here & (row >= 0) & (given < 0), -1)
    token = tl.where(row >= 0, tl.where(given >= 0, given, own), -1)
    row = tl.where(token >= 0, row, -1)
    tl.store(resolved_ptr + i, token, here)
    tl.store(resolved_ptr + batch + i, row, here)
    tl.store(resolved_ptr + 2 * batch + i, tl.where(chooses != 0, row, -1), here)

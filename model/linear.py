"""Linear maps of a network that only serves: weights reordered once for the CPU's matrix kernels.

oneDNN keeps a weight in blocks that its kernels read in order. Such a product is faster than
`torch.nn.functional.linear` at every number of rows, most at few (a decoding step), and a row of
the result does not depend, to the bit, on how many rows there are or where it stands.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """`nn.Linear` without gradients: x `[..., in]` -> `[..., out]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight `[out, in]`, bias `[out]`; the weight is copied into its new order."""
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return product


def can_pack(device: torch.device) -> bool:
    """Whether this build of torch packs weights for this device, found out by doing it."""
    if device.type != "cpu":
        return False
    weight, x = torch.ones(2, 3), torch.ones(1, 3)
    try:
        with torch.inference_mode():
            return torch.equal(PackedLinear(weight, None)(x), F.linear(x, weight))
    except (AttributeError, RuntimeError, TypeError) as error:
        log.warning("weights stay unpacked, which is slower: %s", error)
        return False


def pack_children(module: nn.Module) -> None:
    """Replace every `nn.Linear` inside of the module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, child.bias))
        else:
            pack_children(child)

"""Our matrix products beside torch's in the same type, at the sizes that networks have.

    python -m loadtest.bench_products

Both run in turn in one process, so that a ratio does not depend on how busy the machine is. Weights
are read from memory: each product has as many of them as the cache cannot hold. torch's bfloat16
rounds its outputs to it, and its int8 has inputs that are int8 already; ours have float32 on both
sides.
"""

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from loadtest.bench_model import alternate
from model import WeightDtype
from model.kernels.cpu.compilation import target
from model.kernels.cpu.linear import PRODUCT, product_function
from model.kernels.cpu.threads import ALONE
from model.kernels.cpu.workers import run_on_threads
from model.kernels.linear import PackedLinear, narrow

ROWS = (1, 8, 64, 512)
SHAPES = ((3072, 768), (768, 3072), (768, 768), (50304, 768))
DTYPES: tuple[WeightDtype, ...] = ("float32", "bfloat16", "int8")
COLD_BYTES = 96 << 20
"""Of weights that take turns, and of numbers whose sum measures the bandwidth."""


class Products:
    """One product with each of several equal weights, ours and torch's."""

    def __init__(self, dtype: WeightDtype, shape: tuple[int, int]) -> None:
        weight = torch.randn(shape)
        packed = PackedLinear(weight, None, dtype)
        self.arithmetic = packed.arithmetic
        self.weight_bytes = weight.numel() * packed.weight.element_size()
        copies = max(2, min(256, COLD_BYTES // self.weight_bytes))
        self.num_inputs, self.num_outputs = shape[1], shape[0]
        self._scale = packed.scale
        self._ours = [packed.weight.clone() for _ in range(copies)]
        self._theirs = [narrow(weight, dtype)[0].clone() for _ in range(copies)]
        self._dtype = dtype

    @property
    def copies(self) -> int:
        return len(self._ours)

    def ours(self, x: Tensor) -> Callable[[], object]:
        """All of them by our kernels."""
        y = torch.empty(len(x), self.num_outputs)
        scale = 0 if self._scale is None else self._scale.data_ptr()
        sizes, places = (len(x), self.num_inputs, self.num_outputs), (x.data_ptr(), y.data_ptr())
        records = [
            np.array((ALONE, *sizes, (w.data_ptr(), scale, 0), *places), PRODUCT)
            for w in self._ours
        ]
        function, threads = product_function(self.arithmetic), torch.get_num_threads()

        def run() -> tuple[Tensor, Tensor]:
            for record in records:
                run_on_threads(function, record, threads)
            return x, y  # whose addresses the records have

        return run

    def theirs(self, x: Tensor) -> Callable[[], object]:
        """All of them by torch."""
        inputs = narrow(x, self._dtype)[0]

        @torch.inference_mode()
        def run() -> None:
            for weight in self._theirs:
                if self._dtype == "int8":
                    torch._int_mm(inputs, weight.t())
                else:
                    F.linear(inputs, weight)

        return run


def main(
    rounds: Annotated[int, typer.Option(help="Repetitions; medians are shown.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Measure and print."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    large = torch.ones(COLD_BYTES // 4)
    print(f"{target()}, {torch.get_num_threads()} threads")
    print("weight, rows: ours GFLOP/s, of torch's; weights read GB/s, of what a sum reads")
    for dtype in DTYPES:
        for shape in SHAPES:
            products = Products(dtype, shape)
            print(f"{products.arithmetic.name}, {shape[1]} -> {shape[0]}:")
            for rows in ROWS:
                x = torch.randn(rows, shape[1])
                tasks = products.ours(x), products.theirs(x), large.sum
                ours, theirs, read = alternate(rounds, *tasks)
                bandwidth, ours = large.nbytes / read, ours / products.copies
                theirs, rate = theirs / products.copies, products.weight_bytes / ours
                print(
                    f"  {rows:3} rows: {2e-9 * rows * shape[0] * shape[1] / ours:5.0f} GFLOP/s, "
                    f"{theirs / ours:5.2f}x; {1e-9 * rate:5.1f} GB/s, "
                    f"{100 * rate / bandwidth:3.0f}%"
                )


if __name__ == "__main__":
    typer.run(main)

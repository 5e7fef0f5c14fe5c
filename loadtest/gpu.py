"""All GPU checks in one call: correctness first, then times against the hardware limits.

    python -m loadtest.gpu

The published configuration (124.9 M parameters, random weights). The limit of a decoding step is
the bytes that it must move, every weight once and every session's state out of memory and back,
divided by the bandwidth of a plain copy on the same card. The paper's log-space form, token by
token in plain torch, runs next to it. `--tiny` runs everything on a CPU with a small network in
Triton's interpreter: it tests the program, not the speed.

The last part needs the server's packages (fastapi, uvicorn and so on) and is skipped, with a
message, if they are missing.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TINY = "--tiny" in sys.argv
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from loadtest.log_space import LogSpaceForm  # noqa: E402
from model import WeightDtype  # noqa: E402
from model.batch import Batch  # noqa: E402
from model.decoding.decoder import Piece  # noqa: E402
from model.decoding.runners import new_runner  # noqa: E402
from model.decoding.sampling import RecentTokens, SampledRow, SamplingParams  # noqa: E402
from model.heinsen.config import ModelConfig  # noqa: E402
from model.heinsen.network import LanguageModel  # noqa: E402
from model.state import StatePool  # noqa: E402
from model.transfer import new_transfer  # noqa: E402

DEVICE = torch.device("cpu" if TINY else "cuda")
TOLERANCE = 2e-5
"""Absolute error of logits in float32, against float64."""


@dataclass(frozen=True)
class Sizes:
    config: ModelConfig
    sessions: Sequence[int]
    prompts: Sequence[int]
    piece: int
    """Prompt tokens per forward pass."""

    repeats: int
    copied_bytes: int


WHOLE = Sizes(ModelConfig(), (1, 16, 64, 256, 1024), (512, 32_768), 8192, 50, 4 << 30)
SMALL = Sizes(
    ModelConfig(vocab_sz=96, d_emb=16, n_layers=2, n_heads=2, d_key=4, d_val=4),
    (1, 3), (70,), 64, 1, 1 << 20,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with a small network")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--no-server", action="store_true", help="skip engine and server")
    parser.add_argument("--api-workers", type=int, default=8, help="front processes of the server")
    arguments = parser.parse_args()
    sizes = SMALL if TINY else WHOLE
    _print_machine()
    torch.manual_seed(0)
    network = LanguageModel(sizes.config).requires_grad_(False).eval()
    _check(network, 70 if TINY else 300)
    network = network.to(DEVICE)
    paper = LogSpaceForm(network, 1)
    bandwidth = _copy_bandwidth(sizes)
    print(f"copy: {bandwidth / 1e9:,.0f} GB/s, read and written, of {sizes.copied_bytes:,} bytes")
    served = LanguageModel(sizes.config).to(DEVICE)
    served.load_state_dict(network.state_dict())
    served = served.requires_grad_(False).eval().fuse(arguments.dtype)
    _decode(served, network, sizes, arguments.dtype, bandwidth)
    _prefill(served, paper, sizes)
    _swap(served, sizes)
    if not TINY:
        _profile(served, 256)
    if not arguments.no_server:
        _serve(network, arguments.dtype, 1 if TINY else arguments.api_workers)


def _print_machine() -> None:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()} CPU"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "missing"
    print(
        f"{name}, torch {torch.__version__}, triton {version}, Python {platform.python_version()}"
    )


def _check(network: LanguageModel, tokens: int) -> None:
    """Raises AssertionError if a form of the network does not match float64."""
    config = network.config
    exact = LanguageModel(config).double().requires_grad_(False)
    exact.load_state_dict(network.state_dict())
    ids = torch.randint(config.vocab_sz, (2, tokens + 3))
    expected, _ = exact.unroll(ids, exact.empty_state(2))
    ours = LanguageModel(config).to(DEVICE)
    ours.load_state_dict(network.state_dict())
    ours = ours.requires_grad_(False).eval().fuse("float32")
    pool = ours.new_pool(4)
    prompts = Batch.of(ids[:, :tokens].unbind(), [3, 1]).wanting(range(tokens, 2 * tokens))
    worst = float((ours.forward(prompts, pool).cpu() - expected[1, :tokens]).abs().max())
    for place in range(tokens, tokens + 3):
        logits = ours.forward(Batch.of_tokens(ids[:, place], [3, 1]), pool)
        worst = max(worst, float((logits.cpu() - expected[:, place]).abs().max()))
    print(f"kernels against float64, {tokens} tokens of prefill and 3 steps: {worst:.1e} in logits")
    if worst > TOLERANCE:
        raise SystemExit(f"that is more than {TOLERANCE}")


def _copy_bandwidth(sizes: Sizes) -> float:
    """Bytes per second, reads plus writes."""
    source = torch.zeros(sizes.copied_bytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), 10)


def _decode(
    served: LanguageModel,
    network: LanguageModel,
    sizes: Sizes,
    dtype: WeightDtype,
    bandwidth: float,
) -> None:
    size = served.state_spec.num_bytes
    print(f"\ndecode, weights {dtype}, states float32 ({served.state_spec.num_bytes:,} bytes each)")
    head = (
        "sessions",
        "ms a step",
        "tokens/s",
        "GB a step",
        "of the copy",
        "log-space ms",
        "ratio",
    )
    print(" ".join(f"{name:>12}" for name in head))
    for count in sizes.sessions:
        pool = _filled_pool(served, count)
        ours = _step_seconds(served, pool, count, sizes.repeats)
        moved = served.weight_bytes + 2 * count * size
        theirs = LogSpaceForm(network, count)
        ids = torch.randint(sizes.config.vocab_sz, (count,), device=DEVICE)
        paper = _seconds(lambda: theirs.step(ids), max(1, sizes.repeats // 5))  # noqa: B023
        cells = (
            f"{count}", f"{1e3 * ours:.3f}", f"{count / ours:,.0f}", f"{moved / 1e9:.3f}",
            f"{moved / ours / bandwidth:.1%}", f"{1e3 * paper:.3f}", f"{paper / ours:.1f}",
        )  # fmt: skip
        print(" ".join(f"{cell:>12}" for cell in cells), flush=True)


def _filled_pool(network: LanguageModel, count: int) -> StatePool:
    """Rows 1 to count, each after reading different tokens."""
    pool = network.new_pool(count + 1)
    ids = torch.randint(network.config.vocab_sz, (count, 5))
    for start in range(1, count + 1, 64):
        rows = range(start, min(start + 64, count + 1))
        network.forward(Batch.of(ids[: len(rows)].unbind(), rows), pool)
    return pool


def _step_seconds(network: LanguageModel, pool: StatePool, count: int, repeats: int) -> float:
    """Seconds of a step including sampling, launched ahead as by the engine."""
    runner = new_runner(network, pool, count)
    runner.prepare()
    params = [SamplingParams(temperature=0.8, seed=row) for row in range(count)]
    recent = RecentTokens()

    def pieces(position: int, token_ids: tuple[int, ...] | None) -> list[Piece]:
        return [
            Piece(row + 1, token_ids, SampledRow(params[row], position, recent))
            for row in range(count)
        ]

    under_way = runner.launch(pieces(5, (1,)))
    ahead = pieces(6, None)
    times = []
    for _ in range(3 * repeats):
        started = time.perf_counter()
        following = runner.launch(ahead)
        under_way.collect()
        under_way = following
        times.append(time.perf_counter() - started)
    under_way.collect()
    return statistics.median(times[repeats:])


def _prefill(served: LanguageModel, paper: LogSpaceForm, sizes: Sizes) -> None:
    print("\nprefill of one prompt")
    pool = served.new_pool(1)
    for tokens in sizes.prompts:
        ids = torch.randint(sizes.config.vocab_sz, (1, tokens))
        pieces = torch.split(ids, sizes.piece, 1)

        def read(pieces: Sequence[Tensor] = pieces) -> None:
            for piece in pieces:
                served.forward(Batch.of(piece.unbind(), [0]), pool)

        seconds = _seconds(read, max(1, sizes.repeats // 10))
        line = f"  {tokens:,} tokens: {1e3 * seconds:.2f} ms, {tokens / seconds:,.0f} tokens/s"
        if tokens <= 512:  # the scan of all states takes 50 MB per token and layer
            on_device = ids.to(DEVICE)
            theirs = _seconds(lambda: paper.prefill(on_device), 3)  # noqa: B023
            line += f"; log-space scan {1e3 * theirs:.1f} ms, {theirs / seconds:.1f}x"
        print(line, flush=True)


def _swap(served: LanguageModel, sizes: Sizes) -> None:
    """Transfer of a session's state to host memory and back."""
    pool = _filled_pool(served, 8)
    moves = new_transfer(pool)
    rows = [1 + i % 8 for i in range(max(8, sizes.repeats))]
    data = pool.export_row(1)
    out_alone = _seconds(lambda: moves.export_row(1).collect(), sizes.repeats)
    in_alone = _seconds(lambda: moves.import_row(1, data), sizes.repeats)

    def many() -> None:
        for export in [moves.export_row(row) for row in rows]:
            export.collect()

    each = _seconds(many, 3) / len(rows)
    print(
        f"\na session of {len(data):,} bytes to host memory {1e6 * out_alone:.0f} us, back "
        f"{1e6 * in_alone:.0f} us; {len(rows)} at once {1e6 * each:.0f} us each"
    )


def _profile(served: LanguageModel, count: int) -> None:
    """Kernels of a step by their share of its time."""
    from torch.profiler import ProfilerActivity, profile

    pool = _filled_pool(served, count)
    ids = torch.randint(served.config.vocab_sz, (count,))
    rows = range(1, count + 1)
    served.forward(Batch.of_tokens(ids, rows), pool)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(10):
            served.forward(Batch.of_tokens(ids, rows), pool)
        torch.cuda.synchronize()
    print(f"\nkernels of a step of {count} sessions, by time on the device")
    table = profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=12)
    print(table, flush=True)


def _serve(network: LanguageModel, dtype: WeightDtype, api_workers: int) -> None:
    """Tokens per second of the engine alone, and over SSE from a server."""
    try:
        from loadtest.gpu_server import delivered, engine_rate, write_checkpoint
    except ImportError as error:
        print(f"\nneither engine nor server: {error}")
        return
    streams, tokens = (2, 5) if TINY else (256, 1000)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_checkpoint(network, model)
        alone = engine_rate(model, DEVICE, dtype, streams, tokens)
        print(f"\n{streams} streams: the engine alone {alone:,.0f} tokens/s", flush=True)
        for workers in sorted({1, api_workers}):
            rate = delivered(model, DEVICE, dtype, streams, tokens, workers)
            print(
                f"over SSE with --api-workers {workers}: {rate:,.0f} tokens/s, "
                f"{rate / alone:.2f} of it",
                flush=True,
            )


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of some runs, after a warm-up."""
    work()
    times = []
    for _ in range(max(1, repeats)):
        _wait()
        started = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

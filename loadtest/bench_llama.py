"""latentd beside llama.cpp's server, and both without HTTP.

    python -m loadtest.bench_llama prepare SOURCES BIN MODELS
    python -m loadtest.bench_llama measure BIN MODELS --network rwkv7 --precision int8

Both serve the same random weights of RWKV-7 (`loadtest rwkv7`), ours from the folder and llama.cpp
from GGUF files that its own programs make of it; the paper's network stands beside an RWKV-7 of its
size. Servers are started in pairs, in turn one and the other first, and get the same loads, one at
a time, by what `loadtest compare` does. Prompts are token ids, answers greedy and of fixed length.
"""

import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, NamedTuple, cast

import httpx
import torch
import torch.nn.functional as F
import typer
from safetensors import safe_open

from loadtest.bench_http import server
from loadtest.bench_mixed import FLAGS
from loadtest.bench_model import alternate, read_bandwidth
from loadtest.compare import measured
from loadtest.load import Access, Target, target
from loadtest.measures import Summary
from loadtest.paper import paper
from loadtest.rwkv7 import rwkv7
from loadtest.workload import Lengths, Workload
from model import WeightDtype, checkpoint
from model.batch import Batch
from model.kernels.linear import narrow

PATIENCE_S = 300
THREADS = 2
PROMPT = 512
BELOW = 50_000
"""Token ids that each of the networks has."""


class Pair(NamedTuple):
    """What latentd serves, and the RWKV-7 that llama.cpp serves beside it: folders of MODELS."""

    ours: str
    theirs: str


NETWORKS = {
    "paper": Pair("paper", "rwkv7-0.1B-50k"),
    "rwkv7": Pair("rwkv7-0.1B", "rwkv7-0.1B"),
    "rwkv7-1.5B": Pair("rwkv7-1.5B", "rwkv7-1.5B"),
}


class Precision(NamedTuple):
    """The same by the names of both, and others of theirs that come close."""

    ours: WeightDtype
    theirs: str


PRECISIONS = {
    "f32": Precision("float32", "f32"),
    "bf16": Precision("bfloat16", "f16"),
    "bf16-bf16": Precision("bfloat16", "bf16"),
    "int8": Precision("int8", "q8_0"),
}


class Cell(NamedTuple):
    """Requests that are sent together."""

    users: int
    prompt: int
    """Tokens of each."""

    answer: int
    what: Callable[[Summary], float]
    """More is better."""


def rate(summary: Summary) -> float:
    """Tokens of answers a second."""
    return summary.output_tokens_per_s


CELLS = {
    "8x512": Cell(8, PROMPT, 64, rate),
    "8x32": Cell(8, 32, 64, rate),
    "32": Cell(32, 4, 48, rate),
    "one": Cell(1, 4, 48, lambda s: 1 / s.percentiles["tpot"]["p50"]),
    "prefill": Cell(1, PROMPT, 1, lambda s: PROMPT / s.percentiles["e2e"]["p50"]),
}
"""All in tokens a second: of answers, of one session after its first token, of a prompt."""


def load_of(prompt: int, answer: int) -> Workload:
    """Random tokens, so many, and so many to be answered."""
    return Workload(Lengths("constant", (prompt,)), Lengths("constant", (answer,)), below=BELOW)


def gguf(models: Path, name: str, precision: str) -> Path:
    return models / f"{name}.{precision}.gguf"


@contextmanager
def llama_server(binary: Path, model: Path, slots: int) -> Iterator[int]:
    """llama.cpp's server on a free port: no prompt is kept for the next, nor are sampled tokens
    more than the most probable."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("-t", str(THREADS), "-tb", str(THREADS), "--parallel", str(slots)),
        *("-c", str(slots * 1024), "--no-cache-prompt", "--cache-ram", "0"),
        *("--ctx-checkpoints", "0", "--samplers", "top_k", "--top-k", "1", "--no-ui"),
        *("--fit", "off", "-lv", "1"),
    ]
    with (model.parent / "llama-server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until = time.monotonic() + PATIENCE_S
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{shutil.which(binary)} did not start: see {log.name}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def both(
    binary: Path, models: Path, pair: Pair, precision: Precision, slots: int, ours_first: bool
) -> AsyncIterator[tuple[Target, Target]]:
    """Ours and theirs, warm."""
    ours = server(str(models / pair.ours), "--dtype", precision.ours, *FLAGS)
    theirs = llama_server(
        binary / "llama-server", gguf(models, pair.theirs, precision.theirs), slots
    )
    access = Access(ignore_eos=True, temperature=0.0, keeps_connections=False)
    first = load_of(PROMPT, 4)
    with ExitStack() as processes:
        order = (ours, theirs) if ours_first else (theirs, ours)
        ports = {each: processes.enter_context(each) for each in order}
        async with AsyncExitStack() as stack:
            urls = (f"http://127.0.0.1:{ports[each]}" for each in (ours, theirs))
            one, other = [await stack.enter_async_context(target(url, access)) for url in urls]
            texts = [await greedy_text(each) for each in (one, other)]
            if pair.ours == pair.theirs:
                same = sum(takewhile(bool, (a == b for a, b in zip(*texts, strict=False))))
                print(f"  greedy texts: the same for {same} of {len(texts[0])} characters")
            for each in (one, other):
                await measured(each, first, users=1, rate=None, count=1, seed=-1, label="warm-up")
            yield one, other


async def greedy_text(server: Target) -> str:
    """After a few tokens."""
    body = {"prompt": [*range(1000, 1032)], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    answer = await server.http.post("/v1/completions", json=body | {"model": server.model})
    return str(answer.raise_for_status().json()["choices"][0]["text"])


async def http_cells(
    binary: Path, models: Path, pair: Pair, precision: Precision, cells: list[str], starts: int
) -> dict[str, list[tuple[Summary, Summary]]]:
    """What both did, by cell, once a start.."""
    found: dict[str, list[tuple[Summary, Summary]]] = {name: [] for name in cells}
    slots = max(CELLS[name].users for name in cells)
    for number in range(starts):
        started = both(binary, models, pair, precision, slots, number % 2 == 0)
        async with started as servers:
            for place, name in enumerate(cells):
                sides = [("ours", servers[0]), ("theirs", servers[1])]
                if (number + place) % 2:
                    sides.reverse()
                summaries = {side: await cell_of(side, each, name, number) for side, each in sides}
                ours, theirs = summaries["ours"], summaries["theirs"]
                found[name].append((ours, theirs))
    return found


async def cell_of(side: str, server: Target, name: str, seed: int) -> Summary:
    """The requests of a cell. Where one was not answered whole, all are sent once more, and that is
    said. Raises RuntimeError if it happens again."""
    users, prompt, answer, _ = CELLS[name]
    count = max(users, 2)
    for _ in range(2):
        summary = await measured(
            *(server, load_of(prompt, answer)),
            users=users,
            rate=None,
            count=count,
            seed=seed,
            label=f"{name}, {side}",
        )
        if (summary.prompt_tokens, summary.output_tokens) == (count * prompt, count * answer):
            return summary
        what = f"{summary.prompt_tokens} and {summary.output_tokens} tokens, {summary.errors}"
        print(f"  {name}, {side}: {what}")
    raise RuntimeError(f"{name}: requests to {side} are not answered whole")


class Bare(NamedTuple):
    """Without HTTP and sampling, tokens a second."""

    prefill: float
    one: float
    eight: float
    of_32: float


def torch_products(folder: Path, dtype: WeightDtype) -> Callable[[], None]:
    """torch's products of PROMPT rows with all weights of the layers, in the same type."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        tokens = max(shape[0] for shape in shapes.values())
        weights = [
            narrow(file.get_tensor(name).float(), dtype)[0]
            for name, shape in shapes.items()
            if len(shape) == 2 and shape[0] < tokens
        ]
    inputs = {w.shape[1]: narrow(torch.randn(PROMPT, w.shape[1]), dtype)[0] for w in weights}

    @torch.inference_mode()
    def run() -> None:
        for weight in weights:
            x = inputs[weight.shape[1]]
            if dtype != "int8":
                F.linear(x, weight)
            elif weight.shape[0] % 8 == 0:
                torch._int_mm(x, weight.t())

    return run


def our_bare(folder: Path, dtype: WeightDtype, rounds: int) -> dict[str, float]:
    """`Bare` of the network in this process, and what this machine could do."""
    torch.set_num_threads(THREADS)
    network = checkpoint.load_network(folder, torch.device("cpu"), dtype)
    pool = network.new_pool(32)
    ids = torch.randint(1, BELOW, (PROMPT,))
    prompt = partial(network.forward, Batch.of([ids], [0]).wanting([PROMPT - 1]), pool)
    steps = [
        partial(network.forward, Batch.of_tokens(ids[:count], range(count)), pool)
        for count in (1, 8, 32)
    ]
    prefill, products = alternate(rounds, prompt, torch_products(folder, dtype))
    one, eight, many = (alternate(4 * rounds, step)[0] for step in steps)
    bare = Bare(PROMPT / prefill, 1 / one, 8 / eight, 32 / many)
    return bare._asdict() | {
        "products": PROMPT / products,
        "bandwidth": read_bandwidth(),
        "weight_bytes": network.weight_bytes,
    }


def their_bare(binary: Path, model: Path) -> dict[str, float]:
    """`Bare` by llama-batched-bench, which decodes random tokens and samples none."""
    found = dict[int, float]()
    command = [str(binary), "-m", str(model), "-t", str(THREADS), "-tb", str(THREADS)]
    command += ["--output-format", "jsonl", "-fit", "off"]
    prefill = 0.0
    for prompt, answer, sequences in ((PROMPT, 1, "1"), (4, 32, "1,8,32")):
        sizes = ["-npp", str(prompt), "-ntg", str(answer), "-npl", sequences, "-c", "32768"]
        done = subprocess.run([*command, *sizes], capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise RuntimeError(f"{binary}: {done.stderr[-500:]}")
        if prompt == PROMPT:
            prefill = lines[-1]["speed_pp"]
        else:
            found = {line["pl"]: line["speed_tg"] for line in lines}
    return Bare(prefill, found[1], found[8], found[32])._asdict()


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.1f} ({min(values):.1f} to {max(values):.1f})"


def _ratio(ours: list[float], theirs: list[float]) -> str:
    return f"ratio {statistics.median(ours) / statistics.median(theirs):5.2f}"


app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def prepare(
    sources: Annotated[Path, typer.Argument(help="Of llama.cpp.")],
    binary: Annotated[Path, typer.Argument(help="Folder of its programs.")],
    models: Annotated[Path, typer.Argument(help="Gets the checkpoints.")],
    network: Annotated[list[str], typer.Option(help="Of those that are made.")] = [*NETWORKS],  # noqa: B006
    python: Annotated[str, typer.Option(help="With what its converter needs.")] = sys.executable,
) -> None:
    """Write checkpoints with random weights, and llama.cpp's of the same."""
    for name in network:
        ours, theirs = NETWORKS[name]
        if ours == "paper" and not (models / ours).exists():
            paper(models / ours)
        folder = models / theirs
        if not folder.exists():
            rwkv7(folder, theirs.removeprefix("rwkv7-"))
        for kind in ("f32", "f16", "bf16"):
            convert = [python, str(sources / "convert_hf_to_gguf.py"), str(folder)]
            convert += ["--outtype", kind, "--outfile", str(gguf(models, theirs, kind))]
            subprocess.run(convert, check=True)
        quantize = [str(binary / "llama-quantize"), str(gguf(models, theirs, "f32"))]
        subprocess.run([*quantize, str(gguf(models, theirs, "q8_0")), "q8_0"], check=True)


@app.command()
def measure(
    binary: Annotated[Path, typer.Argument(help="Folder of llama.cpp's programs.")],
    models: Annotated[Path, typer.Argument(help="What `prepare` wrote.")],
    network: Annotated[list[str], typer.Option(help="Several may be given.")] = ["rwkv7"],  # noqa: B006
    precision: Annotated[list[str], typer.Option(help="Several may be given.")] = ["f32"],  # noqa: B006
    cell: Annotated[list[str], typer.Option(help="Over HTTP.")] = [*CELLS],  # noqa: B006
    starts: Annotated[int, typer.Option(min=0, help="Of both servers; 0: only bare.")] = 2,
    bare: Annotated[int, typer.Option(min=0, help="Rounds without HTTP.")] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="Of each step in one of those.")] = 5,
) -> None:
    """Print tokens a second of both, medians with the smallest and the largest, and ratios."""
    for each in network:
        for kind in precision:
            pair, types = NETWORKS[each], PRECISIONS[kind]
            model = gguf(models, pair.theirs, types.theirs)
            print(f"{pair.ours} in {types.ours} / {model.name} ({model.stat().st_size:,} bytes)")
            if bare:
                _show_bare(binary, models, pair, types, bare, repeat)
            if starts:
                found = asyncio.run(http_cells(binary, models, pair, types, cell, starts))
                _show_http(found)


def _show_http(found: dict[str, list[tuple[Summary, Summary]]]) -> None:
    for name, rounds in found.items():
        ours, theirs = ([CELLS[name].what(each[i]) for each in rounds] for i in range(2))
        firsts = (
            f"{statistics.median(each[i].percentiles['ttft']['p50'] for each in rounds):.2f} s"
            for i in range(2)
        )
        print(
            f"  HTTP {name:8} {_spread(ours)} / {_spread(theirs)}, {_ratio(ours, theirs)}"
            f"   first token {' / '.join(firsts)}",
            flush=True,
        )


def _show_bare(
    binary: Path, models: Path, pair: Pair, types: Precision, rounds: int, repeat: int
) -> None:
    alone = [sys.executable, "-m", "loadtest.bench_llama", "bare", str(models / pair.ours)]
    ours, theirs = list[dict[str, float]](), list[dict[str, float]]()
    for _ in range(rounds):
        command = [*alone, types.ours, "--rounds", str(repeat)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        ours.append(json.loads(done.stdout))
        model = gguf(models, pair.theirs, types.theirs)
        theirs.append(their_bare(binary / "llama-batched-bench", model))
    for name in Bare._fields:
        values = [[each[name] for each in side] for side in (ours, theirs)]
        print(f"  bare {name:8} {_spread(values[0])} / {_spread(values[1])}, {_ratio(*values)}")
    products, bandwidth, size = (
        statistics.median(each[name] for each in ours)
        for name in ("products", "bandwidth", "weight_bytes")
    )
    shares = [each["prefill"] / each["products"] for each in ours]
    reads = [each["one"] * each["weight_bytes"] / each["bandwidth"] for each in ours]
    least_s = 8 * PROMPT / products + 64 * size / bandwidth
    print(
        f"  prefill at {statistics.median(shares):.0%} of torch's products, one session at "
        f"{statistics.median(reads):.0%} of the bandwidth ({bandwidth / 1e9:.1f} GB/s, "
        f"{size:,.0f} bytes)\n"
        f"  torch's products and reading the weights alone bound 8x512 at {512 / least_s:.1f} "
        "tokens/s",
        flush=True,
    )


@app.command()
def bare(folder: Path, dtype: str, rounds: int = 5) -> None:
    """Print what our network does in this process, as JSON."""
    if dtype not in ("float32", "bfloat16", "int8"):
        raise typer.BadParameter("float32, bfloat16 or int8", param_hint="DTYPE")
    print(json.dumps(our_bare(folder, cast("WeightDtype", dtype), rounds)))


if __name__ == "__main__":
    app()

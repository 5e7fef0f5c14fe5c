"""The engine and the server of `loadtest.gpu`, on a network with random weights.

Every token of its vocabulary has a different text with one mark in it, so that clients can count
tokens without parsing.
"""

import json
import queue
import subprocess
import sys
import time
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models

from loadtest.bench_http import server
from loadtest.front_client import Report
from loadtest.front_server import MARK
from model import WeightDtype, checkpoint
from model.decoding.sampling import SamplingParams
from model.heinsen.checkpoint import save
from model.heinsen.network import LanguageModel
from model.text.byte_level import ByteLevelTokenizer
from server.engine.engine import Engine, EngineLimits
from server.engine.messages import Continuation, EngineRequest, Event, Finished, RowReleased
from server.metrics import Metrics

LETTERS = "abcdefghij"


def write_checkpoint(network: LanguageModel, folder: Path) -> None:
    """Write the network as a checkpoint, with texts for all its tokens."""
    vocab = {}
    for token_id in range(network.config.vocab_sz):
        vocab[MARK + "".join(LETTERS[int(digit)] for digit in str(token_id))] = token_id
    words = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    words.decoder = decoders.ByteLevel()
    save(folder, network.config, network.state_dict(), ByteLevelTokenizer(words), None)


def engine_rate(
    folder: Path, device: torch.device, dtype: WeightDtype, streams: int, tokens: int
) -> float:
    """Tokens per second of this many streams, at the engine's interface."""
    loaded = checkpoint.load(folder, device, dtype)
    happened: queue.SimpleQueue[list[Event | RowReleased]] = queue.SimpleQueue()
    limits = EngineLimits(streams, 0, streams, 100 * streams, 512, 0.1, 0)
    engine = Engine(loaded, limits, happened.put, Metrics())
    engine.start()
    try:
        for count in (5, tokens):  # the first run warms up
            started = time.perf_counter()
            engine.submit(
                *(
                    EngineRequest(
                        *(f"{count}-{i}", None, Continuation(), (1,), count),
                        sampling=SamplingParams(temperature=0.8, seed=i),
                        ignore_eos=True,
                    )
                    for i in range(streams)
                )
            )
            left = streams
            while left:
                left -= sum(isinstance(event, Finished) for event in happened.get())
            seconds = time.perf_counter() - started
    finally:
        engine.stop()
    return streams * tokens / seconds


def delivered(
    folder: Path,
    device: torch.device,
    dtype: WeightDtype,
    streams: int,
    tokens: int,
    api_workers: int,
) -> float:
    """Tokens per second that clients get over SSE from a server of the checkpoint."""
    flags = [
        *(str(folder), "--device", device.type, "--dtype", dtype),
        *("--log-level", "warning", "--max-running", str(streams), "--max-waiting", str(streams)),
        *("--warm-sessions", "0", "--api-workers", str(api_workers)),
    ]
    with server(*flags) as port:
        _read(port, streams, 5, 1)  # warms up
        reports = _read(port, streams, tokens, min(4, streams))
    return sum(each.tokens for each in reports) / max(each.seconds for each in reports)


def _read(port: int, streams: int, tokens: int, clients: int) -> list[Report]:
    """Reports of client processes that share the streams."""
    shares = [streams // clients + (i < streams % clients) for i in range(clients)]
    program = (sys.executable, "-m", "loadtest.front_client", str(port), "completions")
    readers = [
        subprocess.Popen(
            (*program, str(share), str(tokens)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for share in shares
    ]
    outputs = [reader.communicate()[0] for reader in readers]
    if any(reader.returncode for reader in readers):
        raise RuntimeError("a client failed")
    return [Report(**json.loads(lines.splitlines()[-1])) for lines in outputs]

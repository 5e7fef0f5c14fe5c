"""`latentd generate`: the engine without a server."""

import queue
import sys
from functools import partial
from pathlib import Path

from model import WeightDtype
from model.decoding.sampling import SamplingParams
from server.engine.device import choose_device, choose_threads, load
from server.engine.engine import Engine, EngineLimits
from server.engine.messages import (
    Continuation,
    EngineRequest,
    Event,
    Failed,
    Finished,
    InvalidLogits,
    RowDamaged,
    RowReleased,
    TextDelta,
)
from server.metrics import Metrics


class GenerateError(Exception):
    """Generation failed; the message is one line."""


def generate(
    folder: Path,
    prompt: str,
    max_tokens: int,
    sampling: SamplingParams,
    device_name: str,
    dtype: WeightDtype | None,
    threads: int | None,
) -> None:
    """Stream a continuation to stdout, and print its speed to stderr.

    Raises CheckpointError, DeviceError and GenerateError.
    """
    device, _ = choose_device(device_name)
    report = partial(print, file=sys.stderr, flush=True)
    loaded = load(folder, device, dtype, report)
    choose_threads(threads, loaded.network)
    bos = loaded.network.bos
    token_ids = (*([] if bos is None else [bos]), *loaded.tokenizer.encode(prompt))
    if not token_ids:
        raise GenerateError("the prompt is empty and the model has no initial token")
    events: queue.SimpleQueue[list[Event | RowReleased]] = queue.SimpleQueue()
    limits = EngineLimits(
        max_running=1,
        warm_sessions=0,
        max_waiting=1,
        max_waiting_tokens=len(token_ids),
        prefill_chunk_tokens=512,
        inter_token_latency_s=1.0,
        prefix_cache_bytes=0,
    )
    engine = Engine(loaded, limits, events.put, Metrics())
    engine.start()
    try:
        engine.submit(
            EngineRequest("generate", None, Continuation(), token_ids, max_tokens, sampling)
        )
        print(prompt, end="", flush=True)
        finished = _stream(events)
    finally:
        engine.stop()
    timings = finished.timings
    first = timings.total_s if timings.first_token_s is None else timings.first_token_s
    after = finished.num_generated - 1
    speed = f", {after / (timings.total_s - first):,.0f} tokens/s after it" if after else ""
    print(
        f"{finished.num_generated} tokens, the first after {1000 * first:.0f} ms{speed}",
        file=sys.stderr,
    )


def _stream(events: "queue.SimpleQueue[list[Event | RowReleased]]") -> Finished:
    """Print text until the end of the request."""
    while True:
        for event in events.get():
            match event:
                case TextDelta():
                    print(event.text, end="", flush=True)
                case Finished():
                    print(event.text)
                    return event
                case Failed(_, message):
                    raise GenerateError(message)
                case InvalidLogits() | RowDamaged():
                    raise GenerateError(
                        "the model returned no valid probabilities for the next token"
                    )

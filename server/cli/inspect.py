"""`latentd inspect`: show an exported state or a checkpoint, without a server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from model.checkpoint import describe, fingerprint, is_checkpoint
from model.files import MAX_BLOB_BYTES, check_file, read_file
from model.text.tokenizer import Tokenizer
from server.cli.tables import plain, print_facts, print_table
from server.sessions.codec import FORMAT, BlobError, Codec, read

FACTS = (
    *("format", "version", "dtype", "arithmetic"),
    *("turn", "position", "pending", "undecoded"),
)
MAX_FACT_CHARACTERS = 100
CHECKSUM = {
    True: "ok",
    False: "WRONG",
    None: "unknown: the state has other tensors than this model",
}

Arrays = Mapping[str, NDArray[Any]]


def inspect(file: Path, folder: Path) -> bool:
    """Print an exported state. Returns whether a server of this checkpoint would import it.

    If `file` is a checkpoint, print its description. Raises OSError for a file that cannot be read,
    and CheckpointError.
    """
    if is_checkpoint(file):
        _print_model(file)
        return True
    check_file(file)
    model = describe(folder)
    no_arithmetic = ""  # nothing is computed here
    codec = Codec(fingerprint(folder), model.state_spec.tensors, model.vocab_size, no_arithmetic)
    blob = read_file(file, max(MAX_BLOB_BYTES, codec.max_blob_bytes))
    try:
        facts, arrays = read(blob)
        _print_header(len(blob), facts, codec.checksum_matches(facts, arrays), codec.fingerprint)
        print_table(_tensors(arrays))
        if facts.get("format") == FORMAT:
            print()
            print_table(_layers(arrays))
        print()
        codec.decode_foreign(blob)
        if len(blob) > codec.max_blob_bytes:
            raise BlobError(f"it is larger than the limit of {codec.max_blob_bytes} bytes")
    except BlobError as error:
        print(f"not importable: {plain(str(error))}")
        return False
    print("ok: a server of this model would import it")
    return True


def _print_model(path: Path) -> None:
    model = describe(path)
    spec = model.state_spec
    facts = {
        "parameters": f"{model.num_parameters:,}",
        "weights": f"{model.weight_bytes:,} bytes of {', '.join(model.weight_dtypes)}",
        "vocabulary": f"{model.vocab_size:,}, {_tokenizer(model.tokenizer)}",
        "chat": "no template" if model.chat_template is None else "template",
        "session": f"{spec.num_bytes:,} bytes, at any length",
    }
    print_facts(facts | {name: plain(str(size)) for name, size in model.sizes.items()})
    print()
    table = Table("tensor", "dtype", "shape", "bytes")
    for tensor in spec.tensors:
        shape = " ".join(map(str, tensor.shape))
        table.add_row(tensor.name, tensor.dtype, shape, f"{tensor.num_bytes:,}")
    print_table(table)


def _tokenizer(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "without a tokenizer that fits"
    return f"of which the tokenizer has {tokenizer.num_tokens:,}"


def _print_header(
    num_bytes: int, facts: Mapping[str, str], checksum_matches: bool | None, model: str
) -> None:
    shown = {name: _shown(facts.get(name)) for name in (*FACTS, "fingerprint")}
    if facts.get("fingerprint") == model:
        shown["model"] = "this one"
    else:
        shown["model"] = f"another one; this model is {model}"
    shown["checksum"] = CHECKSUM[checksum_matches]
    shown["size"] = f"{num_bytes:,} bytes"
    print_facts(shown)
    print()


def _shown(fact: str | None) -> str:
    if fact is None:
        return "-"
    return plain(fact if len(fact) <= MAX_FACT_CHARACTERS else fact[:MAX_FACT_CHARACTERS] + "…")


def _tensors(arrays: Arrays) -> Table:
    """Dtype, shape and range of every tensor."""
    table = Table("tensor", "dtype", "shape", "min", "max", "finite")
    for name, values in sorted(arrays.items()):
        shape = " ".join(map(str, values.shape))
        ends = (_number(values.min()), _number(values.max())) if values.size else ("-", "-")
        finite = "yes" if np.isfinite(values).all() else "NO"
        table.add_row(plain(name), str(values.dtype), shape, *ends, finite)
    return table


def _layers(arrays: Arrays) -> Table:
    """Mean magnitude of each tensor's layers, along its first axis."""
    layered = {
        name: values for name, values in sorted(arrays.items()) if values.ndim > 1 and values.size
    }
    table = Table("layer", *map(plain, layered), title="mean of |x|", title_justify="left")
    for layer in range(max(map(len, layered.values()), default=0)):
        cells = (_mean_of_layer(values, layer) for values in layered.values())
        table.add_row(str(layer), *cells)
    return table


def _mean_of_layer(values: NDArray[Any], layer: int) -> str:
    if layer >= len(values):
        return ""
    with np.errstate(all="ignore"):
        return _number(np.abs(values[layer] + 0.0).mean())


def _number(value: Any) -> str:
    return f"{value + 0.0:.3g}"  # avoids -0

"""`latentd inspect`: the content of a file, and the same verdict as a server's."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import Result

from model import PRETRAINED
from model import checkpoint as checkpoints
from model.decoding.sampling import RecentTokens
from model.network import Description
from server.sessions.codec import BlobError, Codec, SessionState, read
from tests.server.cli.commands import latentd, refused

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def outline(tiny_checkpoint: Path) -> Description:
    return checkpoints.describe(tiny_checkpoint)


@pytest.fixture(scope="module")
def codec(outline: Description, tiny_checkpoint: Path) -> Codec:
    fingerprint = checkpoints.fingerprint(tiny_checkpoint)
    return Codec(fingerprint, outline.state_spec.tensors, outline.vocab_size, "int8 x int8")


@pytest.fixture(scope="module")
def session(outline: Description) -> SessionState:
    """Each tensor is filled with 3 in layer 0 and -5 in layer 1."""
    parts = []
    for tensor in outline.state_spec.tensors:
        values = np.full(tensor.shape, 3, tensor.dtype)
        values[1:] = -5
        parts.append(values.tobytes())
    return SessionState(70, (5,), b"\xe2", RecentTokens().to_bytes(), b"".join(parts), turn=4)


@pytest.fixture(scope="module")
def blob(codec: Codec, session: SessionState) -> bytes:
    return codec.encode(session)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state"


def inspect(file: Path, blob: bytes, checkpoint: Path) -> Result:
    file.write_bytes(blob)
    return latentd("inspect", file, "--checkpoint", checkpoint)


def fields(report: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+) +(.*)$", report.partition("\n\n")[0], re.MULTILINE))


def cells(report: str) -> list[list[str]]:
    """The rows of all tables."""
    lines = [line for line in report.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def verdict(report: str) -> str:
    return report.splitlines()[-1]


def rewritten(blob: bytes, padding: int = 0, **facts: str) -> bytes:
    """The blob with modified header metadata."""
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"] |= facts
    raw = json.dumps(header).encode() + b" " * padding
    return len(raw).to_bytes(8, "little") + raw + blob[8 + size :]


def test_a_whole_state_is_shown(
    file: Path, blob: bytes, outline: Description, codec: Codec, tiny_checkpoint: Path
) -> None:
    done = inspect(file, blob, tiny_checkpoint)
    assert done.exit_code == 0
    assert verdict(done.stdout).startswith("ok: ")
    shown = fields(done.stdout)
    assert shown == {
        **{"format": "latentd-session", "version": "5", "dtype": "float32"},
        **{"arithmetic": "int8 x int8"},
        **{"turn": "4", "position": "70", "pending": "[5]", "undecoded": "e2"},
        **{"fingerprint": codec.fingerprint, "model": "this one", "checksum": "ok"},
        "size": f"{len(blob):,} bytes",
    }
    rows = cells(done.stdout)
    tensors = outline.state_spec.tensors
    for tensor in tensors:
        least = "3" if tensor.shape[0] == 1 else "-5"
        shape = " ".join(map(str, tensor.shape))
        assert [tensor.name, tensor.dtype, shape, least, "3", "yes"] in rows
    first, second = (row for row in rows if row[0] in ("0", "1"))
    assert first[1:] == ["3"] * len(tensors)
    by_name = sorted(tensors, key=lambda tensor: tensor.name)
    assert second[1:] == ["" if tensor.shape[0] == 1 else "5" for tensor in by_name]


def test_a_foreign_state_of_the_same_tensors(
    file: Path, blob: bytes, codec: Codec, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    with (other / "config.json").open("a") as config:
        config.write("\n")  # another fingerprint
    for content, checksum in ((blob, "ok"), (rewritten(blob, position="71"), "WRONG")):
        done = inspect(file, content, other)
        assert done.exit_code == 1
        shown = fields(done.stdout)
        assert shown["fingerprint"] == codec.fingerprint
        assert shown["model"] == f"another one; this model is {checkpoints.fingerprint(other)}"
        assert shown["checksum"] == checksum
        assert ["m", "float32"] in [row[:2] for row in cells(done.stdout)]
        theirs = codec.fingerprint[:12]
        assert verdict(done.stdout).startswith(f"not importable: it belongs to model {theirs}")


def test_the_default_checkpoint_is_what_a_state_is_compared_with(file: Path, blob: bytes) -> None:
    file.write_bytes(blob)
    done = latentd("inspect", file)
    assert done.exit_code == 1
    model = checkpoints.fingerprint(PRETRAINED)
    assert fields(done.stdout)["model"] == f"another one; this model is {model}"


def test_a_model_of_linear_values_has_other_tensors(
    file: Path, blob: bytes, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    linear = shutil.copytree(tiny_checkpoint, tmp_path / "linear")
    config = linear / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"values": "linear"}))
    done = inspect(file, blob, linear)
    assert done.exit_code == 1
    assert fields(done.stdout)["checksum"].startswith("unknown")
    assert "it belongs to model" in verdict(done.stdout)


def test_a_foreign_state_of_unknown_tensors(file: Path, blob: bytes, tiny_checkpoint: Path) -> None:
    facts, arrays = read(blob)
    other = safetensors.numpy.save({**arrays, "x": np.ones((3, 2))}, facts | {"fingerprint": "f"})
    done = inspect(file, other, tiny_checkpoint)
    assert done.exit_code == 1
    assert fields(done.stdout)["checksum"].startswith("unknown")
    assert ["x", "float64", "3 2", "1", "1", "yes"] in cells(done.stdout)


def test_damage_is_named(
    file: Path, blob: bytes, session: SessionState, codec: Codec, tiny_checkpoint: Path
) -> None:
    def report(content: bytes) -> str:
        done = inspect(file, content, tiny_checkpoint)
        assert done.exit_code == 1
        assert verdict(done.stdout).startswith("not importable: ")
        return done.stdout

    assert "not a complete safetensors blob" in verdict(report(blob[:-1]))
    flipped = report(blob[:-1] + bytes([blob[-1] ^ 1]))
    assert fields(flipped)["checksum"] == "WRONG"
    assert "checksum does not match" in verdict(flipped)
    bare = report(safetensors.numpy.save({"x": np.array([True, False])}))
    assert fields(bare)["format"] == fields(bare)["fingerprint"] == "-"
    assert ["x", "bool", "2", "0", "1", "yes"] in cells(bare)
    assert "format is None" in verdict(bare)
    holes = np.full(len(session.state) // 4, np.nan, np.float32).tobytes()
    infinite = report(codec.encode(replace(session, state=holes)))
    assert fields(infinite)["checksum"] == "ok"
    assert ["m", "NO"] in [[row[0], row[-1]] for row in cells(infinite)]
    assert "not finite" in verdict(infinite)
    spaces = report(rewritten(blob, padding=1 << 17))
    assert fields(spaces)["checksum"] == "ok"
    assert "larger than" in verdict(spaces)


def test_a_model_is_described(tiny_checkpoint: Path, outline: Description) -> None:
    report = latentd("inspect", tiny_checkpoint)
    assert report.exit_code == 0
    shown, spec = fields(report.stdout), outline.state_spec
    assert shown["parameters"] == f"{outline.num_parameters:,}"
    assert shown["weights"] == f"{outline.weight_bytes:,} bytes of F32"
    assert shown["session"] == f"{spec.num_bytes:,} bytes, at any length"
    assert shown["d_emb"] == "32"
    expected = [
        [t.name, t.dtype, " ".join(map(str, t.shape)), f"{t.num_bytes:,}"] for t in spec.tensors
    ]
    assert cells(report.stdout) == expected


def test_what_is_missing_is_named(tmp_path: Path, tiny_checkpoint: Path, file: Path) -> None:
    missing = tmp_path / "missing"
    assert f"{missing}: No such file" in refused(
        "inspect", missing, "--checkpoint", tiny_checkpoint
    )
    assert "config.json: missing" in refused("inspect", tmp_path)
    file.write_bytes(b"")
    assert "config.json: missing" in refused("inspect", file, "--checkpoint", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model.safetensors: missing" in refused("inspect", file, "--checkpoint", tmp_path)


def test_numbers_are_shown_as_they_are(file: Path, tiny_checkpoint: Path) -> None:
    arrays = {"a": np.full((1, 3), -128, np.int8), "b": np.full((1, 2), -0.0)}
    other = safetensors.numpy.save(arrays, {"format": "latentd-session"})
    assert cells(inspect(file, other, tiny_checkpoint).stdout) == [
        ["a", "int8", "1 3", "-128", "-128", "yes"],
        ["b", "float64", "1 2", "0", "0", "yes"],
        ["0", "128", "0"],
    ]


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"a": np.ones((2, 0, 3)), "b": np.array(3.0), "c": np.zeros(0, np.int8)},
        {"big": np.ones((2**40, 0))},
        {
            name: np.ones((2, 2), name)
            for name in ("bool", "uint64", "int8", "complex64", "float16")
        },
        {
            "h": np.full((1, 2), 1.7e308),
            "m": np.full((2, 2), np.nan),
            "n": np.full((2, 1), -np.inf),
        },
        {f"tensor {number}": np.ones((3, 3)) for number in range(300)},
        {"[/red]": np.ones((1, 1)), "\x1b[31m\n": np.ones((1, 1))},
    ],
)
def test_any_tensors_can_be_shown(
    file: Path, tiny_checkpoint: Path, arrays: dict[str, Any]
) -> None:
    facts = {"format": "latentd-session", "[/red]": "x", "turn": "[/red]\x1b", "pending": "é" * 999}
    done = inspect(file, safetensors.numpy.save(arrays, facts), tiny_checkpoint)
    assert done.exit_code == 1
    assert "\x1b" not in done.stdout
    assert {plain(name) for name in arrays} <= {row[0] for row in cells(done.stdout)}


def plain(name: str) -> str:
    return name if name.isprintable() else repr(name)


def check(file: Path, damaged: bytes, codec: Codec, checkpoint: Path) -> None:
    """The command succeeds, and reports the codec's verdict."""
    done = inspect(file, damaged, checkpoint)
    if checkpoints.is_checkpoint(file):  # it begins as a model's files do
        assert done.exit_code == 2
        assert str(file) in done.output.replace("\n", "")
        return
    try:
        codec.decode(damaged)
    except BlobError:
        assert done.exit_code == 1
        assert verdict(done.stdout).startswith("not importable: ")
    else:
        assert done.exit_code == 0


@pytest.mark.long
@given(noise=st.binary(max_size=300))
@example(noise=b"GGUF")
@example(noise=b"PK\x03\x04")
@quick
def test_noise(noise: bytes, file: Path, codec: Codec, tiny_checkpoint: Path) -> None:
    check(file, noise, codec, tiny_checkpoint)
    check(file, len(noise).to_bytes(8, "little") + noise, codec, tiny_checkpoint)


@given(data=st.data())
@quick
def test_cut_and_flipped(
    data: st.DataObject, file: Path, blob: bytes, codec: Codec, tiny_checkpoint: Path
) -> None:
    size = data.draw(st.just(len(blob)) | st.integers(0, len(blob)))
    damaged = bytearray(blob[:size])
    header = 8 + int.from_bytes(blob[:8], "little")
    positions = st.integers(0, header - 1) | st.integers(0, len(blob) - 1)
    for position, bit in data.draw(st.lists(st.tuples(positions, st.integers(0, 7)), max_size=3)):
        if position < size:
            damaged[position] ^= 1 << bit
    check(file, bytes(damaged), codec, tiny_checkpoint)

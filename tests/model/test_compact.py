"""A compact state answers as the state did, within the bound, in no more bytes than are claimed."""

import math
import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model import PRETRAINED, checkpoint
from model.attention import EMPTY
from model.compact import BOUND, STEP, CompactForm
from model.config import ModelConfig
from model.network import LanguageModel
from model.state import StateSpec
from tests.model.test_network import NAMES, linear_network, reference

Values = dict[str, NDArray[Any]]

DEFAULT = ModelConfig(vocab_sz=4096, d_emb=256, n_layers=6, n_heads=8)
TINY = ModelConfig(vocab_sz=60, d_emb=24, n_layers=2, n_heads=2, d_key=8, d_val=6)
ODD = TINY.model_copy(update={"n_layers": 1, "n_heads": 1, "d_key": 5, "d_val": 3})


def spec_of(config: ModelConfig) -> StateSpec:
    with torch.device("meta"):
        return LanguageModel(config).state_spec


def split(spec: StateSpec, state: bytes) -> Values:
    values, start = {}, 0
    for tensor in spec.tensors:
        count = math.prod(tensor.shape)
        array = np.frombuffer(state, tensor.dtype, count, start).reshape(tensor.shape)
        values[tensor.name] = array.copy()
        start += array.nbytes
    assert start == len(state)
    return values


def join(spec: StateSpec, values: Values) -> bytes:
    return b"".join(values[t.name].astype(t.dtype).tobytes() for t in spec.tensors)


def made(
    spec: StateSpec, seed: int, depth: float = 20.0, zeros: float = 0.0, tokens: float = 1000.0
) -> Values:
    """A state whose sums lie up to `depth` below the Z of their row, in logarithms."""
    chance = np.random.default_rng(seed)
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
    z = np.exp(chance.uniform(-1, math.log(tokens), shapes["z"])).astype(np.float32)
    below = chance.uniform(0, depth, shapes["s"])
    s = np.minimum(z[..., None] * np.exp(-below), z[..., None]).astype(np.float32)
    s[chance.random(s.shape) < zeros] = 0
    return {
        "h": chance.standard_normal(shapes["h"]),
        "m": chance.integers(-300, 300, shapes["m"]).astype(np.float32),
        "z": z,
        "s": s,
        "z_low": chance.integers(-127, 128, shapes["z"]),
        "s_low": chance.integers(-127, 128, shapes["s"]),
        "n": chance.integers(-300, 300, shapes["n"]).astype(np.float32),
    }


def packed(form: CompactForm, state: bytes) -> bytes:
    found = form.pack(state)
    assert found is not None
    assert len(found) == form.num_bytes
    return found


def log_sum(x: NDArray[Any]) -> NDArray[Any]:
    """log sum exp over the keys, the last axis but one."""
    top = x.max(-2, keepdims=True)
    total: NDArray[Any] = np.log(np.exp(x - top).sum(-2)) + top[..., 0, :]
    return total


def log_y(values: Values, q: NDArray[Any]) -> NDArray[Any]:
    """The answers of every head to queries `[queries, 1, 1, d_k]`, in float64."""
    m, z, s, n = (values[name].astype(np.float64) for name in ("m", "z", "s", "n"))
    with np.errstate(divide="ignore"):
        log_z, log_s = np.log(z)[..., None], np.log(s)
    weights = (q + m)[..., None]
    y: NDArray[Any] = log_sum(weights + np.maximum(log_s, -1e300)) - log_sum(weights + log_z) + n
    return y


def queries(spec: StateSpec, seed: int) -> NDArray[Any]:
    """Of all kinds: ordinary, steep, and such as see one key channel only."""
    d_key = {tensor.name: tensor.shape for tensor in spec.tensors}["z"][-1]
    chance = np.random.default_rng(seed)
    ordinary = chance.standard_normal((16, d_key))
    q: NDArray[Any] = np.concatenate([ordinary, 30 * ordinary, 1e4 * np.eye(d_key)])
    return q[:, None, None]


def assert_within_bound(spec: StateSpec, before: Values, after: Values, seed: int = 0) -> None:
    for name in ("m", "z", "n"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(after["s"] == 0, before["s"] == 0)
    sums = before["s"] != 0
    ratio = after["s"][sums].astype(np.float64) / before["s"][sums]
    assert np.abs(np.log(ratio)).max(initial=0) <= BOUND
    q = queries(spec, seed)
    assert np.abs(log_y(after, q) - log_y(before, q)).max() <= BOUND + 1e-6


@cache
def trained() -> LanguageModel:
    """The default checkpoint in plain torch."""
    config = checkpoint.read_config(PRETRAINED / checkpoint.CONFIG)
    weights = checkpoint.read_weights(PRETRAINED / checkpoint.WEIGHTS)
    return checkpoint.build(config, weights, PRETRAINED, torch.device("cpu"))


def read(network: LanguageModel, num_tokens: int, seed: int = 0) -> bytes:
    """The state after so many random tokens, the last one by `step`."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(network.config.vocab_sz, (1, num_tokens), generator=chance)
    pool = network.new_pool(1)
    for some in torch.split(ids[:, :-1], 1024, 1):
        if some.shape[1]:
            network.prefill(some, [some.shape[1]], pool, [0])
    network.step(ids[:, -1], pool, [0])
    return pool.export_row(0)


@pytest.mark.parametrize(
    ("config", "num_bytes"), [(DEFAULT, 64_256), (ModelConfig(), 759_040)], ids=["default", "paper"]
)
def test_a_compact_state_has_less_than_thirty_percent_of_its_numbers_in_float32(
    config: ModelConfig, num_bytes: int
) -> None:
    spec = spec_of(config)
    form = CompactForm(spec)
    numbers = sum(math.prod(t.shape) for t in spec.tensors if not t.name.endswith("_low"))
    assert form.num_bytes == num_bytes == sum(tensor.num_bytes for tensor in form.tensors)
    assert form.num_bytes <= 0.3 * 4 * numbers
    assert config != DEFAULT or spec == trained().state_spec


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    depth=st.floats(0, 85),
    zeros=st.sampled_from([0.0, 0.1, 1.0]),
    tokens=st.sampled_from([1.0, 1e3, 1e8]),
)
@example(seed=0, depth=85.0, zeros=0.0, tokens=1.0)
@example(seed=0, depth=0.0, zeros=0.0, tokens=1e8)
def test_log_y_moves_by_no_more_than_the_bound(
    seed: int, depth: float, zeros: float, tokens: float
) -> None:
    spec = spec_of(TINY)
    form = CompactForm(spec)
    before = made(spec, seed, depth, zeros, tokens)
    after = split(spec, form.unpack(packed(form, join(spec, before))))
    assert_within_bound(spec, before, after, seed)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), depth=st.floats(0, 85), zeros=st.sampled_from([0.0, 0.1]))
@example(seed=0, depth=0.0, zeros=0.0)
def test_packing_again_changes_nothing(seed: int, depth: float, zeros: float) -> None:
    for config in (TINY, ODD):
        spec = spec_of(config)
        form = CompactForm(spec)
        first = packed(form, join(spec, made(spec, seed, depth, zeros)))
        assert packed(form, form.unpack(first)) == first


def test_what_becomes_of_the_other_numbers() -> None:
    spec = spec_of(TINY)
    form = CompactForm(spec)
    before = made(spec, 1)
    after = split(spec, form.unpack(packed(form, join(spec, before))))
    np.testing.assert_array_equal(after["h"], before["h"].astype(np.float32))
    assert not after["z_low"].any()
    assert not after["s_low"].any()
    assert list(after) == [tensor.name for tensor in spec.tensors]


def test_the_bound_is_not_larger_than_it_needs_to_be() -> None:
    """Half a step is reached, and room is left for float32 only."""
    spec = spec_of(DEFAULT)
    form = CompactForm(spec)
    before = made(spec, 2, depth=8)
    after = split(spec, form.unpack(packed(form, join(spec, before))))
    moved = np.abs(np.log(after["s"].astype(np.float64) / before["s"])).max()
    assert 0.99 * BOUND < moved < STEP / 2 + 2e-5 < BOUND


@pytest.mark.parametrize("config", [TINY, ODD, DEFAULT], ids=["tiny", "odd", "default"])
def test_the_state_before_the_first_token_comes_back_as_it_was(config: ModelConfig) -> None:
    network = LanguageModel(config)
    state = network.new_pool(1).export_row(0)
    form = CompactForm(network.state_spec)
    assert form.unpack(packed(form, state)) == state


@pytest.mark.parametrize("num_tokens", [1, 2, 30, 1000, 3000])
def test_states_of_the_default_checkpoint_fit(num_tokens: int) -> None:
    network = trained()
    spec = network.state_spec
    form = CompactForm(spec)
    state = read(network, num_tokens)
    compact = packed(form, state)
    before, after = split(spec, state), split(spec, form.unpack(compact))
    assert_within_bound(spec, before, after)
    assert form.pack(form.unpack(compact)) == compact
    room = form.tensors[-1].num_bytes
    assert len(compact[-room:].rstrip(b"\0")) < 0.95 * room


@pytest.mark.parametrize("name", NAMES)
def test_states_of_the_reference_vectors_fit(name: str) -> None:
    found = reference(name)
    spec = found.network.state_spec
    form = CompactForm(spec)
    pool = found.network.new_pool(1)
    found.network.prefill(found.token_ids[:1], [found.length], pool, [0])
    state = pool.export_row(0)
    after = split(spec, form.unpack(packed(form, state)))
    assert_within_bound(spec, split(spec, state), after)


def test_a_network_goes_on_from_an_unpacked_state() -> None:
    network = trained()
    form = CompactForm(network.state_spec)
    state = read(network, 300)
    pool = network.new_pool(2)
    pool.import_row(0, state)
    pool.import_row(1, form.unpack(packed(form, state)))
    for token_id in range(100, 120):
        logits = network.step(torch.tensor([token_id, token_id]), pool, [0, 1])
        assert bool(torch.isfinite(logits).all())
        chances = logits.double().softmax(-1)
        assert float((chances[0] - chances[1]).abs().sum()) / 2 < 0.05
    assert not torch.equal(logits[0], logits[1])


def rest_after_turns(depth: float, turns: int, moved: float) -> tuple[float, float]:
    """Mean of log S/Z before, and after turns that each move it so far, packed after each."""
    spec = spec_of(TINY)
    form = CompactForm(spec)
    start = values = made(spec, 3, depth)
    for _ in range(turns):
        z = values["z"] * np.float32(1 + 1e-4)
        s = values["s"] * (z / values["z"])[..., None] * np.float32(math.exp(moved))
        state = join(spec, values | {"z": z, "s": s})
        values = split(spec, form.unpack(packed(form, state)))
    was, now = (float(np.log(x["s"] / x["z"][..., None]).mean()) for x in (start, values))
    return was, now


def test_a_session_that_rests_after_every_turn_does_not_forget_them() -> None:
    """Every turn moves log S by a fiftieth of a step, which a fixed lattice would take back."""
    was, now = rest_after_turns(20.0, 500, -STEP / 50)
    assert was - now == pytest.approx(10 * STEP, rel=0.2)


def test_the_largest_sums_stay_sums_however_often_they_rest() -> None:
    """S = Z at first: rounding that goes up and down must not lead above."""
    was, now = rest_after_turns(0.0, 500, 0.0)
    assert was == pytest.approx(0, abs=1e-6)
    assert -20 * STEP < now < 1e-6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("m", 0.5),
        ("m", 32768.0),
        ("m", math.nan),
        ("n", -32768.0),
        ("n", math.inf),
        ("s", 1e-39),
        ("s", -1.0),
        ("s", 1e9),
        ("s", math.inf),
        ("s", math.nan),
        ("z", -1.0),
        ("z", math.inf),
        ("h", 1e39),
        ("h", math.nan),
    ],
)
def test_a_state_that_cannot_be_held_within_the_bound_is_not_packed(
    name: str, value: float
) -> None:
    spec = spec_of(TINY)
    form = CompactForm(spec)
    values = {key: x.astype(np.float64) for key, x in made(spec, 4).items()}
    assert form.pack(join(spec, values)) is not None
    values[name].flat[3] = value
    assert form.pack(join(spec, values)) is None


@pytest.mark.parametrize(("factor", "can_be_held"), [(1 + 1e-6, True), (1 + 1e-3, False)])
def test_a_sum_above_its_z_is_no_sum_of_a_past(factor: float, can_be_held: bool) -> None:
    spec = spec_of(TINY)
    values = made(spec, 9)
    values["s"][0, 0, 0, 0] = values["z"][0, 0, 0] * factor
    assert (CompactForm(spec).pack(join(spec, values)) is not None) == can_be_held


@pytest.mark.parametrize("value", [32767.0, -32767.0, EMPTY])
def test_the_largest_maxima_are_exact(value: float) -> None:
    spec = spec_of(TINY)
    form = CompactForm(spec)
    values = made(spec, 5)
    values["m"][0, 0, 0] = values["n"][1, 1, 2] = np.float32(value)
    after = split(spec, form.unpack(packed(form, join(spec, values))))
    assert after["m"][0, 0, 0] == after["n"][1, 1, 2] == np.float32(value)


def test_a_state_with_more_information_than_there_are_bytes_is_not_packed() -> None:
    spec = spec_of(DEFAULT)
    form = CompactForm(spec)
    assert form.pack(join(spec, made(spec, 6, depth=8))) is not None
    assert form.pack(join(spec, made(spec, 6, depth=80))) is None


def test_bytes_of_another_length_are_refused() -> None:
    spec = spec_of(TINY)
    form = CompactForm(spec)
    state = join(spec, made(spec, 7))
    compact = packed(form, state)
    for wrong in (b"", state[:-1], state + b"\0", compact):
        with pytest.raises(ValueError, match=f"{spec.num_bytes} bytes, not {len(wrong)}"):
            form.pack(wrong)
    for wrong in (b"", compact[:-1], compact + b"\0", state):
        with pytest.raises(ValueError, match=f"{form.num_bytes} bytes, not {len(wrong)}"):
            form.unpack(wrong)


def test_bytes_that_were_not_packed_are_refused() -> None:
    spec, other_spec = spec_of(TINY), spec_of(ODD)
    form, other = CompactForm(spec), CompactForm(other_spec)
    compact = packed(form, join(spec, made(spec, 8)))
    room = form.tensors[-1].num_bytes
    kept, code = compact[:-room], compact[-room:].rstrip(b"\0")
    foreign = packed(other, join(other_spec, made(other_spec, 8)))[-other.tensors[-1].num_bytes :]
    unended = zlib.compressobj()
    start = unended.compress(zlib.decompress(code)) + unended.flush(zlib.Z_SYNC_FLUSH)
    empty_block = b"\0\0\0\xff\xff"
    for wrong in (
        b"",
        (start + room * empty_block)[:room],
        code[:-1],
        code[:40] + bytes([code[40] ^ 1]) + code[41:],
        code.ljust(room - 1, b"\0") + b"\1",
        foreign.rstrip(b"\0"),
    ):
        with pytest.raises(ValueError, match="damaged"):
            form.unpack(kept + wrong.ljust(room, b"\0"))
    h = form.tensors[0].num_bytes
    with pytest.raises(ValueError, match="not finite"):
        form.unpack(kept[:h] + np.float32(math.nan).tobytes() + compact[h + 4 :])


def test_linear_values_have_no_compact_form() -> None:
    with pytest.raises(ValueError, match="linear values"):
        CompactForm(linear_network().state_spec)


def test_float64_sums_have_no_compact_form() -> None:
    with pytest.raises(ValueError, match="not float32"):
        CompactForm(LanguageModel(TINY).double().state_spec)

"""The network matches the reference's outputs, however a sequence is split and batched."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from model.heinsen.attention import Attention, AttentionState, chunked, quadratic
from model.heinsen.config import ModelConfig
from model.heinsen.layers import NetworkState
from model.heinsen.network import LanguageModel
from model.state import DamagedState, StatePool
from tests.model.calls import prefill, step

VECTORS = Path(__file__).parents[2] / "vectors"
NAMES = ["small", "steep_keys", "uneven_heads", "wide_values"]
LOGITS_TOLERANCE, STATE_TOLERANCE = 2e-5, 1e-4
each_file = pytest.mark.parametrize("name", NAMES)


@dataclass(frozen=True)
class Reference:
    """A network, its input, and the reference implementation's results in float64."""

    network: LanguageModel
    tensors: dict[str, Tensor]

    @property
    def token_ids(self) -> Tensor:
        return self.tensors["token_ids"]

    @property
    def length(self) -> int:
        return self.token_ids.shape[1]


def make(config: ModelConfig, weights: dict[str, Tensor]) -> LanguageModel:
    network = LanguageModel(config)
    network.load_state_dict(weights)
    return network.requires_grad_(False)


@cache
def reference(name: str) -> Reference:
    with safe_open(VECTORS / f"{name}.safetensors", "pt") as file:
        config = ModelConfig(**json.loads(file.metadata()["config"]))
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    prefix = "weights."
    weights = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    return Reference(make(config, weights), tensors)


@cache
def linear_network() -> LanguageModel:
    """Random weights, values of any sign, d_key and d_val unequal."""
    torch.manual_seed(3)
    shape = ModelConfig(
        vocab_sz=60, d_emb=24, n_layers=2, n_heads=2, d_key=8, d_val=6, values="linear"
    )
    return LanguageModel(shape).requires_grad_(False)


def assert_logits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=LOGITS_TOLERANCE)


def assert_state(
    state: NetworkState, expected: dict[str, Tensor], sequences: Sequence[int] = (0, 1)
) -> None:
    """Relative to max(1, |value|), as the values are logarithms."""
    pairs = [(state.h, expected["state.embed_pos"])]
    for number, layer in enumerate(state.layers):
        h_s, h_z = layer.to_paper()
        pairs.append((h_s, expected[f"state.layers.{number}.H_S"]))
        pairs.append((h_z, expected[f"state.layers.{number}.H_Z"]))
    for ours, theirs in pairs:
        scale = theirs[list(sequences)].abs().clamp(min=1)
        found = ours.double() / scale
        wanted = theirs[list(sequences)] / scale
        torch.testing.assert_close(found, wanted, rtol=0, atol=STATE_TOLERANCE)


def test_parameters_are_named_as_in_the_reference() -> None:
    for name in NAMES:
        found = reference(name)
        stored = {
            n.removeprefix("weights."): x.shape for n, x in found.tensors.items() if "weights" in n
        }
        assert {n: p.shape for n, p in found.network.state_dict().items()} == stored


def test_the_papers_network_has_the_papers_size() -> None:
    with torch.device("meta"):
        network = LanguageModel(ModelConfig())
    layer = 2 * 768 + (768 + 1) * 24 * 96 + (768 + 1) * 1536 + 768 * 768
    assert network.num_parameters == 50304 * 768 + (768 + 1) * 1536 + 24 * layer + 2 * 768
    assert round(network.num_parameters / 1e6, 1) == 124.9


def test_the_papers_state_has_its_numbers_and_the_two_maxima() -> None:
    with torch.device("meta"):
        spec = LanguageModel(ModelConfig()).state_spec
    papers = 768 + 24 * 24 * (32 * 32 + 32)
    assert papers == 609_024
    maxima = 24 * 24 * (32 + 32)
    kept_exact = 4 * 768 + 24 * 24 * (32 * 32 + 32)
    last = 4 * 768
    assert spec.num_bytes == 4 * (papers + maxima) + kept_exact + last == 3_197_952
    names = ["h", "last", "m", "z", "s", "z_low", "s_low", "n"]
    assert [tensor.name for tensor in spec.tensors] == names
    dtypes = {t.name: t.dtype for t in spec.tensors if t.dtype != "float32"}
    assert dtypes == {"h": "float64", "z_low": "int8", "s_low": "int8"}


def test_linear_values_need_no_maximum_of_values() -> None:
    spec = linear_network().state_spec
    assert [tensor.name for tensor in spec.tensors] == [
        "h",
        "last",
        "m",
        "z",
        "s",
        "z_low",
        "s_low",
    ]
    assert spec.num_bytes == (8 + 4) * 24 + 2 * 2 * (4 * (2 * 8 + 8 * 6) + 8 + 8 * 6)


def test_the_size_of_a_state_does_not_depend_on_what_it_has_seen() -> None:
    found = reference("small")
    pool = found.network.new_pool(1)
    before = len(pool.export_row(0))
    prefill(found.network, found.token_ids[:1], [found.length], pool, [0])
    assert len(pool.export_row(0)) == before == found.network.state_spec.num_bytes


@each_file
@pytest.mark.parametrize("attention", [quadratic, chunked])
def test_in_float64_the_network_is_the_reference_to_its_last_digits(
    name: str, attention: Attention
) -> None:
    found = reference(name)
    network = make(found.network.config, found.network.state_dict()).double()
    logits, state = network.unroll(found.token_ids, network.empty_state(2), attention)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, found.tensors["logits"], rtol=0, atol=1e-10)
    assert_state(state, found.tensors)
    assert {tensor.dtype for tensor in network.state_spec.tensors} == {"float64"}


@each_file
def test_ragged_sequences_in_one_batch_are_each_the_reference(name: str) -> None:
    found = reference(name)
    network, ids = found.network, found.token_ids
    sequences = [0, 1, 0, 1, 0, 1]
    lengths = [found.length - 1, 1, 64, 17, 0, 65]
    lengths = [min(length, found.length - 1) for length in lengths]
    batch = torch.randint(network.config.vocab_sz, (6, found.length - 1))
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        batch[row, :length] = ids[sequence, :length]
    rows = [5, 2, 7, 3, 4, 1]
    pool = network.new_pool(8)
    prefill(network, batch, lengths, pool, rows)
    logits = step(network, ids[sequences, lengths], pool, rows)
    assert_logits(logits, found.tensors["logits"][sequences, lengths])


@each_file
def test_packed_weights_compute_the_reference_too(name: str) -> None:
    found = reference(name)
    ids, expected = found.token_ids, found.tensors["logits"]
    network = make(found.network.config, found.network.state_dict()).pack()
    assert network.num_parameters == found.network.num_parameters
    logits, _ = network.unroll(ids, network.empty_state(2))
    assert_logits(logits, expected)
    half, pool = found.length // 2, network.new_pool(2)
    prefill(network, ids[:, :half], [half, half], pool, [0, 1])
    for place in range(half, found.length):
        assert_logits(step(network, ids[:, place], pool, [0, 1]), expected[:, place])
    assert_state(network.read_state(pool), found.tensors)


@each_file
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scored", [(0,), (1, 3), (0, 1, 2, 3)])
def test_prompts_that_are_scored_have_the_references_logits_and_the_same_states(
    name: str, packed: bool, scored: tuple[int, ...]
) -> None:
    found = reference(name)
    network = make(found.network.config, found.network.state_dict())
    if packed:
        network.pack()
    ids, rows = found.token_ids[[0, 1, 0, 1]], [3, 0, 4, 2]
    lengths = [found.length, found.length // 2, 3, 65 % found.length]
    plain, pool = network.new_pool(5), network.new_pool(5)
    prefill(network, ids, lengths, plain, rows)
    logits = prefill(network, ids, lengths, pool, rows, scored)
    assert set(logits) == set(scored)
    for row in rows:
        assert pool.export_row(row) == plain.export_row(row)
    for place in scored:
        expected = found.tensors["logits"][place % 2, : lengths[place]]
        assert_logits(logits[place], expected)


@each_file
def test_a_batch_of_both_sequences_ends_in_the_references_state(name: str) -> None:
    found = reference(name)
    pool = found.network.new_pool(2)
    prefill(found.network, found.token_ids, [found.length] * 2, pool, [0, 1])
    assert_state(found.network.read_state(pool), found.tensors)


Part = tuple[str, int]
PARTS = st.tuples(st.sampled_from(["prefill", "step", "forward"]), st.sampled_from([1, 5, 63, 64]))


# The same splits each time: with about one in a thousand, an entry of S whose terms nearly cancel
# is 1.06e-4 away in plain float32.
@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(NAMES), parts=st.lists(PARTS, max_size=6))
def test_any_split_into_prefill_forward_and_steps_is_the_reference(
    name: str, parts: list[Part]
) -> None:
    found = reference(name)
    network, ids = found.network, found.token_ids
    expected = found.tensors["logits"]
    pool, start = network.new_pool(2), 0
    for kind, length in [*parts, ("prefill", found.length)]:
        end = min(start + length, found.length - 1)
        if start == end:
            break
        part = ids[:, start:end]
        if kind == "prefill":
            prefill(network, part, [end - start] * 2, pool, [0, 1])
        elif kind == "forward":
            logits, state = network.unroll(part, network.read_state(pool))
            network.write_state(state, pool)
            assert_logits(logits, expected[:, start:end])
        else:
            for place, column in enumerate(part.unbind(1), start):
                assert_logits(step(network, column, pool, [0, 1]), expected[:, place])
        start = end
    assert_logits(step(network, ids[:, -1], pool, [0, 1]), expected[:, -1])
    assert_state(network.read_state(pool), found.tensors)


@each_file
def test_greedy_steps_continue_as_the_reference(name: str) -> None:
    found = reference(name)
    network, wanted = found.network, found.tensors["greedy_ids"][0].tolist()
    pool = network.new_pool(1)
    prefill(network, found.token_ids[:1, :-1], [found.length - 1], pool, [0])
    last, continued = found.token_ids[:1, -1], []
    for _ in wanted:
        last = step(network, last, pool, [0]).argmax(-1)
        continued.append(int(last))
    assert continued == wanted


@pytest.mark.parametrize("parts", [[100], [1, 99], [64, 1, 35], [37, 63]])
def test_linear_values_mean_the_same_in_every_form(parts: list[int]) -> None:
    network = linear_network()
    exact = make(network.config, network.state_dict()).double()
    ids = torch.randint(60, (2, 101), generator=torch.Generator().manual_seed(0))
    expected, _ = exact.unroll(ids, exact.empty_state(2), quadratic)
    logits, _ = network.unroll(ids, network.empty_state(2))
    assert_logits(logits, expected)
    pool, start = network.new_pool(2), 0
    for number, length in enumerate(parts):
        part = ids[:, start : start + length]
        if number % 2:
            for place, column in enumerate(part.unbind(1), start):
                assert_logits(step(network, column, pool, [0, 1]), expected[:, place])
        else:
            prefill(network, part, [length] * 2, pool, [0, 1])
        start += length
    assert_logits(step(network, ids[:, 100], pool, [0, 1]), expected[:, 100])


def filled_pool(network: LanguageModel, num_rows: int) -> StatePool:
    """Rows with pasts of different lengths."""
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(network.config.vocab_sz, (num_rows, 20), generator=chance)
    pool = network.new_pool(num_rows)
    prefill(network, ids, [1 + i * 19 // num_rows for i in range(num_rows)], pool, range(num_rows))
    return pool


def same(pool: StatePool) -> StatePool:
    copy = StatePool(pool.spec, pool.num_rows, pool.device)
    for name, values in pool.tensors.items():
        copy.tensors[name].copy_(values)
    return copy


@pytest.mark.parametrize("values", ["log", "linear"])
@pytest.mark.parametrize(
    "rows", [[0], [3], [0, 1, 2], [2, 3, 4], [5, 0], [4, 2, 0], [1, 3, 4], [5, 4, 3, 2, 1, 0]]
)
@pytest.mark.parametrize("call", ["step", "prefill"])
def test_only_the_named_rows_advance_and_their_order_does_not_matter(
    call: str, rows: list[int], values: str
) -> None:
    network = linear_network() if values == "linear" else reference("small").network
    before = filled_pool(network, 6)
    ids = (torch.arange(6 * 9) * 7 % 60).view(6, 9)
    lengths = [9, 1, 4, 9, 3, 7]
    together, apart = same(before), same(before)
    if call == "step":
        logits = step(network, ids[rows, 0], together, rows)
        for i, row in enumerate(rows):
            alone = step(network, ids[[row], 0], apart, [row])
            torch.testing.assert_close(logits[[i]], alone, rtol=0, atol=LOGITS_TOLERANCE)
    else:
        prefill(network, ids[rows], [lengths[row] for row in rows], together, rows)
        for row in rows:
            prefill(network, ids[[row], : lengths[row]], [lengths[row]], apart, [row])
    for name in together.tensors:
        found, alone = together.tensors[name], apart.tensors[name]
        for row in range(6):
            if row in rows and not name.endswith("_low"):  # of bits that may differ
                torch.testing.assert_close(
                    found[:, row], alone[:, row], rtol=STATE_TOLERANCE, atol=STATE_TOLERANCE
                )
            elif row not in rows:
                assert torch.equal(found[:, row], before.tensors[name][:, row])


def test_rows_by_slice_and_by_gather_are_bit_for_bit_the_same() -> None:
    network = reference("small").network
    pool = filled_pool(network, 3)
    wider = network.new_pool(7)
    scattered = [6, 1, 4]
    for row, place in enumerate(scattered):
        wider.write_row(place, pool.read_row(row))
    for token in range(20):
        ids = torch.tensor([token, token + 1, token + 2])
        in_place = step(network, ids, pool, [0, 1, 2])
        assert torch.equal(in_place, step(network, ids, wider, scattered))
    for row, place in enumerate(scattered):
        assert wider.export_row(place) == pool.export_row(row)


def test_what_follows_a_sequences_end_is_not_read() -> None:
    network = reference("small").network
    pools = [filled_pool(network, 3) for _ in range(2)]
    ids = torch.arange(3 * 12).view(3, 12)
    other = ids.clone()
    lengths = [12, 5, 0]
    for row, length in enumerate(lengths):
        other[row, length:] = 319
    prefill(network, ids, lengths, pools[0], [0, 1, 2])
    prefill(network, other, lengths, pools[1], [0, 1, 2])
    for row in range(3):
        assert pools[0].export_row(row) == pools[1].export_row(row)
    assert pools[0].export_row(2) == filled_pool(network, 3).export_row(2)


def test_states_are_replaced_where_chosen() -> None:
    network = reference("small").network
    own, other = (network.read_state(filled_pool(network, 3)) for _ in range(2))
    _, other = network.unroll(torch.tensor([[1], [2], [3]]), other)
    chosen = torch.tensor([False, True, False])
    mixed = own.replace(chosen, other)
    pool, owns, others = (network.new_pool(3) for _ in range(3))
    for state, into in ((mixed, pool), (own, owns), (other, others)):
        network.write_state(state, into)
    assert [pool.export_row(i) for i in range(3)] == [
        owns.export_row(0),
        others.export_row(1),
        owns.export_row(2),
    ]
    assert owns.export_row(1) != others.export_row(1)


def test_a_detached_state_has_no_history() -> None:
    found = reference("small")
    network = make(found.network.config, found.network.state_dict()).requires_grad_(True)
    _, state = network.unroll(found.token_ids, network.empty_state(2))
    assert state.h.requires_grad
    assert state.layers[0].s.requires_grad
    detached = state.detach()
    assert torch.equal(detached.layers[1].s, state.layers[1].s)
    assert not detached.h.requires_grad
    for layer in detached.layers:
        values = (layer.m, layer.z, layer.s, layer.n)
        assert not any(x is not None and x.requires_grad for x in values)


def test_every_weight_has_the_gradient_of_the_definition_also_across_chunks() -> None:
    found = reference("uneven_heads")
    network = make(found.network.config, found.network.state_dict()).requires_grad_(True)
    exact = make(found.network.config, found.network.state_dict()).double().requires_grad_(True)
    ids = found.token_ids[:, :90]
    whole, _ = exact.unroll(ids, exact.empty_state(2), quadratic)
    parts, state = [], network.empty_state(2)
    for part in torch.split(ids, [40, 1, 49], 1):
        logits, state = network.unroll(part, state)
        parts.append(logits)
    for logits in (whole, torch.cat(parts, 1)):
        torch.autograd.backward(logits.log_softmax(-1)[..., 7].mean())
    for name, parameter in network.named_parameters():
        ours, theirs = parameter.grad, exact.get_parameter(name).grad
        assert ours is not None
        assert theirs is not None
        scale = theirs.abs().max()
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=0, atol=1e-4)


def test_attention_stays_in_float32_when_matrix_products_are_in_bfloat16() -> None:
    found = reference("small")
    network, calls = found.network, list[set[torch.dtype]]()

    def watched(
        q: Tensor, k: Tensor, v: Tensor, state: AttentionState, log_f: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        y, end = chunked(q, k, v, state, log_f)
        assert not torch.is_autocast_enabled("cpu")
        calls.append({x.dtype for x in (q, k, v, y, end.m, end.z, end.s)})
        return y, end

    with torch.autocast("cpu", torch.bfloat16):
        logits, state = network.unroll(found.token_ids, network.empty_state(2), watched)
    assert calls == [{torch.float32}] * 3
    assert state.h.dtype == torch.float64
    assert logits.dtype == torch.bfloat16
    expected = found.tensors["logits"]
    assert (logits.double() - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_pool_of_something_else_is_refused() -> None:
    network = reference("small").network
    spec = replace(network.state_spec, tensors=network.state_spec.tensors[:2])
    with pytest.raises(ValueError, match="new_pool"):
        step(network, torch.tensor([1]), StatePool(spec, 1, torch.device("cpu")), [0])


def served(form: str) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(vocab_sz=96, d_emb=16, n_layers=2, n_heads=2, d_key=4, d_val=4)
    network = LanguageModel(config).requires_grad_(False).eval()
    match form:
        case "compiled":
            network = network.pack()
            assert network.is_compiled
        case "kernels":
            network.to("cuda" if torch.cuda.is_available() else "cpu").fuse()
    return network


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which interprets the kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tensor", ["h", "m", "z", "s", "n"])
@pytest.mark.parametrize("form", ["plain torch", "compiled", "kernels"])
def test_a_damaged_state_shows_in_its_logits_and_stays_damaged(
    form: str, tensor: str, value: float
) -> None:
    """And in no other row."""
    network, ids = served(form), torch.arange(12).view(2, 6)
    pools = [network.new_pool(2) for _ in range(2)]
    for pool in pools:
        prefill(network, ids[:, :5], [5, 5], pool, [0, 1])
    pools[0].tensors[tensor][0, 1].view(-1)[2] = value
    [logits, expected] = [step(network, ids[:, 5], pool, [0, 1]) for pool in pools]
    assert torch.equal(logits[0], expected[0])
    assert not logits[1].isfinite().any()
    assert pools[0].export_row(0) == pools[1].export_row(0)
    with pytest.raises(DamagedState):
        pools[0].check_row(1)
    prefill(network, ids[1:, :3], [3], pools[0], [1])
    with pytest.raises(DamagedState):
        pools[0].check_row(1)

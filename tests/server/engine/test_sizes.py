"""Default sizes fit the state and the memory."""

from pathlib import Path

import pytest
import torch

from server.engine import sizes
from server.engine.sizes import Memory, SizeError, Sizes, choose
from server.settings import Settings

MIB, GIB = 1 << 20, 1 << 30
SMALL = 3_190_000


def settings(**given: object) -> Settings:
    return Settings.model_validate(given)


def shared(size: int) -> Memory:
    return Memory(size, size, is_shared=True)


def test_small_states_have_the_usual_sizes() -> None:
    assert choose(settings(), SMALL, shared(20 * GIB)) == Sizes(
        32, 32, 64 * MIB, 256 * MIB, 256 * SMALL, 8
    )


@pytest.mark.parametrize("state_bytes", [34 * MIB, 66 * MIB])
def test_large_states_have_caches_that_hold_several(state_bytes: int) -> None:
    found = choose(settings(), state_bytes, shared(40 * GIB))
    assert found.warm_sessions == 32
    assert found.prefix_cache_bytes == 16 * state_bytes
    assert found.host_cache_bytes == 32 * state_bytes
    assert found.keep_turns == 2
    assert choose(settings(keep_turns=5), state_bytes, shared(40 * GIB)).keep_turns == 5


@pytest.mark.parametrize("state_bytes", [1000, SMALL, 34 * MIB, 66 * MIB])
@pytest.mark.parametrize("free", [3 * GIB, 6 * GIB, 12 * GIB, 48 * GIB])
@pytest.mark.parametrize("is_shared", [False, True])
def test_what_is_chosen_leaves_half_of_the_memory(
    state_bytes: int, free: int, is_shared: bool
) -> None:
    found = choose(settings(), state_bytes, Memory(free, free, is_shared))
    device, host = found.on_device(state_bytes), found.on_host
    assert device + (host if is_shared else 0) <= free // 2
    assert found.max_running >= min(32, free // state_bytes // 5)
    assert host <= free // 2
    assert found.waiting_bytes >= state_bytes


def test_given_settings_are_used_or_rejected() -> None:
    asked = settings(max_running=32, warm_sessions=100, host_cache_bytes=GIB, prefix_cache_bytes=0)
    found = choose(asked, 34 * MIB, shared(12 * GIB))
    assert (found.warm_sessions, found.host_cache_bytes) == (100, GIB)
    assert found.prefix_cache_bytes == 0
    with pytest.raises(SizeError, match=r"32 running and 100 warm .* lower --max-running"):
        choose(asked, 66 * MIB, shared(6 * GIB))
    with pytest.raises(SizeError, match="lower --host-cache-bytes"):
        choose(settings(host_cache_bytes=9 * GIB), SMALL, Memory(GIB, 4 * GIB, is_shared=False))


def test_a_control_group_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, used = tmp_path / "max", tmp_path / "current"
    most.write_text("5000000\n")
    used.write_text("2000000\n")
    monkeypatch.setattr(sizes, "CGROUPS", ((str(most), str(used)), ("no", "file")))
    assert sizes.free_memory(torch.device("cpu")) == shared(3_000_000)
    most.write_text("max\n")
    assert sizes.free_memory(torch.device("cpu")).host > 3_000_000

"""The host cache evicts the least recently used state, and counts every byte."""

from hypothesis import given
from hypothesis import strategies as st

from server.sessions.cache import HostCache
from server.sessions.codec import SessionState


def state(num_bytes: int, num_recent: int = 0) -> SessionState:
    return SessionState(1, (), b"", bytes(num_recent), bytes(num_bytes - num_recent))


def test_the_least_recently_used_state_goes_first() -> None:
    cache = HostCache(30)
    for name in "abc":
        assert cache.put(name, state(10)) == 0
    assert cache.get("a") is not None
    assert cache.put("d", state(10)) == 1
    assert [name for name in "abcd" if name in cache] == ["a", "c", "d"]
    assert cache.put("e", state(20)) == 2
    assert [name for name in "abcde" if name in cache] == ["d", "e"]


def test_asking_whether_a_state_is_here_does_not_use_it() -> None:
    cache = HostCache(20)
    cache.put("a", state(10))
    cache.put("b", state(10))
    assert "a" in cache
    cache.put("c", state(10))
    assert "a" not in cache


def test_a_state_replaces_the_one_before_it() -> None:
    cache = HostCache(30)
    cache.put("a", state(10))
    cache.put("b", state(10))
    newer = state(20, num_recent=15)
    assert cache.put("a", newer) == 0
    assert cache.get("a") is newer
    assert (len(cache), cache.num_bytes) == (2, 30)


def test_a_state_larger_than_the_cache_evicts_no_other_and_replaces_its_older_one() -> None:
    cache = HostCache(30)
    cache.put("a", state(10))
    cache.put("b", state(10))
    assert cache.put("a", state(31)) == 0
    assert cache.get("a") is None
    assert (len(cache), cache.num_bytes) == (1, 10)
    assert cache.put("c", state(30)) == 1
    assert (len(cache), cache.num_bytes) == (1, 30)


def test_a_cache_of_no_bytes_holds_nothing() -> None:
    cache = HostCache(0)
    assert cache.put("a", state(1)) == 0
    assert (len(cache), cache.num_bytes, cache.get("a")) == (0, 0, None)


NAMES = st.sampled_from("abcdef")
MOVES = st.one_of(
    st.tuples(st.just("put"), NAMES, st.integers(1, 40)),
    st.tuples(st.just("get"), NAMES, st.just(0)),
    st.tuples(st.just("remove"), NAMES, st.just(0)),
)


@given(st.lists(MOVES, max_size=60))
def test_it_does_what_a_plain_list_would(moves: list[tuple[str, str, int]]) -> None:
    cache, held = HostCache(100), list[tuple[str, SessionState]]()
    for move, name, num_bytes in moves:
        found = next((kept for other, kept in held if other == name), None)
        if move == "get":
            assert cache.get(name) is found
        else:
            cache.remove(name)
        held = [pair for pair in held if pair[0] != name]
        if move == "get" and found is not None:
            held.append((name, found))
        if move == "put":
            made = state(num_bytes, num_recent=num_bytes // 2)
            held.append((name, made))
            evicted = 0
            while sum(kept.num_bytes for _, kept in held) > 100:
                held.pop(0)
                evicted += 1
            assert cache.put(name, made) == evicted
        assert [other for other in "abcdef" if other in cache] == sorted(n for n, _ in held)
        assert cache.num_bytes == sum(kept.num_bytes for _, kept in held)
        assert len(cache) == len(held)

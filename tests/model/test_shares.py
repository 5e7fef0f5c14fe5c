"""Shared space: no owner's values evict those of an owner with fewer."""

from hypothesis import given
from hypothesis import strategies as st

from model.shares import SharedCache, has_space


def test_one_owner_gets_everything_and_the_next_ones_their_shares() -> None:
    assert has_space(255, 255, 1, 256, 1)
    assert not has_space(256, 256, 1, 256, 1)
    assert has_space(0, 256, 128, 256, 2)
    assert not has_space(0, 256, 129, 256, 2)
    assert not has_space(256, 256, 1, 256, 2)


def test_the_owner_with_most_loses_its_least_recently_used() -> None:
    cache = SharedCache[str, int](4)
    for number, key in enumerate("abc"):
        cache.put(key, number, "much")
    cache.put("x", 10, "little")
    assert cache.get("a") == 0
    assert cache.put("d", 4, "much") == [1]
    assert cache.put("y", 11, "little") == [2]
    assert cache.put("z", 12, "little") == [10]
    assert set(cache) == {"a", "d", "y", "z"}
    cache.remove_all("little")
    assert set(cache) == {"a", "d"}
    assert cache.size == 2


@given(
    puts=st.lists(st.tuples(st.integers(0, 9), st.sampled_from("ab"), st.integers(1, 5))),
    most=st.integers(0, 9),
)
def test_sizes_are_accounted_for(puts: list[tuple[int, str, int]], most: int) -> None:
    cache, sizes = SharedCache[int, str](most), dict[int, int]()
    for key, owner, size in puts:
        cache.put(key, owner, owner, size)
        sizes[key] = size
        assert cache.size == sum(sizes[each] for each in cache) <= most
        assert len(list(cache)) == len(cache)
    order = list(cache)
    for key in order:
        assert key in cache
        cache.pop()
        assert key not in cache

"""Which states are cached, which sequence waits for which, and that the memory is bounded."""

from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.decoding.sampling import SamplingParams
from server.engine import prefixes
from server.engine.messages import Continuation, EngineRequest, StoredState
from server.engine.prefixes import SharedPrefixes, chain
from server.engine.sequence import EngineSequence

CHUNK, STATE_BYTES, ALL = 4, 100, 1000
REQUEST = EngineRequest("", None, Continuation(), (), 5, SamplingParams())


def sequence(
    *chunks: int, tail: int = 2, scored: bool = False, salt: bytes = b""
) -> EngineSequence:
    """A prompt of whole chunks, each of one token, and a partial chunk."""
    ids = (*(token for token in chunks for _ in range(CHUNK)), *(0,) * tail)
    request = replace(REQUEST, token_ids=ids, score_prompt=scored, owner=salt.decode())
    return EngineSequence(request, 0.0)


def shared(num_states: int = 10) -> SharedPrefixes[str]:
    return SharedPrefixes(num_states * STATE_BYTES, STATE_BYTES, CHUNK)


def read_all(states: SharedPrefixes[str], prefilling: EngineSequence) -> list[EngineSequence]:
    """Read to the end, caching states where required; returns sequences that need not wait any
    more."""
    ready = []
    while not prefilling.is_read:
        prefilling.pop_unread(prefilling.next_piece(ALL, CHUNK))
        if prefilling.num_read in prefilling.retain_at:
            ready += states.retain(prefilling, f"state {prefilling.num_read}")
    assert states.leave(prefilling) == []
    return ready


def test_a_digest_names_all_tokens_before_it() -> None:
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    whole = chain(ids, CHUNK)
    assert len(whole) == 2
    assert chain(ids[:8], CHUNK) == whole
    assert chain(ids[:7], CHUNK) == whole[:1]
    assert chain([0, *ids[1:]], CHUNK)[1] != whole[1]
    assert chain(ids[4:], CHUNK)[0] != whole[1]
    assert chain([256 * 256], 1) != chain([1], 1) != chain([256], 1)
    assert chain(ids[:3], CHUNK) == ()


def test_a_salt_gives_every_beginning_another_name() -> None:
    ids = [1, 2, 3, 4] * 3
    first = array("q", ids[:CHUNK]).tobytes()
    found = [chain(ids, CHUNK, salt) for salt in (b"", b"a", b"b", bytes(32), first)]
    assert chain(ids, CHUNK) == found[0]
    assert len({digest for digests in found for digest in digests}) == 3 * len(found)


def test_prompts_of_different_salts_share_nothing() -> None:
    states = shared()
    first = sequence(1, 2, salt=b"a")
    states.begin(first)
    for salt in (b"", b"b"):
        other = sequence(1, 2, salt=salt)
        assert states.begin(other) is None
        assert other.waits_for is None
        states.leave(other)
    read_all(states, first)
    for salt in (b"", b"b"):
        assert states.begin(sequence(1, 2, salt=salt)) is None
    assert states.begin(sequence(1, 2, salt=b"a")) == "state 8"


def test_a_prompt_that_is_scored_is_read_from_its_beginning() -> None:
    states = shared()
    first, beside = sequence(1, 2, 3), sequence(1, 2, 3, scored=True)
    states.begin(first)
    assert states.begin(beside) is None
    assert beside.waits_for is None
    read_all(states, first)
    for scored in (beside, sequence(1, 2, 3, scored=True)):
        assert states.begin(scored) is None
        assert (scored.num_read, scored.cached_tokens) == (0, 0)
        assert read_all(states, scored) == []


def test_others_continue_from_the_states_of_a_scored_prompt() -> None:
    states = shared()
    scored, follower = sequence(1, 2, 3, scored=True), sequence(1, 2, 9)
    states.begin(scored)
    assert scored.retain_at == {12}
    states.begin(follower)
    assert (follower.waits_for, follower.waits_until) == (scored, 8)
    assert read_all(states, scored) == [follower]
    later = sequence(1, 2, 3)
    assert states.begin(later) == "state 12"


def test_sequences_wait_for_the_one_furthest_ahead_but_not_scored_prompts() -> None:
    states = shared()
    ahead, scored, late = sequence(1, 2, 3), sequence(1, 2, 3, 4, scored=True), sequence(1, 2, 3)
    states.begin(ahead)
    ahead.pop_unread(4)
    states.begin(scored)
    states.begin(late)
    assert (late.waits_for, late.waits_until) == (ahead, 12)
    longer = sequence(1, 2, 3, 4)
    states.begin(longer)
    assert (longer.waits_for, longer.waits_until) == (scored, 16)


def test_a_prompt_continues_from_the_last_chunk_of_an_earlier_one() -> None:
    states = shared()
    first = sequence(1, 2, 3, tail=2)
    assert states.begin(first) is None
    assert first.retain_at == {12}
    read_all(states, first)
    for later in (sequence(1, 2, 3), sequence(1, 2, 3, 4), sequence(1, 2, 3, 9, 9)):
        assert states.begin(later) == "state 12"
        assert (later.num_read, later.cached_tokens) == (12, 12)
        read_all(states, later)
    other = sequence(2, 2, 3)
    assert states.begin(other) is None
    assert other.cached_tokens == 0


def test_the_last_token_is_never_in_a_cached_state() -> None:
    states = shared()
    first = sequence(1, 2, tail=0)
    states.begin(first)
    assert first.retain_at == {4}


def test_where_prompts_diverge_a_state_is_cached_from_the_second_on() -> None:
    states = shared()
    for prompt in (sequence(1, 2, 3, 4), sequence(1, 2, 5, 6)):
        assert states.begin(prompt) is None
        read_all(states, prompt)
    assert prompt.retain_at == {8, 16}
    third = sequence(1, 2, 7)
    assert states.begin(third) == "state 8"
    assert third.retain_at == {12}


def test_the_least_recently_used_state_goes_first() -> None:
    states = shared(2)
    for prompt in (sequence(1), sequence(2)):
        states.begin(prompt)
        read_all(states, prompt)
    assert states.num_bytes == 2 * STATE_BYTES
    assert states.begin(sequence(1, 9)) is not None
    third = sequence(3)
    states.begin(third)
    read_all(states, third)
    assert states.num_bytes == 2 * STATE_BYTES
    assert states.begin(sequence(1, 8)) is not None
    assert states.begin(sequence(2, 8)) is None


@pytest.mark.parametrize("capacity", [0, STATE_BYTES - 1])
def test_without_space_for_a_state_nothing_is_cached_or_waited_for(capacity: int) -> None:
    states = SharedPrefixes[str](capacity, STATE_BYTES, CHUNK)
    for prompt in (sequence(1), sequence(1)):
        assert states.begin(prompt) is None
        assert not prompt.retain_at
        assert prompt.waits_for is None
    assert states.leave(prompt) == []


def test_what_was_seen_is_bounded_and_its_beginning_is_forgotten_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefixes, "MAX_SEEN", 3)
    states = shared()
    for prompt in (sequence(1, 2, 3), sequence(4)):
        states.begin(prompt)
        states.leave(prompt)
    assert len(states._seen) == 3
    parting = sequence(1, 2, 3, 9)
    states.begin(parting)
    assert parting.retain_at == {8, 16}


def test_others_wait_for_the_one_that_reads_the_same() -> None:
    states = shared()
    reader, same, parts, other = (
        sequence(1, 2, 3),
        sequence(1, 2, 3, tail=2),
        sequence(1, 2, 9, 9),
        sequence(5, 2, 3),
    )
    for prompt in (reader, same, parts, other):
        assert states.begin(prompt) is None
    assert (same.waits_for, same.waits_until) == (reader, 12)
    assert (parts.waits_for, parts.waits_until) == (reader, 8)
    assert other.waits_for is None
    assert reader.retain_at == {8, 12}
    reader.pop_unread(8)
    assert states.retain(reader, "state 8") == [parts]
    assert (parts.waits_for, parts.num_read) == (None, 8)
    assert same.waits_for is reader
    late = sequence(1, 2, 4)
    assert states.begin(late) == "state 8"
    deep = sequence(1, 2, 9, 9, 9)
    states.begin(deep)
    assert deep.waits_for is parts
    assert read_all(states, reader) == [same]


def test_no_one_waits_for_a_prefix_that_was_already_passed() -> None:
    states = shared()
    reader, late = sequence(1, 2, 3, 4), sequence(1, 2, 9)
    states.begin(reader)
    reader.pop_unread(12)
    states.begin(late)
    assert late.waits_for is None
    assert late.retain_at == {8, 12}
    after = sequence(1, 2, 8)
    states.begin(after)
    assert after.waits_for is late


def test_sequences_that_waited_for_one_that_left_start_again() -> None:
    states = shared()
    reader, second, third = sequence(1, 2, 3), sequence(1, 2, 3), sequence(1, 2, 3)
    for prompt in (reader, second, third):
        states.begin(prompt)
    reader.pop_unread(4)
    orphans = states.leave(reader)
    assert orphans == [second, third]
    for orphan in orphans:
        assert states.begin(orphan) is None
    assert second.waits_for is None
    assert third.waits_for is second
    assert states.leave(third) == []
    assert read_all(states, second) == []


@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 1), max_size=5), st.booleans()), min_size=1, max_size=12
    ),
    moves=st.lists(
        st.tuples(st.sampled_from(["begin", "read", "chunk", "leave"]), st.integers(0, 7)),
        max_size=60,
    ),
    num_states=st.integers(1, 3),
)
def test_whatever_happens_there_is_always_one_that_reads(
    prompts: list[tuple[list[int], bool]], moves: list[tuple[str, int]], num_states: int
) -> None:
    states = shared(num_states)
    coming = [sequence(*chunks, scored=scored) for chunks, scored in prompts]
    running = list[EngineSequence]()

    def leave(prompt: EngineSequence) -> None:
        running.remove(prompt)
        for orphan in states.leave(prompt):
            states.begin(orphan)

    def end_those_that_are_read() -> None:
        for done in [prompt for prompt in running if prompt.is_read]:
            leave(done)

    for move, place in [*moves, *[("begin", 0)] * 12, *[("read", 0)] * 200]:
        if move == "begin" and coming:
            running.append(coming.pop())
            states.begin(running[-1])
            end_those_that_are_read()
        able = [prompt for prompt in running if prompt.waits_for is None]
        if move == "begin" or not running:
            continue
        assert able
        for waiting in running:
            if waiting.waits_for is not None:
                assert waiting.waits_for in running
                assert waiting.num_read < waiting.waits_until
                assert waiting.waits_for.num_read < waiting.waits_until
                assert waiting.waits_until in waiting.waits_for.retain_at
        if move == "leave":
            leave(running[place % len(running)])
            continue
        chosen = able[place % len(able)]
        chosen.pop_unread(chosen.next_piece(CHUNK if move == "chunk" else ALL, CHUNK))
        if chosen.num_read in chosen.retain_at:
            states.retain(chosen, "")
        end_those_that_are_read()
        assert states.num_bytes <= num_states * STATE_BYTES
    assert not running
    assert not coming
    assert not states._readers
    assert not states._followers


def test_the_longest_text_is_found_by_its_owner_until_it_is_forgotten() -> None:
    states = shared(3)
    me, you, tuned = (
        replace(REQUEST, owner="me"),
        replace(REQUEST, owner="you"),
        replace(REQUEST, owner="me", source=StoredState("initial", b"", is_initial=True)),
    )
    states.cache_text(me, b"the cat", (7,), "cat")
    states.cache_text(me, b"the", (), "the")
    states.cache_text(you, b"the cat sat", (), "sat")
    found = states.find_text(me, b"the cat sat on")
    assert found is not None
    assert (found[0].num_bytes, found[0].pending, found[1]) == (7, (7,), "cat")
    assert states.find_text(me, b"the") is None  # nothing would be left to read
    shorter = states.find_text(me, b"the cow")
    assert shorter is not None
    assert shorter[1] == "the"
    for other in (replace(REQUEST, owner="they"), tuned):
        assert states.find_text(other, b"the cat sat on") is None
    states.cache_text(me, b"the", (), "the again")
    states.cache_text(me, b"a", (), "a")  # who has most loses what it has not used for longest
    again = states.find_text(me, b"the cat sat on")
    assert again is not None
    assert again[1] == "the again"
    assert states.find_text(you, b"the cat sat on") is not None
    states.forget_owner("me")
    assert states.find_text(me, b"the cat sat on") is None
    assert states.find_text(you, b"the cat sat on") is not None
    states.drop_retained()
    assert states.find_text(you, b"the cat sat on") is None
    assert not states._lengths

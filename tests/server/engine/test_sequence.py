"""A turn's progress in reading its tokens."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from model.decoding.sampling import SamplingParams
from server.engine.messages import Continuation, EngineRequest
from server.engine.sequence import EngineSequence

REQUEST = EngineRequest("r", None, Continuation(), (), 5, SamplingParams())


def sequence(num_pending: int, num_prompt: int) -> EngineSequence:
    """Tokens 0, 1, 2, ..., of which the first are pending."""
    ids = tuple(range(num_pending + num_prompt))
    start = Continuation(position=10, pending=ids[:num_pending])
    return EngineSequence(replace(REQUEST, continuation=start, token_ids=ids[num_pending:]), 3.0)


def test_pending_tokens_are_read_first_and_count_once() -> None:
    made = sequence(2, 3)
    assert made.unread == [0, 1, 2, 3, 4]
    assert made.position == 13
    assert made.pop_unread(3) == [0, 1, 2]
    assert made.unread == [3, 4]
    assert made.position == 13
    assert made.submitted_at == made.admitted_at == made.read_at == made.last_token_at == 3.0


@given(
    num_pending=st.integers(0, 3),
    num_prompt=st.integers(0, 30),
    generates=st.booleans(),
    data=st.data(),
)
def test_pieces_are_whole_cuts_and_no_last_token_is_alone(
    num_pending: int, num_prompt: int, generates: bool, data: st.DataObject
) -> None:
    made, total = sequence(num_pending, num_prompt), num_pending + num_prompt
    made.generates = generates
    end = total if generates else max(0, total - 1)
    read = list[int]()
    while not made.is_read:
        assert made.num_unread == end - len(read)
        count = made.next_piece(data.draw(st.integers(4, 12)), 4)
        read += made.pop_unread(count)
        assert made.num_read == len(read)
        assert len(read) % 4 == 0 or made.is_read
    assert [*read, *made.unread] == list(range(total))
    assert len(made.unread) == (total == 1 if generates else min(1, total))


def test_there_is_no_piece_where_not_even_a_cut_fits() -> None:
    made = sequence(0, 10)
    assert [made.next_piece(most, 4) for most in (-3, 0, 3, 4, 7, 8, 9, 10)] == [
        0, 0, 0, 4, 4, 8, 8, 10,
    ]  # fmt: skip


def test_reading_stops_where_the_state_is_to_be_cached() -> None:
    made = sequence(0, 10)
    made.retain_at = {4, 6}
    stops = []
    while not made.is_read:
        made.pop_unread(made.next_piece(100, 2))
        stops.append(made.num_read)
    assert stops == [4, 6, 10]


def test_what_is_skipped_was_read_by_another() -> None:
    made = sequence(0, 10)
    made.skip_to(4)
    assert (made.num_read, made.cached_tokens, made.num_unread) == (4, 4, 6)
    assert made.pop_unread(2) == [4, 5]
    assert made.cached_tokens == 4

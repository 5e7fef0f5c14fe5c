"""The queue is bounded in requests and tokens; messages leave it in order."""

from dataclasses import replace

import pytest

from model.decoding.sampling import SamplingParams
from server.engine.inbox import Inbox
from server.engine.messages import (
    Cancel,
    Continuation,
    EngineMessage,
    EngineRequest,
    Release,
    Stop,
    StoredState,
    Submit,
)
from server.errors import Overloaded

REQUEST = EngineRequest("", None, Continuation(), (), 1, SamplingParams())


def submit(name: str, num_tokens: int) -> Submit:
    ids = (1,) * num_tokens
    return Submit(EngineRequest(name, None, Continuation(), ids, 1, SamplingParams()), 0.0)


def test_states_that_wait_are_bounded() -> None:
    inbox = Inbox(9, 100, max_waiting_bytes=10)
    large, small = (
        replace(submit(name, 1).request, source=StoredState(name, bytes(size)))
        for name, size in (("large", 30), ("small", 4))
    )
    inbox.submit(Submit(large, 0))  # alone it may be of any size
    with pytest.raises(Overloaded, match="30 bytes of states") as caught:
        inbox.submit(Submit(small, 0))
    assert caught.value.code == "queue_states_full"
    inbox.submit(submit("none", 1))
    inbox.left_queue(large)
    inbox.submit(Submit(small, 0))


def test_messages_come_out_in_order_and_only_when_there() -> None:
    inbox = Inbox(2, 10)
    assert list(inbox.receive(wait=False)) == []
    messages: list[EngineMessage] = [submit("a", 1), Cancel("a"), Release("state"), Stop()]
    inbox.submit(submit("a", 1))
    for message in messages[1:]:
        inbox.put(message)
    assert not inbox.empty
    assert list(inbox.receive(wait=True)) == messages


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ([1, 1, 1], [1], "queue_full"),
        ([3], [1, 1, 1], "queue_full"),
        ([6], [2, 3], "queue_tokens_full"),
    ],
)
def test_requests_are_queued_all_or_none(first: list[int], second: list[int], code: str) -> None:
    inbox = Inbox(3, 10)
    waiting = [submit(f"a{i}", tokens) for i, tokens in enumerate(first)]
    refused = [submit(f"b{i}", tokens) for i, tokens in enumerate(second)]
    inbox.submit(*waiting)
    with pytest.raises(Overloaded) as caught:
        inbox.submit(*refused)
    assert caught.value.code == code
    assert list(inbox.receive(wait=False)) == waiting
    for message in waiting:
        inbox.left_queue(message.request)
    inbox.submit(*refused)
    assert list(inbox.receive(wait=False)) == refused


def test_a_rejection_estimates_when_the_queue_will_have_drained() -> None:
    now = 100.0
    inbox = Inbox(10, 1000, lambda: now)
    late, new = submit("late", 1), [submit(f"a{i}", 1) for i in range(10)]

    def retry_after() -> int:
        with pytest.raises(Overloaded) as caught:
            inbox.submit(late)
        return int(caught.value.headers["Retry-After"])

    inbox.submit(*new)
    assert retry_after() == 1
    now += 0.5
    assert retry_after() == 5  # ten wait, and none has left in half a second
    for _ in range(4):
        now += 1
        inbox.left_queue(new[0].request)
        inbox.submit(new[0])
    assert retry_after() == 12  # 4.5 s for 4: 11.25 s for 10
    now += 1000
    assert retry_after() == 60
    for _ in range(100):
        now += 0.01
        inbox.left_queue(new[0].request)
        inbox.submit(new[0])
    assert retry_after() == 1  # only the last ones tell how fast it is
    for message in new:
        inbox.left_queue(message.request)
    now += 1000
    inbox.submit(*new)
    now += 0.1
    assert retry_after() == 1  # the time without a queue does not count


def test_a_waiter_times_out() -> None:
    inbox = Inbox(5, 100)
    assert list(inbox.receive(wait=True, timeout_s=0.001)) == []
    inbox.put(Cancel("a"))
    assert list(inbox.receive(wait=True, timeout_s=0.001)) == [Cancel("a")]


def test_one_owner_does_not_fill_the_queue_for_others() -> None:
    inbox = Inbox(8, 800)

    def ask(owner: str, count: int, num_tokens: int = 1) -> None:
        made = replace(REQUEST, owner=owner, token_ids=(1,) * num_tokens)
        inbox.submit(*(Submit(made, 0.0) for _ in range(count)))

    ask("a", 8)
    with pytest.raises(Overloaded):
        ask("a", 1)
    ask("b", 4)
    with pytest.raises(Overloaded):
        ask("b", 1)
    ask("c", 2, 100)
    with pytest.raises(Overloaded):
        ask("d", 1, 700)


def test_pending_tokens_count() -> None:
    inbox = Inbox(8, 800)
    start = replace(REQUEST.continuation, position=801, pending=(1,) * 801)
    inbox.submit(Submit(replace(REQUEST, continuation=start), 0.0))
    with pytest.raises(Overloaded):
        inbox.submit(Submit(replace(REQUEST, token_ids=(1,)), 0.0))

"""Log fields of a request."""

import json

from server.records import RequestRecord, TurnRecord


def test_what_is_not_known_is_left_out() -> None:
    record = RequestRecord("req_1", "GET", started=10.0)
    record.status, record.outcome, record.endpoint = 200, "ok", "/v1/models"
    record.ended = 10.1234567
    assert record.fields() == {
        "request_id": "req_1",
        "method": "GET",
        "endpoint": "/v1/models",
        "status": 200,
        "outcome": "ok",
        "total_s": 0.123457,
    }
    json.dumps(record.fields())


def test_a_turn_adds_its_tokens_and_times() -> None:
    turn = TurnRecord(max_tokens=5, num_choices=1, prompt_tokens=7)
    turn.cached_tokens, turn.generated_tokens, turn.queue_s = 3, 5, 0.25
    record = RequestRecord("req_1", "POST", turn=turn, session_id="sess_1", key="app")
    record.end()
    fields = record.fields()
    expected = {"tokens_in": 7, "tokens_cached": 3, "tokens_out": 5, "queue_s": 0.25}
    assert {name: fields[name] for name in expected} == expected
    assert (fields["session"], fields["key"]) == ("sess_1", "app")
    assert "prefill_s" not in fields


def test_a_turn_that_outlives_its_request_says_how_that_ended() -> None:
    turn = TurnRecord(max_tokens=5, num_choices=1, prompt_tokens=7, is_detached=True)
    record = RequestRecord("req_1", "POST", turn=turn)
    record.outcome = "ok"
    ended: list[RequestRecord] = []
    turn.on_end = lambda: ended.append(record)
    turn.outcome, turn.error = "server_error", "storage_failed"
    turn.end()
    assert ended == [record]
    record.end()
    assert (record.outcome, record.error) == ("server_error", "storage_failed")

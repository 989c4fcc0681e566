"""What a connection may say next: hello first and once, ids that go up, so many requests, at some pace."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.gateway.config import GatewayLimits
from gorouter_trio.gateway.frames import Violation
from gorouter_trio.gateway.machine import ConnectionMachine, Greet, Ignore, Refuse, Serve, Steer

HELLO = {"type": "hello", "version": 1}


def machine(*, is_open=True, **limits):
    made = ConnectionMachine(GatewayLimits(**limits), now=0.0)
    if is_open:
        assert isinstance(take(made, HELLO), Greet)
        made.open()
    return made


def take(made, message, now=0.0):
    return made.take(message if isinstance(message, (str, bytes)) else json.dumps(message), now=now)


def ask(request_id, **more):
    return {"type": "ask", "id": request_id, "session": "s", "messages": "hi", **more}


def code(move):
    assert isinstance(move, Violation), move
    return move.code


def test_the_way_it_should_be():
    """Requests run side by side, end, and are steered while they run."""
    made = machine()
    assert isinstance(take(made, ask(1)), Serve)
    assert isinstance(take(made, {"type": "clear", "id": 2, "session": "s"}), Serve)
    assert made.running == 2
    assert isinstance(take(made, {"type": "grant", "id": 1, "credit": 5}), Steer)
    made.end(1)
    assert isinstance(take(made, {"type": "cancel", "id": 1}), Ignore)
    assert made.running == 1


BEFORE_HELLO = [ask(1), {"type": "grant", "id": 1, "credit": 1}, {"type": "statistics", "id": 1}]


@pytest.mark.parametrize("message", BEFORE_HELLO)
def test_nothing_before_the_hello(message):
    """Whatever comes first is a hello, or the end."""
    assert code(take(machine(is_open=False), message)) == 4409


def test_one_hello():
    """A second one, also while the first is looked at, and one of another version."""
    assert code(take(machine(), HELLO)) == 4409
    made = machine(is_open=False)
    take(made, HELLO)
    assert code(take(made, HELLO)) == 4409
    assert code(take(machine(is_open=False), {"type": "hello", "version": 2})) == 4406


@pytest.mark.parametrize("request_id", [1, 2])
def test_ids_go_up(request_id):
    """An id that is not above the last one, and steering of what was never asked."""
    made = machine()
    take(made, ask(2))
    assert code(take(made, ask(request_id))) == 4409
    assert code(take(machine(), {"type": "cancel", "id": 1})) == 4409


MALFORMED = [
    "", "x", "[]", "null", "{}", '{"type":"nope"}', '{"type":"ask"}', '{"type":"ask","id":0,"messages":"x"}',
    '{"type":"ask","id":1,"messages":"x","unknown":1}', '{"type":"ask","id":1.5}',
    '{"type":"ask","id":9999999999999999}',
    '{"type":"ask","id":1,"options":{"extra_headers":{}}}', '{"type":"ask","id":1,"options":{"tenant":"x"}}',
    '{"type":"ask","id":1,"session":""}', '{"type":"ask","id":1,"session":"' + "x" * 4_097 + '"}',
    '{"type":"clear","id":1}', '{"type":"welcome","version":1}', "[" * 100_000, '{"type":"ask","id":1,"credit":-1}',
    '{"type":"answer","id":1,"session":"s","question_id":"q","approved":"yes"}', '{"type":"ask","id":NaN}',
    f'{{"type":"ask","id":1,"after":{"9" * 4_300}}}', f'{{"type":"ask","id":1,"credit":{"9" * 4_300}}}',
    f'{{"type":"history","id":1,"session":"s","start":{"9" * 4_300}}}',
    '{"type":"grant","id":1,"credit":9007199254740992}',
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed(text):
    """Closed with 4400, and a word about what is wrong."""
    move = take(machine(), text)
    assert code(move) == 4400
    assert isinstance(move, Violation)
    assert move.reason


def test_binary():
    """Bytes are not taken."""
    assert code(take(machine(), b"{}")) == 1003


@given(st.text() | st.binary())
def test_nothing_raises(message):
    """Whatever comes is a move."""
    take(machine(), message)


def test_so_many_requests():
    """One more is refused, and the connection lives."""
    made = machine(max_requests=2)
    take(made, ask(1))
    take(made, ask(2))
    refused = take(made, ask(3))
    assert isinstance(refused, Refuse)
    assert refused.failed.error.code == "too_many_requests"
    made.end(1)
    assert isinstance(take(made, ask(4)), Serve)


def test_so_many_messages():
    """A flood closes with 1008; at the pace that is allowed it goes on for ever."""
    made = machine(messages_per_s=2.0, message_burst=4)
    moves = [take(made, {"type": "cancel", "id": 1}) for _ in range(3)]
    assert code(take(machine(messages_per_s=2.0, message_burst=1), ask(1))) == 1008
    assert {code(move) for move in moves} == {4409}
    made = machine(messages_per_s=2.0, message_burst=4)
    for number in range(1, 50):
        assert isinstance(take(made, ask(number), now=number / 2), Serve)
        made.end(number)

"""Mail between actors: tagged, closed unions that could cross a wire as they are."""

from __future__ import annotations

import math

import msgspec
import pytest

from gorouter_trio.wire.mail import (
    AnswerQuestion,
    ClearHistory,
    CompactHistory,
    ForkHistory,
    HttpCall,
    PoolMail,
    ReadHistory,
    SessionMail,
    StartTurn,
    UndoTurns,
)

MAIL: list[tuple[object, SessionMail | PoolMail]] = [
    (PoolMail, HttpCall(method="GET", path="/models", body=b"\xff\x00", streaming=True, deadline=12.5)),
    (SessionMail, StartTurn(turn_id="t", messages=b'{"role":"user"}', options=b"{}", deadline=3.0)),
    (SessionMail, ReadHistory()),
    (SessionMail, ClearHistory()),
    (SessionMail, ForkHistory("other")),
    (SessionMail, StartTurn(turn_id="t", messages=b"", options=b"{}", resume=True, replaces="")),
    (SessionMail, UndoTurns()),
    (SessionMail, CompactHistory()),
    (SessionMail, AnswerQuestion("q", b"true")),
]


@pytest.mark.parametrize(("union", "mail"), MAIL, ids=lambda value: type(value).__name__)
def test_mail_survives_the_wire(union: object, mail: SessionMail | PoolMail) -> None:
    """Every kind of mail comes back equal, bytes included, and of its own kind."""
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(mail), type=union)
    assert back == mail
    assert type(back) is type(mail)


def test_mail_is_closed() -> None:
    """Unknown tags and unknown fields are refused: own mail is no place for guesses."""
    for odd in ({"type": "Nobody"}, {"type": "ForkHistory", "target": "x", "more": 1}, {"type": "ForkHistory"}, {}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(odd), type=SessionMail)


def test_mail_is_a_value() -> None:
    """Mail cannot be changed after it was sent, and has no deadline unless it was given one."""
    assert HttpCall().deadline == math.inf
    with pytest.raises(AttributeError):
        HttpCall().path = "/x"  # type: ignore[misc]

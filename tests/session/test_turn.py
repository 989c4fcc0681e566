"""The turn machine: what may follow what, and what a log that ends anywhere says of its turn."""

from __future__ import annotations

import msgspec
import pytest

from gorouter_trio.session.turn import MOVES, EntryOutOfOrderError, TurnMachine
from gorouter_trio.wire.codec import encode_json
from gorouter_trio.wire.journal import (
    QuestionAnswered,
    ToolsAnswered,
    TurnAbandoned,
    TurnAnswered,
    TurnCalled,
    TurnEntry,
    TurnParked,
    TurnResumed,
    TurnStarted,
)
from gorouter_trio.wire.messages import AssistantMessage, FunctionCall, ToolCall, ToolMessage
from gorouter_trio.wire.result import CallRecord

T = "t"
STARTED = TurnStarted(T, msgspec.Raw(b"[]"))
ANSWERED = TurnAnswered(T, msgspec.Raw(encode_json(AssistantMessage("A"))), CallRecord())
ABANDONED = TurnAbandoned(T, "x")
RESUMED = TurnResumed(T)


def called(*ids: str) -> TurnCalled:
    message = AssistantMessage(None, tool_calls=[ToolCall(i, FunctionCall("f", "{}")) for i in ids])
    return TurnCalled(T, msgspec.Raw(encode_json(message)), CallRecord())


def results(*ids: str) -> ToolsAnswered:
    return ToolsAnswered(T, msgspec.Raw(encode_json([ToolMessage(i, "R") for i in ids])))


def parked(call_id: str, question_id: str = "q", *, until_s: float | None = None) -> TurnParked:
    return TurnParked(T, question_id, call_id, msgspec.Raw(b'"ok?"'), until_s=until_s)


def replied(question_id: str = "q", *, taken: bool = False) -> QuestionAnswered:
    return QuestionAnswered(T, question_id, msgspec.Raw(b"true"), taken=taken)


def machine_after(*entries: TurnEntry) -> TurnMachine:
    machine = TurnMachine(T)
    for entry in entries:
        machine.apply(entry)
    return machine


@pytest.mark.parametrize(
    "entries",
    [
        (STARTED, ANSWERED),
        (STARTED, ABANDONED),
        (STARTED, called("a", "b"), results("a", "b"), ANSWERED),
        (STARTED, called("a", "b"), results("b"), results("a"), called("a"), results("a"), ANSWERED),
        (STARTED, called("a"), ABANDONED),
        (STARTED, called("a", "b"), parked("a"), results("b"), replied(taken=True), results("a"), ANSWERED),
        (STARTED, called("a"), parked("a"), replied(), RESUMED, results("a"), ANSWERED),
        (STARTED, called("a"), parked("a"), replied(taken=True), parked("a", "r"), replied("r"), ABANDONED),
        (STARTED, RESUMED, ANSWERED),
    ],
)
def test_what_a_turn_may_go_through(entries: tuple[TurnEntry, ...]) -> None:
    """Each of these is a turn, and it is over at its last entry and not before."""
    machine = TurnMachine(T)
    for entry in entries:
        assert not machine.is_over
        machine.apply(entry)
    assert machine.is_over
    assert machine.turn_id in repr(machine)


@pytest.mark.parametrize(
    ("entries", "wrong"),
    [
        ((), ANSWERED),
        ((STARTED,), STARTED),
        ((STARTED,), results("a")),
        ((STARTED,), called()),
        ((STARTED,), parked("a")),
        ((STARTED,), replied()),
        ((STARTED, called("a")), ANSWERED),
        ((STARTED, called("a")), called("b")),
        ((STARTED, called("a")), results("b")),
        ((STARTED, called("a")), results()),
        ((STARTED, called("a", "b")), results("a", "a")),
        ((STARTED, called("a", "b"), results("a")), results("a")),
        ((STARTED, called("a", "b"), parked("a")), parked("b")),
        ((STARTED, called("a"), parked("a")), parked("a", "r")),
        ((STARTED, called("a")), parked("b")),
        ((STARTED, called("a"), parked("a"), replied()), replied()),
        ((STARTED, called("a"), parked("a"), results("a")), replied()),
        ((STARTED, ANSWERED), ABANDONED),
        ((STARTED, ABANDONED), RESUMED),
        ((STARTED,), TurnAnswered("other", ANSWERED.message, ANSWERED.call)),
    ],
)
def test_what_is_out_of_order(entries: tuple[TurnEntry, ...], wrong: TurnEntry) -> None:
    """What cannot be next is refused and changes nothing."""
    machine = machine_after(*entries)
    before = (machine.state, dict(machine.open_calls), machine.questions, machine.rounds)
    assert machine.fault(wrong)
    with pytest.raises(EntryOutOfOrderError, match=type(wrong).__name__):
        machine.apply(wrong)
    assert (machine.state, dict(machine.open_calls), machine.questions, machine.rounds) == before


def test_the_table_has_every_entry_and_state() -> None:
    """Each entry of a turn has its place in the table, and each state that it leads to has its line."""
    assert {kind for moves in MOVES.values() for kind in moves} == set(TurnEntry.__args__)
    assert {state for moves in MOVES.values() for state in moves.values()} | {"new"} == set(MOVES)


def test_what_was_running_is_in_doubt_in_the_next_life() -> None:
    """Taken up again, a call that ran may have been carried out; one that waited was not."""
    machine = machine_after(STARTED, called("ran", "waits", "may"), parked("waits"), parked("may", "m"), replied("m"))
    assert machine.is_parked
    machine.apply(RESUMED)
    assert dict(machine.open_calls) == {"ran": "unknown", "waits": "waiting", "may": "running"}
    machine.apply(RESUMED)
    assert dict(machine.open_calls) == {"ran": "unknown", "waits": "waiting", "may": "unknown"}


def test_what_a_question_says() -> None:
    """A question is there with its reply until its call has a result."""
    machine = machine_after(STARTED, called("a", "b"), parked("a", until_s=9.0))
    (question,) = machine.questions
    assert (question.call_id, question.question, question.until_s, question.answer) == ("a", b'"ok?"', 9.0, None)
    machine.apply(replied())
    assert machine.question("q") is not None
    assert machine.questions[0].answer == b"true"
    assert machine.last_call is not None
    machine.apply(results("a"))
    assert machine.question("q") is None
    assert not machine.is_parked
    machine.apply(results("b"))
    assert machine.last_call is None
    assert (machine.state, machine.rounds) == ("sent", 1)

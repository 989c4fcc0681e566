"""The turn machine: what may be written of a turn, in which order, and how far a turn has come. Pure.

Theory of operation. A turn is written down as it goes, each step before the next one is begun::

    started -> [called -> tools | discarded]* -> answered | abandoned

`called` is an answer that calls tools, `tools` what they returned, in one entry or in several, until each
call has its one result; only then is the next request sent. `discarded` is an answer that had not the form that was
asked for. A call that waits for somebody outside is `parked` with its question, and `replied` when the reply is there.
A turn that a crash or a shutdown cut off is `resumed` when somebody takes it up again. `MOVES` has which entry may
follow in which state; whatever is written goes through `apply`, so that an entry out of order is never stored, and
read back the same way, so that the log tells after a crash what the turn was about:

* it was sent, and whether it was answered is unknown: in doubt, and not sent again unasked;
* a tool ran, and its result is unknown: that call is in doubt and not carried out again, unless it is harmless;
* a call waited for a reply: it was not carried out, and may be.

Ids of calls are here as the model gave them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias, cast

from msgspec import Struct

from ..wire.codec import decode_json, decode_message, decode_reports
from ..wire.journal import (
    AnswerDiscarded,
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

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..wire.messages import AssistantMessage
    from ..wire.result import CallRecord
    from ..wire.toolcalls import ToolCallReport

__all__ = ["MOVES", "CallState", "EntryOutOfOrderError", "OpenQuestion", "TurnMachine", "TurnState"]

TurnState = Literal["new", "sent", "calling", "answered", "abandoned"]
"""Not written down; waiting for the model; waiting for tools; ended with an answer; ended without one."""

CallState = Literal["running", "waiting", "replied", "unknown"]
"""A call without a result: it runs, or did when the process ended; waits for a reply; has its reply and was not begun;
may have been carried out in an earlier life."""

MOVES: Final[Mapping[TurnState, Mapping[type[TurnEntry], TurnState]]] = {
    "new": {TurnStarted: "sent"},
    "sent": {
        TurnCalled: "calling",
        AnswerDiscarded: "sent",
        TurnResumed: "sent",
        TurnAnswered: "answered",
        TurnAbandoned: "abandoned",
    },
    "calling": {
        ToolsAnswered: "calling",  # "sent", once no call is open
        TurnParked: "calling",
        QuestionAnswered: "calling",
        TurnResumed: "calling",
        TurnAbandoned: "abandoned",
    },
    "answered": {},
    "abandoned": {},
}
"""What may follow in each state, and the state then."""


class EntryOutOfOrderError(RuntimeError):
    """An entry that the turn cannot have in its state: nothing was written."""


class OpenQuestion(Struct, frozen=True):
    """A question that a call waits for: any JSON value, encoded, and its reply once it is there."""

    question_id: str
    call_id: str
    question: bytes
    until_s: float | None = None
    answer: bytes | None = None

    def has_lapsed(self, at_s: float) -> bool:
        """Whether there is no reply, and one that comes at `at_s` comes too late."""
        return self.answer is None and self.until_s is not None and self.until_s <= at_s

    def is_open(self, at_s: float) -> bool:
        """Whether a reply that comes at `at_s` counts."""
        return self.answer is None and not self.has_lapsed(at_s)


_Tool: TypeAlias = "Mapping[str, object]"


class TurnMachine:
    """One turn, as far as it was written down.

    `records` are of the answers so far, which called tools or were discarded; `rounds` counts those with tools, and
    `reports` are what became of their calls, those of a whole round in the order in which it has them.
    """

    __slots__ = (
        "_calls",
        "_first_report",
        "_message",
        "_order",
        "_questions",
        "records",
        "reports",
        "rounds",
        "state",
        "turn_id",
    )

    def __init__(self, turn_id: str) -> None:
        self.turn_id = turn_id
        self.state: TurnState = "new"
        self.records: list[CallRecord] = []
        self.reports: list[ToolCallReport] = []
        self.rounds = 0
        self._message = b""
        self._order: list[str] = []
        self._first_report = 0
        self._calls: dict[str, CallState] = {}
        self._questions: dict[str, OpenQuestion] = {}

    def __repr__(self) -> str:
        return f"<TurnMachine {self.turn_id!r}: {self.state}, {self.rounds} rounds, {len(self._calls)} open calls>"

    @property
    def is_over(self) -> bool:
        """Whether the turn has its end."""
        return self.state in {"answered", "abandoned"}

    @property
    def is_parked(self) -> bool:
        """Whether a call waits for a reply, or has it and was not begun: the turn can be taken up without a doubt."""
        return any(state in {"waiting", "replied"} for state in self._calls.values())

    @property
    def open_calls(self) -> Mapping[str, CallState]:
        """The calls without a result, by id."""
        return self._calls

    @property
    def last_call(self) -> AssistantMessage | None:
        """The answer whose calls are open; None when none is."""
        return cast("AssistantMessage", decode_message(self._message)) if self._calls else None

    @property
    def questions(self) -> list[OpenQuestion]:
        """The questions of the open calls, those with a reply included."""
        return list(self._questions.values())

    def question(self, question_id: str) -> OpenQuestion | None:
        """The question with this id, while its call is open."""
        return self._questions.get(question_id)

    def has_reply(self, question_id: str) -> bool:
        """Whether the question has its reply, and its call was not begun."""
        question = self._questions.get(question_id)
        return question is not None and self._calls[question.call_id] == "replied"

    def fault(self, entry: TurnEntry) -> str | None:
        """Why `entry` cannot be next; None when it can."""
        if entry.turn_id != self.turn_id:
            return f"it is of turn {entry.turn_id!r}"
        if type(entry) not in MOVES[self.state]:
            return f"it may not follow while the turn is {self.state}"
        match entry:
            case TurnCalled(message=message):
                return None if _call_ids(bytes(message)) else "it calls no tool"
            case ToolsAnswered(messages=messages):
                return self._fault_of_results(_results(bytes(messages)))
            case TurnParked(question_id=question_id, call_id=call_id):
                is_free = question_id not in self._questions and self._calls.get(call_id) in {"running", "unknown"}
                return None if is_free else f"call {call_id!r} does not run, or {question_id!r} was asked before"
            case QuestionAnswered(question_id=question_id):
                question = self._questions.get(question_id)
                return None if question is not None and question.answer is None else f"nobody asks {question_id!r}"
            case _:
                return None

    def apply(self, entry: TurnEntry) -> None:
        """Take the next entry into account; raises `EntryOutOfOrderError`, and changes nothing, when it cannot be."""
        fault = self.fault(entry)
        if fault is not None:
            raise EntryOutOfOrderError(f"{type(entry).__name__} of turn {self.turn_id!r}: {fault}")
        self.state = MOVES[self.state][type(entry)]
        match entry:
            case TurnCalled():
                self._begin_round(bytes(entry.message), entry.call)
            case ToolsAnswered(messages=messages, reports=reports):
                self.reports += decode_reports(bytes(reports))
                self._take_results(_results(bytes(messages)))
            case TurnParked():
                self._calls[entry.call_id] = "waiting"
                self._questions[entry.question_id] = OpenQuestion(
                    entry.question_id, entry.call_id, bytes(entry.question), entry.until_s
                )
            case QuestionAnswered():
                self._take_reply(entry)
            case AnswerDiscarded(call=record):
                self.records.append(record)
            case TurnResumed():
                self._take_up()
            case _:
                pass

    def _begin_round(self, message: bytes, record: CallRecord) -> None:
        self.records.append(record)
        self.rounds += 1
        self._message = message
        self._order = _call_ids(message)
        self._first_report = len(self.reports)
        self._calls = dict.fromkeys(self._order, "running")
        self._questions = {}

    def _fault_of_results(self, results: list[_Tool]) -> str | None:
        seen: set[object] = set()
        for result in results:
            call_id = result.get("tool_call_id")
            if call_id not in self._calls or call_id in seen:
                return f"call {call_id!r} is not open"
            seen.add(call_id)
        return None if results else "it has no result"

    def _take_results(self, results: list[_Tool]) -> None:
        for result in results:
            del self._calls[str(result["tool_call_id"])]
        self._questions = {k: q for k, q in self._questions.items() if q.call_id in self._calls}
        if not self._calls:
            self.state = "sent"
            self._message = b""
            self._sort_reports()

    def _sort_reports(self) -> None:
        places = {call_id: place for place, call_id in enumerate(self._order)}
        begin = self._first_report
        self.reports[begin:] = sorted(self.reports[begin:], key=lambda report: places.get(report.call_id, len(places)))

    def _take_reply(self, entry: QuestionAnswered) -> None:
        question = self._questions[entry.question_id]
        self._questions[entry.question_id] = OpenQuestion(
            question.question_id, question.call_id, question.question, question.until_s, bytes(entry.answer)
        )
        self._calls[question.call_id] = "running" if entry.taken else "replied"

    def _take_up(self) -> None:
        """What ran may have been carried out; what has its reply is begun now."""
        after: dict[CallState, CallState] = {"running": "unknown", "replied": "running"}
        self._calls = {call_id: after.get(state, state) for call_id, state in self._calls.items()}


def _call_ids(message: bytes) -> list[str]:
    answer = cast("AssistantMessage", decode_message(message))
    return [call.id for call in answer.tool_calls or ()]


def _results(messages: bytes) -> list[_Tool]:
    return cast("list[_Tool]", decode_json(messages))

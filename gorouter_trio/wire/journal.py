"""Entries of a session's log: what a store keeps, encoded once and never edited.

A log is a sequence of turns. A turn starts with the user's messages, before anything is sent, and
ends answered or abandoned; one that only started is in doubt. In between, each round of tools has the
answer that calls them and what they returned, and a call that has to wait for somebody outside has the
question and, once it is there, the reply. What is undone, folded or compacted is said by entries of
its own. The tags and fields are a stored format: they may grow tags, and fields with defaults,
nothing else.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TypeAlias

import msgspec
from msgspec import Struct

from .result import CallRecord

__all__ = [
    "AnswerDiscarded",
    "HistoryCompacted",
    "HistoryFolded",
    "LogEntry",
    "QuestionAnswered",
    "ToolsAnswered",
    "TurnAbandoned",
    "TurnAnswered",
    "TurnCalled",
    "TurnEntry",
    "TurnParked",
    "TurnResumed",
    "TurnStarted",
    "TurnsDropped",
]


class TurnStarted(Struct, frozen=True, tag="started", omit_defaults=True):
    """The user's messages, a JSON array; `at_s` is wall-clock seconds since the epoch.

    `replaces` is the id of a turn that gives way to this one, with all that follow it, once this one has an
    answer. `joined` are the ids of further turns that were asked for and are taken in this one. `first` counts the
    turns of the history that its requests leave out. `tokens` is, in a log that was written anew, what the turn adds to
    a request: its usage counts turns that this log has not.
    """

    turn_id: str
    messages: msgspec.Raw
    at_s: float = 0.0
    replaces: str = ""
    joined: tuple[str, ...] = ()
    first: int = 0
    tokens: int | None = None


class TurnCalled(Struct, frozen=True, tag="called"):
    """An answer that calls tools, which are run next."""

    turn_id: str
    message: msgspec.Raw
    call: CallRecord


class ToolsAnswered(Struct, frozen=True, tag="tools", omit_defaults=True):
    """Tool messages, a JSON array, of some or all calls of the answer before, and a report on each, another one."""

    turn_id: str
    messages: msgspec.Raw
    reports: msgspec.Raw = msgspec.Raw(b"[]")


class AnswerDiscarded(Struct, frozen=True, tag="discarded"):
    """An answer that was paid for and is no part of the conversation: it had not the form that was asked for."""

    turn_id: str
    message: msgspec.Raw
    call: CallRecord


class TurnParked(Struct, frozen=True, tag="parked", omit_defaults=True):
    """A call that is not carried out before somebody outside has replied to a question, any JSON value.

    `until_s` is when the question lapses, in wall-clock seconds since the epoch.
    """

    turn_id: str
    question_id: str
    call_id: str
    question: msgspec.Raw = msgspec.Raw(b"null")
    at_s: float = 0.0
    until_s: float | None = None


class QuestionAnswered(Struct, frozen=True, tag="replied", omit_defaults=True):
    """The reply to a question, any JSON value; `taken` says that the turn ran and went on with it at once."""

    turn_id: str
    question_id: str
    answer: msgspec.Raw
    at_s: float = 0.0
    taken: bool = False


class TurnResumed(Struct, frozen=True, tag="resumed", omit_defaults=True):
    """A turn that an earlier life left is taken up again: from here on, what is open may be carried out again."""

    turn_id: str
    at_s: float = 0.0


class TurnAnswered(Struct, frozen=True, tag="answered"):
    """The assistant's message, whole or, where the call says `interrupted`, what had arrived of it."""

    turn_id: str
    message: msgspec.Raw
    call: CallRecord


class TurnAbandoned(Struct, frozen=True, tag="abandoned"):
    """The turn ended without an answer; it is not part of later requests, except for rounds of tools that it had."""

    turn_id: str
    reason: str
    maybe_billed: bool = False


class TurnsDropped(Struct, frozen=True, tag="dropped", omit_defaults=True):
    """The turn and all that follow it are not part of the history any more."""

    turn_id: str
    at_s: float = 0.0


class HistoryFolded(Struct, frozen=True, tag="folded", omit_defaults=True):
    """One message, a summary, stands in later requests for everything up to the end of a turn.

    `turn_id` is the turn's id and `upto` how many turns of the history that makes, since an id may come twice in it;
    0 in logs of earlier versions, which meant the last turn of this id. Without a `turn_id` the summary stands for what
    came before the first turn of the log.
    """

    message: msgspec.Raw
    turn_id: str = ""
    at_s: float = 0.0
    upto: int = 0


class HistoryCompacted(Struct, frozen=True, tag="compacted", omit_defaults=True):
    """What a log that was written anew has left out: the ids of answered turns, and what their calls add up to.

    `cost_usd` is the sum of the costs that are known, `unpriced` counts the calls without one.
    """

    turn_ids: tuple[str, ...] = ()
    calls: int = 0
    cost_usd: Decimal = Decimal(0)
    unpriced: int = 0


TurnEntry: TypeAlias = (
    TurnStarted
    | TurnCalled
    | ToolsAnswered
    | AnswerDiscarded
    | TurnParked
    | QuestionAnswered
    | TurnResumed
    | TurnAnswered
    | TurnAbandoned
)
"""What is written of one turn."""

LogEntry: TypeAlias = TurnEntry | TurnsDropped | HistoryFolded | HistoryCompacted

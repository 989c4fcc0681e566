"""Messages that were said elsewhere, as turns of a session's log. Pure.

A turn is what was asked and one answer, so messages are cut behind each of the assistant's. What follows the last one,
and tool messages that answer no open call, cannot be part of a conversation that a provider accepts. They are kept in
the log, as turns that were abandoned, and named to whoever adds them. Where an answer follows another whose calls
nobody has answered, results that say so are put between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, Struct

from ..wire.codec import encode_json
from ..wire.journal import LogEntry, TurnAbandoned, TurnAnswered, TurnStarted
from ..wire.messages import AssistantMessage, Message, ToolMessage
from ..wire.result import CallRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..wire.result import HistoryEntry

__all__ = ["SetAside", "Turns", "to_turns"]

_NOT_ANSWERED = "The call was not carried out: the conversation went on without it."
_NO_CALL = CallRecord(attempts=0)
"""Of an answer whose call is not known: nothing was sent for it, and nothing is counted."""


class SetAside(Struct, frozen=True):
    """A message that is kept outside of the conversation: its place among those given, from 0, and why."""

    position: int
    reason: str


class Turns(Struct, frozen=True):
    """Encoded entries of a log, and the messages that became no part of the conversation."""

    entries: tuple[bytes, ...]
    set_aside: tuple[SetAside, ...]


def to_turns(history: Iterable[HistoryEntry], *, turn_id: str, at_s: float = 0.0) -> Turns:
    """The messages as turns whose ids begin with `turn_id`.

    `at_s` is when they were asked, in wall-clock seconds since the epoch, where the call that answered them does not
    say; 0 for unknown.
    """
    writer = _Writer(turn_id, at_s)
    for position, entry in enumerate(history):
        writer.take(position, entry)
    return writer.finish()


class _Writer:
    def __init__(self, turn_id: str, at_s: float) -> None:
        self._turn_id = turn_id
        self._at_s = at_s
        self._log: list[bytes] = []
        self._set_aside: list[SetAside] = []
        self._asked: list[tuple[int, Message]] = []
        # In the order of the calls.
        self._open_calls: dict[str, None] = {}
        self._turns = 0

    def take(self, position: int, entry: HistoryEntry) -> None:
        message = entry.message
        if isinstance(message, AssistantMessage):
            self._answer(message, entry.call or _NO_CALL)
        elif isinstance(message, ToolMessage) and message.tool_call_id not in self._open_calls:
            self._abandon(position, message, "answers no open call")
        else:
            if isinstance(message, ToolMessage):
                del self._open_calls[message.tool_call_id]
            self._asked.append((position, message))

    def finish(self) -> Turns:
        for position, message in self._asked:
            self._abandon(position, message, "was never answered")
        return Turns(tuple(self._log), tuple(self._set_aside))

    def _answer(self, message: AssistantMessage, call: CallRecord) -> None:
        turn_id = self._next_id()
        asked: list[Message] = [message for _position, message in self._asked]
        if not asked:
            asked = [ToolMessage(call_id, _NOT_ANSWERED) for call_id in self._open_calls]
        if asked:
            self._write(TurnStarted(turn_id, _raw(asked), call.finished_at_s or self._at_s))
        self._write(TurnAnswered(turn_id, _raw(message), call))
        self._asked = []
        self._open_calls = {} if message.tool_calls is UNSET else dict.fromkeys(call.id for call in message.tool_calls)

    def _abandon(self, position: int, message: Message, reason: str) -> None:
        turn_id = self._next_id()
        self._write(TurnStarted(turn_id, _raw([message]), self._at_s))
        self._write(TurnAbandoned(turn_id, f"added: {reason}"))
        self._set_aside.append(SetAside(position, reason))

    def _next_id(self) -> str:
        self._turns += 1
        return f"{self._turn_id}-{self._turns}"

    def _write(self, entry: LogEntry) -> None:
        self._log.append(encode_json(entry))


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(encode_json(value))

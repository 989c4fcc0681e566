"""What a session's log means: the messages of the next request, and what became of each turn. Pure.

The log is only ever appended to. What is rendered from it is valid for a provider at every instant:
a turn that was abandoned is left out, and each assistant message that calls tools is followed by
exactly one tool message per call, a synthetic one where none was ever written.
"""

from __future__ import annotations

from ..errors import BadRequestError
from ..wire.codec import decode_message, decode_messages, encode_message
from ..wire.journal import LogEntry, TurnAbandoned, TurnAnswered, TurnStarted
from ..wire.messages import AssistantMessage, Message, ToolMessage
from ..wire.result import HistoryEntry

__all__ = ["Transcript", "entries_of"]

_NOT_ANSWERED = "The call was not carried out: the turn ended before its tools ran."


class Transcript:
    """The state of one session, built entry by entry.

    `rendered` grows by the bytes of each turn; nothing in it is ever encoded again.
    """

    __slots__ = ("_answered", "_open_calls", "_pending", "rendered")

    def __init__(self) -> None:
        self.rendered = bytearray()
        self._answered: dict[str, bool] = {}
        self._open_calls: list[str] = []
        self._pending: TurnStarted | None = None

    @property
    def in_doubt(self) -> str | None:
        """The id of a turn that was started and has no end."""
        return None if self._pending is None else self._pending.turn_id

    @property
    def turns(self) -> int:
        """Turns that have ended, abandoned ones included."""
        return len(self._answered)

    def is_answered(self, turn_id: str) -> bool | None:
        """Whether the turn of this id was answered; None when there was none."""
        return self._answered.get(turn_id)

    def render(self, messages: bytes) -> bytes:
        """The messages of a request: everything so far and `messages`, joined by commas.

        Raises `BadRequestError` when `messages` holds a tool message that answers no open call.
        """
        added = self._with_open_calls_closed(messages)
        return bytes(self.rendered) + b"," + added if self.rendered else added

    def apply(self, entry: LogEntry) -> None:
        """Take the next entry of the log into account."""
        match entry:
            case TurnStarted():
                self._pending = entry
            case TurnAnswered():
                self._apply_answer(entry)
            case TurnAbandoned():
                self._pending = None
                self._answered[entry.turn_id] = False

    def _apply_answer(self, entry: TurnAnswered) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and pending.turn_id == entry.turn_id:
            self._add(self._with_open_calls_closed(bytes(pending.messages)[1:-1]))
        message = bytes(entry.message)
        self._add(message)
        self._answered[entry.turn_id] = True
        self._open_calls = _calls_of(message) if b'"tool_calls"' in message else []

    def _add(self, encoded: bytes) -> None:
        if self.rendered:
            self.rendered += b","
        self.rendered += encoded

    def _with_open_calls_closed(self, messages: bytes) -> bytes:
        if not self._open_calls and b'"tool"' not in messages:
            return messages
        return _close_calls(self._open_calls, decode_messages(messages))


def _calls_of(message: bytes) -> list[str]:
    decoded = decode_message(message)
    return [call.id for call in decoded.tool_calls or ()] if isinstance(decoded, AssistantMessage) else []


def _close_calls(open_calls: list[str], messages: list[Message]) -> bytes:
    """`messages` with their tool messages first, one for each open call."""
    given = {message.tool_call_id: message for message in messages if isinstance(message, ToolMessage)}
    unknown = [call_id for call_id in given if call_id not in open_calls]
    if unknown:
        raise BadRequestError(f"messages: tool_call_id {unknown[0]!r} answers no open call", status=400)
    closed: list[Message] = [given.get(i) or ToolMessage(tool_call_id=i, content=_NOT_ANSWERED) for i in open_calls]
    rest = [message for message in messages if not isinstance(message, ToolMessage)]
    return b",".join(encode_message(message) for message in closed + rest)


def entries_of(log: list[LogEntry]) -> list[HistoryEntry]:
    """The messages of the answered turns of a log, in order, with their calls."""
    history: list[HistoryEntry] = []
    started: TurnStarted | None = None
    for entry in log:
        if isinstance(entry, TurnStarted):
            started = entry
        elif isinstance(entry, TurnAnswered):
            if started is not None and started.turn_id == entry.turn_id:
                history += [HistoryEntry(m) for m in decode_messages(bytes(started.messages)[1:-1])]
            history.append(HistoryEntry(decode_message(bytes(entry.message)), entry.call))
    return history

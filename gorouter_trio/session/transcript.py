"""What a session's log means: the messages of the next request, and what became of each turn. Pure.

The log is only ever appended to, and never edited. What is rendered from it is accepted by providers
at every instant, whatever was cut where:

* a turn that was abandoned is left out, and so is one that was interrupted before it said anything;
* each assistant message that calls tools is followed by exactly one tool message per call, in the
  order of the calls, a synthetic one where none was given;
* ids of calls are distinct in the whole request: some engines number them anew in every answer;
* an answer that says nothing at all is left out, since an empty message is refused by some.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import msgspec
from msgspec import Struct

from ..errors import BadRequestError
from ..wire.codec import decode_json, decode_message, decode_messages, encode_json, encode_message
from ..wire.journal import LogEntry, TurnAbandoned, TurnAnswered, TurnStarted
from ..wire.result import HistoryEntry

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ..wire.messages import AssistantMessage

__all__ = ["Transcript", "TurnOutcome", "entries_of"]

TurnOutcome = Literal["answered", "abandoned", "in_doubt"]
"""What became of a turn: answered, wholly or until it was interrupted; ended without an answer, and
not billed; sent and not answered, so that it may have been billed."""

_Object: TypeAlias = "dict[str, object]"

_NOT_ANSWERED = "The call was not carried out: the turn ended before its tools ran."
_MAX_ID = 40
# The start of an answer that takes a closer look to know whether it says anything: null, a list, a blank of any script,
# an escape, or a form that this package does not write.
_MAY_BE_BLANK = re.compile(
    rb'\{"role":"assistant","content":(?:null|\[|"[\s\\"\xc2\xe1\xe2\xe3])|(?!\{"role":"assistant","content":)'
)


class _Call(Struct, frozen=True, gc=False):
    """A tool call by the id that the model gave it, and the id that it has in requests."""

    given: str
    rendered: str


class _Fitted(Struct, frozen=True):
    """Messages as a request has them, and the ids of the calls among them."""

    messages: bytes
    call_ids: tuple[str, ...] = ()


class Transcript:
    """The state of one session, built entry by entry.

    `rendered` grows by the bytes of each turn, behind `system`, the encoded system messages; nothing
    in it is ever encoded again.
    """

    __slots__ = ("_call_ids", "_open_calls", "_outcomes", "_pending", "rendered")

    def __init__(self, system: bytes = b"") -> None:
        self.rendered = bytearray(system)
        self._outcomes: dict[str, TurnOutcome] = {}
        self._call_ids: set[str] = set()
        self._open_calls: list[_Call] = []
        self._pending: TurnStarted | None = None

    @property
    def unfinished(self) -> str | None:
        """The id of a turn that was started and has no end."""
        return None if self._pending is None else self._pending.turn_id

    @property
    def turns(self) -> int:
        """Turns that have ended, abandoned ones included."""
        return len(self._outcomes)

    def outcome(self, turn_id: str) -> TurnOutcome | None:
        """What became of the turn of this id; None when there was none, or it has no end."""
        return self._outcomes.get(turn_id)

    def render(self, messages: bytes) -> bytes:
        """The messages that follow `rendered` in a request that adds `messages`, both joined by commas.

        Raises `BadRequestError` when a tool message among `messages` answers no open call, or one
        that was answered already.
        """
        return self._fit(messages).messages

    def apply(self, entry: LogEntry) -> None:
        """Take the next entry of the log into account."""
        match entry:
            case TurnStarted():
                self._pending = entry
            case TurnAnswered():
                self._apply_answer(entry)
            case TurnAbandoned():
                self._pending = None
                self._outcomes[entry.turn_id] = "in_doubt" if entry.maybe_billed else "abandoned"

    def _apply_answer(self, entry: TurnAnswered) -> None:
        pending, self._pending = self._pending, None
        self._outcomes[entry.turn_id] = "answered"
        message = bytes(entry.message)
        is_blank = _MAY_BE_BLANK.match(message) is not None and _is_blank(_decode_answer(message))
        if is_blank and entry.call.interrupted:
            return
        if pending is not None and pending.turn_id == entry.turn_id:
            fitted = self._fit(bytes(pending.messages)[1:-1])
            self._call_ids.update(fitted.call_ids)
            self._add(fitted.messages)
        self._open_calls = []
        if not is_blank:
            self._add(self._take_calls(message) if b'"tool_calls"' in message else message)

    def _add(self, encoded: bytes) -> None:
        if self.rendered:
            self.rendered += b","
        self.rendered += encoded

    def _take_calls(self, encoded: bytes) -> bytes:
        """An answer with its calls under distinct ids, which are open from now on."""
        answer = _decode_answer(encoded)
        calls = answer.tool_calls or []
        self._open_calls = _distinct([call.id for call in calls], self._call_ids)
        self._call_ids.update(call.rendered for call in self._open_calls)
        if all(call.given == call.rendered for call in self._open_calls):
            return encoded
        renamed = [
            msgspec.structs.replace(call, id=fresh.rendered)
            for call, fresh in zip(calls, self._open_calls, strict=True)
        ]
        return encode_message(msgspec.structs.replace(answer, tool_calls=renamed))

    def _fit(self, messages: bytes) -> _Fitted:
        if not self._open_calls and b'"tool' not in messages:
            return _Fitted(messages)
        given = cast("list[_Object]", decode_json(b"[%b]" % messages))
        fitting = _Fitting(self._open_calls, self._call_ids)
        for message in given:
            fitting.take(message)
        fitted = fitting.finish()
        added = len(fitted) - len(given)
        # What stays as it came keeps its bytes, to the last digit of a number.
        if all(ours is theirs for ours, theirs in zip(fitted[added:], given, strict=True)):
            encoded = b",".join([encode_json(message) for message in fitted[:added]] + [messages])
        else:
            encoded = b",".join(encode_json(message) for message in fitted)
        return _Fitted(encoded, tuple(fitting.new_ids))


class _Fitting:
    """Takes the messages of a prompt one by one and puts each tool message behind the call that it answers."""

    __slots__ = ("_calls", "_done", "_given", "_rest", "_used", "new_ids")

    def __init__(self, open_calls: list[_Call], used: set[str]) -> None:
        self._done: list[_Object] = []
        self._calls = open_calls
        self._given: list[_Object | None] = [None] * len(open_calls)
        self._rest: list[_Object] = []
        self._used = used
        self.new_ids: list[str] = []

    def take(self, message: _Object) -> None:
        """The next message; raises `BadRequestError` for a tool message that answers no open call."""
        if message.get("role") == "tool":
            self._place(message)
        elif message.get("role") == "assistant" and message.get("tool_calls"):
            self._close()
            self._done.append(self._open(message))
        else:
            self._rest.append(message)

    def finish(self) -> list[_Object]:
        """All messages, with nothing left open."""
        self._close()
        return self._done

    def _place(self, message: _Object) -> None:
        call_id = message.get("tool_call_id")
        places = [n for n, call in enumerate(self._calls) if call_id in (call.given, call.rendered)]
        free = [n for n in places if self._given[n] is None]
        if not free:
            fault = "answers a call that is answered already" if places else "answers no open call"
            raise BadRequestError(f"messages: tool_call_id {call_id!r} {fault}", status=400)
        call = self._calls[free[0]]
        if call_id != call.rendered:
            message = {**message, "tool_call_id": call.rendered}
        self._given[free[0]] = message

    def _close(self) -> None:
        """Answer every open call, and let what came meanwhile follow."""
        for call, answer in zip(self._calls, self._given, strict=True):
            missing: _Object = {"role": "tool", "tool_call_id": call.rendered, "content": _NOT_ANSWERED}
            self._done.append(missing if answer is None else answer)
        self._done += self._rest
        self._calls, self._given, self._rest = [], [], []

    def _open(self, message: _Object) -> _Object:
        """An assistant's message among the prompt's: its calls are answered by what follows it."""
        calls = _read_calls(message["tool_calls"])
        self._calls = _distinct([str(call.get("id") or "") for call in calls], self._used, self.new_ids)
        self._given = [None] * len(calls)
        self.new_ids += [call.rendered for call in self._calls]
        if all(call.given == call.rendered for call in self._calls):
            return message
        renamed = [{**call, "id": fresh.rendered} for call, fresh in zip(calls, self._calls, strict=True)]
        return {**message, "tool_calls": renamed}


def _distinct(ids: Iterable[str], *used: Collection[str]) -> list[_Call]:
    """Calls whose rendered ids are in nobody's way."""
    calls: list[_Call] = []
    fresh: set[str] = set()
    # A number that was hardly taken before: counting up from 1 would make an engine that reuses ids cost a square.
    number = sum(map(len, used)) + 1
    for given in ids:
        rendered = given or "call"
        while rendered in fresh or any(rendered in some for some in used):
            suffix = f"_{number}"
            rendered = (given or "call")[: _MAX_ID - len(suffix)] + suffix
            number += 1
        fresh.add(rendered)
        calls.append(_Call(given, rendered))
    return calls


def _read_calls(calls: object) -> list[_Object]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRequestError("messages: tool_calls must be a list of calls", status=400)
    return calls


def _decode_answer(encoded: bytes) -> AssistantMessage:
    return cast("AssistantMessage", decode_message(encoded))


def _is_blank(answer: AssistantMessage) -> bool:
    """Whether an answer has nothing in it that may stand in a request."""
    if answer.tool_calls or answer.refusal or answer.images or answer.audio:
        return False
    content = answer.content
    return not (content.strip() if isinstance(content, str) else content)


def entries_of(log: Iterable[LogEntry]) -> list[HistoryEntry]:
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

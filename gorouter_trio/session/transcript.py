"""What a session's log means: the messages of the next request, and what became of each turn. Pure.

The log is only ever appended to, and never edited. What is rendered from it is accepted by providers
at every instant, whatever was cut where:

* a turn that was abandoned is left out, and so is one that was interrupted before it said anything;
* rounds of tools stay, whatever became of their turn: what a tool did has been done;
* each assistant message that calls tools is followed by exactly one tool message per call, in the
  order of the calls, a synthetic one where none was given, which says what happened;
* ids of calls are distinct in the whole request: some engines number them anew in every answer;
* ids, names and arguments of calls have the form that the strictest provider takes, whatever a model made of them:
  arguments that are no JSON object, as where an answer was cut off, are rendered as an empty one;
* an answer that says nothing at all is left out, since an empty message is refused by some, and one that is nothing but
  a refusal has the text of that.

A turn without an end that something else follows is in doubt, as one that ended so: messages were added behind it, or
another process wrote on.

A turn that gives way to another one, and those after it, are cut off at the end of `rendered`; what
a summary stands for, or a limit leaves out, is cut off at its front, in the request alone. Both cuts
are made at the start of a turn only, and the front's only where no call is open, so no group of a
call and its results is ever split.
"""

from __future__ import annotations

import re
from array import array
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import msgspec
from msgspec import UNSET, Struct

from ..errors import BadRequestError
from ..wire.codec import decode_json, decode_message, decode_messages, encode_json, encode_message
from ..wire.journal import (
    AnswerDiscarded,
    HistoryCompacted,
    HistoryFolded,
    LogEntry,
    QuestionAnswered,
    ToolsAnswered,
    TurnAbandoned,
    TurnAnswered,
    TurnCalled,
    TurnParked,
    TurnResumed,
    TurnsDropped,
    TurnStarted,
)
from ..wire.sendable import MAX_CALL_ID, acceptable_call, acceptable_id
from .turn import EntryOutOfOrderError, TurnMachine

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from ..wire.messages import AssistantMessage, Message
    from ..wire.result import CallRecord

__all__ = ["BYTES_PER_TOKEN", "Piece", "Transcript", "TurnOutcome"]

TurnOutcome = Literal["answered", "abandoned", "in_doubt", "forgotten"]
"""What became of a turn: answered, wholly or until it was interrupted; ended without an answer, and
not billed; sent and not answered, so that it may have been billed; answered, and the log was
compacted since, so that the answer is gone."""

BYTES_PER_TOKEN = 4
"""What tokens are estimated by before a reply has counted them: bytes of JSON, of any script."""

Piece: TypeAlias = bytes | bytearray | memoryview
"""Some of the bytes of a request."""

_Object: TypeAlias = dict[str, object]
_Step: TypeAlias = TurnCalled | ToolsAnswered | AnswerDiscarded | TurnParked | QuestionAnswered | TurnResumed

_NOT_ANSWERED = "The call was not carried out: the turn ended before its tools ran."
_INTERRUPTED = "The call was interrupted; whether it was carried out is unknown."
_NOT_PERMITTED = "The call was not carried out: it waited for a reply that did not come."
_ANSWERED: Collection[TurnOutcome] = ("answered", "forgotten")
_NOTHING: Mapping[Any, Any] = MappingProxyType({})
# The start of an answer that takes a closer look to know whether it says anything: null, a list, a blank of any script,
# an escape, or a form that this package does not write.
_MAY_BE_BLANK = re.compile(
    rb'\{"role":"assistant","content":(?:null|\[|"[\s\\"\xc2\xe1\xe2\xe3])|(?!\{"role":"assistant","content":)'
)


class _Call(Struct, frozen=True):
    """A tool call: the id that the model gave it, the one it has in requests, its result or what is said without."""

    given: str
    rendered: str
    missing: str = _NOT_ANSWERED
    result: _Object | None = None


class _Fitted(Struct, frozen=True):
    """Messages as a request has them, and the ids of the calls among them."""

    messages: bytes
    call_ids: tuple[str, ...] = ()


class Transcript:
    """The state of one session, built entry by entry.

    `rendered` grows by the bytes of each turn, behind `system`, the encoded system messages; nothing
    in it is ever encoded again. `cost_usd` adds up the calls whose cost is known, `unpriced` counts the others.
    """

    __slots__ = (
        "_call_ids",
        "_first",
        "_folds",
        "_ids",
        "_inside",
        "_is_begun",
        "_joined_at",
        "_joined_ids",
        "_left_open",
        "_machine",
        "_open_calls",
        "_outcomes",
        "_pending",
        "_starts",
        "_tokens",
        "calls",
        "cost_usd",
        "rendered",
        "unpriced",
    )

    def __init__(self, system: bytes = b"") -> None:
        self.rendered = bytearray(system)
        self.calls = 0
        self.cost_usd = Decimal(0)
        self.unpriced = 0
        self._outcomes: dict[str, TurnOutcome] = {}
        # The ids whose last try was joined to a turn of another id, and those of each turn of the history. What few
        # sessions have takes no memory of the others.
        self._joined_ids: Mapping[str, None] = _NOTHING
        self._joined_at: Mapping[int, Sequence[str]] = _NOTHING
        # One item for each turn of the history: its id, where it starts in `rendered`, and the tokens to its end.
        self._ids: list[str] = []
        self._starts = array("Q")
        self._tokens = array("Q")
        # The turns that begin within a group of calls and results of the one before.
        self._inside: Mapping[int, None] = _NOTHING
        self._left_open: Mapping[int, Sequence[_Call]] = _NOTHING
        self._folds: Sequence[tuple[int, bytes]] = ()
        # As keys: an empty set is three times the size of an empty dict, and most sessions have none.
        self._call_ids: dict[str, None] = {}
        self._open_calls: Sequence[_Call] = ()
        self._pending: TurnStarted | None = None
        self._is_begun = False
        self._first = 0
        self._machine: TurnMachine | None = None

    @property
    def machine(self) -> TurnMachine | None:
        """The turn that was started and has no end."""
        if self._machine is None and self._pending is not None:
            # Most turns have no rounds, and are never looked at so closely.
            self._machine = TurnMachine(self._pending.turn_id)
            self._machine.apply(self._pending)
        return self._machine

    @property
    def unfinished(self) -> str | None:
        """The id of a turn that was started and has no end."""
        return None if self._pending is None else self._pending.turn_id

    def is_unfinished(self, turn_id: str) -> bool:
        """Whether the turn that was started and has no end has this id, or had the one of this id joined to it."""
        pending = self._pending
        return pending is not None and (turn_id == pending.turn_id or turn_id in pending.joined)

    @property
    def first(self) -> int:
        """How many turns the requests of the last turn leave out."""
        return self._first

    @property
    def turns(self) -> int:
        """Turns that have ended, abandoned ones included."""
        return len(self._outcomes) - len(self._joined_ids)

    def outcome(self, turn_id: str) -> TurnOutcome | None:
        """What became of the turn of this id; None when there was none, or it has no end."""
        return self._outcomes.get(turn_id)

    # The turns of the history, by their place in it

    @property
    def length(self) -> int:
        """How many turns the history has: those with an answer, and those that have run a tool."""
        return len(self._ids)

    @property
    def folded(self) -> int:
        """How many turns, from the first, a summary stands for."""
        return self._folds[-1][0] if self._folds else 0

    @property
    def last_turn(self) -> str | None:
        """The id of the last turn of the history."""
        return self._ids[-1] if self._ids else None

    def place(self, turn_id: str) -> int | None:
        """The place of a turn in the history, or of the one that it was joined to; None for what is no part of it."""
        for place in range(len(self._ids) - 1, -1, -1):
            if self._ids[place] == turn_id or turn_id in self._joined_at.get(place, ()):
                return place
        return None

    def turn_at(self, place: int) -> str:
        """The id of the turn at a place."""
        return self._ids[place]

    def is_inside(self, place: int) -> bool:
        """Whether the turn at `place`, or the next one to come, begins within the calls and results of another."""
        return place in self._inside or (place == len(self._ids) and bool(self._open_calls))

    def tokens_before(self, place: int) -> int:
        """Tokens of the turns before `place`: counted by the replies' usage where they have one, else estimated."""
        return self._tokens[place - 1] if place else 0

    @property
    def fixed_tokens(self) -> int:
        """An estimate of the tokens in front of the turns: system messages and summary."""
        start = self._starts[0] if self._starts else len(self.rendered)
        return (start + (len(self._folds[-1][1]) if self._folds else 0)) // BYTES_PER_TOKEN

    def messages(self, first: int, end: int) -> list[Message]:
        """The messages of the turns from `first` up to `end`, as they are rendered, behind the summary if any."""
        stop = self._starts[end] if end < len(self._starts) else len(self.rendered)
        joined = bytes(self.rendered[self._begin(first) : stop])
        head = self._folds[-1][1] if self._folds else b""
        return decode_messages(b",".join(part for part in (head, joined) if part))

    # Requests

    def render(self, messages: bytes) -> bytes:
        """The messages that follow `rendered` in a request that adds `messages`, both joined by commas.

        Raises `BadRequestError` when a tool message among `messages` answers no open call, or one
        that was answered already.
        """
        return self._fit(messages, self._open_calls).messages

    def pieces(self, messages: bytes, *, first: int = 0, end: int | None = None) -> list[Piece]:
        """The messages of a request that adds `messages`, in pieces to be joined as they are.

        The turns before `first` are left out, and those from `end` on; a summary and what it stands for take
        each other's place. Raises as `render` does. The pieces hold only until the next entry is applied.
        """
        length = len(self._ids)
        if end is not None and end < length:
            added = self._fit(messages, self._left_open.get(end - 1, ())).messages
            return self._joined(added, first=first, end=end)
        if self._open_calls or b'"tool' in messages:
            added = self._fit(messages, self._open_calls).messages
        else:
            added = messages
        if first or self._folds:
            return self._joined(added, first=first, end=length)
        return [self.rendered, b",", added] if self.rendered and added else [self.rendered or added]

    def _joined(self, added: bytes, *, first: int, end: int) -> list[Piece]:
        stop = self._starts[end] if end < len(self._starts) else len(self.rendered)
        system = min(self._starts[0] if self._starts else stop, stop)
        upto, summary = next((fold for fold in reversed(self._folds) if fold[0] <= end), (0, b""))
        view = memoryview(self.rendered)
        joined: list[Piece] = []
        for part in (view[:system], summary, view[min(self._begin(max(first, upto)), stop) : stop], added):
            if len(part):
                joined += [b",", part] if joined else [part]
        return joined

    def _begin(self, place: int) -> int:
        """Where the messages of the turn at `place` begin: behind the comma in front of it, if it has one."""
        if place >= len(self._starts):
            return len(self.rendered)
        start = self._starts[place]
        return start + (start > 0)

    # The log

    def apply(self, entry: LogEntry) -> None:
        """Take the next entry of the log into account; one that is out of order in its turn is passed over."""
        match entry:
            case TurnStarted():
                if self._pending is not None:
                    self._leave_in_doubt(self._pending)
                self._pending, self._machine, self._is_begun, self._first = entry, None, False, entry.first
            case TurnAnswered():
                self._apply_answer(entry)
            case TurnAbandoned():
                self._apply_end(entry)
            case TurnCalled() | ToolsAnswered() | TurnParked() | QuestionAnswered() | TurnResumed() | AnswerDiscarded():
                self._apply_step(entry)
            case TurnsDropped(turn_id=turn_id):
                if self._pending is not None:
                    self._leave_in_doubt(self._pending)
                self._cut(self.place(turn_id))
            case HistoryFolded():
                self._fold(entry)
            case HistoryCompacted():
                self._outcomes |= dict.fromkeys(entry.turn_ids, "forgotten")
                self.calls += entry.calls
                self.cost_usd += entry.cost_usd
                self.unpriced += entry.unpriced

    def _leave_in_doubt(self, pending: TurnStarted) -> None:
        """The log goes on behind a turn without an end: nobody takes that up any more, and it may have been billed."""
        self._apply_end(TurnAbandoned(pending.turn_id, "in doubt", maybe_billed=True))

    def _apply_answer(self, entry: TurnAnswered) -> None:
        if self._pending is not None and self._pending.turn_id != entry.turn_id:
            self._leave_in_doubt(self._pending)
        own, self._pending, self._machine = self._pending, None, None
        self._note_outcome(entry.turn_id, own, "answered")
        self._count(entry.call)
        message = bytes(entry.message)
        is_blank = _MAY_BE_BLANK.match(message) is not None and _is_blank(_decode_answer(message))
        if not self._is_begun:
            says_nothing = is_blank and entry.call.interrupted
            self._begin_turn(own, entry.turn_id, is_empty=says_nothing)
            if says_nothing:
                return
        self._is_begun = False
        if self._open_calls:
            self._close_calls()
        if not is_blank:
            if b'"refusal"' in message:
                message = self._with_refusal(message)
            self._add(self._take_calls(message, _NOT_ANSWERED) if b'"tool_calls"' in message else message)
            if self._open_calls:
                self._leave_open(len(self._ids) - 1)
        self._count_tokens(entry.call, own)

    def _apply_end(self, entry: TurnAbandoned) -> None:
        if self._pending is not None and self._pending.turn_id != entry.turn_id:
            self._leave_in_doubt(self._pending)
        own, self._pending, self._machine = self._pending, None, None
        self._note_outcome(entry.turn_id, own, "in_doubt" if entry.maybe_billed else "abandoned")
        if self._is_begun and self._open_calls:
            self._leave_open(len(self._ids) - 1)
        self._is_begun = False

    def _apply_step(self, entry: _Step) -> None:
        machine, pending = self.machine, self._pending
        if machine is None or pending is None:
            return
        try:
            machine.apply(entry)
        except EntryOutOfOrderError:
            return
        if isinstance(entry, AnswerDiscarded):
            self._count(entry.call)
        elif isinstance(entry, TurnCalled):
            if not self._is_begun:
                self._begin_turn(pending, entry.turn_id)
                self._is_begun = True
            self._add(self._take_calls(bytes(entry.message), _INTERRUPTED))
            self._count(entry.call)
            self._count_tokens(entry.call, pending)
        elif isinstance(entry, ToolsAnswered):
            if pending.tokens is None:
                self._tokens[-1] += len(entry.messages) // BYTES_PER_TOKEN
            self._take_results(bytes(entry.messages), is_whole=not machine.open_calls)
        else:
            waiting = {call_id for call_id, state in machine.open_calls.items() if state in {"waiting", "replied"}}
            self._open_calls = [
                msgspec.structs.replace(call, missing=_NOT_PERMITTED if call.given in waiting else _INTERRUPTED)
                for call in self._open_calls
            ]

    def _note_outcome(self, turn_id: str, started: TurnStarted | None, outcome: TurnOutcome) -> None:
        joined = () if started is None else started.joined
        for ended in (turn_id, *joined):
            # Once answered, always answered: logs were compacted that have the doubt of an earlier try behind it.
            if outcome == "answered" or self._outcomes.get(ended) not in _ANSWERED:
                self._outcomes[ended] = outcome
        if turn_id in self._joined_ids:
            self._joined_ids = {other: None for other in self._joined_ids if other != turn_id}
        if joined:
            self._joined_ids = {**self._joined_ids, **dict.fromkeys(joined)}

    def _begin_turn(self, started: TurnStarted | None, turn_id: str, *, is_empty: bool = False) -> None:
        """A turn becomes part of the history: it has an answer now."""
        if started is not None and started.replaces:
            self._cut(self.place(started.replaces))
        place = len(self._ids)
        if self._open_calls:
            self._inside = {**self._inside, place: None}
        if started is not None and started.joined:
            self._joined_at = {**self._joined_at, place: started.joined}
        self._ids.append(turn_id)
        self._starts.append(len(self.rendered))
        if is_empty:
            self._tokens.append(self.tokens_before(place))
            if self._open_calls:
                self._leave_open(place)
            return
        if started is not None:
            messages = bytes(started.messages)[1:-1]
            if self._open_calls or b'"tool' in messages:
                fitted = self._fit(messages, self._open_calls)
                self._call_ids |= dict.fromkeys(fitted.call_ids)
                self._open_calls = ()
                messages = fitted.messages
            self._add(messages)
        # Counted when its answer is there.
        self._tokens.append(0)

    def _cut(self, place: int | None) -> None:
        """Leave out the turns from `place` on."""
        if place is None or place >= len(self._ids):
            return
        del self.rendered[self._starts[place] :]
        del self._ids[place:], self._starts[place:], self._tokens[place:]
        self._inside = {other: None for other in self._inside if other < place}
        self._joined_at = {other: joined for other, joined in self._joined_at.items() if other < place}
        self._left_open = {other: calls for other, calls in self._left_open.items() if other < place}
        self._open_calls = self._left_open.get(place - 1, ())
        self._folds = [fold for fold in self._folds if fold[0] <= place]

    def _leave_open(self, place: int) -> None:
        self._left_open = {**self._left_open, place: self._open_calls}

    def _fold(self, entry: HistoryFolded) -> None:
        upto: int | None = min(entry.upto, len(self._ids))
        if entry.turn_id and not upto:
            place = self.place(entry.turn_id)
            upto = None if place is None else place + 1
        if upto is not None and upto >= self.folded:
            self._folds = [*self._folds, (upto, bytes(entry.message))]

    def _count(self, call: CallRecord) -> None:
        self.calls += 1
        cost = call.cost
        if cost is None:
            self.unpriced += 1
        else:
            self.cost_usd += cost

    def _count_tokens(self, call: CallRecord, started: TurnStarted | None) -> None:
        """Tokens to the end of the last turn: what the reply counted, and what its request had left out."""
        starts, counted, usage = self._starts, self._tokens, call.usage
        place = len(starts) - 1
        before = counted[place - 1] if place else 0
        if started is not None and started.tokens is not None:
            counted[place] = before + started.tokens
            return
        prompt = None if usage is None else usage.prompt_tokens
        if usage is None or not prompt:
            tokens = before + (len(self.rendered) - starts[place]) // BYTES_PER_TOKEN
        else:
            tokens = prompt + (usage.completion_tokens or 0) - self.fixed_tokens
            details = usage.completion_tokens_details
            if details is not None and details.reasoning_tokens:
                tokens -= min(details.reasoning_tokens, usage.completion_tokens or 0)
            left_out = min(max(self._first, self.folded), place)
            if left_out:
                tokens += counted[left_out - 1]
        counted[place] = max(tokens, before)

    def _add(self, encoded: bytes) -> None:
        if self.rendered and encoded:
            self.rendered += b","
        self.rendered += encoded

    @staticmethod
    def _with_refusal(encoded: bytes) -> bytes:
        """An answer that has nothing but a refusal, with the text of it as its own."""
        answer = _decode_answer(encoded)
        if not answer.refusal or not _is_blank(msgspec.structs.replace(answer, refusal=UNSET)):
            return encoded
        return encode_message(msgspec.structs.replace(answer, content=answer.refusal))

    # Calls and results

    def _take_calls(self, encoded: bytes, missing: str) -> bytes:
        """An answer with its calls under distinct ids, which are open from now on."""
        answer = _decode_answer(encoded)
        calls = answer.tool_calls or []
        self._open_calls = _distinct([call.id for call in calls], self._call_ids, missing=missing)
        self._call_ids |= dict.fromkeys(call.rendered for call in self._open_calls)
        taken = [acceptable_call(call, fresh.rendered) for call, fresh in zip(calls, self._open_calls, strict=True)]
        if all(ours is theirs for ours, theirs in zip(taken, calls, strict=True)):
            return encoded
        return encode_message(msgspec.structs.replace(answer, tool_calls=taken))

    def _take_results(self, messages: bytes, *, is_whole: bool) -> None:
        """Results of open calls, which are rendered in the order of the calls, once all are there."""
        results = cast("list[_Object]", decode_json(messages))
        if is_whole and [(call.rendered, None) for call in self._open_calls] == [
            (result["tool_call_id"], call.result) for result, call in zip(results, self._open_calls, strict=False)
        ]:
            # As they came, to the last byte.
            self._open_calls = ()
            self._add(messages[1:-1])
            return
        given = {result["tool_call_id"]: result for result in results}
        self._open_calls = [
            msgspec.structs.replace(call, result={**given[call.given], "tool_call_id": call.rendered})
            if call.given in given
            else call
            for call in self._open_calls
        ]
        if is_whole:
            self._close_calls()

    def _close_calls(self) -> None:
        closing = self._closing()
        if closing:
            self._add(closing)
        self._open_calls = ()

    def _closing(self) -> bytes:
        """What closes the open calls when nothing else is said."""
        return self._fit(b"", self._open_calls).messages if self._open_calls else b""

    def _fit(self, messages: bytes, open_calls: Sequence[_Call]) -> _Fitted:
        if not open_calls and b'"tool' not in messages:
            return _Fitted(messages)
        given = cast("list[_Object]", decode_json(b"[%b]" % messages))
        fitting = _Fitting(open_calls, self._call_ids)
        for message in given:
            fitting.take(message)
        fitted = fitting.finish()
        added = len(fitted) - len(given)
        # What stays as it came keeps its bytes, to the last digit of a number.
        if all(ours is theirs for ours, theirs in zip(fitted[added:], given, strict=True)):
            own = [messages] if messages else []
            encoded = b",".join([encode_json(message) for message in fitted[:added]] + own)
        else:
            encoded = b",".join(encode_json(message) for message in fitted)
        return _Fitted(encoded, tuple(fitting.new_ids))


class _Fitting:
    """Takes the messages of a prompt one by one and puts each tool message behind the call that it answers."""

    __slots__ = ("_calls", "_done", "_given", "_rest", "_used", "new_ids")

    def __init__(self, open_calls: Sequence[_Call], used: Collection[str]) -> None:
        self._done: list[_Object] = []
        self._calls = list(open_calls)
        self._given = [call.result for call in open_calls]
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
            missing: _Object = {"role": "tool", "tool_call_id": call.rendered, "content": call.missing}
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


def _distinct(ids: Iterable[str], *used: Collection[str], missing: str = _NOT_ANSWERED) -> list[_Call]:
    """Calls whose rendered ids are in nobody's way."""
    calls: list[_Call] = []
    fresh: set[str] = set()
    # A number that was hardly taken before: counting up from 1 would make an engine that reuses ids cost a square.
    number = sum(map(len, used)) + 1
    for given in ids:
        rendered = base = acceptable_id(given)
        while rendered in fresh or any(rendered in some for some in used):
            suffix = f"_{number}"
            rendered = base[: MAX_CALL_ID - len(suffix)] + suffix
            number += 1
        fresh.add(rendered)
        calls.append(_Call(given, rendered, missing))
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

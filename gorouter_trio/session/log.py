"""A log as people look at it: the turns of the history and their messages; and a shorter log for the same. Pure."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, cast

import msgspec

from ..wire.codec import decode_message, decode_messages
from ..wire.journal import (
    AnswerDiscarded,
    HistoryCompacted,
    HistoryFolded,
    LogEntry,
    ToolsAnswered,
    TurnAbandoned,
    TurnAnswered,
    TurnCalled,
    TurnEntry,
    TurnsDropped,
    TurnStarted,
)
from ..wire.result import HistoryEntry
from .transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ..wire.messages import AssistantMessage, ToolMessage
    from .transcript import TurnOutcome

__all__ = ["LoggedTurn", "compact", "entries_of", "turns_of"]


class LoggedTurn:
    """One turn as it was written down; `started` is None where the log has only its end."""

    __slots__ = ("entries", "started", "turn_id")

    def __init__(self, turn_id: str, started: TurnStarted | None = None) -> None:
        self.turn_id = turn_id
        self.started = started
        self.entries: list[TurnEntry] = [] if started is None else [started]

    @property
    def ids(self) -> tuple[str, ...]:
        """Its id, and those that were joined to it."""
        return (self.turn_id, *(self.started.joined if self.started is not None else ()))

    @property
    def answer(self) -> TurnAnswered | None:
        """The entry with its answer, if it has one."""
        last = self.entries[-1]
        return last if isinstance(last, TurnAnswered) else None

    @property
    def is_over(self) -> bool:
        """Whether it has an end."""
        return isinstance(self.entries[-1], (TurnAnswered, TurnAbandoned))

    @property
    def messages(self) -> bytes:
        """The user's messages, encoded and joined by commas."""
        return b"" if self.started is None else bytes(self.started.messages)[1:-1]

    @property
    def is_said(self) -> bool:
        """Whether it is part of the history: it has an answer, or has called a tool."""
        return any(isinstance(entry, (TurnAnswered, TurnCalled)) for entry in self.entries)


class _Replay:
    """Reads a log entry by entry."""

    def __init__(self) -> None:
        self.turns: list[LoggedTurn] = []
        self.folds: list[tuple[int, HistoryFolded]] = []
        self.gone: list[LoggedTurn] = []
        self.forgotten = HistoryCompacted()
        self.open: LoggedTurn | None = None

    def read(self, entry: LogEntry) -> None:
        match entry:
            case TurnStarted(turn_id=turn_id):
                self._leave()
                self.open = LoggedTurn(turn_id, entry)
            case TurnsDropped(turn_id=turn_id):
                self._leave()
                self._cut(turn_id)
            case HistoryFolded():
                self._fold(entry)
            case HistoryCompacted():
                self.forgotten = entry
            case _:
                self._go_on(entry)

    def _go_on(self, entry: TurnEntry) -> None:
        turn, is_end = self.open, isinstance(entry, (TurnAnswered, TurnAbandoned))
        if turn is None or turn.turn_id != entry.turn_id:
            if not is_end:
                return  # A step of no turn that runs, which means nothing.
            self._leave()
            turn = self.open = LoggedTurn(entry.turn_id)
        was_said = turn.is_said
        turn.entries.append(entry)
        if turn.is_said and not was_said:
            if turn.started is not None and turn.started.replaces:
                self._cut(turn.started.replaces)
            self.turns.append(turn)
        if is_end:
            self._leave()

    def _leave(self) -> None:
        turn, self.open = self.open, None
        if turn is None:
            return
        if not turn.is_over:
            # The log goes on behind it.
            turn.entries.append(TurnAbandoned(turn.turn_id, "in doubt", maybe_billed=True))
        if not turn.is_said:
            self.gone.append(turn)

    def _fold(self, entry: HistoryFolded) -> None:
        places = [min(entry.upto, len(self.turns))]
        if entry.turn_id and not places[0]:
            places = [n for n, turn in enumerate(self.turns, 1) if entry.turn_id in turn.ids]
        self.folds += [(place, entry) for place in places[-1:]]

    def _cut(self, turn_id: str) -> None:
        places = [n for n, turn in enumerate(self.turns) if turn_id in turn.ids]
        if places:
            self.gone += self.turns[places[-1] :]
            del self.turns[places[-1] :]
            self.folds = [fold for fold in self.folds if fold[0] <= places[-1]]


def _replayed(log: Iterable[LogEntry]) -> _Replay:
    replay = _Replay()
    for entry in log:
        replay.read(entry)
    return replay


def turns_of(log: Iterable[LogEntry]) -> list[LoggedTurn]:
    """The turns that are part of the history, in order; the one that runs is among them once it has called a tool."""
    return _replayed(log).turns


def entries_of(log: Iterable[LogEntry]) -> list[HistoryEntry]:
    """The messages of the history, in order, with their calls; what a compacted log has folded is one summary."""
    replay = _replayed(log)
    history = [HistoryEntry(decode_message(bytes(fold.message))) for place, fold in replay.folds[-1:] if place == 0]
    for turn in replay.turns:
        history += _entries_of_turn(turn)
    return history


def _entries_of_turn(turn: LoggedTurn) -> Iterator[HistoryEntry]:
    for message in decode_messages(turn.messages):
        yield HistoryEntry(message, turn_id=turn.turn_id)
    results: dict[str, ToolMessage | None] = {}
    for entry in turn.entries:
        if isinstance(entry, ToolsAnswered):
            messages = cast("list[ToolMessage]", decode_messages(bytes(entry.messages)[1:-1]))
            results |= {message.tool_call_id: message for message in messages}
        elif isinstance(entry, (TurnCalled, TurnAnswered)):
            yield from _results(turn.turn_id, results)
            message = cast("AssistantMessage", decode_message(bytes(entry.message)))
            yield HistoryEntry(message, entry.call, turn_id=turn.turn_id)
            # Results come as they are ready, and are sent in the order of the calls.
            results = dict.fromkeys(call.id for call in message.tool_calls or ())
    yield from _results(turn.turn_id, results)


def _results(turn_id: str, results: Mapping[str, ToolMessage | None]) -> Iterator[HistoryEntry]:
    for message in results.values():
        if message is not None:
            yield HistoryEntry(message, turn_id=turn_id)


def compact(log: Sequence[LogEntry], *, system: bytes = b"") -> list[LogEntry]:
    """A log that renders the same requests and keeps every promise about turn ids, without what no request needs.

    Left out are abandoned turns that were not billed, turns that gave way to others, and turns that a summary
    stands for; of the answered ones among them the ids stay, and what their calls have cost. `system` are the encoded
    system messages of the requests, without which what a turn adds to one cannot be told.
    """
    replay, transcript = _replayed(log), Transcript(system)
    for entry in log:
        transcript.apply(entry)
    upto, fold = replay.folds[-1] if replay.folds else (0, None)
    gone, kept = replay.gone + replay.turns[:upto], replay.turns[upto:]
    short: list[LogEntry] = []
    forgotten = _forgotten(replay.forgotten, gone)
    if forgotten != HistoryCompacted():
        short.append(forgotten)
    if fold is not None:
        short.append(msgspec.structs.replace(fold, turn_id="", upto=0))
    ends = {turn_id: turn.entries[-1] for turn in gone for turn_id in turn.ids}
    kept_ids = {turn_id for turn in kept if turn is not replay.open for turn_id in turn.ids}
    short += _ends([turn_id for turn_id in ends if turn_id not in kept_ids], ends, {"in_doubt"}, transcript)
    for place, turn in enumerate(kept, upto):
        added = transcript.tokens_before(place + 1) - transcript.tokens_before(place)
        tokens = None if turn is replay.open else added
        short += [_settled(entry, folded=upto, tokens=tokens) for entry in turn.entries]
        if turn is not replay.open:
            others: set[TurnOutcome] = {"abandoned", "in_doubt"}
            others.discard(_outcome_of(turn))
            short += _ends([turn_id for turn_id in turn.ids if turn_id in ends], ends, others, transcript)
    if replay.open is not None and not replay.open.is_said:
        # What gives way to it does so once it is answered.
        replaces = cast("TurnStarted", replay.open.started).replaces
        short += [_settled(entry, folded=upto, replaces=replaces) for entry in replay.open.entries]
    return short


def _ends(
    turn_ids: Iterable[str], ends: Mapping[str, TurnEntry], outcomes: set[TurnOutcome], transcript: Transcript
) -> Iterator[TurnAbandoned]:
    """The ends of turns that have gone, where one of these is what has become of their ids after their last try."""
    for turn_id in turn_ids:
        outcome = transcript.outcome(turn_id)
        if outcome in outcomes:
            yield TurnAbandoned(
                turn_id, cast("TurnAbandoned", ends[turn_id]).reason, maybe_billed=outcome == "in_doubt"
            )


def _outcome_of(turn: LoggedTurn) -> TurnOutcome:
    """What has become of this try of a turn, which has an end."""
    last = turn.entries[-1]
    if isinstance(last, TurnAbandoned):
        return "in_doubt" if last.maybe_billed else "abandoned"
    return "answered"


def _settled(entry: TurnEntry, *, folded: int, replaces: str = "", tokens: int | None = None) -> TurnEntry:
    """The entry in a log without the turns that gave way to its own, and without the first ones: `folded` of them."""
    if isinstance(entry, TurnStarted):
        first = max(entry.first - folded, 0)
        return msgspec.structs.replace(entry, replaces=replaces, first=first, tokens=tokens)
    return entry


def _forgotten(before: HistoryCompacted, gone: Iterable[LoggedTurn]) -> HistoryCompacted:
    ids = list(before.turn_ids)
    calls, cost_usd, unpriced = before.calls, before.cost_usd, before.unpriced
    for turn in gone:
        if turn.answer is not None:
            ids += turn.ids
        for entry in turn.entries:
            if isinstance(entry, (TurnCalled, AnswerDiscarded, TurnAnswered)):
                calls += 1
                cost_usd += entry.call.cost or Decimal(0)
                unpriced += entry.call.cost is None
    return HistoryCompacted(tuple(ids), calls, cost_usd, unpriced)

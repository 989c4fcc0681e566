"""The rounds of a session's turn: what the loop of tools writes down, and what it waits for outside."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import msgspec
import trio

from .._mailbox import ReplySlot
from ..wire.codec import decode_json, encode_json
from ..wire.journal import AnswerDiscarded, QuestionAnswered, ToolsAnswered, TurnCalled, TurnParked
from ..wire.messages import ToolMessage
from .turn import EntryOutOfOrderError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .._turns.request import TurnRequest
    from .._turns.rounds import Question, RoundJournal
    from ..events import StreamEvent
    from ..wire.journal import LogEntry
    from ..wire.mail import AnswerQuestion
    from ..wire.messages import AssistantMessage
    from ..wire.result import ChatResult
    from ..wire.toolcalls import ToolCallReport
    from .running import Envelope, RunningTurn
    from .turn import TurnMachine

__all__ = ["SessionRounds", "plain_rounds"]

_NOT_REPEATED = "The call was interrupted; whether it was carried out is unknown, and it was not repeated."


async def plain_rounds(journal: RoundJournal) -> ChatResult:
    """The loop of a turn without tools: what is open is closed, and the answer is what comes, with calls or without."""
    if journal.open_calls:
        await journal.answered([ToolMessage(call_id, _NOT_REPEATED) for call_id in journal.open_calls])
    return await journal.send()


class _Waiting(ReplySlot[bytes]):
    """A call that waits for the reply to its question, and whoever brings that."""

    def __init__(self, until_s: float | None) -> None:
        super().__init__()
        self.until_s = until_s
        self.bringer: Envelope | None = None

    def take(self, envelope: Envelope, *, at_s: float) -> bool:
        """Have the reply that comes at `at_s`, or refuse it as late or a second one; False when nobody waits here now.

        A computer that slept was waiting for longer than it noticed.
        """
        if self.abandoned:
            return False
        is_late = self.until_s is not None and self.until_s <= at_s
        if not is_late and self.resolve(cast("AnswerQuestion", envelope.mail).answer):
            self.bringer = envelope
        else:
            envelope.resolve(False)
            envelope.finish()
        return True

    def end(self) -> None:
        """Nobody waits any more: who has brought a reply that was not written down brings it again."""
        if self.bringer is not None:
            self.bringer.resolve(None)
            self.bringer.finish()


class SessionRounds:
    """`RoundJournal` for the turn of a session; see there."""

    def __init__(self, turn: RunningTurn) -> None:
        self._turn = turn
        self._actor = turn.actor
        self._waiting: dict[str, _Waiting] = {}
        self._lock = trio.Lock()
        self.deadline = turn.mail.deadline

    @property
    def pending(self) -> AssistantMessage | None:
        """The answer whose calls have no results yet."""
        return self._machine.last_call

    @property
    def open_calls(self) -> Sequence[str]:
        """The ids of its calls without a result."""
        return list(self._machine.open_calls)

    @property
    def in_doubt(self) -> frozenset[str]:
        """Those that may have been carried out."""
        return frozenset(call_id for call_id, state in self._machine.open_calls.items() if state == "unknown")

    @property
    def waits_for(self) -> str | None:
        """The first question that a call waits for now."""
        return next(iter(self._waiting), None)

    @property
    def _machine(self) -> TurnMachine:
        machine = self._actor.machine
        if machine is None or machine.turn_id != self._turn.turn_id:
            raise EntryOutOfOrderError(f"turn {self._turn.turn_id!r} does not run any more")
        return machine

    @property
    def session(self) -> str:
        """The key of the session."""
        return self._actor.key

    @property
    def turn_id(self) -> str:
        """The id of the turn."""
        return self._turn.turn_id

    @property
    def is_streamed(self) -> bool:
        """Whether somebody reads the answers as they come."""
        return self._turn.mail.streaming

    def request(self) -> TurnRequest:
        """The conversation as it is now."""
        return self._actor.request(self._turn)

    async def send(self, request: TurnRequest | None = None) -> ChatResult:
        """Send the conversation as it is now, or what stands in for it."""
        return await self._actor.send(self._turn, request or self.request())

    async def discarded(self, answer: ChatResult) -> None:
        """`answer` is no part of the conversation."""
        entry = AnswerDiscarded(self._turn.turn_id, msgspec.Raw(encode_json(answer.message)), answer.call)
        async with self._lock:
            await self._actor.write(self._turn, entry, answer=answer)
            if self._turn.loan is not None:
                self._turn.loan.take_round()

    async def commit(self, answer: ChatResult[object]) -> None:
        """`answer` is that of the turn."""
        await self._actor.commit(self._turn, answer)

    async def called(self, answer: ChatResult) -> None:
        """`answer` calls tools."""
        entry = TurnCalled(self._turn.turn_id, msgspec.Raw(encode_json(answer.message)), answer.call)
        async with self._lock:
            await self._actor.write(self._turn, entry, answer=answer)
            if self._turn.loan is not None:
                self._turn.loan.take_round()

    async def answered(self, messages: Sequence[ToolMessage], reports: Sequence[ToolCallReport] = ()) -> None:
        """What open calls returned."""
        async with self._lock:
            await self._actor.write(self._turn, self._answers(messages, reports))

    def keep(self, messages: Sequence[ToolMessage], reports: Sequence[ToolCallReport] = ()) -> None:
        """What calls returned before the turn was cut off.

        Each is an entry of its own: of a write that was cut off, the store may have some of them already.
        """
        under_way = _ids_in(self._turn.unsaved)
        for message in messages:
            call_id = message.tool_call_id
            if call_id not in under_way:
                own = [report for report in reports if report.call_id == call_id]
                self._actor.keep(self._turn, self._answers([message], own))

    def _answers(self, messages: Sequence[ToolMessage], reports: Sequence[ToolCallReport]) -> ToolsAnswered:
        encoded = [msgspec.Raw(encode_json(list(part))) for part in (messages, reports)]
        return ToolsAnswered(self._turn.turn_id, *encoded)

    async def parked(self, question: Question) -> bytes | None:
        """Wait for the reply to `question`."""
        known = self._machine.question(question.question_id)
        if known is not None and known.answer is not None:
            await trio.lowlevel.checkpoint()
            return known.answer
        until_s = question.until_s if known is None else known.until_s
        # A reply may be quicker than the writing down of its question.
        waiting = self._waiting[question.question_id] = _Waiting(until_s)
        try:
            if known is None:
                await self._park(question)
            else:
                self._take_early_replies(waiting, question.question_id)
            return await self._wait(waiting, question.question_id)
        finally:
            del self._waiting[question.question_id]
            waiting.end()

    def _take_early_replies(self, waiting: _Waiting, question_id: str) -> None:
        """What came while the turn was taken up. Not of a new question: ids come again, and may have meant another."""
        while (early := self._actor.early_reply(question_id)) is not None:
            waiting.take(early, at_s=self._actor.wall())

    async def _park(self, question: Question) -> None:
        asked = TurnParked(
            self._turn.turn_id,
            question.question_id,
            question.call_id,
            msgspec.Raw(encode_json(question.question)),
            self._actor.wall(),
            question.until_s,
        )
        async with self._lock:
            await self._actor.write(self._turn, asked)

    async def _wait(self, waiting: _Waiting, question_id: str) -> bytes | None:
        left_s = math.inf if waiting.until_s is None else waiting.until_s - self._actor.wall()
        with trio.move_on_after(max(left_s, 0)) as scope:
            answer = await waiting.wait()
        if scope.cancelled_caught:
            return None
        # Brought in time is in time, however long it takes to write it down.
        turn_id = self._turn.turn_id
        entry = QuestionAnswered(turn_id, question_id, msgspec.Raw(answer), self._actor.wall(), taken=True)
        async with self._lock:
            await self._actor.write(self._turn, entry)
        if waiting.bringer is not None:
            waiting.bringer.resolve(True)
        return answer

    def take_reply(self, envelope: Envelope) -> bool:
        """Have the reply to a question; False when no call waits for it.

        `envelope` is answered once it is stored, with None where the turn ends before that.
        """
        waiting = self._waiting.get(cast("AnswerQuestion", envelope.mail).question_id)
        return waiting is not None and waiting.take(envelope, at_s=self._actor.wall())

    def emit(self, *events: StreamEvent) -> None:
        """Give events to the reader of the stream."""
        if self._turn.loan is not None:
            self._turn.loan.emit(*events)

    @contextmanager
    def as_tool(self) -> Iterator[None]:
        """The current task is a tool of this turn."""
        tasks, task = self._actor.tool_tasks, trio.lowlevel.current_task()
        before = tasks.get(task)
        tasks[task] = self._turn
        try:
            yield
        finally:
            if before is None:
                del tasks[task]
            else:
                tasks[task] = before


def _ids_in(entry: LogEntry | None) -> set[object]:
    """The calls that have their results in an entry."""
    if not isinstance(entry, ToolsAnswered):
        return set()
    return {message["tool_call_id"] for message in cast("list[dict[str, object]]", decode_json(bytes(entry.messages)))}

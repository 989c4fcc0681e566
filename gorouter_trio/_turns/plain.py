"""Turns without a session: the journals of chats and streams, which are kept nowhere.

A chat's loop runs in its caller's task. A stream's has a task of its own, since its caller's reads: the two meet
at a `TurnLoan`, as a session and its asker do.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import msgspec
import trio
from msgspec import UNSET

from .._contain import contain
from .._mailbox import ReplySlot
from ..errors import ActorGoneError, GorouterError
from ..wire.codec import encode_message
from ..wire.sendable import acceptable_call
from .loan import TurnLoan

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from ..events import StreamEvent
    from ..pool.streams import ChatReader
    from ..wire.mail import HttpCall
    from ..wire.messages import AssistantMessage, ToolMessage
    from ..wire.result import ChatResult
    from ..wire.toolcalls import ToolCallReport
    from .request import TurnRequest
    from .rounds import Question, TakeRounds

__all__ = ["ChatJournal", "StreamJournal"]


class _PlainJournal:
    """A conversation of one turn: what the rounds add stands behind its prompt, and goes when it has its answer."""

    is_streamed = False
    in_doubt: frozenset[str] = frozenset()
    session: str | None = None
    turn_id: str | None = None

    def __init__(self, request: TurnRequest) -> None:
        self._request = request
        self._used: set[str] = set()
        self._results: dict[str, ToolMessage | None] = {}
        self.deadline = request.deadline
        self.pending: AssistantMessage | None = None

    @property
    def open_calls(self) -> Sequence[str]:
        """The calls without a result."""
        return [call_id for call_id, result in self._results.items() if result is None]

    def request(self) -> TurnRequest:
        """The conversation as it is now."""
        return self._request

    async def called(self, answer: ChatResult) -> None:
        """`answer` calls tools."""
        calls = answer.message.tool_calls
        self.pending = answer.message
        self._results = {} if calls is UNSET else dict.fromkeys(call.id for call in calls)
        self._used.update(self._results)
        taken = [] if calls is UNSET else [acceptable_call(call, call.id) for call in calls]
        message = msgspec.structs.replace(answer.message, tool_calls=taken or UNSET)
        self._request = self._request.with_more(encode_message(message))
        await trio.lowlevel.checkpoint()

    async def answered(self, messages: Sequence[ToolMessage], reports: Sequence[ToolCallReport] = ()) -> None:
        """What open calls returned; they are sent in the order of the calls."""
        self._results |= {message.tool_call_id: message for message in messages}
        if not self.open_calls:
            done = cast("list[ToolMessage]", list(self._results.values()))
            self._request = self._request.with_more(b",".join(map(encode_message, done)))
            self._results, self.pending = {}, None
        await trio.lowlevel.checkpoint()

    async def discarded(self, answer: ChatResult) -> None:
        """Nothing is kept."""
        await trio.lowlevel.checkpoint()

    async def commit(self, answer: ChatResult[object]) -> None:
        """Nothing is kept."""
        await trio.lowlevel.checkpoint()

    def keep(self, messages: Sequence[ToolMessage], reports: Sequence[ToolCallReport] = ()) -> None:
        """Nothing is kept."""

    async def parked(self, question: Question) -> bytes | None:
        """Nobody could reply: a chat is not found again."""
        await trio.lowlevel.checkpoint()
        return None

    def emit(self, *events: StreamEvent) -> None:
        """Nobody reads."""

    @contextmanager
    def as_tool(self) -> Iterator[None]:
        """A chat is nobody that its tools could ask."""
        yield

    def _with_free_ids(self, answer: ChatResult) -> ChatResult:
        """The answer with ids of calls that no round before it has: some engines number them anew each time."""
        calls = answer.message.tool_calls
        if calls is UNSET or self._used.isdisjoint(call.id for call in calls):
            return answer
        number = len(self._used)
        renamed = [
            msgspec.structs.replace(call, id=f"{call.id[:32]}_{number + position}") if call.id in self._used else call
            for position, call in enumerate(calls)
        ]
        return msgspec.structs.replace(answer, message=msgspec.structs.replace(answer.message, tool_calls=renamed))


class ChatJournal(_PlainJournal):
    """`RoundJournal` of a chat, whose loop runs in its caller's task."""

    def __init__(self, request: TurnRequest, send: Callable[[HttpCall], Awaitable[ChatResult]]) -> None:
        super().__init__(request)
        self._send = send

    async def send(self, request: TurnRequest | None = None) -> ChatResult:
        """Send the conversation, or what stands in for it."""
        return self._with_free_ids(await self._send((request or self._request).call()))


class StreamJournal(_PlainJournal):
    """`RoundJournal` of a stream, and the task that runs its loop.

    `opened` gets the loan once there is data, or the answer that an extension has given in place of the model.
    """

    is_streamed = True

    def __init__(self, request: TurnRequest, open_reader: Callable[[HttpCall], Awaitable[ChatReader]]) -> None:
        super().__init__(request)
        self._open_reader = open_reader
        self._scope = trio.CancelScope()
        self._loan: TurnLoan | None = None
        self.opened: ReplySlot[TurnLoan | ChatResult[object]] = ReplySlot()

    async def run(self, loop: TakeRounds) -> None:
        """Run the loop until it has ended, or the consumer has left; whoever waits is told how it ended."""
        try:
            with self._scope:
                await contain(partial(self._take, loop), report=self._fail)
        finally:
            self._end()

    def leave(self) -> None:
        """The consumer has left before the answer was there."""
        self._scope.cancel()

    async def send(self, request: TurnRequest | None = None) -> ChatResult:
        """Open the stream of an answer, lend it, and return what its reader gave once it was read."""
        reader = await self._open_reader((request or self._request).call(streaming=True))
        if self._loan is None:
            self._loan = TurnLoan(reader, "", has_rounds=True, on_return=self.leave)
            if not self.opened.resolve(self._loan):
                self._loan.give_back()
        else:
            self._loan.go_on(reader)
        return self._with_free_ids(await self._loan.wait_round())

    async def commit(self, answer: ChatResult[object]) -> None:
        """The consumer has the answer; what extensions still do is theirs."""
        cast("TurnLoan", self._loan).finish(answer)
        await trio.lowlevel.checkpoint()

    def emit(self, *events: StreamEvent) -> None:
        """Give events to the consumer."""
        if self._loan is not None:
            self._loan.emit(*events)

    async def _take(self, loop: TakeRounds) -> None:
        result = await loop(self)
        if self._loan is None:
            self.opened.resolve(result)
        else:
            self._loan.saved.resolve(result)

    def _fail(self, error: Exception) -> None:
        told = error if isinstance(error, GorouterError) else _broken(error)
        loan = self._loan
        if loan is None:
            self.opened.fail(told)
        elif loan.fail(told) or loan.is_broken:
            # Its reader reads it off the loan, or has met it there.
            loan.saved.resolve(None)
        else:
            loan.saved.fail(told)

    def _end(self) -> None:
        """Nobody is left waiting, however the task ends."""
        if self._loan is None:
            self.opened.fail(ActorGoneError("the stream was given up before it had begun"))
        else:
            self._loan.revoke()
            self._loan.saved.resolve(None)


def _broken(error: Exception) -> GorouterError:
    told = GorouterError(f"the turn failed: {type(error).__name__}: {error}")
    told.__cause__ = error
    return told

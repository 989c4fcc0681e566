"""A streamed turn, lent to its asker: one sequence of chunks and events over as many replies as the turn has rounds.

The asker reads each reply off its socket in its own task. At the end of one, the session has the next move: it writes
down what was said, runs tools, and either hands over the reader of the next reply or says that this was the last one.
What happens meanwhile comes as events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import trio
from msgspec import UNSET

from .._mailbox import ReplySlot
from ..errors import GorouterError, TurnInterruptedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..events import StreamEvent
    from ..pool.streams import ChatReader
    from ..wire.messages import AssistantMessage
    from ..wire.result import ChatResult
    from ..wire.stream import ChatChunk

__all__ = ["TurnLoan", "interrupted", "patience"]

_SLACK_S = 0.5


def patience(grace_s: float) -> trio.CancelScope:
    """A shield for waiting until a session has saved, which takes it at most `grace_s`: a little longer than that."""
    return trio.CancelScope(shield=True, deadline=trio.current_time() + grace_s + _SLACK_S)


class TurnLoan:
    """The readers of a streamed turn, on loan to the asker, whose stream reads from it.

    The asker ends with `give_back` and then waits on `saved`, which holds the result of the turn or
    the error that storing it met. `holder` is the asker's task as long as it has the loan. With `has_rounds` the end
    of a reader is not the end of the turn: what comes next is said by `go_on` or `finish`.
    """

    __slots__ = (
        "_broken",
        "_events",
        "_failure",
        "_has_rounds",
        "_is_between",
        "_is_taken",
        "_on_return",
        "_reader",
        "_result",
        "_returned",
        "_revoked",
        "_round_over",
        "_wake",
        "holder",
        "saved",
        "turn_id",
    )

    def __init__(
        self,
        reader: ChatReader,
        turn_id: str,
        *,
        has_rounds: bool = False,
        on_return: Callable[[], object] | None = None,
    ) -> None:
        self._reader = reader
        self._has_rounds = has_rounds
        self._on_return = on_return
        self._is_between = False
        self._is_taken = False
        self._events: list[StreamEvent] = []
        self._failure: GorouterError | None = None
        self._broken: GorouterError | None = None
        self._result: ChatResult[object] | None = None
        self._returned = trio.Event()
        self._round_over = trio.Event() if has_rounds else self._returned
        self._wake: trio.Event | None = None
        self._revoked = False
        self.holder: trio.lowlevel.Task | None = None
        self.saved: ReplySlot[ChatResult[object] | None] = ReplySlot()
        self.turn_id = turn_id

    # For the asker

    @property
    def generation_id(self) -> str | None:
        """As `ChatReader.generation_id`, of the answer that is being read."""
        return self._reader.generation_id

    async def read(self) -> list[ChatChunk] | tuple[StreamEvent, ...]:
        """As `ChatReader.read`, over all rounds, or events that came between two of them, as a tuple.

        Raises `TurnInterruptedError` when the session took the reader back, and what ended the turn between two rounds.
        """
        while True:
            if self._events:
                events, self._events = tuple(self._events), []
                await trio.lowlevel.checkpoint_if_cancelled()
                return events
            if self._is_between:
                await self._wait_for_session()
                continue
            try:
                chunks = await self._reader.read()
            except GorouterError as exc:
                self._note_broken(exc)
                raise
            if chunks or not self._has_rounds:
                return chunks
            # The connection is free while the tools run.
            self._reader.close()
            self._is_between = True
            self._round_over.set()

    def wait(self) -> Awaitable[None] | None:
        """As `ChatReader.wait`."""
        return None if self._events or self._is_between else self._reader.wait()

    def take(self) -> list[ChatChunk]:
        """As `ChatReader.take`; `TurnInterruptedError` when the session took the reader back."""
        try:
            return self._reader.take()
        except GorouterError as exc:
            self._note_broken(exc)
            raise

    def _note_broken(self, error: GorouterError) -> None:
        if self._revoked:
            raise interrupted(error) from error
        if self._has_rounds:
            self._broken = error
            self._round_over.set()

    async def _wait_for_session(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._revoked:
            raise interrupted(None)
        self._wake = trio.Event()
        await self._wake.wait()

    def result(self) -> ChatResult[object]:
        """The answer from everything that was read; once that is all of it, this is also what is stored."""
        if self._result is not None:
            return self._result
        reader = self._reader
        result = msgspec.structs.replace(reader.result(), turn_id=self.turn_id)
        if reader.is_ended and reader.is_answered and not self._has_rounds:
            self._result = result
        return result

    def give_back(self) -> None:
        """The asker has stopped reading; never waits, may be called twice."""
        self.holder = None
        self._reader.close()
        if not self._returned.is_set():
            self._returned.set()
            if self._has_rounds and self._on_return is not None:
                self._on_return()

    # For the session

    async def wait_returned(self) -> None:
        """Wait until the asker has given it back."""
        await self._returned.wait()

    async def wait_round(self) -> ChatResult:
        """Wait until the reader was read to its end, and return what it gave; raises what its holder met there."""
        await self._round_over.wait()
        if self._broken is not None:
            raise self._broken
        return self._reader.result()

    @property
    def failure(self) -> GorouterError | None:
        """What the holder of the reader was told that it had met."""
        return self._reader.failure

    @property
    def is_broken(self) -> bool:
        """Whether the reader's holder was told already why there is no answer."""
        return self._broken is not None

    def take_round(self) -> None:
        """What the reader gave is written down as a round of the turn; it is not the turn's answer."""
        self._is_taken = True

    def go_on(self, reader: ChatReader) -> None:
        """Hand over the reader of the next round."""
        self._reader = reader
        self._is_between = self._is_taken = False
        self._round_over = trio.Event()
        if self._returned.is_set():
            reader.close()
        self._rouse()

    def emit(self, *events: StreamEvent) -> None:
        """Give out events; their number is bounded by that of the calls in a round."""
        self._events += events
        self._rouse()

    def finish(self, result: ChatResult[object]) -> None:
        """There is no further round; `result` is the answer of the turn."""
        self._result = result
        self._has_rounds = self._is_between = False
        self._rouse()

    def fail(self, error: GorouterError) -> bool:
        """The turn has failed between two rounds, which its reader is told; False when it is not there to be told."""
        if self._failure is not None:
            return True
        if not self._is_between or self._returned.is_set():
            return False
        self._failure = error
        self._rouse()
        return True

    def revoke(self) -> None:
        """Take the reader back, unless it is back already."""
        self._revoked = not self._returned.is_set()
        self._reader.close()
        self._rouse()

    def answer(self) -> ChatResult[object] | None:
        """What has arrived of the last round, in the form that is stored; None when that is nothing."""
        reader = self._reader
        if self._result is not None:
            return self._result
        if self._is_taken or not (reader.is_answered or reader.merge.has_data):
            return None
        result = reader.result(interrupted=not reader.is_answered)
        return msgspec.structs.replace(result, message=_storable(result), turn_id=self.turn_id)

    def _rouse(self) -> None:
        if self._wake is not None:
            self._wake.set()
            self._wake = None


def _storable(result: ChatResult[object]) -> AssistantMessage:
    """The message of an answer; without its tool calls when it was interrupted: they may be cut anywhere."""
    message = result.message
    if result.interrupted and message.tool_calls is not UNSET:
        return msgspec.structs.replace(message, tool_calls=UNSET, content=message.content or "")
    return message


def interrupted(cause: GorouterError | None, *, maybe_billed: bool = True) -> TurnInterruptedError:
    """What the asker of a turn that was stopped is told; `cause` holds what had arrived."""
    error = TurnInterruptedError("the turn was interrupted")
    error.maybe_billed = maybe_billed
    if cause is not None:
        error.partial = cause.partial
        error.generation_id = cause.generation_id
    return error

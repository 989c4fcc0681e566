"""What a loop of rounds and the owner of a turn are to each other.

A turn that takes more than one request is a loop: send, and as long as the answer calls tools, run them and send
again. The loop knows nothing of where the conversation is kept; whoever owns that gives it a `RoundJournal`, and
each step is written down before the next one is begun. `_loop.TurnLoop` is the loop of this package, for whole and
for streamed turns alike; the bones of it are::

    async def run(journal: RoundJournal) -> ChatResult:
        if journal.open_calls:                             # taken up again after a crash or a parking
            await answer_calls(journal, journal.pending)
        while True:
            answer = await journal.send()
            if not answer.message.tool_calls or rounds are used up:
                await journal.commit(answer)               # its calls, if any, are closed by the owner
                return answer
            await journal.called(answer)
            await answer_calls(journal, answer.message)

    async def answer_calls(journal, message):              # in parallel, if the loop likes
        for call in message.tool_calls:
            if call.id in journal.in_doubt and not idempotent: a synthetic result
            elif it needs approval: await journal.parked(Question(...))
            with journal.as_tool(): result = ...
        await journal.answered(messages, reports)          # of all open calls at once, or of some at a time

The loop is awaited in the owner's task. It may run tools in tasks of its own, and call the journal from them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from ..events import StreamEvent
    from ..wire.messages import AssistantMessage, ToolMessage
    from ..wire.result import ChatResult
    from ..wire.toolcalls import ToolCallReport
    from .request import TurnRequest

__all__ = ["Question", "RoundJournal", "TakeRounds", "has_tools", "recalled"]


class Question(Struct, frozen=True):
    """What somebody outside has to reply to before a call is carried out.

    `question` is any JSON value for whoever shows it. `until_s` is when it lapses, in wall-clock seconds since the
    epoch; None is never. The `question_id` is the same each time the call comes to it, and best no other call's:
    a reply that comes late names it.
    """

    question_id: str
    call_id: str
    question: object = None
    until_s: float | None = None


class RoundJournal(Protocol):
    """One turn, as a loop of rounds sees it. What is awaited is written down when it returns.

    Each method raises what storing raises, and is cancelled with its turn: the loop lets both pass.
    """

    deadline: float
    """On the trio clock, `inf` for none: until when the asker wants the whole turn."""

    @property
    def session(self) -> str | None:
        """The key of the session whose turn it is."""

    @property
    def turn_id(self) -> str | None:
        """The id of the turn, in a session."""

    @property
    def is_streamed(self) -> bool:
        """Whether somebody reads the answers as they come."""

    @property
    def pending(self) -> AssistantMessage | None:
        """The answer whose calls have no results yet; set where a turn is taken up in the middle of a round."""

    @property
    def open_calls(self) -> Sequence[str]:
        """The ids of the calls of `pending` that have no result."""

    @property
    def in_doubt(self) -> frozenset[str]:
        """Those among them that may have been carried out in an earlier life; only harmless ones may be repeated."""

    def request(self) -> TurnRequest:
        """The conversation as it is now: what `send` sends where it is given nothing else."""

    async def send(self, request: TurnRequest | None = None) -> ChatResult:
        """Send the conversation, or `request`, and return the answer; of a stream, once its reader has read it."""

    async def discarded(self, answer: ChatResult) -> None:
        """`answer` was paid for and is no part of the conversation: it has not the form that was asked for."""

    async def commit(self, answer: ChatResult[object]) -> None:
        """`answer` is that of the turn: on return it is as durable as it gets. Without it, what the loop returns is."""

    async def called(self, answer: ChatResult) -> None:
        """`answer` calls tools, and they are run next."""

    async def answered(self, messages: Sequence[ToolMessage], reports: Sequence[ToolCallReport] = ()) -> None:
        """What some of the open calls, or all, returned, and a report on each: any value that is written as JSON."""

    def keep(self, messages: Sequence[ToolMessage], reports: Sequence[ToolCallReport] = ()) -> None:
        """`answered` for a loop that is being cancelled: what tools have done is written down as the turn ends.

        What `answered` was given and has not written, because it was cut off, may be among it.
        """

    async def parked(self, question: Question) -> bytes | None:
        """Wait for the reply to `question` and return it, as JSON; None when it has lapsed.

        The call must not have been begun. Returns at once with a reply that came while nobody ran the turn.
        """

    def emit(self, *events: StreamEvent) -> None:
        """Give events to the reader of the stream; nothing for a whole turn."""

    def as_tool(self) -> AbstractContextManager[None]:
        """The current task, and all that it starts, is a tool of this turn: asked by it, its own session says no."""


TakeRounds: TypeAlias = Callable[[RoundJournal], Awaitable["ChatResult[object]"]]
"""A loop of rounds, as above."""


def has_tools(rounds: TakeRounds | None) -> bool:
    """Whether a turn that waits for a tool can go on with this loop: one without tools says so by an attribute."""
    return rounds is not None and getattr(rounds, "has_tools", True)


def recalled(rounds: TakeRounds | None, answer: ChatResult) -> ChatResult[object]:
    """A stored answer as this loop would give it: one that makes more of answers has a method `recall` for that."""
    recall = getattr(rounds, "recall", None)
    return answer if recall is None else cast("ChatResult[object]", recall(answer))

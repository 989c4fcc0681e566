"""What runs in a session: mail with its asker, the turn that is taken, and what askers are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec
import trio

from .._mailbox import ReplySlot
from .._turns.loan import TurnLoan, interrupted
from ..errors import (
    ActorGoneError,
    DeadlineExceededError,
    GorouterError,
    HistoryNotSaved,
    SessionBusyError,
    StoreError,
    TurnInDoubtError,
    TurnParkedError,
)
from ..wire.codec import encode_json
from ..wire.journal import LogEntry, TurnAbandoned, TurnAnswered
from ..wire.mail import SessionMail, StartTurn
from ..wire.result import CallRecord, ChatResult, HistoryEntry

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from .._turns.request import TurnRequest
    from .._turns.rounds import TakeRounds
    from ..wire.toolcalls import ToolCallReport
    from .turn import TurnMachine

__all__ = [
    "Answer",
    "Envelope",
    "RunningTurn",
    "ToolTasks",
    "TurnOwner",
    "closed",
    "dropped",
    "end_of",
    "gone",
    "in_doubt",
    "not_saved",
    "parked",
    "stopped",
    "store_failed",
]

Answer: TypeAlias = ChatResult[object] | TurnLoan | list[HistoryEntry] | bool | None
"""What mail is answered with."""


ToolTasks: TypeAlias = "dict[trio.lowlevel.Task, RunningTurn]"
"""The tasks that are tools of a turn: one table for all sessions of a client."""


class TurnOwner(Protocol):
    """The actor, as what runs in it sees it."""

    key: str
    tool_tasks: ToolTasks
    wall: Callable[[], float]

    @property
    def machine(self) -> TurnMachine | None:
        """The turn that runs, as far as it was written down."""

    def abandon(self, envelope: Envelope) -> None:
        """The asker of `envelope` was cancelled."""

    def queued_for(self) -> list[RunningTurn]:
        """The turns whose tools wait until the one that runs is over."""

    def request(self, turn: RunningTurn) -> TurnRequest:
        """The conversation as it is now."""

    async def send(self, turn: RunningTurn, request: TurnRequest) -> ChatResult:
        """Send `request`, and return the answer."""

    async def commit(self, turn: RunningTurn, result: ChatResult[object]) -> None:
        """Store the answer of a turn with rounds."""

    def early_reply(self, question_id: str) -> Envelope | None:
        """The next reply to a question that came before its call waited for it."""

    def keep(self, turn: RunningTurn, entry: LogEntry) -> None:
        """Store the entry when the turn ends, which is being cut off."""

    async def write(self, turn: RunningTurn, entry: LogEntry, *, answer: ChatResult[object] | None = None) -> None:
        """Store the next entry of the turn; `answer` is what was paid for, should that fail."""


class Envelope(ReplySlot[Answer]):
    """Mail and the asker who waits for its answer.

    `rounds` is the loop of tool rounds that takes the turn, None for a turn without tools; `within` is the turn whose
    tool the asker is, if it is one. `options` are those of the session when the mail was sent.
    """

    __slots__ = ("_actor", "_done", "_is_done", "context", "mail", "options", "rounds", "within")

    def __init__(
        self,
        mail: SessionMail,
        actor: TurnOwner,
        *,
        rounds: TakeRounds | None = None,
        within: RunningTurn | None = None,
        options: object = None,
    ) -> None:
        super().__init__()
        self.mail = mail
        self.options = options
        # The context variables of the asker, where something of its own runs in the turn.
        self.context: Context | None = None
        self.rounds = rounds
        self.within = within
        self._actor = actor
        # Few ever wait for more than the answer, so there is an event only then.
        self._done: trio.Event | None = None
        self._is_done = False

    @property
    def is_finished(self) -> bool:
        """Whether the actor is through with the mail, so that its asker waits for nothing any more."""
        return self._is_done

    def finish(self) -> None:
        """The actor is through with the mail, and the history is in order."""
        self._is_done = True
        if self._done is not None:
            self._done.set()

    async def wait_finished(self) -> None:
        """Wait for `finish`."""
        if self._is_done:
            await trio.lowlevel.checkpoint()
            return
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()

    def on_abandon(self) -> None:
        """Leave the mailbox, or interrupt the turn that runs for this asker."""
        self._actor.abandon(self)


class RunningTurn:
    """The turn that runs: what was asked, and how far it has come.

    `others` are askers whose messages are taken in the same turn. `first` and `end` bound the part of the history that
    is sent. `unsaved` is what has to be stored even if the turn is cut off: an answer that was paid for, the result of
    a tool that has run; `kept` are results that nobody has begun to store. `earlier` are the rounds of an earlier life,
    `earlier_reports` what became of their calls. `begun` are the messages of the first request of a turn with rounds;
    `is_saved` says that the answer of one is stored.
    """

    __slots__ = (
        "actor",
        "answer",
        "begun",
        "deadline",
        "earlier",
        "earlier_reports",
        "end",
        "envelope",
        "first",
        "is_late",
        "is_saved",
        "is_sent",
        "kept",
        "loan",
        "mail",
        "messages",
        "others",
        "replaces",
        "turn_id",
        "unsaved",
    )

    def __init__(self, mail: StartTurn, envelope: Envelope, *, turn_id: str, actor: TurnOwner) -> None:
        self.mail = mail
        self.envelope = envelope
        self.turn_id = turn_id
        self.actor = actor
        self.messages = mail.messages
        self.deadline = mail.deadline
        self.begun = b""
        self.is_saved = False
        self.others: list[Envelope] = []
        self.earlier: tuple[CallRecord, ...] = ()
        self.earlier_reports: tuple[ToolCallReport, ...] = ()
        self.first = 0
        self.end: int | None = None
        self.replaces = ""
        self.is_late = False
        self.is_sent = False
        self.loan: TurnLoan | None = None
        self.answer: ChatResult[object] | None = None
        self.unsaved: LogEntry | None = None
        self.kept: tuple[LogEntry, ...] = ()

    def note_sent(self) -> None:
        """A request of the turn is going out: from now on it may be billed."""
        self.is_sent = True

    @property
    def waited_for_by(self) -> list[RunningTurn]:
        """The turns whose tools are among its askers, or wait in the line behind it."""
        askers = [asker for asker in (self.envelope, *self.others) if not asker.is_finished]
        return [*(asker.within for asker in askers if asker.within is not None), *self.actor.queued_for()]

    @property
    def joined(self) -> tuple[str, ...]:
        """The ids of the turns that are taken in this one."""
        ids = [other.mail.turn_id for other in self.others if isinstance(other.mail, StartTurn)]
        return tuple(dict.fromkeys(turn_id for turn_id in ids if turn_id and turn_id != self.turn_id))

    def succeed(self) -> None:
        """Tell the askers that the answer is stored."""
        if self.loan is not None:
            self.loan.saved.resolve(self.answer)
            return
        self.envelope.resolve(self.answer)
        for other in self.others:
            other.resolve(self._answer_for(other))

    def fail(self, error: GorouterError) -> None:
        """Tell the askers what became of the turn, unless that was said before."""
        if self.loan is not None:
            self.loan.saved.fail(error)
            return
        self.envelope.fail(error)
        for other in self.others:
            other.fail(_copied(error))

    def fail_with(self, exc: BaseException, *, error: GorouterError | None = None) -> None:
        """Tell the asker of a turn without an answer why that is so: `error`, or what `exc` stands for."""
        loan = self.loan
        error = error or self._error_of(exc)
        if loan is None:
            self.fail(error)
        elif loan.fail(error) or not isinstance(exc, Exception):
            # Its holder reads off the loan what became of the turn.
            self.succeed()
        else:
            self.fail(error)

    def finish(self) -> None:
        """The askers that were joined may go: the history is in order."""
        for other in self.others:
            other.finish()

    def _error_of(self, exc: BaseException) -> GorouterError:
        if isinstance(exc, GorouterError):
            return exc
        if isinstance(exc, Exception):
            return gone(exc)
        return stopped(self.mail, maybe_billed=self.is_sent)

    def _answer_for(self, other: Envelope) -> ChatResult[object] | None:
        mail = other.mail
        if self.answer is None or not isinstance(mail, StartTurn) or not mail.turn_id:
            return self.answer
        return msgspec.structs.replace(self.answer, turn_id=mail.turn_id)


def _copied(error: GorouterError) -> GorouterError:
    """The same error for another task: a raised exception collects the traceback of one."""
    copied = error.__class__.__new__(error.__class__)
    copied.args = error.args
    copied.__dict__.update(error.__dict__)
    copied.__cause__ = error.__cause__
    return copied


def end_of(turn: RunningTurn, exc: BaseException | None, *, reason: str = "interrupted") -> LogEntry:
    """The entry that ends a turn, which `exc` cut off if it is not None."""
    answer = turn.answer
    if answer is not None:
        return TurnAnswered(turn.turn_id, msgspec.Raw(encode_json(answer.message)), answer.call)
    if isinstance(exc, GorouterError):
        return TurnAbandoned(turn.turn_id, type(exc).__name__, maybe_billed=exc.maybe_billed)
    return TurnAbandoned(turn.turn_id, reason, maybe_billed=turn.is_sent)


def stopped(mail: SessionMail, *, maybe_billed: bool = False, is_late: bool = False) -> GorouterError:
    """What the asker is told when what was done for `mail` was cancelled; `is_late` says that its time was over."""
    if not isinstance(mail, StartTurn):
        return gone(None)
    if not is_late:
        return interrupted(None, maybe_billed=maybe_billed)
    error = DeadlineExceededError("the deadline of the turn passed", phase="total")
    error.maybe_billed = maybe_billed
    return error


def in_doubt(turn_id: str) -> TurnInDoubtError:
    """The turn of this id was cut off in an earlier life."""
    error = TurnInDoubtError(f"turn {turn_id!r} was sent before, and whether it was answered is unknown")
    error.maybe_billed = True
    return error


def parked(turn_id: str, question_id: str) -> TurnParkedError:
    """The turn waits for a reply, and nobody waits for the turn any more."""
    error = TurnParkedError(f"turn {turn_id!r} waits for a reply to question {question_id!r}", question_id=question_id)
    error.maybe_billed = True
    return error


def not_saved(answer: ChatResult[object] | None, cause: Exception) -> HistoryNotSaved:
    """The answer was not stored because of `cause`."""
    error = HistoryNotSaved(f"the answer arrived but was not stored: {cause}")
    if answer is not None:
        error.partial = answer
        error.generation_id = answer.generation_id
        error.attempts = answer.call.attempts
    error.maybe_billed = True
    error.__cause__ = cause
    return error


def store_failed(exc: OSError) -> StoreError:
    """What an operating system's error out of a store is to the asker."""
    return StoreError(f"the store failed: {exc.__class__.__name__}: {exc}", kind="io")


def closed() -> ActorGoneError:
    """The actor takes no mail any more."""
    return ActorGoneError("the session was closed before it could take the message")


def dropped() -> SessionBusyError:
    """Newer mail has taken the place of this one."""
    return SessionBusyError("the session's mailbox was full, and newer mail took the place of this one (drop_oldest)")


def gone(cause: Exception | None) -> ActorGoneError:
    """The actor has ended, or began anew, because of `cause`."""
    if cause is None:
        return ActorGoneError("the session ended before it could answer")
    error = ActorGoneError(f"the session failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error

"""The session actor: one task owns one conversation and takes its turns one after the other.

Theory of operation. Everything that changes a session goes through its mailbox and is acted upon by
its one task, in order of arrival; `interrupt`, the reply to a question and an asker's leaving pass the queue. A turn
is written down before it is sent and again when it is answered, with each round of tools in between, and the
answer is given to the asker only after that.

The way of a turn that nothing happens to is straight and holds no scope of its own. All mail is acted
upon inside one scope, which our own interrupts cancel and which is replaced by a new one afterwards;
a cancel from outside passes. However a turn is cut off, there is one way out: `_repair` writes its
end, shielded and bounded, straight to the store, and before it what must not be lost: an answer that was
paid for, the result of a tool. A write that failed or was cancelled is in doubt: what the actor knows is thrown away
then, and the store asked.

A streamed turn is lent on: the asker gets the reader of the reply, reads from the socket in its own
task, and gives it back; what has arrived by then is what is stored.

A turn in which a call waits for a reply from outside runs as long as somebody waits for the turn. When its asker
leaves, or the client closes, it stays parked in the log: asked again under its id it goes on, and so it does when
the reply comes with the tools to go on with. Until then the session takes no other turn, unless double texting
is to interrupt; a question that has lapsed stands in nobody's way, nor does a reply that nobody has acted on by then.

With `double_texting="merge"`, a turn that is taken from the queue takes those with it that wait behind it, whole ones
with the same options: their messages are joined in order of arrival. Each asker gets the one answer, under its own
turn id if it gave one; the log keeps all ids, so asking again under any of them gives the stored answer, and no
message is sent twice. The turn is interrupted only when the last of its askers leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import copy_context
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Literal, assert_never, cast

import msgspec
import trio
from msgspec import Struct

from .._contain import contain
from .._contexts import adopted
from .._mailbox import Mailbox
from .._turns.loan import TurnLoan, patience
from .._turns.request import TurnExtras, TurnRequest
from .._turns.rounds import has_tools, recalled
from ..config import ContextPolicy
from ..errors import GorouterError, HistoryNotSaved, SessionBusyError, SessionConflictError
from ..pool.deadlines import DeadlineKeeper
from ..wire.codec import (
    decode_log_entry,
    decode_message,
    encode_json,
    encode_message,
    join_options,
    render_body,
)
from ..wire.journal import (
    AnswerDiscarded,
    HistoryFolded,
    LogEntry,
    QuestionAnswered,
    TurnAbandoned,
    TurnAnswered,
    TurnCalled,
    TurnEntry,
    TurnResumed,
    TurnsDropped,
    TurnStarted,
)
from ..wire.mail import (
    DEFAULT_SETTINGS,
    AnswerQuestion,
    CallSettings,
    ClearHistory,
    CompactHistory,
    ForkHistory,
    HttpCall,
    ReadHistory,
    SessionMail,
    StartTurn,
    UndoTurns,
)
from ..wire.messages import SystemMessage
from ..wire.result import ChatResult
from .context import decide
from .log import compact, entries_of, turns_of
from .rounds import SessionRounds, plain_rounds
from .running import (
    Envelope,
    RunningTurn,
    ToolTasks,
    closed,
    dropped,
    end_of,
    gone,
    in_doubt,
    not_saved,
    parked,
    stopped,
    store_failed,
)
from .transcript import Transcript
from .turn import EntryOutOfOrderError, TurnMachine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from typing import TypeVar

    from .._pipeline import ChatPipeline
    from .._turns.rounds import TakeRounds
    from ..abc import HistoryStore, ImmediateStore
    from ..config import SessionConfig, Summarise
    from ..wire.messages import AssistantMessage
    from .ownership import SessionLog, SessionOwnership
    from .running import Answer

    T = TypeVar("T")

__all__ = [
    "SaveWatch",
    "SessionActor",
    "SessionOptions",
    "SessionServices",
    "SessionState",
    "SessionStatistics",
    "WaitsFor",
]

SessionState = Literal["loading", "idle", "running", "parked", "gone"]
"""Reading the log; without mail; acting on mail; in a turn with a call that waits for a reply; ended."""

WaitsFor = Literal["mail", "store", "model", "reader", "tools", "reply"]
"""Whom a session waits for: its askers, its store, the API, the reader of its stream, tools, somebody outside."""


_NOTHING = ReadHistory()


class SessionOptions(Struct, frozen=True):
    """What a session was opened with: encoded system messages (or nothing), encoded chat options, and the rest.

    `options` and `settings` are those of `keywords` above the client's defaults, after so many changes as `base` says.
    """

    system: bytes = b""
    options: bytes = b"{}"
    settings: CallSettings = DEFAULT_SETTINGS
    context: ContextPolicy | None = None
    extras: TurnExtras | None = None
    keywords: Mapping[str, object] = {}
    base: int = 0


class SessionStatistics(Struct, frozen=True):
    """A snapshot of a session.

    `queued` is the mail that waits, `waiting` the askers that wait for room in the mailbox. `turns` have ended,
    abandoned ones included; `length` of them are in the history. `waits_for` whom it waits, for `since_s` seconds
    now. `cost_usd` adds up the calls in the log whose cost is known, `unpriced` counts the others; both are about what
    the actor has loaded, like `version` and `rendered_bytes`. `question_id` is the first question that waits for a
    reply. `failure` is what failed last without harm to a turn: the summary of a history.
    """

    state: SessionState
    queued: int
    turns: int
    version: int
    rendered_bytes: int
    length: int = 0
    waiting: int = 0
    waits_for: WaitsFor = "mail"
    since_s: float = 0.0
    calls: int = 0
    cost_usd: Decimal | None = None
    unpriced: int = 0
    question_id: str | None = None
    failure: str = ""


class SaveWatch:
    """Ends the saves that take longer than `limit_s`: one task for all sessions of a client."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._now = trio.lowlevel.current_clock().current_time
        self._saving: dict[SessionActor, None] = {}
        self._keeper = DeadlineKeeper(self._saving)

    async def run(self) -> None:
        """Watch until cancelled."""
        await self._keeper.run()

    def begin(self, actor: SessionActor) -> None:
        """From now on, `actor` has the limit to save."""
        actor.deadline_at = self._now() + self._limit_s
        self._saving[actor] = None
        if actor.deadline_at < self._keeper.next_wake:
            self._keeper.hurry(actor.deadline_at)

    def end(self, actor: SessionActor) -> None:
        """`actor` has saved, or will not any more."""
        actor.deadline_at = math.inf
        self._saving.pop(actor, None)


class SessionServices:
    """What all sessions of a client have in common."""

    __slots__ = (
        "config",
        "immediate",
        "now",
        "on_gone",
        "on_rest",
        "ownership",
        "pipeline",
        "store",
        "tool_tasks",
        "turn_ids",
        "wall",
        "watch",
    )

    def __init__(
        self,
        *,
        pipeline: ChatPipeline,
        store: HistoryStore,
        config: SessionConfig,
        wall: Callable[[], float],
        turn_ids: Iterator[str],
        on_gone: Callable[[SessionActor], None],
        watch: SaveWatch,
        tool_tasks: ToolTasks,
        ownership: SessionOwnership | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.store = store
        has_all_at_hand = hasattr(store, "load_nowait") and hasattr(store, "append_nowait")
        self.immediate = cast("ImmediateStore", store) if has_all_at_hand else None
        self.config = config
        self.wall = wall
        self.turn_ids = turn_ids
        self.on_gone = on_gone
        # Where there are more actors than there should be: called by each that is about to have nothing to do.
        self.on_rest: Callable[[], None] | None = None
        self.ownership = ownership
        self.now = trio.lowlevel.current_clock().current_time
        self.watch = watch
        self.tool_tasks = tool_tasks


class SessionActor:
    """Run it as a task; talk to it through `ask` and `interrupt`."""

    __slots__ = (
        "_config",
        "_current",
        "_ended",
        "_failure",
        "_head",
        "_head_of",
        "_is_ending",
        "_is_gone",
        "_is_leaving",
        "_journal",
        "_last_error",
        "_mail_scope",
        "_mailbox",
        "_restarts",
        "_routing",
        "_services",
        "_since",
        "_stop",
        "_store",
        "_transcript",
        "_turn",
        "_turns_asked",
        "_version",
        "_waits_for",
        "deadline_at",
        "key",
        "options",
        "tool_tasks",
        "used_at",
        "wall",
    )

    def __init__(self, key: str, options: SessionOptions, *, services: SessionServices, routing: bytes = b"") -> None:
        config = services.config
        self.key = key
        self.options = options
        self.deadline_at = math.inf
        self.used_at = self._since = services.now()
        self.tool_tasks = services.tool_tasks
        self.wall = services.wall
        self._services = services
        self._store: SessionLog = services.store
        self._config = config
        self._routing = routing
        self._head = b""
        self._head_of: SessionOptions | None = None
        drops = config.overflow == "drop_oldest"
        self._mailbox: Mailbox[Envelope] = Mailbox(
            config.mailbox, policy=config.overflow, on_drop=_drop if drops else None
        )
        self._transcript: Transcript | None = None
        self._version = 0
        self._current: Envelope | None = None
        self._turn: RunningTurn | None = None
        self._journal: SessionRounds | None = None
        self._turns_asked = 0
        self._mail_scope = trio.CancelScope()
        self._stop: Literal["", "interrupt", "left"] = ""
        self._waits_for: WaitsFor = "mail"
        # Few actors are ever waited for, so there is an event only then.
        self._ended: trio.Event | None = None
        self._is_gone = self._is_ending = self._is_leaving = False
        self._restarts: list[float] = []
        self._last_error: Exception | None = None
        self._failure = ""

    def __repr__(self) -> str:
        return f"<SessionActor {self.key!r}: {self.statistics().state}>"

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""
        return self._is_gone

    # For refs: the data plane and the control plane

    async def ask(self, mail: SessionMail, *, rounds: TakeRounds | None = None) -> Answer:
        """Queue `mail` and wait for its one answer; `rounds` is the loop of tools that takes the turn.

        Raises what the answer is, `SessionBusyError` when the policy refuses it, `ActorGoneError`
        when the actor ends first. Cancelling takes queued mail out, or interrupts its turn and
        waits, at most the shutdown grace, until the history is repaired.
        """
        is_turn = isinstance(mail, StartTurn)
        if self._turn is not None or self._turns_asked:
            self._mind_others(is_turn=is_turn)
        within = self._asking_turn() if self.tool_tasks else None
        envelope = Envelope(mail, self, rounds=rounds, within=within, options=self.options)
        if rounds is not None:
            envelope.context = copy_context()
        self._turns_asked += is_turn
        try:
            if not self._post_nowait(envelope):
                await self._post(envelope)
            return await envelope.wait()
        finally:
            self._turns_asked -= is_turn
            if envelope.abandoned:
                with patience(self._config.shutdown_grace_s):
                    await envelope.wait_finished()  # noqa: ASYNC102 - `patience` is a shield with a deadline

    async def reply(self, question_id: str, answer: bytes, *, rounds: TakeRounds | None = None) -> bool:
        """Bring the reply to a question, ahead of queued mail where its turn runs; True once it is stored.

        False when no turn waits for it, or not any more. A turn that nobody runs is taken up with `rounds`, if there
        are any.
        """
        mail, turn = AnswerQuestion(question_id, answer), self._turn
        if turn is not None:
            envelope = Envelope(mail, self)
            if self._journal is not None and self._journal.take_reply(envelope):
                is_taken = cast("bool | None", await envelope.wait())
                if is_taken is not None:
                    return is_taken
                mail = AnswerQuestion(question_id, answer, turn.turn_id)
            elif self._transcript is not None and not self._is_open(question_id):
                await trio.lowlevel.checkpoint()
                return False
        # A turn that is just taken up finds it in the queue; one that is just left is behind us when its turn comes.
        is_taken = cast("bool | None", await self.ask(mail, rounds=rounds))
        if is_taken is None:
            raise gone(None)
        return is_taken

    async def interrupt(self) -> bool:
        """Stop the running turn, ahead of all queued mail, and wait until the history is repaired.

        What had arrived is stored as an interrupted answer. False when no turn was stopped: none was
        running, or it was answered already and only being stored.
        """
        if not self._is_in_turn():
            await trio.lowlevel.checkpoint()
            return False
        envelope = cast("Envelope", self._current)
        is_stopped = self._stop_current("interrupt")
        await envelope.wait_finished()
        return is_stopped

    async def aclose(self) -> None:
        """End the actor: the running turn is interrupted, queued mail gets `ActorGoneError`."""
        self._stop_for_good()
        await self._wait_gone()

    async def retire_when_done(self) -> None:
        """`leave_when_done`, and wait for it. Raises `SessionBusyError` where the actor would wait for who asks."""
        self._mind_others(is_turn=False)
        if self.tool_tasks:
            self._asking_turn()
        self.leave_when_done()
        await self._wait_gone()

    async def _wait_gone(self) -> None:
        if self._is_gone:
            await trio.lowlevel.checkpoint()
            return
        if self._ended is None:
            self._ended = trio.Event()
        await self._ended.wait()

    def retire(self) -> bool:
        """End the actor if it has nothing to do; False, and nothing else, when it has. Never waits."""
        if not self._mailbox.is_awaited:
            return False
        self._stop_for_good()
        return True

    def leave_when_done(self) -> None:
        """End the actor as soon as it has nothing to do. That takes no room among its mail, and asks no store."""
        if not self.retire():
            self._is_leaving = True

    def abandon(self, envelope: Envelope) -> None:
        """The asker of `envelope` was cancelled; used by envelopes. A turn goes on while another asker waits for it."""
        if self._mailbox.remove(envelope):
            envelope.finish()
            if self._is_leaving and not self._mailbox.has_mail:
                # Its reader may be about to take it, and would wait for the next one.
                self._post_nothing()
            return
        turn = self._turn
        others = [] if turn is None else turn.others
        if envelope is not self._current and not any(envelope is other for other in others):
            return
        if others and not all(asker.abandoned for asker in (*others, cast("RunningTurn", turn).envelope)):
            envelope.finish()
        else:
            self._stop_current("left")

    def queued_for(self) -> list[RunningTurn]:
        """The turns whose tools wait until the one that runs is over; used by turns."""
        return [mail.within for mail in self._mailbox.waiting() if mail.within is not None]

    def expire(self) -> None:
        """Saving has taken too long: the asker is told at once; called by the watch."""
        turn = cast("RunningTurn", self._turn)
        turn.is_late = True
        turn.fail(not_saved(turn.answer, self._too_late()))
        self._mail_scope.cancel()

    def statistics(self) -> SessionStatistics:
        """A snapshot; cheap."""
        transcript = self._transcript or Transcript()
        mailbox = self._mailbox.statistics()
        question_id = None if self._journal is None else self._journal.waits_for
        return SessionStatistics(
            self._state(question_id),
            mailbox.queued,
            transcript.turns,
            self._version,
            len(transcript.rendered),
            transcript.length,
            mailbox.waiting_posters,
            self._waits_for if question_id is None else "reply",
            self._services.now() - self._since,
            transcript.calls,
            transcript.cost_usd if transcript.calls > transcript.unpriced else None,
            transcript.unpriced,
            question_id or _open_question(transcript.machine),
            self._failure,
        )

    # The task

    async def run(self) -> None:
        """The actor's life: take mail until it is closed or cancelled. Every asker gets an answer."""
        cause = None
        try:
            while self._may_start():
                await contain(self._take_mail, report=self._fail_current)
            if not self._is_ending:
                cause = self._last_error
        finally:
            self._end(cause)

    async def _take_mail(self) -> None:
        """Act on mail, inside a scope that is replaced once it was cancelled."""
        while not self._is_ending:
            with trio.CancelScope() as self._mail_scope:
                self._stop = ""
                while self._goes_on:
                    # A checkpoint, at which the scope is left that was cancelled meanwhile.
                    await self._act(await self._mailbox.receive())
                self._is_ending = True

    @property
    def _goes_on(self) -> bool:
        return not self._is_ending and (not self._is_leaving or self._mailbox.has_mail)

    def _stop_for_good(self) -> None:
        """Take no mail any more, and stop what is done for the current one."""
        self._is_ending = True
        if self._mailbox.is_awaited:
            # Nothing is done that a cancel could stop. Mail that nobody waits for wakes for a tenth of its cost.
            self._post_nothing()
        else:
            self._mail_scope.cancel()

    def _post_nothing(self) -> None:
        nothing = Envelope(_NOTHING, self)
        nothing.abandoned = True
        self._mailbox.post_nowait(nothing)

    async def _act(self, envelope: Envelope) -> None:
        if envelope.abandoned:
            envelope.finish()
            return
        self._current = envelope
        try:
            await self._answer(envelope)
        except GorouterError as exc:
            envelope.fail(exc)
        except BaseException as exc:
            # What is no `Exception` is a cancel, alone or in the group of a store's nursery; the rest is contained.
            if not isinstance(exc, Exception):
                self._settle_current(self._stopped(envelope.mail))
            raise
        finally:
            if self._store is not self._services.store:
                self._disown()
        self._current = None
        if self._services.on_rest is not None:
            self._services.on_rest()
        envelope.finish()
        self._wait_for("mail")

    async def _answer(self, envelope: Envelope) -> None:
        if self._services.ownership is not None and not isinstance(envelope.mail, (StartTurn, ReadHistory)):
            await self._own(self._services.ownership)
        match envelope.mail:
            case StartTurn() as turn:
                await self._take_turn(turn, envelope)
            case ReadHistory():
                envelope.resolve(entries_of(await self._read_log()))
            case ClearHistory():
                await self._clear()
                envelope.resolve(None)
            case ForkHistory(target=target):
                await self._fork(target)
                envelope.resolve(None)
            case UndoTurns(turn_id=turn_id):
                envelope.resolve(await self._undo(turn_id))
            case CompactHistory():
                await self._compact()
                envelope.resolve(None)
            case AnswerQuestion() as reply:
                await self._take_reply(reply, envelope)
            case unknown:
                assert_never(unknown)

    def _state(self, question_id: str | None) -> SessionState:
        if self._is_gone:
            return "gone"
        if self._current is None:
            return "idle"
        if question_id is not None:
            return "parked"
        return "loading" if self._transcript is None else "running"

    def _wait_for(self, whom: WaitsFor) -> None:
        self._waits_for = whom
        self._since = self._services.now()

    def _may_start(self) -> bool:
        """Whether the actor may (re)start: at most `restarts` times in the window."""
        if self._is_ending:
            return False
        now = self._services.now()
        self._restarts = [at for at in self._restarts if now - at < self._config.restart_window_s]
        self._restarts.append(now)
        return len(self._restarts) <= self._config.restarts + 1

    def _fail_current(self, error: Exception) -> None:
        """An error that nobody expected: the asker gets it as the cause, the actor starts afresh."""
        self._last_error = error
        self._transcript = None
        self._settle_current(gone(error))

    def _settle_current(self, error: GorouterError) -> None:
        envelope, self._current = self._current, None
        if envelope is not None:
            envelope.fail(error)
            envelope.finish()
            self._wait_for("mail")

    def _end(self, cause: Exception | None) -> None:
        self._services.on_gone(self)
        if self._current is not None:
            self._settle_current(gone(cause))
        for envelope in self._mailbox.close():
            envelope.fail(gone(cause))
            envelope.finish()
        self._is_gone = True
        if self._ended is not None:
            self._ended.set()

    # The mailbox

    def _post_nowait(self, envelope: Envelope) -> bool:
        """Queue the mail if there is room. No checkpoint: the asker waits for the answer anyway."""
        try:
            self._mailbox.post_nowait(envelope)
        except trio.WouldBlock:
            return False
        except trio.ClosedResourceError:
            raise closed() from None
        return True

    async def _post(self, envelope: Envelope) -> None:
        """Wait for room in a full mailbox, or refuse, as the policy says."""
        try:
            await self._mailbox.post(envelope)
        except trio.WouldBlock:
            raise SessionBusyError(f"the session's mailbox is full ({self._config.mailbox})") from None
        except trio.ClosedResourceError:
            raise closed() from None

    def _mind_others(self, *, is_turn: bool) -> None:
        """Mail comes while turns wait or run."""
        loan = None if self._turn is None else self._turn.loan
        if loan is not None and loan.holder is trio.lowlevel.current_task():
            raise SessionBusyError("this task holds a stream of the session; leave that first")
        policy = self._config.double_texting
        if is_turn and policy == "reject":
            raise SessionBusyError("a turn is running, and the session rejects another (double_texting)")
        if is_turn and policy == "interrupt" and self._is_in_turn() and not (self.tool_tasks and self._asking_turn()):
            self._stop_current("interrupt")

    def _asking_turn(self) -> RunningTurn | None:
        """The turn whose tool is asking; raises `SessionBusyError` when it runs in this session, or for it."""
        asking = None
        task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        while task is not None and asking is None:
            asking = self.tool_tasks.get(task)
            task = None if task.parent_nursery is None else task.parent_nursery.parent_task
        waiting = [] if asking is None else [asking]
        for turn in waiting:  # Which grows under way.
            if turn is self._turn:
                raise SessionBusyError(
                    "a tool asks the session whose turn it is part of: each would wait for the other"
                )
            waiting += [other for other in turn.waited_for_by if not any(other is known for known in waiting)]
        return asking

    def _is_in_turn(self) -> bool:
        return self._turn is not None or (self._current is not None and isinstance(self._current.mail, StartTurn))

    def _stop_current(self, why: Literal["interrupt", "left"]) -> bool:
        """Interrupt what is done for the current mail; what is answered is stored all the same."""
        if self._turn is not None and self._turn.answer is not None and not self._turn.is_saved:
            return False
        self._stop = self._stop or why
        self._mail_scope.cancel()
        return True

    def _leave(self, turn: RunningTurn) -> None:
        """The stream of `turn` was left, maybe long after the turn has failed and another one runs."""
        if turn is self._turn:
            self._stop_current("left")

    def _stopped(self, mail: SessionMail) -> GorouterError:
        """What the asker of a turn that was not begun, or of other work, is told of a cancel."""
        return stopped(mail, is_late=self._is_overdue(mail))

    def _is_overdue(self, mail: SessionMail) -> bool:
        return not self._stop and isinstance(mail, StartTurn) and mail.deadline <= self._services.now()

    # Turns

    @property
    def machine(self) -> TurnMachine | None:
        """The turn that was started and has no end."""
        return None if self._transcript is None else self._transcript.machine

    def _is_open(self, question_id: str) -> bool:
        """Whether the turn without an end waits for the reply to this question, which would come in time."""
        question = None if self.machine is None else self.machine.question(question_id)
        return question is not None and question.is_open(self.wall())

    async def _take_turn(self, mail: StartTurn, envelope: Envelope) -> None:
        if mail.deadline != math.inf:
            if mail.deadline <= self._services.now():
                raise stopped(mail, is_late=True)
            self._mail_scope.deadline = mail.deadline
        try:
            if self._services.ownership is not None:
                await self._own(self._services.ownership)
            transcript = self._transcript or await self._load()
            turn_id = mail.turn_id or self._new_turn_id(transcript)
            is_known = transcript.unfinished is not None or transcript.outcome(turn_id) is not None
            if is_known and await self._is_settled(mail, envelope, turn_id=turn_id):
                return
            turn = RunningTurn(mail, envelope, turn_id=turn_id, actor=self)
            await self._carry_out(turn, self._transcript)
        finally:
            if mail.deadline != math.inf:
                self._mail_scope.deadline = math.inf

    async def _is_settled(self, mail: StartTurn, envelope: Envelope, *, turn_id: str) -> bool:
        """Look back at what the log says of this turn, or of one that has no end; True when nothing is left to do."""
        transcript = cast("Transcript", self._transcript)
        outcome, machine = transcript.outcome(turn_id), transcript.machine
        if outcome == "answered":
            envelope.resolve(recalled(envelope.rounds, await self._stored_answer(turn_id)))
            return True
        if outcome == "forgotten":
            raise SessionConflictError(f"turn {turn_id!r} was answered before the history was compacted")
        if machine is not None:
            if transcript.is_unfinished(turn_id):
                if machine.is_parked or (mail.resume and machine.rounds):
                    await self._take_up(mail, envelope, machine)
                    return True
                if not mail.resume:
                    # Left as it is, so that it can still be taken up where it was.
                    raise in_doubt(turn_id)
            await self._pass_by(machine)
            outcome = transcript.outcome(turn_id)
        if outcome == "in_doubt" and not mail.resume:
            raise in_doubt(turn_id)
        return False

    async def _take_up(self, mail: StartTurn, envelope: Envelope, machine: TurnMachine) -> None:
        """Go on with a turn that an earlier life has left in the midst of its rounds."""
        if machine.is_parked and not has_tools(envelope.rounds):
            raise parked(machine.turn_id, _open_question(machine) or "")
        turn = RunningTurn(mail, envelope, turn_id=machine.turn_id, actor=self)
        turn.is_sent = True
        turn.first = cast("Transcript", self._transcript).first
        turn.earlier, turn.earlier_reports = tuple(machine.records), tuple(machine.reports)
        await self._carry_out(turn, None)

    async def _pass_by(self, machine: TurnMachine) -> None:
        """End a turn of an earlier life, which nobody takes up; raises when it waits for a reply that may yet come."""
        reason = "in doubt"
        if machine.is_parked:
            reason = "lapsed" if self._has_lapsed(machine) else "interrupted"
            if reason == "interrupted" and self._config.double_texting != "interrupt":
                raise SessionBusyError(f"turn {machine.turn_id!r} {_what_for(machine)}")
        await self._append(TurnAbandoned(machine.turn_id, reason, maybe_billed=True))

    def _has_lapsed(self, machine: TurnMachine) -> bool:
        """Whether the time of each question is over: that of one whose reply nobody has acted on as well."""
        now = self.wall()
        return all(question.until_s is not None and question.until_s <= now for question in machine.questions)

    def _new_turn_id(self, transcript: Transcript) -> str:
        """An id for a turn that came without one. A client that is seeded draws ids that may be in the log already."""
        while True:
            turn_id = next(self._services.turn_ids)
            if transcript.outcome(turn_id) is None and not transcript.is_unfinished(turn_id):
                return turn_id

    async def _carry_out(self, turn: RunningTurn, transcript: Transcript | None) -> None:
        """Take a turn from its start to its end, or from where it was left; however it ends, the log says so.

        A turn that is new has the `transcript` that it goes on from.
        """
        self._turn = turn
        body = b""
        try:
            body = await (self._resume(turn) if transcript is None else self._begin(turn, transcript))
            if body:
                await (self._stream_turn(turn, body) if turn.mail.streaming else self._whole_turn(turn, body))
                self._note_plain(turn, body)
            else:
                await self._take_rounds(turn)
        except BaseException as exc:
            if body and isinstance(exc, GorouterError):
                self._note_plain(turn, body, exc)
            await self._repair(turn, exc)  # noqa: ASYNC102 - shields itself, for the grace at most
            raise
        finally:
            self._turn = self._journal = None
            if turn.others:
                turn.finish()

    async def _begin(self, turn: RunningTurn, transcript: Transcript) -> bytes:
        """Write down a turn that is new, and return the body of its request; none where a loop makes it."""
        mail = turn.mail
        if mail.replaces is not None:
            await self._find_replaced(turn, transcript)
        elif self._config.double_texting == "merge" and not mail.streaming:
            self._join_others(turn, transcript)
        policy = self.options.context or self._config.context
        if policy is not None:
            await self._limit(turn, transcript, policy)
        body = b""
        if turn.envelope.rounds is None:
            body = self._render(turn, transcript)
        else:
            turn.begun = b"".join(transcript.pieces(turn.messages, first=turn.first, end=turn.end))
        started = TurnStarted(turn.turn_id, msgspec.Raw(b"[%b]" % turn.messages), self.wall())
        if turn.others or turn.replaces or turn.first:
            started = msgspec.structs.replace(started, joined=turn.joined, replaces=turn.replaces, first=turn.first)
        await self._append(started)
        return body

    async def _resume(self, turn: RunningTurn) -> bytes:
        await self._append(TurnResumed(turn.turn_id, self.wall()))
        return b""

    def _join_others(self, turn: RunningTurn, transcript: Transcript) -> None:
        """Take the turns that wait behind this one with it, where they are such as can be joined."""
        transcript.render(turn.messages)  # A turn that cannot be sent fails alone.
        mail, seen = turn.mail, {turn.turn_id}

        def may_join(envelope: Envelope) -> bool:
            other = envelope.mail
            return (
                isinstance(other, StartTurn)
                and envelope.rounds == turn.envelope.rounds
                and envelope.options == turn.envelope.options
                and (other.options, other.settings) == (mail.options, mail.settings)
                and not (other.streaming or other.resume or other.replaces is not None)
                and b'"tool' not in other.messages
                and (not other.turn_id or transcript.outcome(other.turn_id) is None)
            )

        messages = [turn.messages]
        while len(turn.others) < self._config.mailbox and (taken := self._mailbox.take_nowait(may_join)) is not None:
            turn.others.append(taken)
            other = cast("StartTurn", taken.mail)
            if not other.turn_id or other.turn_id not in seen:
                messages.append(other.messages)
                seen.add(other.turn_id)
        if turn.others:
            turn.messages = b",".join(messages)
            self._extend_deadline(turn)

    def _extend_deadline(self, turn: RunningTurn) -> None:
        """A turn of several askers has the time of the one who waits longest."""
        turn.deadline = max(cast("StartTurn", asker.mail).deadline for asker in (turn.envelope, *turn.others))
        self._mail_scope.deadline = turn.deadline

    async def _find_replaced(self, turn: RunningTurn, transcript: Transcript) -> None:
        """The turn that gives way to this one, and its messages where this one has none of its own."""
        wanted = turn.mail.replaces or transcript.last_turn
        turn.end = None if wanted is None else transcript.place(wanted)
        if wanted is None or turn.end is None:
            raise SessionConflictError(
                "no turn to replace" + (f": {wanted!r} is no part of the history" if wanted else "")
            )
        turn.replaces = wanted
        if not turn.messages:
            logged = [found for found in turns_of(await self._read_log()) if wanted in found.ids]
            turn.messages = logged[-1].messages if logged else b""

    async def _limit(self, turn: RunningTurn, transcript: Transcript, policy: ContextPolicy) -> None:
        """Decide what of the history is sent, and make the summary that is due."""
        size = len(turn.messages)
        context = decide(policy, transcript, new_bytes=size, end=turn.end)
        if context.fold and policy.summarise is not None:
            if not await self._fold(turn, context.fold, policy.summarise):
                return
            context = decide(policy, transcript, new_bytes=size, end=turn.end)
        turn.first = context.first

    async def _fold(self, turn: RunningTurn, upto: int, summarise: Summarise) -> bool:
        """Have a summary made of the turns before `upto`, and write it down; False when that failed."""
        transcript = cast("Transcript", self._transcript)

        async def make() -> bytes:
            made = await summarise(transcript.messages(transcript.folded, upto))
            message = encode_message(SystemMessage(made) if isinstance(made, str) else made)
            if _is_blank(message):
                raise ValueError("the summary is empty")
            return message

        self._wait_for("tools")
        with SessionRounds(turn).as_tool():
            summary = await contain(make, report=self._note_failure)
        if summary is None:
            return False
        self._failure = ""
        last = transcript.turn_at(upto - 1)
        await self._append(HistoryFolded(msgspec.Raw(summary), last, self.wall(), upto))
        return True

    def _note_failure(self, error: Exception) -> None:
        self._failure = f"{type(error).__name__}: {error}"

    def _note_plain(self, turn: RunningTurn, body: bytes, error: GorouterError | None = None) -> None:
        """Note the end of a turn without a loop for whoever looks at them; one that was interrupted has none."""
        pipeline, mail = self._services.pipeline, turn.mail
        if not pipeline.is_noting:
            return
        outcome = error or (turn.loan and turn.loan.failure) or turn.answer
        if outcome is None or (isinstance(outcome, ChatResult) and outcome.interrupted):
            return
        request = TurnRequest(b"", (), settings=mail.settings, session=self.key, turn_id=turn.turn_id)
        pipeline.note(request, body, outcome, is_streamed=mail.streaming)

    async def _whole_turn(self, turn: RunningTurn, body: bytes) -> None:
        self._wait_for("model")
        result = await self._services.pipeline.send(self._call(turn, body), on_sent=turn.note_sent)
        turn.answer = msgspec.structs.replace(result, turn_id=turn.turn_id)
        await self._save(turn)
        turn.succeed()

    async def _stream_turn(self, turn: RunningTurn, body: bytes) -> None:
        await self._lend(turn, self._call(turn, body))
        loan = cast("TurnLoan", turn.loan)
        await loan.wait_returned()
        turn.answer = loan.answer()
        await self._save(turn)
        turn.succeed()

    def _call(self, turn: RunningTurn, body: bytes) -> HttpCall:
        mail = turn.mail
        return HttpCall(
            body=body, streaming=mail.streaming, deadline=turn.deadline, settings=mail.settings, flow=self.key
        )

    async def _take_rounds(self, turn: RunningTurn) -> None:
        """A turn with tools: the loop has it, and writes down each step through the journal."""
        journal = self._journal = SessionRounds(turn)
        with adopted(turn.envelope.context):
            result = await (turn.envelope.rounds or plain_rounds)(journal)
        if turn.answer is None:
            await self.commit(turn, result)
        else:
            # What extensions have made of it is for the asker; the log has what the model said.
            answer = turn.answer
            turn.answer = msgspec.structs.replace(
                result, turn_id=turn.turn_id, rounds=answer.rounds, tool_calls=answer.tool_calls
            )
        turn.succeed()

    async def commit(self, turn: RunningTurn, result: ChatResult[object]) -> None:
        """Store the answer of a turn with rounds; used by the journal."""
        records, reports = result.rounds, result.tool_calls
        if self.machine is not None:
            records = records or tuple(self.machine.records[len(turn.earlier) :])
            reports = reports or tuple(self.machine.reports[len(turn.earlier_reports) :])
        answer = msgspec.structs.replace(
            result,
            turn_id=turn.turn_id,
            rounds=turn.earlier + records,
            tool_calls=turn.earlier_reports + reports,
        )
        if turn.loan is not None:
            turn.loan.finish(answer)
            self._wait_for("reader")
            await turn.loan.wait_returned()
        turn.answer = answer
        await self._save(turn)
        turn.is_saved = True

    def early_reply(self, question_id: str) -> Envelope | None:
        """A reply that came while its turn was being taken up, out of the queue; used by the journal."""

        def answers(envelope: Envelope) -> bool:
            return isinstance(envelope.mail, AnswerQuestion) and envelope.mail.question_id == question_id

        return self._mailbox.pick_nowait(answers)

    def keep(self, turn: RunningTurn, entry: LogEntry) -> None:
        """Store the entry when the turn is repaired; used by the journal."""
        turn.kept = (*turn.kept, entry)

    def request(self, turn: RunningTurn) -> TurnRequest:
        """The conversation as it is now; used by the journal."""
        messages = turn.begun
        if not messages or (self.machine is not None and self.machine.rounds):
            messages = b"".join(cast("Transcript", self._transcript).pieces(b"", first=turn.first))
        return TurnRequest(
            self._options_of(turn),
            (messages,),
            settings=turn.mail.settings,
            deadline=turn.deadline,
            session=self.key,
            turn_id=turn.turn_id,
        )

    async def send(self, turn: RunningTurn, request: TurnRequest) -> ChatResult:
        """Send a request of the turn; used by the journal."""
        call = request.call(streaming=turn.mail.streaming)
        if turn.mail.streaming:
            await self._lend(turn, call)
            result = await cast("TurnLoan", turn.loan).wait_round()
        else:
            self._wait_for("model")
            result = await self._services.pipeline.send(call, on_sent=turn.note_sent)
        self._wait_for("tools")
        return result

    async def _lend(self, turn: RunningTurn, call: HttpCall) -> None:
        """Open the stream of a reply and hand its reader to the asker, who has time of its own to read it."""
        self._wait_for("model")
        reader = await self._services.pipeline.open_reader(call, on_sent=turn.note_sent)
        self._wait_for("reader")
        if turn.loan is not None:
            turn.loan.go_on(reader)
            return
        turn.deadline = self._mail_scope.deadline = math.inf
        # Of a turn that is taken up as well, with a loop or without.
        has_rounds = self._journal is not None
        loan = turn.loan = TurnLoan(
            reader,
            turn.turn_id,
            has_rounds=has_rounds,
            on_return=partial(self._leave, turn) if has_rounds else None,
        )
        if not turn.envelope.resolve(loan):
            loan.give_back()

    async def write(self, turn: RunningTurn, entry: LogEntry, *, answer: ChatResult[object] | None = None) -> None:
        """Store the next entry of a running turn; used by the journal.

        Raises `EntryOutOfOrderError` for one that cannot be next, `HistoryNotSaved` with the `answer` it has in it.
        """
        if self._transcript is None:
            # A write before this one failed, or was cut off at the deadline of a call, and the turn goes on.
            await self._load()
        machine = self.machine
        fault = "the turn does not run" if machine is None else machine.fault(cast("TurnEntry", entry))
        if fault is not None:
            raise EntryOutOfOrderError(f"{type(entry).__name__} of turn {turn.turn_id!r}: {fault}")
        turn.unsaved = entry
        try:
            await self._append(entry)
        except GorouterError as exc:
            if answer is None:
                raise
            raise not_saved(answer, exc) from exc
        turn.unsaved = None
        self._wait_for("tools")

    async def _save(self, turn: RunningTurn) -> None:
        """Write the end of a turn; the watch bounds it, and neither an interrupt nor the turn's deadline stops it."""
        if turn.deadline != math.inf:
            self._mail_scope.deadline = math.inf
        if self._services.immediate is not None:
            await self._append(end_of(turn, None))
            return
        watch = self._services.watch
        watch.begin(self)
        try:
            await self._append(end_of(turn, None))
        finally:
            watch.end(self)

    async def _repair(self, turn: RunningTurn, exc: BaseException) -> None:
        """End a turn that was cut off by `exc`: in the store, and for its asker where `exc` does not."""
        if turn.is_saved:
            # What an extension does after the answer was stored takes nothing away from it.
            turn.fail(exc) if isinstance(exc, GorouterError) else turn.succeed()
            return
        was_saving = turn.answer is not None
        if turn.loan is not None:
            if isinstance(exc, Exception):
                turn.loan.fail(exc if isinstance(exc, GorouterError) else gone(exc))
            turn.loan.revoke()
            if not isinstance(turn.unsaved, (TurnCalled, AnswerDiscarded)):
                turn.answer = turn.answer or turn.loan.answer()
        if turn.is_late:
            return
        if was_saving and isinstance(exc, Exception):
            turn.fail(not_saved(turn.answer, exc))
            return
        failures: list[Exception] = []
        with self._grace() as scope:
            await contain(partial(self._write_end, turn, exc), report=failures.append)
        if scope.cancelled_caught:
            failures.append(self._too_late())
        for failure in failures:
            exc.add_note(f"and the turn's end was not stored: {failure!r}")
        self._settle_cut_off(turn, exc, failures)

    async def _write_end(self, turn: RunningTurn, exc: BaseException) -> None:
        """Write the end of the turn unless the store has it, which only the store knows after a doubtful write."""
        transcript = self._transcript or await self._load()
        if transcript.unfinished != turn.turn_id:
            return
        machine = cast("TurnMachine", transcript.machine)
        entries: list[LogEntry] = []
        unsaved = turn.unsaved
        if isinstance(unsaved, QuestionAnswered):
            # Whoever takes the turn up begins the call; here it was not.
            unsaved = msgspec.structs.replace(unsaved, taken=False)
        left = turn.kept if unsaved is None else (unsaved, *turn.kept)
        entries += [entry for entry in left if machine.fault(cast("TurnEntry", entry)) is None]
        if machine.rounds or entries:
            turn.is_sent = True
            if isinstance(exc, GorouterError):
                exc.maybe_billed = True
        if not self._stays_parked(turn, exc):
            entries.append(end_of(turn, exc))
        if entries:
            await self._append(*entries)

    def _stays_parked(self, turn: RunningTurn, exc: BaseException) -> bool:
        """Whether a turn that was cut off waits for its reply in the log: unless it was meant to end, or has failed."""
        machine = self.machine
        return (
            machine is not None
            and machine.turn_id == turn.turn_id
            and machine.is_parked
            and self._stop != "interrupt"
            and not isinstance(exc, Exception)
        )

    def _settle_cut_off(self, turn: RunningTurn, exc: BaseException, failures: list[Exception]) -> None:
        """Answer the asker of a turn that was cut off, now that the store knows of it or could not be told."""
        transcript = self._transcript
        if self._stays_parked(turn, exc):
            turn.fail_with(exc, error=parked(turn.turn_id, _open_question(self.machine) or ""))
        elif turn.answer is None:
            is_late = self._is_overdue(turn.mail) and turn.loan is None
            error = stopped(turn.mail, maybe_billed=turn.is_sent, is_late=True) if is_late else None
            turn.fail_with(exc, error=None if isinstance(exc, Exception) else error)
        elif transcript is not None and transcript.outcome(turn.turn_id) == "answered":
            turn.succeed()
        else:
            cause = failures[0] if failures else SessionConflictError("somebody else wrote")
            turn.fail(not_saved(turn.answer, cause))

    def _render(self, turn: RunningTurn, transcript: Transcript) -> bytes:
        """The body of a turn's first request, in one piece from the start: the history is copied once."""
        head, tail = self._frame(turn)
        return b"".join((head, *transcript.pieces(turn.messages, first=turn.first, end=turn.end), tail))

    def _frame(self, turn: RunningTurn) -> tuple[bytes, bytes]:
        """What stands before and after the messages of a body."""
        mail, of_session = turn.mail, self._session_options(turn)
        is_own = mail.options == b"{}" and not mail.streaming
        if is_own and self._head_of is of_session:
            return self._head, b"]}"
        head = render_body(self._options_of(turn), b"", streaming=mail.streaming)[:-2]
        if is_own:
            self._head, self._head_of = head, of_session
        return head, b"]}"

    def _session_options(self, turn: RunningTurn) -> SessionOptions:
        """What the session was opened with, as it was when the turn was asked."""
        return cast("SessionOptions", turn.envelope.options)

    def _options_of(self, turn: RunningTurn) -> bytes:
        """The options of a turn's requests: its own above the session's, and where they are to be routed."""
        own, of_session = turn.mail.options, self._session_options(turn).options
        options = of_session if own == b"{}" else join_options(of_session, own)
        if self._routing and b'"session_id"' not in options:
            options = b"%b%b%b}" % (options[:-1], b"," if len(options) > 2 else b"", self._routing)
        return options

    # What is asked of the log

    async def _take_reply(self, reply: AnswerQuestion, envelope: Envelope) -> None:
        """Write down the reply to a question of a turn that nobody runs, and take the turn up if there are tools."""
        transcript = self._transcript or await self._load()
        machine = transcript.machine
        is_taken = machine is not None and await self._store_reply(reply, machine)
        envelope.resolve(is_taken)
        if machine is not None and is_taken and envelope.rounds is not None:
            mail = StartTurn(turn_id=machine.turn_id, messages=b"", options=b"{}", settings=self.options.settings)
            await self._take_up(mail, envelope, machine)

    async def _store_reply(self, reply: AnswerQuestion, machine: TurnMachine) -> bool:
        """Write the reply down, unless the turn that had it before has left it there; False when it is too late."""
        if reply.turn_id == machine.turn_id and machine.has_reply(reply.question_id):
            return True
        if reply.turn_id not in {"", machine.turn_id} or not self._is_open(reply.question_id):
            return False
        said = msgspec.Raw(reply.answer)
        await self._append(QuestionAnswered(machine.turn_id, reply.question_id, said, self.wall()))
        return True

    async def _undo(self, turn_id: str) -> bool:
        transcript = self._transcript or await self._load()
        machine = transcript.machine
        entries: list[LogEntry] = []
        was_open = machine is not None and (not turn_id or transcript.is_unfinished(turn_id))
        if machine is not None:
            if not machine.is_parked or not was_open:
                await self._pass_by(machine)
            else:
                entries.append(TurnAbandoned(machine.turn_id, "undone", maybe_billed=True))
        dropped_id = turn_id or transcript.last_turn or ""
        if transcript.place(dropped_id) is not None:
            entries.append(TurnsDropped(dropped_id, self.wall()))
        if entries:
            await self._append(*entries)
        return bool(entries)

    async def _compact(self) -> None:
        transcript = await self._load_if_there()
        if transcript is None:
            return
        if transcript.machine is not None:
            await self._pass_by(transcript.machine)
        log = compact(await self._read_log(), system=self.options.system)
        self._transcript = None
        encoded = [encode_json(entry) for entry in log]
        self._version = await _typed(self._store.rewrite(self.key, encoded, expected_version=self._version))
        self._transcript = self._transcript_of(log)

    # The store

    async def _own(self, ownership: SessionOwnership) -> None:
        """Have the session to ourselves until the mail is answered; what others wrote meanwhile is loaded anew."""
        self._wait_for("store")
        self._store, version = await _typed(ownership.take(self.key))
        if version != self._version:
            self._transcript = None

    def _disown(self) -> None:
        self._store = self._services.store
        cast("SessionOwnership", self._services.ownership).release(self.key)

    async def _load(self) -> Transcript:
        self._wait_for("store")
        if self._services.immediate is not None:
            stored = self._services.immediate.load_nowait(self.key)
        else:
            stored = await _typed(self._store.load(self.key))
        self._transcript = transcript = self._transcript_of(decode_log_entry(entry) for entry in stored.entries)
        self._version = stored.version
        return transcript

    async def _load_if_there(self) -> Transcript | None:
        """What the log means; None for a session that is not in the store, nor was put there by somebody else."""
        transcript = self._transcript
        if transcript is None or not self._version:
            transcript = await self._load()
        return transcript if self._version else None

    def _transcript_of(self, log: Iterable[LogEntry]) -> Transcript:
        transcript = Transcript(self.options.system)
        for entry in log:
            transcript.apply(entry)
        return transcript

    async def _append(self, *entries: LogEntry) -> None:
        immediate = self._services.immediate
        try:
            encoded = [encode_json(entry) for entry in entries]
            if immediate is not None:
                self._version = immediate.append_nowait(self.key, encoded, expected_version=self._version)
            else:
                self._wait_for("store")
                self._version = await self._store.append(self.key, encoded, expected_version=self._version)
            if self._transcript is not None:
                for entry in entries:
                    self._transcript.apply(entry)
        except BaseException as exc:
            # Written or not: the store knows, and is asked before anything else is done.
            self._transcript = None
            if isinstance(exc, OSError):
                raise store_failed(exc) from exc
            raise

    async def _read_log(self) -> list[LogEntry]:
        stored = await _typed(self._store.load(self.key))
        return [decode_log_entry(entry) for entry in stored.entries]

    async def _stored_answer(self, turn_id: str) -> ChatResult:
        turn = TurnMachine(turn_id)
        joined: tuple[str, ...] = ()
        for entry in await self._read_log():
            if isinstance(entry, TurnStarted):
                turn, joined = TurnMachine(entry.turn_id), entry.joined  # One that comes again takes its place.
            if isinstance(entry, TurnEntry) and turn.fault(entry) is None:
                turn.apply(entry)  # What was added to a history may have an answer that nobody asked for.
            if isinstance(entry, TurnAnswered) and (
                entry.turn_id == turn_id or (entry.turn_id == turn.turn_id and turn_id in joined)
            ):
                return ChatResult(
                    message=cast("AssistantMessage", decode_message(bytes(entry.message))),
                    call=entry.call,
                    turn_id=turn_id,
                    rounds=tuple(turn.records),
                    tool_calls=tuple(turn.reports),
                )
        raise SessionConflictError(f"the answer of turn {turn_id!r} is not in the store any more")

    async def _clear(self) -> None:
        if await self._load_if_there() is None:
            return
        self._transcript = None
        self._version = await _typed(self._store.rewrite(self.key, [], expected_version=self._version))
        self._transcript = Transcript(self.options.system)

    async def _fork(self, target: str) -> None:
        """Copy the log. A turn in doubt is in doubt there as well; one that is parked stays here, to happen once."""
        stored = await _typed(self._store.load(self.key))
        entries = list(stored.entries)
        machine = self._transcript_of(decode_log_entry(entry) for entry in entries).machine
        if machine is not None and not machine.is_parked:
            entries.append(encode_json(TurnAbandoned(machine.turn_id, "in doubt", maybe_billed=True)))
        while machine is not None and machine.is_parked and entries:
            if isinstance(decode_log_entry(entries.pop()), TurnStarted):
                break
        await _typed(self._store.append(target, entries, expected_version=0))

    def _too_late(self) -> HistoryNotSaved:
        return HistoryNotSaved(f"the store did not answer in {self._config.shutdown_grace_s:g} s")

    def _grace(self) -> trio.CancelScope:
        """A shield for saving, bounded."""
        return trio.CancelScope(shield=True, deadline=trio.current_time() + self._config.shutdown_grace_s)


async def _typed(work: Awaitable[T]) -> T:
    """What a store gives; an error of the operating system out of it becomes one of ours."""
    try:
        return await work
    except OSError as exc:
        raise store_failed(exc) from exc


def _drop(envelope: Envelope) -> None:
    envelope.fail(dropped())
    envelope.finish()


def _is_blank(message: bytes) -> bool:
    """Whether a message says nothing: it would stand for turns without a word of them, and providers refuse some."""
    content = decode_message(message).content
    return not (content.strip() if isinstance(content, str) else content)


def _what_for(machine: TurnMachine) -> str:
    """What a parked turn waits for."""
    question_id = _open_question(machine)
    question = machine.question(question_id or "")
    if question is None or question.answer is None:
        return f"waits for a reply to question {question_id!r}"
    return f"has the reply to question {question_id!r} and waits to be taken up: ask it again under its id, or undo it"


def _open_question(machine: TurnMachine | None) -> str | None:
    """The id of the first question that waits for a reply, or else of the first that has one."""
    questions = [] if machine is None else machine.questions
    waiting = [question.question_id for question in questions if question.answer is None]
    return next(iter([*waiting, *(question.question_id for question in questions)]), None)

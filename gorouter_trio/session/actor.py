"""The session actor: one task owns one conversation and takes its turns one after the other.

Theory of operation. Everything that changes a session goes through its mailbox and is acted upon by
its one task, in order of arrival; `interrupt` and an asker's leaving pass the queue. A turn is
written down before it is sent and again when it is answered, and the answer is given to the asker
only after that.

The way of a turn that nothing happens to is straight and holds no scope of its own. All mail is acted
upon inside one scope, which our own interrupts cancel and which is replaced by a new one afterwards;
a cancel from outside passes. However a turn is cut off, there is one way out: `_repair` writes its
end, shielded and bounded, straight to the store. A write that failed or was cancelled is in doubt:
what the actor knows is thrown away then, and the store asked.

A streamed turn is lent on: the asker gets the reader of the reply, reads from the socket in its own
task, and gives it back; what has arrived by then is what is stored.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, assert_never, cast

import msgspec
import trio
from msgspec import UNSET, Struct

from .._contain import contain
from .._mailbox import Mailbox, ReplySlot
from ..errors import (
    ActorGoneError,
    GorouterError,
    HistoryNotSaved,
    SessionBusyError,
    SessionConflictError,
    TurnInDoubtError,
    TurnInterruptedError,
)
from ..pool.deadlines import DeadlineKeeper
from ..wire.codec import decode_log_entry, encode_json, join_options, render_body
from ..wire.journal import LogEntry, TurnAbandoned, TurnAnswered, TurnStarted
from ..wire.mail import (
    DEFAULT_SETTINGS,
    CallSettings,
    ClearHistory,
    ForkHistory,
    ReadHistory,
    SessionMail,
    StartTurn,
)
from ..wire.result import ChatResult, HistoryEntry
from .transcript import Transcript, entries_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .._pipeline import ChatPipeline
    from ..abc import HistoryStore
    from ..config import SessionConfig
    from ..pool.streams import ChatReader
    from ..wire.messages import AssistantMessage
    from ..wire.stream import ChatChunk

__all__ = [
    "Answer",
    "Envelope",
    "SaveWatch",
    "SessionActor",
    "SessionOptions",
    "SessionStatistics",
    "TurnLoan",
    "patience",
]

_SLACK_S = 0.5


class SessionOptions(Struct, frozen=True):
    """What a session was opened with: encoded system messages (or nothing), encoded chat options, and the rest."""

    system: bytes = b""
    options: bytes = b"{}"
    settings: CallSettings = DEFAULT_SETTINGS


class SessionStatistics(Struct, frozen=True):
    """A snapshot: what the actor does, mail waiting, turns ended, version of the log, bytes rendered."""

    state: Literal["loading", "idle", "running", "gone"]
    queued: int
    turns: int
    version: int
    rendered_bytes: int


class TurnLoan:
    """The reader of a streamed turn, on loan to the asker, whose stream reads from it.

    The asker ends with `give_back` and then waits on `saved`, which holds the result of the turn or
    the error that storing it met. `holder` is the asker's task as long as it has the loan.
    """

    __slots__ = ("_reader", "_result", "_returned", "_revoked", "holder", "saved", "turn_id")

    def __init__(self, reader: ChatReader, turn_id: str) -> None:
        self._reader = reader
        self._result: ChatResult | None = None
        self._returned = trio.Event()
        self._revoked = False
        self.holder: trio.lowlevel.Task | None = None
        self.saved: ReplySlot[ChatResult | None] = ReplySlot()
        self.turn_id = turn_id

    @property
    def generation_id(self) -> str | None:
        """As `ChatReader.generation_id`."""
        return self._reader.generation_id

    async def read(self) -> list[ChatChunk]:
        """As `ChatReader.read`; `TurnInterruptedError` when the session took the reader back."""
        try:
            return await self._reader.read()
        except GorouterError as exc:
            if self._revoked:
                raise _interrupted(exc) from exc
            raise

    def result(self) -> ChatResult:
        """The whole answer, once it has arrived."""
        self._result = self._result or msgspec.structs.replace(self._reader.result(), turn_id=self.turn_id)
        return self._result

    def give_back(self) -> None:
        """The asker has stopped reading; never waits, may be called twice."""
        self.holder = None
        self._reader.close()
        self._returned.set()

    async def wait_returned(self) -> None:
        """Wait until the asker has given it back; used by the session."""
        await self._returned.wait()

    def revoke(self) -> None:
        """Take the reader back, unless it is back already; used by the session."""
        self._revoked = not self._returned.is_set()
        self._reader.close()

    def answer(self) -> ChatResult | None:
        """What has arrived, in the form that is stored; None when that is nothing."""
        reader = self._reader
        if self._result is not None:
            return self._result
        if not (reader.is_answered or reader.merge.has_data):
            return None
        result = reader.result(interrupted=not reader.is_answered)
        return msgspec.structs.replace(result, message=_storable(result), turn_id=self.turn_id)


def patience(grace_s: float) -> trio.CancelScope:
    """A shield for waiting until a session has saved, which takes it at most `grace_s`: a little longer than that."""
    return trio.CancelScope(shield=True, deadline=trio.current_time() + grace_s + _SLACK_S)


Answer: TypeAlias = ChatResult | TurnLoan | list[HistoryEntry] | None


class Envelope(ReplySlot[Answer]):
    """Mail and the asker who waits for its answer."""

    __slots__ = ("_actor", "_done", "_is_done", "mail")

    def __init__(self, mail: SessionMail, actor: SessionActor) -> None:
        super().__init__()
        self.mail = mail
        self._actor = actor
        # Few ever wait for more than the answer, so there is an event only then.
        self._done: trio.Event | None = None
        self._is_done = False

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
        self._done = self._done or trio.Event()
        await self._done.wait()

    def on_abandon(self) -> None:
        """Leave the mailbox, or interrupt the turn that runs for this asker."""
        self._actor.abandon(self)


class _Turn:
    """The turn that runs: what was asked, and how far it has come."""

    __slots__ = ("answer", "envelope", "is_late", "is_sent", "loan", "mail", "turn_id")

    def __init__(self, mail: StartTurn, envelope: Envelope, *, turn_id: str) -> None:
        self.mail = mail
        self.envelope = envelope
        self.turn_id = turn_id
        self.is_late = False
        self.is_sent = False
        self.loan: TurnLoan | None = None
        self.answer: ChatResult | None = None

    def succeed(self) -> None:
        """Tell the asker that the answer is stored."""
        if self.loan is None:
            self.envelope.resolve(self.answer)
        else:
            self.loan.saved.resolve(self.answer)

    def fail(self, error: GorouterError) -> None:
        """Tell the asker what became of the turn, unless that was said before."""
        if self.loan is None:
            self.envelope.fail(error)
        else:
            self.loan.saved.fail(error)

    def fail_with(self, exc: BaseException) -> None:
        """Tell the asker of a turn without an answer why that is so."""
        if isinstance(exc, GorouterError):
            self.fail(exc)
        elif isinstance(exc, Exception):
            self.fail(_gone(exc))
        elif self.loan is None:
            self.fail(_stopped(self.mail, maybe_billed=self.is_sent))
        else:
            # Nothing had arrived, and its holder reads off the loan that it was taken back.
            self.succeed()


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


class SessionActor:
    """Run it as a task; talk to it through `ask` and `interrupt`."""

    __slots__ = (
        "_config",
        "_current",
        "_ended",
        "_is_gone",
        "_last_error",
        "_mail_scope",
        "_mailbox",
        "_on_gone",
        "_pipeline",
        "_restarts",
        "_routing",
        "_scope",
        "_store",
        "_transcript",
        "_turn",
        "_turn_ids",
        "_turns_asked",
        "_version",
        "_wall",
        "_watch",
        "deadline_at",
        "key",
        "options",
        "used_at",
    )

    def __init__(
        self,
        key: str,
        options: SessionOptions,
        *,
        pipeline: ChatPipeline,
        store: HistoryStore,
        config: SessionConfig,
        wall: Callable[[], float],
        turn_ids: Iterator[str],
        watch: SaveWatch,
        on_gone: Callable[[SessionActor], None],
        routing: bytes = b"",
    ) -> None:
        self.key = key
        self.options = options
        self.deadline_at = math.inf
        self.used_at = 0.0
        self._pipeline = pipeline
        self._store = store
        self._config = config
        self._wall = wall
        self._turn_ids = turn_ids
        self._watch = watch
        self._on_gone = on_gone
        self._routing = routing
        self._mailbox: Mailbox[Envelope] = Mailbox(config.mailbox, policy=config.overflow)
        self._transcript: Transcript | None = None
        self._version = 0
        self._current: Envelope | None = None
        self._turn: _Turn | None = None
        self._turns_asked = 0
        self._scope = self._mail_scope = trio.CancelScope()
        # Few actors are ever waited for, so there is an event only then.
        self._ended: trio.Event | None = None
        self._is_gone = False
        self._restarts: list[float] = []
        self._last_error: Exception | None = None

    def __repr__(self) -> str:
        return f"<SessionActor {self.key!r}: {self.statistics().state}>"

    # For refs: the data plane and the control plane

    async def ask(self, mail: SessionMail) -> Answer:
        """Queue `mail` and wait for its one answer.

        Raises what the answer is, `SessionBusyError` when the policy refuses it, `ActorGoneError`
        when the actor ends first. Cancelling takes queued mail out, or interrupts its turn and
        waits, at most the shutdown grace, until the history is repaired.
        """
        is_turn = isinstance(mail, StartTurn)
        if self._turn is not None or self._turns_asked:
            self._mind_others(is_turn=is_turn)
        envelope = Envelope(mail, self)
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

    async def interrupt(self) -> bool:
        """Stop the running turn, ahead of all queued mail, and wait until the history is repaired.

        What had arrived is stored as an interrupted answer. False when no turn was stopped: none was
        running, or it was answered already and only being stored.
        """
        if not self._is_in_turn():
            await trio.lowlevel.checkpoint()
            return False
        envelope = cast("Envelope", self._current)
        is_stopped = self._stop_current()
        await envelope.wait_finished()
        return is_stopped

    async def aclose(self) -> None:
        """End the actor: the running turn is interrupted, queued mail gets `ActorGoneError`."""
        self._scope.cancel()
        if self._is_gone:
            await trio.lowlevel.checkpoint()
            return
        self._ended = self._ended or trio.Event()
        await self._ended.wait()

    def retire(self) -> bool:
        """End the actor if it has nothing to do; False, and nothing else, when it has. Never waits."""
        if not self._mailbox.is_awaited:
            return False
        self._scope.cancel()
        return True

    def abandon(self, envelope: Envelope) -> None:
        """The asker of `envelope` was cancelled; used by envelopes."""
        if self._mailbox.remove(envelope):
            envelope.finish()
        elif envelope is self._current:
            self._stop_current()

    def expire(self) -> None:
        """Saving has taken too long: the asker is told at once; called by the watch."""
        turn = cast("_Turn", self._turn)
        turn.is_late = True
        turn.fail(_not_saved(turn, self._too_late()))
        self._mail_scope.cancel()

    def statistics(self) -> SessionStatistics:
        """A snapshot; cheap."""
        transcript = self._transcript
        return SessionStatistics(
            self._state(),
            self._mailbox.statistics().queued,
            0 if transcript is None else transcript.turns,
            self._version,
            0 if transcript is None else len(transcript.rendered),
        )

    # The task

    async def run(self) -> None:
        """The actor's life: take mail until it is closed or cancelled. Every asker gets an answer."""
        cause = None
        try:
            with self._scope:
                while self._may_start():
                    await contain(self._take_mail, report=self._fail_current)
                cause = self._last_error
        finally:
            self._end(cause)

    async def _take_mail(self) -> None:
        """Act on mail, inside a scope that is replaced once it was cancelled."""
        while True:
            with trio.CancelScope() as self._mail_scope:
                while not self._mail_scope.cancel_called:
                    await self._act(await self._mailbox.receive())

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
                self._settle_current(_stopped(envelope.mail))
            raise
        self._current = None
        envelope.finish()

    async def _answer(self, envelope: Envelope) -> None:
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
            case unknown:
                assert_never(unknown)

    def _state(self) -> Literal["loading", "idle", "running", "gone"]:
        if self._is_gone:
            return "gone"
        if self._current is None:
            return "idle"
        return "loading" if self._transcript is None else "running"

    def _may_start(self) -> bool:
        """Whether the actor may (re)start: at most `restarts` times in the window."""
        now = trio.current_time()
        self._restarts = [at for at in self._restarts if now - at < self._config.restart_window_s]
        self._restarts.append(now)
        return len(self._restarts) <= self._config.restarts + 1

    def _fail_current(self, error: Exception) -> None:
        """An error that nobody expected: the asker gets it as the cause, the actor starts afresh."""
        self._last_error = error
        self._transcript = None
        self._settle_current(_gone(error))

    def _settle_current(self, error: GorouterError) -> None:
        envelope, self._current = self._current, None
        if envelope is not None:
            envelope.fail(error)
            envelope.finish()

    def _end(self, cause: Exception | None) -> None:
        self._on_gone(self)
        self._settle_current(_gone(cause))
        for envelope in self._mailbox.close():
            envelope.fail(_gone(cause))
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
            raise _closed() from None
        return True

    async def _post(self, envelope: Envelope) -> None:
        """Wait for room in a full mailbox, or refuse, as the policy says."""
        try:
            await self._mailbox.post(envelope)
        except trio.WouldBlock:
            raise SessionBusyError(f"the session's mailbox is full ({self._config.mailbox})") from None
        except trio.ClosedResourceError:
            raise _closed() from None

    def _mind_others(self, *, is_turn: bool) -> None:
        """Mail comes while turns wait or run."""
        loan = None if self._turn is None else self._turn.loan
        if loan is not None and loan.holder is trio.lowlevel.current_task():
            raise SessionBusyError("this task holds a stream of the session; leave that first")
        policy = self._config.double_texting
        if is_turn and policy == "reject":
            raise SessionBusyError("a turn is running, and the session rejects another (double_texting)")
        if is_turn and policy == "interrupt" and self._is_in_turn():
            self._stop_current()

    def _is_in_turn(self) -> bool:
        return self._current is not None and isinstance(self._current.mail, StartTurn)

    def _stop_current(self) -> bool:
        """Interrupt what is done for the current mail; what is answered is stored all the same."""
        if self._turn is not None and self._turn.answer is not None:
            return False
        self._mail_scope.cancel()
        return True

    # Turns

    async def _take_turn(self, mail: StartTurn, envelope: Envelope) -> None:
        transcript = self._transcript or await self._load()
        turn_id = mail.turn_id or self._new_turn_id(transcript)
        outcome = transcript.outcome(turn_id)
        if outcome == "answered":
            envelope.resolve(await self._stored_answer(turn_id))
            return
        if transcript.unfinished is not None:
            # A turn of an earlier life: nobody knows whether it was answered.
            doubtful = transcript.unfinished
            await self._append(TurnAbandoned(doubtful, "in doubt", maybe_billed=True))
            outcome = transcript.outcome(turn_id)
        if outcome == "in_doubt":
            raise _in_doubt(turn_id)
        body = self._render(mail, transcript)
        turn = self._turn = _Turn(mail, envelope, turn_id=turn_id)
        try:
            await self._append(TurnStarted(turn_id, msgspec.Raw(b"[%b]" % mail.messages), self._wall()))
            turn.is_sent = True
            await (self._stream_turn(turn, body) if mail.streaming else self._whole_turn(turn, body))
        except BaseException as exc:
            await self._repair(turn, exc)  # noqa: ASYNC102 - shields itself, for the grace at most
            raise
        finally:
            self._turn = None

    def _new_turn_id(self, transcript: Transcript) -> str:
        """An id for a turn that came without one. A client that is seeded draws ids that may be in the log already."""
        while True:
            turn_id = next(self._turn_ids)
            if transcript.outcome(turn_id) is None and turn_id != transcript.unfinished:
                return turn_id

    async def _whole_turn(self, turn: _Turn, body: bytes) -> None:
        mail = turn.mail
        result = await self._pipeline.run(body, settings=mail.settings, deadline=mail.deadline)
        turn.answer = msgspec.structs.replace(result, turn_id=turn.turn_id)
        await self._save(turn)
        turn.succeed()

    async def _stream_turn(self, turn: _Turn, body: bytes) -> None:
        reader = await self._pipeline.open_stream(body, settings=turn.mail.settings)
        loan = turn.loan = TurnLoan(reader, turn.turn_id)
        if not turn.envelope.resolve(loan):
            loan.give_back()
        await loan.wait_returned()
        turn.answer = loan.answer()
        await self._save(turn)
        turn.succeed()

    async def _save(self, turn: _Turn) -> None:
        """Write the end of a turn; the watch bounds it, and no interrupt stops it."""
        self._watch.begin(self)
        try:
            await self._append(_end_of(turn, None))
        finally:
            self._watch.end(self)

    async def _repair(self, turn: _Turn, exc: BaseException) -> None:
        """End a turn that was cut off by `exc`: in the store, and for its asker where `exc` does not."""
        was_saving = turn.answer is not None
        if turn.loan is not None:
            turn.loan.revoke()
            turn.answer = turn.answer or turn.loan.answer()
        if turn.is_late:
            return
        if was_saving and isinstance(exc, Exception):
            turn.fail(_not_saved(turn, exc))
            return
        failures: list[Exception] = []
        with self._grace() as scope:
            await contain(partial(self._write_end, turn, exc), report=failures.append)
        if scope.cancelled_caught:
            failures.append(self._too_late())
        for failure in failures:
            exc.add_note(f"and the turn's end was not stored: {failure!r}")
        self._settle_cut_off(turn, exc, failures)

    async def _write_end(self, turn: _Turn, exc: BaseException) -> None:
        """Write the end of the turn unless the store has it, which only the store knows after a doubtful write."""
        transcript = self._transcript or await self._load()
        if transcript.unfinished == turn.turn_id:
            await self._append(_end_of(turn, exc))

    def _settle_cut_off(self, turn: _Turn, exc: BaseException, failures: list[Exception]) -> None:
        """Answer the asker of a turn that was cut off, now that the store knows of it or could not be told."""
        transcript = self._transcript
        if turn.answer is None:
            turn.fail_with(exc)
        elif transcript is not None and transcript.outcome(turn.turn_id) == "answered":
            turn.succeed()
        else:
            turn.fail(_not_saved(turn, failures[0] if failures else SessionConflictError("somebody else wrote")))

    def _render(self, mail: StartTurn, transcript: Transcript) -> bytes:
        """The request body, in one piece from the start: the history is copied once."""
        options = self.options.options if mail.options == b"{}" else join_options(self.options.options, mail.options)
        if self._routing and b'"session_id"' not in options:
            options = b"%b%b%b}" % (options[:-1], b"," if len(options) > 2 else b"", self._routing)
        added = transcript.render(mail.messages)
        start, end = render_body(options, b"\0", streaming=mail.streaming).split(b"\0")
        comma = b"," if transcript.rendered else b""
        return b"".join((start, transcript.rendered, comma, added, end))

    # The store

    async def _load(self) -> Transcript:
        stored = await self._store.load(self.key)
        transcript = Transcript(self.options.system)
        for entry in stored.entries:
            transcript.apply(decode_log_entry(entry))
        self._transcript = transcript
        self._version = stored.version
        return transcript

    async def _append(self, entry: LogEntry) -> None:
        try:
            self._version = await self._store.append(self.key, [encode_json(entry)], expected_version=self._version)
            cast("Transcript", self._transcript).apply(entry)
        except BaseException:
            # Written or not: the store knows, and is asked before anything else is done.
            self._transcript = None
            raise

    async def _read_log(self) -> list[LogEntry]:
        stored = await self._store.load(self.key)
        return [decode_log_entry(entry) for entry in stored.entries]

    async def _stored_answer(self, turn_id: str) -> ChatResult:
        for entry in await self._read_log():
            if isinstance(entry, TurnAnswered) and entry.turn_id == turn_id:
                (answer,) = entries_of([entry])
                return ChatResult(message=answer.message, call=entry.call, turn_id=turn_id)  # type: ignore[arg-type]  # an answer is an assistant's
        raise SessionConflictError(f"the answer of turn {turn_id!r} is not in the store any more")

    async def _clear(self) -> None:
        if self._transcript is None:
            await self._load()
        self._transcript = None
        self._version = await self._store.rewrite(self.key, [], expected_version=self._version)
        self._transcript = Transcript(self.options.system)

    async def _fork(self, target: str) -> None:
        stored = await self._store.load(self.key)
        await self._store.append(target, stored.entries, expected_version=0)

    def _too_late(self) -> HistoryNotSaved:
        return HistoryNotSaved(f"the store did not answer in {self._config.shutdown_grace_s:g} s")

    def _grace(self) -> trio.CancelScope:
        """A shield for saving, bounded."""
        return trio.CancelScope(shield=True, deadline=trio.current_time() + self._config.shutdown_grace_s)


def _end_of(turn: _Turn, exc: BaseException | None) -> LogEntry:
    """The entry that ends a turn, which `exc` cut off if it is not None."""
    answer = turn.answer
    if answer is not None:
        return TurnAnswered(turn.turn_id, msgspec.Raw(encode_json(answer.message)), answer.call)
    if isinstance(exc, GorouterError):
        return TurnAbandoned(turn.turn_id, type(exc).__name__, maybe_billed=exc.maybe_billed)
    return TurnAbandoned(turn.turn_id, "interrupted", maybe_billed=turn.is_sent)


def _storable(result: ChatResult) -> AssistantMessage:
    """The message of an answer; without its tool calls when it was interrupted: they may be cut anywhere."""
    message = result.message
    if result.interrupted and message.tool_calls is not UNSET:
        return msgspec.structs.replace(message, tool_calls=UNSET, content=message.content or "")
    return message


def _interrupted(cause: GorouterError) -> TurnInterruptedError:
    error = TurnInterruptedError("the turn was interrupted")
    error.partial = cause.partial
    error.generation_id = cause.generation_id
    error.maybe_billed = True
    return error


def _stopped(mail: SessionMail, *, maybe_billed: bool = False) -> GorouterError:
    """What the asker is told when what was done for `mail` was cancelled."""
    if not isinstance(mail, StartTurn):
        return _gone(None)
    error = TurnInterruptedError("the turn was interrupted")
    error.maybe_billed = maybe_billed
    return error


def _in_doubt(turn_id: str) -> TurnInDoubtError:
    error = TurnInDoubtError(f"turn {turn_id!r} was sent before, and whether it was answered is unknown")
    error.maybe_billed = True
    return error


def _not_saved(turn: _Turn, cause: Exception) -> HistoryNotSaved:
    error = HistoryNotSaved(f"the answer arrived but was not stored: {cause}")
    if turn.answer is not None:
        error.partial = turn.answer
        error.generation_id = turn.answer.generation_id
        error.attempts = turn.answer.call.attempts
    error.__cause__ = cause
    return error


def _closed() -> ActorGoneError:
    return ActorGoneError("the session was closed before it could take the message")


def _gone(cause: Exception | None) -> ActorGoneError:
    if cause is None:
        return ActorGoneError("the session ended before it could answer")
    error = ActorGoneError(f"the session failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error

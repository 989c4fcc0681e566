"""The session actor: one task owns one conversation and takes its turns one after the other.

Theory of operation. Everything that changes a session goes through its mailbox and is acted upon by
its one task, in order of arrival; `interrupt` and an asker's leaving pass the queue. A turn is
written down before it is sent and again when it is answered, and the answer is given to the asker
only after that. The turn runs in a scope of its own: our own interrupts cancel that scope and are
turned into an outcome of the turn, a cancel from outside passes through. However a turn ends, its
end is written in a shielded and bounded step, straight to the store.

A streamed turn is lent on: the asker gets the reader of the reply, reads from the socket in its own
task, and gives it back; what has arrived by then is what is stored.
"""

from __future__ import annotations

from contextlib import suppress
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
from ..wire.codec import decode_log_entry, encode_json, join_options, render_body
from ..wire.journal import LogEntry, TurnAbandoned, TurnAnswered, TurnStarted
from ..wire.mail import ClearHistory, ForkHistory, ReadHistory, SessionMail, StartTurn
from ..wire.result import ChatResult, HistoryEntry
from .transcript import Transcript, entries_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._pipeline import ChatPipeline
    from ..abc import HistoryStore
    from ..config import Seams, SessionConfig
    from ..pool.streams import ChatReader

__all__ = ["Envelope", "SessionActor", "SessionOptions", "SessionStatistics", "TurnLoan"]


class SessionOptions(Struct, frozen=True):
    """What a session was opened with: encoded system messages (or nothing) and encoded chat options."""

    system: bytes = b""
    options: bytes = b"{}"


class SessionStatistics(Struct, frozen=True):
    """A snapshot: what the actor does, mail waiting, turns ended, version of the log, bytes rendered."""

    state: Literal["loading", "idle", "running", "gone"]
    queued: int
    turns: int
    version: int
    rendered_bytes: int


class TurnLoan:
    """The reader of a streamed turn, on loan to the asker.

    The asker ends with `give_back` and then waits on `saved`, which holds the result of the turn or
    the error that storing it met. `revoked` says that the session took the reader back itself.
    """

    __slots__ = ("reader", "returned", "revoked", "saved")

    def __init__(self, reader: ChatReader) -> None:
        self.reader = reader
        self.revoked = False
        self.returned = trio.Event()
        self.saved: ReplySlot[ChatResult | None] = ReplySlot()

    def give_back(self) -> None:
        """The asker has stopped reading; never waits, may be called twice."""
        self.reader.close()
        self.returned.set()


Answer: TypeAlias = ChatResult | TurnLoan | list[HistoryEntry] | None


class Envelope(ReplySlot[Answer]):
    """Mail and the asker who waits for its answer."""

    __slots__ = ("_actor", "done", "mail")

    def __init__(self, mail: SessionMail, actor: SessionActor) -> None:
        super().__init__()
        self.mail = mail
        self.done = trio.Event()
        self._actor = actor

    def on_abandon(self) -> None:
        """Leave the mailbox, or interrupt the turn that runs for this asker."""
        self._actor.abandon(self)


class SessionActor:
    """Run it as a task; talk to it through `ask` and `interrupt`."""

    def __init__(
        self,
        key: str,
        options: SessionOptions,
        *,
        pipeline: ChatPipeline,
        store: HistoryStore,
        config: SessionConfig,
        seams: Seams,
        on_gone: Callable[[SessionActor], None],
    ) -> None:
        self.key = key
        self.options = options
        self._pipeline = pipeline
        self._store = store
        self._config = config
        self._seams = seams
        self._on_gone = on_gone
        self._mailbox: Mailbox[Envelope] = Mailbox(config.mailbox, policy=config.overflow)
        self._transcript: Transcript | None = None
        self._version = 0
        self._current: Envelope | None = None
        self._turn_scope: trio.CancelScope | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._restarts: list[float] = []

    def __repr__(self) -> str:
        return f"<SessionActor {self.key!r}: {self.statistics().state}>"

    # For refs: the data plane and the control plane

    async def ask(self, mail: SessionMail) -> Answer:
        """Queue `mail` and wait for its one answer.

        Raises what the answer is, `SessionBusyError` when the policy refuses it, `ActorGoneError`
        when the actor ends first. Cancelling takes queued mail out, or interrupts its turn and
        waits, at most the shutdown grace, until the history is repaired.
        """
        envelope = Envelope(mail, self)
        if isinstance(mail, StartTurn):
            self._mind_double_texting()
        try:
            await self._mailbox.post(envelope)
        except trio.WouldBlock:
            raise SessionBusyError(f"the session's mailbox is full ({self._config.mailbox})") from None
        except trio.ClosedResourceError:
            raise ActorGoneError("the session was closed before it could take the message") from None
        try:
            return await envelope.wait()
        finally:
            if envelope.abandoned:
                with self._grace():
                    await envelope.done.wait()

    async def interrupt(self) -> bool:
        """Stop the running turn, ahead of all queued mail, and wait until the history is repaired.

        What had arrived is stored as an interrupted answer. False when no turn was running.
        """
        envelope = self._current
        if not self._interrupt_turn():
            await trio.lowlevel.checkpoint()
            return False
        await cast("Envelope", envelope).done.wait()
        return True

    async def aclose(self) -> None:
        """End the actor: the running turn is interrupted, queued mail gets `ActorGoneError`."""
        self._scope.cancel()
        await self._ended.wait()

    def abandon(self, envelope: Envelope) -> None:
        """The asker of `envelope` was cancelled; used by envelopes."""
        if self._mailbox.remove(envelope):
            envelope.done.set()
        elif envelope is self._current:
            self._interrupt_turn()

    def statistics(self) -> SessionStatistics:
        """A snapshot; cheap."""
        transcript = self._transcript
        running = "running" if self._current is not None else "idle"
        state = "gone" if self._ended.is_set() else "loading" if transcript is None else running
        return SessionStatistics(
            state,  # type: ignore[arg-type]  # three literals that mypy widens to str
            self._mailbox.statistics().queued,
            0 if transcript is None else transcript.turns,
            self._version,
            0 if transcript is None else len(transcript.rendered),
        )

    # The task

    async def run(self) -> None:
        """The actor's life: take mail until it is closed or cancelled. Every asker gets an answer."""
        try:
            with self._scope:
                while self._may_start():
                    await contain(self._take_mail, report=self._fail_current)
        finally:
            self._end()

    async def _take_mail(self) -> None:
        while True:
            envelope = await self._mailbox.receive()
            if envelope.abandoned:
                envelope.done.set()
                continue
            self._current = envelope
            await self._act(envelope)
            self._current = None
            envelope.done.set()

    async def _act(self, envelope: Envelope) -> None:
        try:
            if self._transcript is None:
                await self._load()
            match envelope.mail:
                case StartTurn() as turn:
                    await self._take_turn(turn, envelope)
                case ReadHistory():
                    envelope.resolve(await self._read_history())
                case ClearHistory():
                    await self._clear()
                    envelope.resolve(None)
                case ForkHistory(target=target):
                    await self._fork(target)
                    envelope.resolve(None)
                case unknown:
                    assert_never(unknown)
        except GorouterError as exc:
            envelope.fail(exc)
            if isinstance(exc, (SessionConflictError, HistoryNotSaved)):
                # Somebody else wrote, or a write is in doubt: the store knows, this copy does not.
                self._transcript = None

    def _may_start(self) -> bool:
        """Whether the actor may (re)start: at most `restarts` times in the window."""
        now = trio.current_time()
        self._restarts = [at for at in self._restarts if now - at < self._config.restart_window_s]
        self._restarts.append(now)
        return len(self._restarts) <= self._config.restarts + 1

    def _fail_current(self, error: Exception) -> None:
        """An error that nobody expected: the asker gets it as the cause, the actor starts afresh."""
        self._transcript = None
        envelope, self._current = self._current, None
        if envelope is not None:
            gone = ActorGoneError(f"the session failed: {type(error).__name__}: {error}")
            gone.__cause__ = error
            envelope.fail(gone)
            envelope.done.set()

    def _end(self) -> None:
        self._on_gone(self)
        gone = [self._current] if self._current is not None else []
        self._current = None
        for envelope in gone + self._mailbox.close():
            envelope.fail(ActorGoneError("the session ended before it could answer"))
            envelope.done.set()
        self._ended.set()

    # Turns

    async def _take_turn(self, turn: StartTurn, envelope: Envelope) -> None:
        transcript = cast("Transcript", self._transcript)
        known = transcript.is_answered(turn.turn_id)
        if known:
            envelope.resolve(await self._stored_answer(turn.turn_id))
            return
        if transcript.in_doubt is not None:
            await self._resolve_doubt(transcript.in_doubt, turn.turn_id)
        body = self._render(turn, transcript)
        with trio.CancelScope(deadline=turn.deadline) as scope:
            self._turn_scope = scope
            await self._append(_started(turn, self._seams.wall()))
            try:
                if turn.streaming:
                    await self._stream_turn(turn, body, envelope)
                else:
                    await self._whole_turn(turn, body, envelope)
            except BaseException as exc:
                await self._close_turn(turn, exc)
                raise
            finally:
                self._turn_scope = None
        if scope.cancelled_caught:
            envelope.fail(TurnInterruptedError("the turn was interrupted"))

    async def _whole_turn(self, turn: StartTurn, body: bytes, envelope: Envelope) -> None:
        result = await self._pipeline.run(body)
        result = msgspec.structs.replace(result, turn_id=turn.turn_id)
        await self._save_answer(turn, result)
        envelope.resolve(result)

    async def _stream_turn(self, turn: StartTurn, body: bytes, envelope: Envelope) -> None:
        reader = await self._pipeline.open_stream(body)
        loan = TurnLoan(reader)
        if not envelope.resolve(loan):
            loan.give_back()
        try:
            await loan.returned.wait()
        finally:
            loan.revoked = not loan.returned.is_set()
            reader.close()
            await self._settle_loan(turn, loan)

    async def _settle_loan(self, turn: StartTurn, loan: TurnLoan) -> None:
        """Write what has arrived and tell the asker; an empty partial answer abandons the turn."""
        whole = loan.reader.is_answered
        try:
            if whole or loan.reader.merge.has_data:
                result = loan.reader.result(interrupted=not whole)
                await self._save_answer(turn, _storable(result, turn.turn_id))
                loan.saved.resolve(result)
            else:
                await self._save(TurnAbandoned(turn.turn_id, "interrupted", maybe_billed=True))
                loan.saved.resolve(None)
        except GorouterError as exc:
            loan.saved.fail(exc)

    async def _save_answer(self, turn: StartTurn, result: ChatResult) -> None:
        """Write the answer; what keeps it from being written becomes `HistoryNotSaved`, answer attached."""
        try:
            await self._save(TurnAnswered(turn.turn_id, msgspec.Raw(encode_json(result.message)), result.call))
        except GorouterError as exc:
            error = HistoryNotSaved(f"the answer arrived but was not stored: {exc}")
            error.partial = result
            error.generation_id = result.generation_id
            raise error from exc

    async def _close_turn(self, turn: StartTurn, exc: BaseException) -> None:
        """The end of a turn that has none yet."""
        transcript = cast("Transcript", self._transcript)
        if transcript.in_doubt != turn.turn_id or isinstance(exc, HistoryNotSaved):
            return
        billed = exc.maybe_billed if isinstance(exc, GorouterError) else True
        reason = type(exc).__name__ if isinstance(exc, GorouterError) else "interrupted"
        with suppress(GorouterError):
            # The turn's own error says more; a turn left without an end is given one by the next.
            await self._save(TurnAbandoned(turn.turn_id, reason, maybe_billed=billed))

    async def _resolve_doubt(self, doubtful: str, turn_id: str) -> None:
        """A turn of an earlier life has no end: it is given one, and whoever asks for it is told."""
        await self._append(TurnAbandoned(doubtful, "in doubt", maybe_billed=True))
        if doubtful == turn_id:
            error = TurnInDoubtError(f"turn {turn_id!r} was sent, and whether it was answered is unknown")
            error.maybe_billed = True
            raise error

    def _render(self, turn: StartTurn, transcript: Transcript) -> bytes:
        messages = transcript.render(turn.messages)
        if self.options.system:
            messages = self.options.system + b"," + messages
        options = turn.options if turn.options != b"{}" else self.options.options
        if options is turn.options and self.options.options != b"{}":
            options = join_options(self.options.options, turn.options)
        return render_body(options, messages, streaming=turn.streaming)

    def _mind_double_texting(self) -> None:
        busy = self._current is not None or self._mailbox.statistics().queued > 0
        if busy and self._config.double_texting == "reject":
            raise SessionBusyError("a turn is running, and the session rejects another (double_texting)")
        if busy and self._config.double_texting == "interrupt":
            self._interrupt_turn()

    def _interrupt_turn(self) -> bool:
        if self._turn_scope is None:
            return False
        self._turn_scope.cancel()
        return True

    # The store

    async def _load(self) -> None:
        stored = await self._store.load(self.key)
        transcript = Transcript()
        for entry in stored.entries:
            transcript.apply(decode_log_entry(entry))
        self._transcript = transcript
        self._version = stored.version

    async def _save(self, entry: LogEntry) -> None:
        """Append the end of a turn, shielded and bounded; raises `HistoryNotSaved` when time runs out."""
        with self._grace() as scope:
            await self._append(entry)
        if scope.cancelled_caught:
            raise HistoryNotSaved(f"the store did not answer in {self._config.shutdown_grace_s} s")

    async def _append(self, entry: LogEntry) -> None:
        self._version = await self._store.append(self.key, [encode_json(entry)], expected_version=self._version)
        cast("Transcript", self._transcript).apply(entry)

    async def _read_log(self) -> list[LogEntry]:
        stored = await self._store.load(self.key)
        return [decode_log_entry(entry) for entry in stored.entries]

    async def _read_history(self) -> list[HistoryEntry]:
        return entries_of(await self._read_log())

    async def _stored_answer(self, turn_id: str) -> ChatResult:
        for entry in await self._read_log():
            if isinstance(entry, TurnAnswered) and entry.turn_id == turn_id:
                (answer,) = entries_of([entry])
                return ChatResult(message=answer.message, call=entry.call, turn_id=turn_id)  # type: ignore[arg-type]  # an answer is an assistant's
        raise SessionConflictError(f"the answer of turn {turn_id!r} is not in the store any more")

    async def _clear(self) -> None:
        self._version = await self._store.rewrite(self.key, [], expected_version=self._version)
        self._transcript = Transcript()

    async def _fork(self, target: str) -> None:
        stored = await self._store.load(self.key)
        await self._store.append(target, stored.entries, expected_version=0)

    def _grace(self) -> trio.CancelScope:
        """A shield for saving, bounded."""
        return trio.CancelScope(shield=True, deadline=trio.current_time() + self._config.shutdown_grace_s)


def _started(turn: StartTurn, at_s: float) -> TurnStarted:
    return TurnStarted(turn.turn_id, msgspec.Raw(b"[%b]" % turn.messages), at_s)


def _storable(result: ChatResult, turn_id: str) -> ChatResult:
    """An interrupted answer without its tool calls: they may be cut anywhere, and nothing ran for them."""
    message = result.message
    if result.interrupted and message.tool_calls is not UNSET:
        message = msgspec.structs.replace(message, tool_calls=UNSET, content=message.content or "")
    return msgspec.structs.replace(result, message=message, turn_id=turn_id)

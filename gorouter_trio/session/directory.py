"""Which sessions are active, and the refs through which they are reached."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import trio

from .._stream import ChatStream
from ..errors import ConfigError, GorouterError, SessionConflictError, TurnInterruptedError
from ..wire.codec import encode_options, encode_prompt
from ..wire.mail import ClearHistory, ForkHistory, ReadHistory, StartTurn
from .actor import SessionActor, SessionOptions, SessionStatistics, TurnLoan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Unpack

    from .._pipeline import ChatPipeline
    from ..abc import HistoryStore
    from ..config import Seams, SessionConfig
    from ..wire.codec import Prompt
    from ..wire.requests import ChatKeywords
    from ..wire.result import ChatResult, HistoryEntry

__all__ = ["SessionDirectory", "SessionRef"]


class SessionDirectory:
    """The active actors of one runtime, by key; actors run in the nursery given."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        pipeline: ChatPipeline,
        store: HistoryStore,
        config: SessionConfig,
        seams: Seams,
    ) -> None:
        self._nursery = nursery
        self._pipeline = pipeline
        self._store = store
        self._config = config
        self._actors: dict[str, SessionActor] = {}
        self.seams = seams

    @property
    def active(self) -> int:
        """How many actors there are."""
        return len(self._actors)

    def ref(self, key: str, options: SessionOptions) -> SessionRef:
        """A ref to the session `key`, starting nothing.

        Raises `ConfigError` for a key that cannot be one, `SessionConflictError` when the session is
        active with other options.
        """
        self._check_key(key)
        self._check_options(key, options)
        return SessionRef(self, key, options)

    def activate(self, key: str, options: SessionOptions) -> SessionActor:
        """The session's actor, started if need be; raises `SessionConflictError` as `ref` does."""
        self._check_options(key, options)
        actor = self._actors.get(key)
        if actor is None:
            actor = SessionActor(
                key,
                options,
                pipeline=self._pipeline,
                store=self._store,
                config=self._config,
                seams=self.seams,
                on_gone=self._forget,
            )
            self._actors[key] = actor
            self._nursery.start_soon(actor.run)
        return actor

    def active_actor(self, key: str) -> SessionActor | None:
        """The session's actor if it is active."""
        return self._actors.get(key)

    def grace(self) -> trio.CancelScope:
        """A shield for the end of a turn, bounded."""
        return trio.CancelScope(shield=True, deadline=trio.current_time() + self._config.shutdown_grace_s)

    def _forget(self, actor: SessionActor) -> None:
        if self._actors.get(actor.key) is actor:
            del self._actors[actor.key]

    def _check_options(self, key: str, options: SessionOptions) -> None:
        actor = self._actors.get(key)
        if actor is not None and actor.options != options:
            raise SessionConflictError(f"session {key!r} is open with different options")

    def _check_key(self, key: str) -> None:
        if not key:
            raise ConfigError("session: the key must not be empty")
        try:
            size = len(key.encode())
        except UnicodeEncodeError as exc:
            raise ConfigError(f"session: the key is not valid Unicode: {exc.reason}") from exc
        if size > self._config.max_id_bytes:
            raise ConfigError(f"session: the key is {size} bytes long, at most {self._config.max_id_bytes} are allowed")


class SessionRef:
    """A session by its key: cheap, safe to keep and pass on. The actor behind it starts on the first message."""

    __slots__ = ("_directory", "_options", "key")

    def __init__(self, directory: SessionDirectory, key: str, options: SessionOptions) -> None:
        self._directory = directory
        self._options = options
        self.key = key

    def __repr__(self) -> str:
        return f"<SessionRef {self.key!r}>"

    async def ask(self, prompt: Prompt, *, turn_id: str | None = None, **options: Unpack[ChatKeywords]) -> ChatResult:
        """Take one turn and return its answer, which is stored by then.

        Turns of a session are serial, in order of arrival. With a `turn_id` the turn happens at
        most once: asked again after its answer it gives the stored one, and `TurnInDoubtError` when
        a crash left its outcome unknown. Raises the errors of `client.chat`, `SessionBusyError`,
        `TurnInterruptedError`, `HistoryNotSaved` with the answer in `partial`, and
        `ActorGoneError`. Cancelling takes the turn back or interrupts it; the history stays valid.
        """
        actor = self._directory.activate(self.key, self._options)
        return cast("ChatResult", await actor.ask(self._turn(prompt, turn_id, options, streaming=False)))

    @asynccontextmanager
    async def stream(
        self, prompt: Prompt, *, turn_id: str | None = None, raw_chunks: bool = False, **options: Unpack[ChatKeywords]
    ) -> AsyncIterator[ChatStream]:
        """Take one turn with the answer streamed; it is stored when the `async with` is left.

        Leaving early, by an exception or a cancel as well, stores what had arrived as an
        interrupted answer. Errors as in `ask`, raised on entering, while iterating, or on leaving.
        """
        actor = self._directory.activate(self.key, self._options)
        loan = cast("TurnLoan", await actor.ask(self._turn(prompt, turn_id, options, streaming=True)))
        if not isinstance(loan, TurnLoan):
            yield ChatStream.of_result(loan)
            return
        try:
            try:
                yield ChatStream(loan.reader, raw_chunks=raw_chunks)
            except GorouterError as exc:
                if loan.revoked:
                    raise _interrupted(exc) from exc
                raise
        finally:
            loan.give_back()
            with self._directory.grace():
                await loan.saved.wait()

    async def interrupt(self) -> bool:
        """Stop the running turn, ahead of queued ones; what had arrived is stored. False when none runs."""
        actor = self._directory.active_actor(self.key)
        if actor is None:
            await trio.lowlevel.checkpoint()
            return False
        return await actor.interrupt()

    async def history(self) -> list[HistoryEntry]:
        """The messages of the answered turns, in order, after the turns queued before."""
        return cast("list[HistoryEntry]", await self._actor().ask(ReadHistory()))

    async def clear(self) -> None:
        """Empty the history, after the turns queued before; the session stays."""
        await self._actor().ask(ClearHistory())

    async def fork(self, key: str, **options: Unpack[ChatKeywords]) -> SessionRef:
        """A new session with a copy of this history; raises `SessionConflictError` when it exists already."""
        chat_options = encode_options(options) if options else self._options.options
        target = self._directory.ref(key, SessionOptions(self._options.system, chat_options))
        await self._actor().ask(ForkHistory(key))
        return target

    async def statistics(self) -> SessionStatistics:
        """A snapshot; a session that is not active is idle with nothing known of it."""
        await trio.lowlevel.checkpoint()
        actor = self._directory.active_actor(self.key)
        return SessionStatistics("idle", 0, 0, 0, 0) if actor is None else actor.statistics()

    async def aclose(self) -> None:
        """End the actor: a running turn is interrupted, queued ones get `ActorGoneError`. The history stays."""
        actor = self._directory.active_actor(self.key)
        if actor is not None:
            await actor.aclose()
        else:
            await trio.lowlevel.checkpoint()

    def _actor(self) -> SessionActor:
        return self._directory.activate(self.key, self._options)

    def _turn(self, prompt: Prompt, turn_id: str | None, options: ChatKeywords, *, streaming: bool) -> StartTurn:
        if turn_id is not None and not turn_id:
            raise ConfigError("turn_id: must not be empty")
        return StartTurn(
            turn_id=turn_id or self._directory.seams.new_id(),
            messages=encode_prompt(prompt),
            options=encode_options(options) if options else b"{}",
            streaming=streaming,
            deadline=trio.current_effective_deadline(),
        )


def _interrupted(cause: GorouterError) -> TurnInterruptedError:
    error = TurnInterruptedError("the turn was interrupted")
    error.partial = cause.partial
    error.maybe_billed = True
    return error

"""Which sessions are active, and the refs through which they are reached."""

from __future__ import annotations

import hmac
import itertools
from collections import OrderedDict
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast, overload

import msgspec
import trio

from .._contexts import start_clean
from .._turns.loan import TurnLoan, patience
from .._turns.request import TurnExtras
from .._turns.rounds import has_tools
from .._turns.stream import ChatStream
from ..errors import (
    ActorGoneError,
    BadRequestError,
    ConfigError,
    DecodeError,
    GorouterError,
    HistoryNotSaved,
    SessionConflictError,
    SessionNotFoundError,
)
from ..wire.codec import decode_json, encode_json, encode_name, encode_prompt, join_options
from ..wire.mail import ClearHistory, CompactHistory, ForkHistory, ReadHistory, StartTurn, UndoTurns
from .actor import SaveWatch, SessionActor, SessionOptions, SessionServices, SessionStatistics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager
    from typing import Literal, Unpack

    from .._pipeline import ChatPipeline
    from .._turns.defaults import CallDefaults
    from .._turns.gate import Gate
    from .._turns.request import TurnEncoder, TurnKeywords
    from .._turns.rounds import TakeRounds
    from ..abc import HistoryStore
    from ..config import Seams, SessionConfig
    from ..secret import Secret
    from ..security.sessions import Owner
    from ..wire.codec import Prompt
    from ..wire.result import ChatResult, HistoryEntry
    from .ownership import SessionOwnership

T = TypeVar("T")

__all__ = ["SessionDirectory", "SessionRef"]

_Turn: TypeAlias = tuple[StartTurn, TurnExtras | None]

_MAX_LOOKS = 16


class SessionDirectory:
    """The active actors of one runtime, by key; actors run in the nursery given.

    The one that was used last stands last. An actor that retires leaves the directory in the same step
    in which it is found idle, so that no mail can reach it any more; what it knew is in the store.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        pipeline: ChatPipeline,
        encoder: TurnEncoder,
        gate: Gate,
        store: HistoryStore,
        config: SessionConfig,
        seams: Seams,
        routing_key: bytes = b"",
        defaults: CallDefaults | None = None,
        ownership: SessionOwnership | None = None,
    ) -> None:
        self.encoder = encoder
        self._defaults = defaults
        self.gate = gate
        self.loop = pipeline.loop
        self._nursery = nursery
        self._config = config
        self._routing_key = routing_key if config.routing else b""
        self._actors: OrderedDict[str, SessionActor] = OrderedDict()
        self._is_open = True
        self._now = trio.lowlevel.current_clock().current_time
        self._has_actors = trio.Event()
        self._make_services = partial(
            SessionServices,
            pipeline=pipeline,
            config=config,
            wall=seams.wall,
            turn_ids=map(f"{seams.new_id()}-{{}}".format, itertools.count(1)),
            on_gone=self._forget,
            watch=SaveWatch(config.shutdown_grace_s),
            tool_tasks={},
        )
        self._services = self._make_services(store=store, ownership=ownership)
        self._leaving: dict[SessionActor, None] = {}

    def __repr__(self) -> str:
        return f"<SessionDirectory {'open' if self._is_open else 'closed'}: {self.active} active>"

    @property
    def active(self) -> int:
        """How many actors there are."""
        return len(self._actors)

    @property
    def leaving(self) -> int:
        """How many finish what they were asked before the store was changed."""
        return len(self._leaving)

    async def run(self) -> None:
        """What all sessions need to have running; until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._services.watch.run)
            nursery.start_soon(self._retire_idle)

    def inspect(self) -> dict[str, SessionStatistics]:
        """A snapshot of each active session, by key, the one used the longest time ago first."""
        return {key: actor.statistics() for key, actor in self._actors.items()}

    def change_store(self, store: HistoryStore, ownership: SessionOwnership | None) -> None:
        """Keep histories there from now on: actors finish what they were asked, and new ones take their places."""
        self._services = self._make_services(store=store, ownership=ownership)
        for actor in list(self._actors.values()):
            if not self._retire(actor):
                self._forget(actor)
                self._leaving[actor] = None
                actor.leave_when_done()

    def current(self, options: SessionOptions) -> SessionOptions:
        """These options above the defaults as they are now."""
        defaults = self._defaults
        if defaults is None or options.base == defaults.number:
            return options
        encoded, settings, _extras = defaults.turn(options.keywords)
        return msgspec.structs.replace(options, options=encoded, settings=settings, base=defaults.number)

    def close(self) -> None:
        """Start no more actors; the running ones end with their nursery."""
        self._is_open = False

    def ref(
        self, key: str, options: SessionOptions, *, token: Secret | None = None, owner: Owner | None = None
    ) -> SessionRef:
        """A ref to the session `key`, starting nothing.

        Raises `ConfigError` for a key that cannot be one, `SessionConflictError` when the session is
        active with other options.
        """
        self._check_key(key)
        if owner is not None and self.gate.is_open:
            raise ConfigError("owner: the client has no `security`, so that no session has an owner")
        actor = self._actors.get(key) if self.gate.is_open else None
        if actor is not None:
            self._check_options(actor, options)
        return SessionRef(self, key, options=options, token=token, owner=owner)

    async def check_exists(self, key: str, name: str) -> None:
        """Raise `SessionNotFoundError` for the `name` that the asker calls it by unless there is a session `key`."""
        if key not in self._actors and not (await self._services.store.load(key)).version:
            raise SessionNotFoundError(f"there is no session {name!r}")

    def activate(self, key: str, options: SessionOptions) -> SessionActor:
        """The session's actor, started if need be.

        Raises `SessionConflictError` as `ref` does, `ActorGoneError` when the client is closed.
        """
        actor = self._actors.get(key)
        if actor is None:
            return self._start(key, options)
        if actor.options is not options:
            self._check_options(actor, options)
        actor.used_at = self._now()
        self._actors.move_to_end(key)
        return actor

    def active_actor(self, key: str) -> SessionActor | None:
        """The session's actor if it is active."""
        return self._actors.get(key)

    async def passivate(self, key: str) -> None:
        """Wait until the session has nothing to do, and end its actor: what it knew is in the store.

        Raises `SessionBusyError` for a tool of its turn, and for whoever holds a stream of it: those it would wait for.
        """
        actor = self._actors.get(key)
        if actor is None or self._retire(actor):
            await trio.lowlevel.checkpoint()
        else:
            await actor.retire_when_done()

    async def end_stream(self, loan: TurnLoan) -> GorouterError | None:
        """Give the loan back and wait until the turn is stored; returns what kept it from that."""
        loan.give_back()
        try:
            with patience(self._config.shutdown_grace_s):
                await loan.saved.wait()
                return None
        except GorouterError as exc:
            return exc
        error = HistoryNotSaved("the session did not say in time whether what had arrived was stored")
        error.partial = loan.answer()
        return error

    def _check_options(self, actor: SessionActor, options: SessionOptions) -> None:
        """Raise unless the actor was opened with these, whatever the defaults were; it has them from now on."""
        if actor.options == options:
            return
        if self.current(actor.options) != options:
            raise SessionConflictError(f"session {actor.key!r} is open with different options")
        actor.options = options

    def _start(self, key: str, options: SessionOptions) -> SessionActor:
        if not self._is_open:
            raise ActorGoneError("the client is closed")
        actor = SessionActor(key, options, services=self._services, routing=self._routing(key))
        self._actors[key] = actor
        self._has_actors.set()
        start_clean(self._nursery, actor.run)
        if len(self._actors) > self._config.max_active:
            self._services.on_rest = self._make_room
            self._make_room()
        return actor

    def _routing(self, key: str) -> bytes:
        """The routing field of the session's requests: a hash, which only the holder of the API key can make."""
        if not self._routing_key:
            return b""
        return b'"session_id":"%b"' % hmac.digest(self._routing_key, key.encode(), "sha256").hex().encode()

    def _forget(self, actor: SessionActor) -> None:
        if self._actors.get(actor.key) is actor:
            del self._actors[actor.key]
            if len(self._actors) <= self._config.max_active:
                self._services.on_rest = None
        self._leaving.pop(actor, None)

    async def _retire_idle(self) -> None:
        """Retire each actor that was idle for long enough; until cancelled."""
        while True:
            # The one that was waited for may have ended in the same step.
            while not self._actors:
                self._has_actors = trio.Event()
                await self._has_actors.wait()
            # The time alone: a name for the oldest actor would keep it here after its end.
            await trio.sleep_until(next(iter(self._actors.values())).used_at + self._config.idle_s)
            self._retire_due(self._now())

    def _retire_due(self, now: float) -> None:
        """Retire the idle actors that were not used for long enough; the busy ones are in use."""
        for actor in list(self._actors.values()):
            if actor.used_at + self._config.idle_s > now:
                return
            if not self._retire(actor):
                actor.used_at = now
                self._actors.move_to_end(actor.key)

    def _make_room(self) -> None:
        """Retire the idle actor that was used the longest time ago, if it is among the first few."""
        for actor in list(itertools.islice(self._actors.values(), _MAX_LOOKS)):
            if self._retire(actor):
                return
            self._actors.move_to_end(actor.key)

    def _retire(self, actor: SessionActor) -> bool:
        if not actor.retire():
            return False
        self._forget(actor)
        return True

    def _check_key(self, key: str) -> None:
        size = len(encode_name("session: the key", key))
        if size > self._config.max_id_bytes:
            raise ConfigError(f"session: the key is {size} bytes long, at most {self._config.max_id_bytes} are allowed")


class SessionRef:
    """A session by its key: cheap, safe to keep and pass on. The actor behind it starts on the first message.

    Where the client has `security`, the session belongs to the principal of the access token that it was asked for
    with, or of the one that a turn brings; `key` is its name there.
    """

    __slots__ = ("_directory", "_options", "_owner", "_token", "key")

    def __init__(
        self,
        directory: SessionDirectory,
        key: str,
        *,
        options: SessionOptions,
        token: Secret | None = None,
        owner: Owner | None = None,
    ) -> None:
        self._directory = directory
        self._options = options
        self._token = token
        self._owner = owner
        self.key = key

    def __repr__(self) -> str:
        return f"<SessionRef {self.key!r}>"

    @overload
    async def ask(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        rounds: TakeRounds | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[T]: ...

    @overload
    async def ask(
        self,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        rounds: TakeRounds | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult: ...

    async def ask(
        self,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        rounds: TakeRounds | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[object]:
        """Take one turn and return its answer, which is stored by then.

        Turns of a session are serial, in order of arrival. With a `turn_id`, any text, the turn happens at
        most once: asked again after its answer it gives the stored one, and `TurnInDoubtError` when
        a crash left its outcome unknown, unless it is to `resume="resend"`: then it is sent again, and may be billed
        twice; tools that have run keep their results, and of those whose result is unknown only harmless ones run
        again. (Once another turn was taken it begins anew.) A turn that waits for a reply from outside goes on where
        it was.

        The options are those of `client.chat`, above the ones of the session; answers that had not the right form and
        the rounds of tools are in the log as well. `rounds` is another loop to take the turn, in place of the one that
        runs `tools` and asks again. Raises the errors of `client.chat`, `SessionBusyError`,
        `TurnInterruptedError`, `HistoryNotSaved` with the answer in `partial`, `TurnParkedError`, `StoreError`,
        `SessionNotFoundError` and `ActorGoneError`. Cancelling takes the turn back or interrupts it, or leaves it
        parked; the history stays valid.
        """
        turn = self._turn(prompt, turn_id, _with_type(options, response_type), resume=resume)
        return await self._whole(turn, rounds)

    @overload
    async def retry(
        self,
        *,
        response_type: type[T],
        turn_id: str | None = None,
        rounds: TakeRounds | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[T]: ...

    @overload
    async def retry(
        self, *, turn_id: str | None = None, rounds: TakeRounds | None = None, **options: Unpack[TurnKeywords]
    ) -> ChatResult: ...

    async def retry(
        self,
        *,
        response_type: type[object] | None = None,
        turn_id: str | None = None,
        rounds: TakeRounds | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[object]:
        """Take the last turn of the history again, with the same messages, and let the new answer stand in its place.

        Until that is there, and if there is none, the history stays as it is. `turn_id` is the id of the new turn.
        Raises `SessionConflictError` for a session without turns, and as `ask` does.
        """
        turn = self._turn(None, turn_id, _with_type(options, response_type), replaces="")
        return await self._whole(turn, rounds)

    @overload
    async def edit(
        self,
        edited: str,
        prompt: Prompt,
        *,
        response_type: type[T],
        turn_id: str | None = None,
        rounds: TakeRounds | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[T]: ...

    @overload
    async def edit(
        self,
        edited: str,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        rounds: TakeRounds | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult: ...

    async def edit(
        self,
        edited: str,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        turn_id: str | None = None,
        rounds: TakeRounds | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[object]:
        """Ask something else in place of a past turn: the one with the id `edited` and all after it give way to it.

        Until the answer is there, and if there is none, the history stays as it is. `turn_id` is the id of the new
        turn. Raises `SessionConflictError` when the history has no turn `edited`, and as `ask` does.
        """
        encode_name("edited:", edited)
        turn = self._turn(prompt, turn_id, _with_type(options, response_type), replaces=edited)
        return await self._whole(turn, rounds)

    async def undo(self, turn_id: str | None = None) -> bool:
        """Leave the last turn out of the history, or the one of this id and all after it, behind queued turns.

        False when there is none. The log keeps what was said and paid for, and the ids stay used.
        """
        if turn_id is not None:
            encode_name("turn_id:", turn_id)
        return cast("bool", await (await self._own_actor()).ask(UndoTurns(turn_id or "")))

    async def answer(self, question_id: str, answer: object, *, rounds: TakeRounds | None = None) -> bool:
        """Reply to a question that a turn waits for, ahead of queued turns, also after a restart; stored on return.

        `answer` is any JSON value; for the approval of a tool true or false, or an object with `approved`, `reason`
        and `by`. The turn goes on for whoever waits for it; if nobody does, it is taken up here, with the tools of the
        session or with `rounds`, or when it is asked again. False when no turn waits for it, or not any more.
        """
        try:
            encoded = encode_json(answer)
            # A number that is none is written all the same, and nobody could read the session again.
            decode_json(encoded)
        except (TypeError, ValueError, RecursionError, DecodeError) as exc:
            raise BadRequestError(f"answer: cannot be written as JSON: {exc}", status=400) from exc
        key, extras = await self._admit(self._options.extras)
        loop = rounds or self._directory.loop(extras)
        return await self._actor(key).reply(question_id, encoded, rounds=loop if has_tools(loop) else None)

    async def compact(self) -> None:
        """Write the log anew, behind queued turns: without turns that were undone or that a summary stands for.

        What is sent stays the same, and so does what every turn id promises; the answers of turns that
        have gone are not there to be asked for again.
        """
        await (await self._own_actor()).ask(CompactHistory())

    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        rounds: TakeRounds | None = None,
        raw_chunks: bool = False,
        **options: Unpack[TurnKeywords],
    ) -> AbstractAsyncContextManager[ChatStream[T]]: ...

    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        rounds: TakeRounds | None = None,
        raw_chunks: bool = False,
        **options: Unpack[TurnKeywords],
    ) -> AbstractAsyncContextManager[ChatStream]: ...

    def stream(
        self,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        rounds: TakeRounds | None = None,
        raw_chunks: bool = False,
        **options: Unpack[TurnKeywords],
    ) -> AbstractAsyncContextManager[ChatStream[object]]:
        """Take one turn with the answer streamed; it is stored when the `async with` is left.

        Leaving early, by an exception or a cancel as well, stores what had arrived as an
        interrupted answer. Errors as in `ask`, raised on entering, while iterating, or on leaving;
        an error of the body leaves as it is, whatever becomes of storing. While the stream is open
        its task cannot ask the session anything else: that is a `SessionBusyError`. An answer without the form that
        was asked for is not asked for again, since it was read already.
        """
        given = _with_type(options, response_type)
        turn = self._turn(prompt, turn_id, given, streaming=True, resume=resume)
        return self._streamed(turn, rounds, raw_chunks=raw_chunks)

    async def interrupt(self) -> bool:
        """Stop the running turn, ahead of queued ones; what had arrived is stored. False when none runs."""
        key, _extras = await self._admit(None)
        actor = self._directory.active_actor(key)
        if actor is None:
            await trio.lowlevel.checkpoint()
            return False
        return await actor.interrupt()

    async def history(self) -> list[HistoryEntry]:
        """The messages of the answered turns, in order, after the turns queued before."""
        return cast("list[HistoryEntry]", await (await self._own_actor()).ask(ReadHistory()))

    async def clear(self) -> None:
        """Empty the history, after the turns queued before; the session stays, its turn ids are forgotten."""
        await (await self._own_actor()).ask(ClearHistory())

    async def fork(self, key: str, **options: Unpack[TurnKeywords]) -> SessionRef:
        """A new session with a copy of this history, after the turns queued before, of the same owner.

        It has this session's system message and options, beneath the ones given. Raises
        `SessionConflictError` when a session with this key exists already.
        """
        own = self._current()
        encoded, settings, extras = self._directory.encoder.encode(options, beneath=own.settings, extras=own.extras)
        chat_options = join_options(own.options, encoded)
        options_there = msgspec.structs.replace(
            own,
            options=chat_options,
            settings=settings,
            extras=extras,
            keywords={**own.keywords, **options},
        )
        target = self._directory.ref(key, options_there, token=self._token, owner=self._owner)
        there, _extras = await target._admit(None)  # noqa: SLF001 - one of its own kind
        if self._directory.active_actor(there) is not None:
            raise SessionConflictError(f"session {key!r} exists already")
        await (await self._own_actor()).ask(ForkHistory(there))
        return target

    async def statistics(self) -> SessionStatistics:
        """A snapshot; a session that is not active is idle with nothing known of it."""
        key, _extras = await self._admit(None)
        await trio.lowlevel.checkpoint()
        actor = self._directory.active_actor(key)
        return SessionStatistics("idle", 0, 0, 0, 0) if actor is None else actor.statistics()

    async def aclose(self) -> None:
        """End the actor: a running turn is interrupted, queued ones get `ActorGoneError`. The history stays."""
        key, _extras = await self._admit(None)
        actor = self._directory.active_actor(key)
        if actor is not None:
            await actor.aclose()
        else:
            await trio.lowlevel.checkpoint()

    async def _own_actor(self) -> SessionActor:
        key, _extras = await self._admit(None)
        return self._actor(key)

    def _actor(self, key: str) -> SessionActor:
        return self._directory.activate(key, self._current())

    def _current(self) -> SessionOptions:
        """The options of the session, above the client's defaults of now."""
        own = self._options
        current = self._directory.current(own)
        if current is not own:
            self._options = current
        return current

    async def _admit(self, extras: TurnExtras | None) -> tuple[str, TurnExtras | None]:
        """The full key of the session for who asks, and the extras with them."""
        gate = self._directory.gate
        if gate.is_open and self._token is None and (extras is None or extras.token is None):
            return self.key, extras
        extras = await gate.admit(extras, self._token)
        principal = None if extras is None else extras.principal
        key = gate.key_for(principal, self.key, owner=self._owner)
        if self._owner is not None:
            await self._directory.check_exists(key, self.key)
        return key, extras

    async def _whole(self, turn: _Turn, rounds: TakeRounds | None) -> ChatResult[object]:
        mail, extras = turn
        key, extras = await self._admit(extras)
        rounds = rounds or self._directory.loop(extras)
        return cast("ChatResult[object]", await self._actor(key).ask(mail, rounds=rounds))

    @asynccontextmanager
    async def _streamed(
        self, turn: _Turn, rounds: TakeRounds | None, *, raw_chunks: bool
    ) -> AsyncIterator[ChatStream[object]]:
        mail, extras = turn
        key, extras = await self._admit(extras)
        answer = await self._actor(key).ask(mail, rounds=rounds or self._directory.loop(extras))
        if not isinstance(answer, TurnLoan):
            yield ChatStream.of_result(cast("ChatResult[object]", answer))
            return
        answer.holder = trio.lowlevel.current_task()
        try:
            yield ChatStream(answer, raw_chunks=raw_chunks)
        except BaseException as exc:
            failure = await self._directory.end_stream(answer)  # noqa: ASYNC102 - shields itself, bounded
            if failure is not None:
                exc.add_note(f"and what had arrived was not stored: {failure}")
            raise
        failure = await self._directory.end_stream(answer)
        if failure is not None:
            raise failure

    def _turn(
        self,
        prompt: Prompt | None,
        turn_id: str | None,
        options: Mapping[str, object],
        *,
        streaming: bool = False,
        resume: Literal["resend"] | None = None,
        replaces: str | None = None,
    ) -> _Turn:
        if turn_id is not None:
            encode_name("turn_id:", turn_id)
        if resume not in {None, "resend"} or (resume and turn_id is None):
            raise ConfigError('resume: is None or "resend", and needs the turn_id of the turn that is meant')
        own = self._current()
        encoded, settings, extras = b"{}", own.settings, own.extras
        if options:
            encoded, settings, extras = self._directory.encoder.encode(options, beneath=settings, extras=extras)
        mail = StartTurn(
            turn_id=turn_id or "",
            messages=b"" if prompt is None else encode_prompt(prompt),
            options=encoded,
            streaming=streaming,
            deadline=trio.current_effective_deadline(),
            settings=settings,
            resume=resume is not None,
            replaces=replaces,
        )
        return mail, extras


def _with_type(options: Mapping[str, object], response_type: type[object] | None) -> Mapping[str, object]:
    return options if response_type is None else {"response_type": response_type, **options}

"""Sessions behind a gateway, as if they were here: `open_remote(url)` gives a client with the same methods and errors.

Theory of operation. One task keeps one connection, and makes a new one when it breaks, with growing pauses. Every turn
has an id, made here where none was given. When the connection breaks in the middle of a turn, the turn is asked again
under its id on the next one, with the number of the last message that had come: the gateway joins the asker to the turn
where it still runs, or gives the stored answer, and so a turn happens once, however often the connection breaks.
"""

from __future__ import annotations

import os
import random
from contextlib import asynccontextmanager
from copy import copy
from typing import TYPE_CHECKING, Final, TypeAlias, TypedDict, cast, overload
from urllib.parse import urlsplit
from uuid import uuid4

import msgspec
import trio

from ._contain import ungrouped
from ._turns.output import FormCache
from ._turns.stream import ChatStream, ChunkSource
from .client import session_key
from .errors import (
    BadRequestError,
    ConfigError,
    ConnectError,
    DecodeError,
    GorouterError,
    InvalidOutputError,
    PoolClosedError,
    StreamBrokenError,
    StreamNotFinishedError,
)
from .events import StreamFinished
from .gateway.failures import error_of
from .gateway.link import LinkBrokenError, is_refused_by_tls, open_link
from .gateway.protocol import (
    Accepted,
    Answer,
    Ask,
    AskOptions,
    Clear,
    Close,
    Compact,
    Done,
    Event,
    Failed,
    Fork,
    Gap,
    GatewaySnapshot,
    History,
    HistoryPage,
    Interrupt,
    Question,
    RemoteStatistics,
    Snapshot,
    Statistics,
    Undo,
    decode_server_message,
)
from .secret import Secret
from .session.actor import SessionStatistics
from .transport.tls import make_tls_context
from .wire.codec import decode_json, encode_json, encode_name, encode_prompt, make_decoder

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager
    from typing import Literal, TypeVar, Unpack

    from ._turns.output import AnswerForm
    from .abc import TurnOptions
    from .events import StreamEvent
    from .gateway.link import Call, Link
    from .gateway.protocol import ServerMessage, SessionRequest
    from .network import TlsConfig
    from .wire.codec import Prompt
    from .wire.requests import AskKeywords
    from .wire.result import ChatResult, HistoryEntry
    from .wire.stream import ChatChunk

    T = TypeVar("T")

__all__ = ["OnQuestion", "RemoteClient", "RemoteSession", "open_remote"]

_BASE_S: Final = 0.05
_MAX_S: Final = 5.0
_CREDIT: Final = 65_536
_GRACE_S: Final = 10.0
_AGENT: Final = "gorouter-trio"

OnQuestion: TypeAlias = "Callable[[Question], Awaitable[None]]"
"""Called with each question about a tool; it may answer it with `session.answer`, at once or ever.

Whoever reads the turn waits for it. One that is cancelled with its reader is called again when that reads on.
"""

_Place: TypeAlias = tuple[str, tuple[str, str] | None]

_decode_options = make_decoder(AskOptions)


class _Names(TypedDict):
    session: str
    owner: tuple[str, str] | None
    system: str | None


class _Wire:
    """The connection, and the next one when it breaks."""

    def __init__(
        self, url: str, *, token: Secret | None, tls: ssl.SSLContext | None, patience_s: float, rng: random.Random
    ) -> None:
        self._url = url
        self._token = token
        self._tls = tls
        self._patience_s = patience_s
        self._rng = rng
        self._link: Link | None = None
        self._fatal: GorouterError | None = None
        self._trouble = ""
        self._changed = trio.Event()
        self.connects = 0
        self._turns: dict[_Place, dict[_Turn, Link]] = {}
        # Of each session, the turns that were begun, in order, and where: a gateway that goes away still has them.
        self.forms = FormCache()
        self.on_question: OnQuestion | None = None

    def __repr__(self) -> str:
        return f"{self._url} {'connected' if self._link is not None else 'not connected'}"

    async def link(self, *, other_than: Link | None = None) -> Link:
        """The connection, waited for where there is none; raises `ConnectError` when that takes too long."""
        with trio.move_on_after(self._patience_s):
            while True:
                if self._fatal is not None:
                    # Each caller has one of its own: a turn notes on it what became of it, and its traceback keeps what
                    # was asked.
                    raise copy(self._fatal) from self._fatal.__cause__
                link = self._link
                # One that has ended stays here until it is closed: what is asked of it would pass for begun.
                if link is not None and link is not other_than and link.broken is None:
                    return link
                await self._changed.wait()
        raise ConnectError(f"there is no connection to {self._url}{self._trouble}")

    def close(self) -> None:
        """Nobody gets a connection any more: whoever waits for one, or comes later, is told so at once."""
        self._fatal = PoolClosedError("the client is closed")
        self._tell()

    async def run(self) -> None:
        """Keep a connection, until it is of no use to try.

        One whose gateway goes away stays for what runs on it while the next one is made.
        """
        failures = 0
        async with trio.open_nursery() as nursery:
            while self._fatal is None:
                link: Link | None = await nursery.start(self._hold)
                if link is not None:
                    failures = 0
                    await link.leaving()
                await trio.sleep(self._rng.uniform(0, min(_MAX_S, _BASE_S * 2 ** min(failures, 10))))
                failures += 1

    async def _hold(self, *, task_status: trio.TaskStatus[Link | None]) -> None:
        """Make a connection, and keep it until it ends; started with None where none could be made."""
        link: Link | None = None
        try:
            async with open_link(self._url, token=self._token, tls=self._tls, agent=_AGENT) as link:
                self._trouble = ""
                self.connects += 1
                self._set(link)
                task_status.started(link)
                await link.closed()
        except* (LinkBrokenError, GorouterError) as group:
            self._give_up_on(_first(group))
        if link is None:
            task_status.started(None)
        elif self._link is link:
            self._set(None)

    def _set(self, link: Link | None) -> None:
        self._link = link
        self._tell()

    def _give_up_on(self, exc: BaseException) -> None:
        if isinstance(exc, LinkBrokenError):
            self._fatal = self._fatal or exc.fatal()
        elif not isinstance(exc, (ConnectError, DecodeError)) or self._is_the_wrong_place(exc):
            self._fatal = cast("GorouterError", exc)
        self._trouble = f": {exc}"
        self._tell()

    def _is_the_wrong_place(self, exc: GorouterError) -> bool:
        """Whether TLS refuses what has never worked; where it did, a certificate may have ended and be renewed."""
        return not self.connects and is_refused_by_tls(exc)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def request(self, request: SessionRequest | Statistics, *, again: bool = False) -> ServerMessage:
        """The one answer to a request; `again` asks once more when the connection breaks first."""
        while True:
            link = self._link_of_turn(request) or await self.link()
            try:
                call = await link.begin(request)
                try:
                    _head, text = await call.receive()
                finally:
                    link.end(call)
            except LinkBrokenError as exc:
                self._lost(link, exc)
                if not again:
                    raise StreamBrokenError("the connection broke before the answer had come") from exc
                continue
            message = decode_server_message(text)
            if isinstance(message, Failed):
                raise error_of(message.error)
            return message

    def note_begun(self, turn: _Turn, place: _Place, link: Link) -> None:
        """The turn is asked for on this link, the first time or again."""
        self._turns.setdefault(place, {})[turn] = link

    def note_ended(self, turn: _Turn, place: _Place) -> None:
        """It is nowhere any more."""
        turns = self._turns.get(place, {})
        turns.pop(turn, None)
        if not turns:
            self._turns.pop(place, None)

    def _link_of_turn(self, request: SessionRequest | Statistics) -> Link | None:
        """Where the session is in the middle of a turn: that of the first one, since the others wait for it."""
        if request.session is None:
            return None
        turns = self._turns.get((request.session, request.owner), {})
        return next((link for turn, link in turns.items() if turn.is_running and link.broken is None), None)

    def _lost(self, link: Link, exc: LinkBrokenError) -> None:
        """Do not offer this link any more, and raise what trying again would not change.

        Which of the calls on it the gateway did not like nobody knows: none of them is made again.
        """
        if self._link is link:
            self._set(None)
        if (fatal := exc.fatal()) is not None:
            if exc.is_for_good:
                self._fatal = copy(fatal)
                self._tell()
            raise fatal

    async def reopen(self, link: Link, exc: LinkBrokenError) -> None:
        """As `_lost`, for a turn that goes on elsewhere, unless that is of no use: it may have begun here."""
        try:
            self._lost(link, exc)
        except GorouterError as fatal:
            fatal.maybe_billed = True
            raise
        await trio.lowlevel.checkpoint()


class _Turn(ChunkSource):
    """One turn, over as many connections as it takes: a `ChunkSource`."""

    def __init__(self, wire: _Wire, ask: Ask) -> None:
        self._wire = wire
        self._ask = ask
        self._link: Link | None = None
        self._call: Call | None = None
        self._seq = 0
        self._owed = 0
        self._question: Question | None = None
        self._failure: GorouterError | None = None
        self._may_have_begun = False
        self._result: ChatResult[object] | None = None

    @property
    def generation_id(self) -> str | None:
        """Known with the answer only."""
        return None if self._result is None else self._result.generation_id

    @property
    def is_running(self) -> bool:
        """Whether it was asked for, and its end has not come."""
        return self._call is not None and not self._call.is_over

    def has_ended(self) -> bool:
        """Whether the answer is there."""
        return self._result is not None

    def result(self) -> ChatResult[object]:
        """The answer."""
        if self._result is None:
            raise StreamNotFinishedError("the turn has not ended")
        return self._result

    async def begin(self, *, other_than: Link | None = None) -> None:
        """Ask, the first time or again."""
        ask = self._ask
        if self._may_have_begun:
            ask = msgspec.structs.replace(ask, resumed=True, after=self._seq)
        while True:
            link = await self._next_link(other_than)
            try:
                self._call, self._link = await link.begin(ask), link
                # That has its credit anew.
                self._owed = 0
                if ask.session is not None:
                    self._wire.note_begun(self, (ask.session, ask.owner), link)
            except LinkBrokenError as exc:
                await self._wire.reopen(link, exc)
                self._may_have_begun = True
                ask = msgspec.structs.replace(ask, resumed=True, after=self._seq)
            else:
                return

    async def _next_link(self, other_than: Link | None) -> Link:
        """A link to ask on; that there is none is worse for a turn that may run than for one that was never sent."""
        failure: GorouterError
        try:
            return await self._wire.link(other_than=other_than)
        except GorouterError as exc:
            if not self._may_have_begun:
                raise
            match exc:
                case PoolClosedError():
                    failure = PoolClosedError("the client was closed before the answer had come")
                case ConnectError():
                    failure = StreamBrokenError(f"the connection broke before the answer had come: {exc.message}")
                case _:
                    exc.maybe_billed = True
                    raise
            failure.maybe_billed = True
            raise failure from exc

    async def read(self) -> list[ChatChunk] | tuple[StreamEvent, ...]:
        """The next events, all that are there; an empty list at the end.

        Raises what the turn has failed with, behind the events that came before that.
        """
        if self.has_ended():
            await trio.lowlevel.checkpoint()
            return []
        while True:
            if self._failure is not None:
                raise self._failure
            await self._pass_question_on()
            await self._pay()
            events: list[StreamEvent] = []
            message: ServerMessage | None = await self._next()
            while message is not None:
                self._take(message, events)
                # What came before a question is the reader's before the handler is called, which may take its time.
                is_over = self.has_ended() or self._failure is not None
                message = None if is_over or self._question is not None else self._next_nowait()
            if events:
                return tuple(events)
            if self.has_ended():
                return []

    async def _pay(self) -> None:
        """Grant what was read, in pieces that are worth a message."""
        call, link = self._call, self._link
        if call is None or link is None or self._owed < max(1, min(_CREDIT, link.welcome.max_credit) // 2):
            return
        try:
            await call.grant(self._owed)
        except LinkBrokenError:
            # Noticed where it is read from.
            return
        # Only then: who is cancelled has not paid, and may read on.
        self._owed = 0

    def _take(self, message: ServerMessage, events: list[StreamEvent]) -> None:
        match message:
            case Event(event=StreamFinished()):
                pass
            case Event(event=event):
                events.append(event)
            case Question():
                self._question = message
            case Done(result=result):
                self._result = result
            case Failed(error=error):
                self._failure = error_of(error)
            case _:
                pass

    async def _next(self) -> ServerMessage:
        while True:
            call, link = self._call, self._link
            if call is None or link is None:
                await self.begin()
                continue
            try:
                head, text = await call.receive()
            except LinkBrokenError as exc:
                self._may_have_begun = True
                await self._wire.reopen(link, exc)
                await self.begin()
                continue
            message = self._accept(head.seq, text)
            if message is None:
                continue
            if isinstance(message, Failed) and message.error.code == "draining":
                # Nothing was begun: another gateway takes it.
                await self.begin(other_than=link)
                continue
            return message

    def _next_nowait(self) -> ServerMessage | None:
        item = None if self._call is None else self._call.receive_nowait()
        if item is None:
            return None
        head, text = item
        return self._accept(head.seq, text)

    def _accept(self, seq: int, text: str) -> ServerMessage | None:
        """The message, unless it has come before."""
        # Credit is counted in bytes.
        self._owed += len(text) if text.isascii() else len(text.encode())
        message = decode_server_message(text)
        if isinstance(message, (Event, Question, Gap)):
            if seq <= self._seq:
                return None
            self._seq = seq
        return message

    async def _pass_question_on(self) -> None:
        question, self._question = self._question, None
        if question is None or self._wire.on_question is None:
            return
        try:
            await self._wire.on_question(question)
        except trio.Cancelled:
            # Whoever reads on is asked again: nobody else would answer it.
            self._question = question
            raise

    async def whole(self) -> ChatResult[object]:
        """Read to the end; being cancelled stops the turn, and waits until that is stored."""
        try:
            while not self.has_ended():
                await self.read()
        finally:
            await self.aclose()
        return self.result()

    async def aclose(self) -> None:
        """Stop the turn unless it has ended, and wait, for a bounded time, for its end."""
        call, link = self._call, self._link
        if call is None or link is None:
            return
        try:
            await self._stop(call, link)
        finally:
            self._wire.note_ended(self, (self._ask.session or "", self._ask.owner))

    async def _stop(self, call: Call, link: Link) -> None:
        if not call.is_over and link.broken is None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _GRACE_S):
                await _stop(call)
        link.end(call)


async def _stop(call: Call) -> None:
    try:
        await call.cancel()
        while not call.is_over:
            await call.receive()
    except LinkBrokenError:
        return


class RemoteClient:
    """Chats and sessions behind a gateway; made by `open_remote`. Any number of tasks may use it."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def __repr__(self) -> str:
        return f"<RemoteClient {self._wire!r}>"

    @property
    def connects(self) -> int:
        """How many connections there were so far."""
        return self._wire.connects

    def on_question(self, handler: OnQuestion | None) -> None:
        """Call `handler` with each question whether a tool may run, of the turns that are asked for here."""
        self._wire.on_question = handler

    @overload
    async def chat(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        system: str | None = None,
        session: str | None = None,
        **options: Unpack[TurnOptions],
    ) -> ChatResult[T]: ...

    @overload
    async def chat(
        self, prompt: Prompt, *, system: str | None = None, session: str | None = None, **options: Unpack[TurnOptions]
    ) -> ChatResult: ...

    async def chat(
        self,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        system: str | None = None,
        session: str | None = None,
        **options: Unpack[TurnOptions],
    ) -> ChatResult[object]:
        """As `Client.chat`. `tools` are definitions: functions run in the gateway, which is given them.

        When the connection breaks and the gateway has forgotten the chat (it does after a minute, and when it is
        started anew), that is a `TurnInDoubtError`: nobody asks twice.
        """
        form = self._form(response_type, options)
        return _typed(await self._ask(session, system, prompt=prompt, options=options, form=form), form)

    async def ask(
        self,
        prompt: Prompt,
        *,
        user: str | None = None,
        group: str | None = None,
        system: str | None = None,
        turn_id: str | None = None,
        **options: Unpack[AskKeywords],
    ) -> ChatResult:
        """As `Client.ask`."""
        if user:
            session = self.session(session_key(user, group=group), system=system)
            return await session.ask(prompt, turn_id=turn_id, **options)
        if group or turn_id is not None:
            raise ConfigError(f"{'group' if group else 'turn_id'}: needs a user, whose session it is about")
        return await self.chat(prompt, system=system, **options)

    def stream(
        self, prompt: Prompt, *, system: str | None = None, session: str | None = None, **options: Unpack[TurnOptions]
    ) -> AbstractAsyncContextManager[ChatStream]:
        """As `Client.stream`, without raw chunks."""
        if session is not None:
            return self.session(session, system=system).stream(prompt, **options)
        return _streamed(self._wire, _request(None, system, prompt=prompt, options=options, stream=True))

    def session(self, key: str, *, system: str | None = None, owner: tuple[str, str] | None = None) -> RemoteSession:
        """The session with this key, of who the gateway knows by the token; no I/O."""
        encode_name("session: the key", key)
        return RemoteSession(self._wire, key, system=system, owner=None if owner is None else _owner(owner))

    async def statistics(self) -> GatewaySnapshot:
        """What the gateway does; raises `AccessDeniedError` for who may not know."""
        return cast("Snapshot", await self._wire.request(Statistics(id=1), again=True)).snapshot

    async def _ask(
        self,
        session: str | None,
        system: str | None,
        *,
        prompt: Prompt,
        options: TurnOptions,
        form: AnswerForm | None,
    ) -> ChatResult[object]:
        if session is not None:
            ref = self.session(session, system=system)
            return await ref._whole(prompt, options, form=form)  # noqa: SLF001 - one of its own kind
        return await _Turn(self._wire, _request(None, system, prompt=prompt, options=options, form=form)).whole()

    def _form(self, response_type: type[object] | None, options: TurnOptions) -> AnswerForm | None:
        return self._wire.forms.get(response_type, options.get("response_schema"), None)


class RemoteSession:
    """A session behind a gateway, with the methods of `SessionRef`."""

    __slots__ = ("_owner", "_system", "_wire", "key")

    def __init__(self, wire: _Wire, key: str, *, system: str | None, owner: tuple[str, str] | None) -> None:
        self._wire = wire
        self._system = system
        self._owner = owner
        self.key = key

    def __repr__(self) -> str:
        return f"<RemoteSession {self.key!r}>"

    @overload
    async def ask(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        **options: Unpack[TurnOptions],
    ) -> ChatResult[T]: ...

    @overload
    async def ask(
        self,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        **options: Unpack[TurnOptions],
    ) -> ChatResult: ...

    async def ask(
        self,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        **options: Unpack[TurnOptions],
    ) -> ChatResult[object]:
        """As `SessionRef.ask`: one turn, stored on return. The connection may break meanwhile."""
        form = self._wire.forms.get(response_type, options.get("response_schema"), None)
        result = await self._whole(prompt, options, turn_id=turn_id, resume=resume, form=form)
        return _typed(result, form)

    async def retry(self, *, turn_id: str | None = None, **options: Unpack[TurnOptions]) -> ChatResult:
        """As `SessionRef.retry`."""
        return cast("ChatResult", await self._whole(None, options, turn_id=turn_id, replaces=""))

    async def edit(
        self, edited: str, prompt: Prompt, *, turn_id: str | None = None, **options: Unpack[TurnOptions]
    ) -> ChatResult:
        """As `SessionRef.edit`."""
        encode_name("edited:", edited)
        return cast("ChatResult", await self._whole(prompt, options, turn_id=turn_id, replaces=edited))

    def stream(
        self,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        **options: Unpack[TurnOptions],
    ) -> AbstractAsyncContextManager[ChatStream]:
        """As `SessionRef.stream`, without raw chunks.

        A consumer that falls far behind (256 KiB) misses pieces: the stream goes on with what is newer, and its
        `result` is whole.
        """
        return _streamed(self._wire, self._request(prompt, options, turn_id=turn_id, resume=resume, stream=True))

    async def undo(self, turn_id: str | None = None) -> bool:
        """As `SessionRef.undo`."""
        if turn_id is not None:
            encode_name("turn_id:", turn_id)
        return await self._accepted(Undo(id=1, **self._names, turn_id=turn_id))

    async def answer(self, question_id: str, answer: object) -> bool:
        """As `SessionRef.answer`, for approvals: true, false, or an object with `approved` and `reason`."""
        fields = answer if isinstance(answer, dict) else {"approved": answer}
        if not isinstance(fields.get("approved"), bool):
            raise BadRequestError("answer: must be true, false, or an object with `approved`", status=400)
        message = Answer(
            id=1,
            **self._names,
            question_id=question_id,
            approved=cast("bool", fields["approved"]),
            reason=str(fields.get("reason", "")),
        )
        return await self._accepted(message)

    async def interrupt(self) -> bool:
        """As `SessionRef.interrupt`."""
        return await self._accepted(Interrupt(id=1, **self._names))

    async def history(self) -> list[HistoryEntry]:
        """As `SessionRef.history`: fetched in pages, which may be of different moments where somebody else writes."""
        entries: list[HistoryEntry] = []
        start: int | None = 0
        while start is not None:
            request = History(id=1, **self._names, start=start)
            page = cast("HistoryPage", await self._wire.request(request, again=True))
            entries += page.entries
            start = page.next
        return entries

    async def clear(self) -> None:
        """As `SessionRef.clear`."""
        await self._accepted(Clear(id=1, **self._names))

    async def compact(self) -> None:
        """As `SessionRef.compact`."""
        await self._accepted(Compact(id=1, **self._names))

    async def fork(self, key: str) -> RemoteSession:
        """As `SessionRef.fork`."""
        encode_name("session: the key", key)
        await self._accepted(Fork(id=1, **self._names, target=key))
        return RemoteSession(self._wire, key, system=self._system, owner=self._owner)

    async def statistics(self) -> SessionStatistics:
        """As `SessionRef.statistics`."""
        request = Statistics(id=1, **self._names)
        found = cast("RemoteStatistics", await self._wire.request(request, again=True))
        fields = msgspec.structs.asdict(found)
        return SessionStatistics(**{name: fields[name] for name in SessionStatistics.__struct_fields__})

    async def aclose(self) -> None:
        """As `SessionRef.aclose`."""
        await self._accepted(Close(id=1, **self._names))

    @property
    def _names(self) -> _Names:
        return {"session": self.key, "owner": self._owner, "system": self._system}

    async def _accepted(self, request: SessionRequest) -> bool:
        return cast("Accepted", await self._wire.request(request)).value is True

    async def _whole(
        self,
        prompt: Prompt | None,
        options: TurnOptions,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        replaces: str | None = None,
        form: AnswerForm | None = None,
    ) -> ChatResult[object]:
        ask = self._request(prompt, options, turn_id=turn_id, resume=resume, replaces=replaces, form=form)
        return await _Turn(self._wire, ask).whole()

    def _request(
        self,
        prompt: Prompt | None,
        options: TurnOptions,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        replaces: str | None = None,
        form: AnswerForm | None = None,
        stream: bool = False,
    ) -> Ask:
        if turn_id is not None:
            encode_name("turn_id:", turn_id)
        if resume not in (None, "resend") or (resume and turn_id is None):
            raise ConfigError('resume: is None or "resend", and needs the turn_id of the turn that is meant')
        ask = _request(self.key, self._system, prompt=prompt, options=options, form=form, stream=stream)
        turn_id = turn_id or ask.turn_id
        return msgspec.structs.replace(ask, owner=self._owner, turn_id=turn_id, resume=resume, replaces=replaces)


def _request(
    session: str | None,
    system: str | None,
    *,
    prompt: Prompt | None,
    options: TurnOptions,
    form: AnswerForm | None = None,
    stream: bool = False,
) -> Ask:
    messages = None if prompt is None else decode_json(b"[%b]" % encode_prompt(prompt))
    left_s = trio.current_effective_deadline() - trio.current_time()
    return Ask(
        id=1,
        session=session,
        turn_id=uuid4().hex,
        messages=cast("list[Mapping[str, object]] | None", messages),
        system=system,
        options=_options(options, form),
        stream=stream,
        credit=_CREDIT,
        deadline_s=max(left_s, 0.001) if left_s != float("inf") else None,
    )


def _options(options: TurnOptions, form: AnswerForm | None) -> AskOptions:
    """The options as they cross the wire; raises `BadRequestError` for what does not."""
    given = dict(cast("Mapping[str, object]", options))
    tools = given.get("tools")
    if any(callable(tool) for tool in (tools if isinstance(tools, (list, tuple)) else (tools,))):
        raise ConfigError("tools: functions run in the gateway: give them to serve_gateway, and definitions here")
    if form is not None and "response_schema" not in given:
        given |= _schema_of(form)
    try:
        return cast("AskOptions", _decode_options(encode_json(given)))
    except (msgspec.ValidationError, TypeError, ValueError, RecursionError) as exc:
        raise BadRequestError(f"the options cannot go to a gateway: {exc}", status=400) from None


def _schema_of(form: AnswerForm) -> dict[str, object]:
    """What makes the gateway hold the answer to the form, and ask again for another one."""
    named = form.response_format.get("json_schema")
    return {"response_format": form.response_format} if named is None else {"response_schema": named}


def _typed(result: ChatResult[object], form: AnswerForm | None) -> ChatResult[object]:
    """The result with the value that its text stands for: the gateway knows JSON, and not the types of this program."""
    if form is None or result.invalid is not None:
        return result
    try:
        return msgspec.structs.replace(result, value=form.decode(result.text))
    except DecodeError as exc:
        failure = InvalidOutputError(f"the answer has not the form that was asked for: {exc.message}")
        failure.partial = result
        raise failure from exc


@asynccontextmanager
async def _streamed(wire: _Wire, ask: Ask) -> AsyncIterator[ChatStream]:
    turn = _Turn(wire, ask)
    await turn.begin()
    try:
        yield cast("ChatStream", ChatStream(turn))
    finally:
        await turn.aclose()  # noqa: ASYNC102 - shields itself, bounded


@asynccontextmanager
async def open_remote(
    url: str,
    *,
    token: str | Secret | None = None,
    tls: TlsConfig | ssl.SSLContext | None = None,
    patience_s: float = 30.0,
    rng: random.Random | None = None,
) -> AsyncIterator[RemoteClient]:
    """A client of the gateway at `url` (`ws://` or `wss://`): `async with open_remote(url, token=...) as client: ...`.

    Connects at once, and again whenever the connection breaks; what is asked meanwhile waits for up to `patience_s`,
    and raises `ConnectError` then; a turn that may have begun raises `StreamBrokenError`, and may have been billed.
    `tls` are the settings for wss, such as `TlsConfig(ca_file="ca.pem")`, in place of the system's; a gateway whose
    certificate does not verify is a `ConnectError` at once. Raises `InvalidTokenError` for a token that the gateway
    does not take, `AccessDeniedError` where it does not let this program in, `ConfigError` for a URL that is none, for
    settings of the wrong kind, and for files that cannot be used.

    Leaving stops running turns, as leaving the client of this process does; what is asked afterwards raises
    `PoolClosedError`. An error of the body leaves as itself.
    """
    secret = _secret(token)
    del token  # A traceback may show locals.
    _check_url(url)
    _check_patience(patience_s)
    context = make_tls_context(tls, environ=os.environ) if url.startswith("wss://") else None
    wire = _Wire(url, token=secret, tls=context, patience_s=patience_s, rng=rng or random.Random())
    async with ungrouped(_connected(wire)):
        yield RemoteClient(wire)


@asynccontextmanager
async def _connected(wire: _Wire) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.run)
        try:
            await wire.link()
            yield
        finally:
            wire.close()
            nursery.cancel_scope.cancel()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def _owner(given: object) -> tuple[str, str]:
    """A tenant and the id of a principal; raises `ConfigError` for what is none."""
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(part, str) for part in given):
        return (given[0], given[1])
    raise ConfigError(f"owner: must be a tenant and the id of a principal, not {given!r}")


def _secret(token: object) -> Secret | None:
    """The token; raises `ConfigError` for what is none, which shows nothing of it."""
    secret = Secret(token) if isinstance(token, str) else token
    if secret is None:
        return None
    if not isinstance(secret, Secret):
        raise ConfigError(f"token: must be a str, a Secret or None, not a {type(token).__name__}")
    try:
        secret.reveal().encode()
    except UnicodeEncodeError:
        raise ConfigError("token: is not valid Unicode") from None
    return secret


def _check_patience(patience_s: object) -> None:
    if isinstance(patience_s, bool) or not isinstance(patience_s, (int, float)) or not patience_s >= 0:
        raise ConfigError(f"patience_s: must be a number of seconds, 0 or more, not {patience_s!r}")


def _check_url(url: object) -> None:
    """Raise `ConfigError` for what is no place to connect to, without what may be a password in it."""
    if not isinstance(url, str):
        raise ConfigError(f"url: must be a text such as ws://host:port, not {url!r}")
    shown = repr(f"...@{url.rpartition('@')[2]}" if "@" in url else url)
    if not url.startswith(("ws://", "wss://")):
        raise ConfigError(f"url: must begin with ws:// or wss://, not {shown}")
    try:
        place = urlsplit(url)
        has_place = bool(place.hostname) and place.port != 0
        (place.hostname or "").encode("idna")
    except ValueError as exc:
        why = "is no URL" if "@" in url else str(exc)
        raise ConfigError(f"url: {shown}: {why}") from None
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"url: {shown}: must be printable ASCII: write others as %XX, and a host as xn--…")
    if not has_place:
        raise ConfigError(f"url: {shown} names no host, or no port that there is")
    if place.username is not None or place.password is not None:
        raise ConfigError("url: must hold no credentials; give the token as `token`")

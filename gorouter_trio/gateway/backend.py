"""What the gateway asks of its client: turns and requests of sessions, in the name of whoever asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import msgspec
import trio

from ..errors import (
    AccessDeniedError,
    BadRequestError,
    DeadlineExceededError,
    GorouterError,
    TurnInDoubtError,
    TurnInterruptedError,
)
from ..events import RawChunk
from ..secret import Secret
from ..security.rules import Principal
from ..wire.codec import encode_json
from .failures import error_info
from .protocol import (
    SYSTEM_ROLES,
    Accepted,
    Answer,
    Ask,
    AskOptions,
    Clear,
    Close,
    Compact,
    Event,
    Fork,
    History,
    HistoryPage,
    Interrupt,
    Question,
    RemoteStatistics,
    Statistics,
    Undo,
)
from .turns import TurnKey

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from .._turns.request import TurnKeywords
    from .._turns.stream import ChatStream
    from ..client import Client
    from ..session.directory import SessionRef
    from ..tools.turn import ApprovalDecision, ApprovalRequest
    from ..wire.codec import Prompt
    from ..wire.result import ChatResult, HistoryEntry
    from .config import GatewayConfig
    from .protocol import SessionRequest
    from .turns import LiveTurn, TakeTurn

__all__ = ["Backend", "Caller"]


class Caller(msgspec.Struct, frozen=True):
    """Who asks: the principal and the token that it is known by, both None for nobody."""

    principal: Principal | None = None
    token: Secret | None = None
    address: str = ""

    @property
    def identity(self) -> tuple[str, str]:
        """Tenant and id, empty for nobody."""
        return ("", "") if self.principal is None else (self.principal.tenant, self.principal.id)

    def has_role(self, roles: object) -> bool:
        """Whether one of the roles is theirs."""
        return self.principal is not None and not self.principal.roles.isdisjoint(cast("frozenset[str]", roles))


class Backend:
    """The client behind a gateway, with the tools that the gateway's turns have."""

    def __init__(self, client: Client, config: GatewayConfig, *, tools: Sequence[Callable[..., object]] = ()) -> None:
        self.client = client
        self.config = config
        self._tools = tuple(tools)

    # Turns

    def key(self, ask: Ask, caller: Caller, *, turn_id: str) -> TurnKey:
        """What the turn is known by; a chat without a session has none of the names that sessions have."""
        return TurnKey(*caller.identity, ask.owner, ask.session or "", turn_id)

    def check(self, ask: Ask) -> None:
        """Raise `GorouterError` for what cannot be asked, before anything is begun."""
        self.check_system(ask.system, () if isinstance(ask.messages, str) else ask.messages or ())
        if ask.session is None and (ask.owner or ask.replaces is not None or ask.resume is not None):
            raise BadRequestError("owner, replaces and resume: need a session", status=400)
        _check_messages(ask)
        self.check_options(ask.options)

    def check_system(self, system: str | None, messages: Sequence[Mapping[str, object]] = ()) -> None:
        """Raise `AccessDeniedError` for a system message, however it is brought, where askers may bring none."""
        if self.config.allow_system:
            return
        if system is not None or any(message.get("role") in SYSTEM_ROLES for message in messages):
            raise AccessDeniedError("system: this gateway has its own")

    def check_options(self, options: AskOptions) -> None:
        """Raise `AccessDeniedError` for a model that is not on offer here."""
        allowed = self.config.models
        if allowed is None:
            return
        named = [options.model or (), *(options.models or ()), *(options.fallbacks or ())]
        for model in named:
            if model and model not in allowed:
                raise AccessDeniedError(f"model: this gateway does not offer {model!r}")

    def turn(self, ask: Ask, caller: Caller) -> TakeTurn:
        """The function that takes the turn."""

        async def take(live: LiveTurn) -> None:
            try:
                if ask.deadline_s is None:
                    live.finish(await self._answer(ask, caller, live))
                    return
                with trio.move_on_after(ask.deadline_s):
                    live.finish(await self._answer(ask, caller, live))
                    return
            except GorouterError as exc:
                live.fail(error_info(exc))
                return
            except trio.Cancelled:
                live.fail(error_info(TurnInterruptedError("the turn was stopped")))
                raise
            live.fail(error_info(DeadlineExceededError("the turn's deadline passed", phase="total")))

        return take

    async def _answer(self, ask: Ask, caller: Caller, live: LiveTurn) -> ChatResult[object]:
        if ask.session is None and ask.resumed:
            # Nobody keeps what it was; sending it again might be to pay twice.
            raise TurnInDoubtError("what became of this chat is not known any more")
        if not ask.stream or ask.resumed or ask.replaces is not None:
            # What was asked before has had its pieces, or lost them: the answer is whole.
            return await self._whole(ask, caller, live)
        async with self._stream(ask, caller, live) as stream:
            async for event in stream:
                if not isinstance(event, RawChunk):
                    live.publish(Event(id=0, seq=0, event=event))
        return stream.result

    async def _whole(self, ask: Ask, caller: Caller, live: LiveTurn) -> ChatResult[object]:
        options = self.options(ask.options, caller, live=live if ask.session else None)
        if ask.session is None:
            return await self.client.chat(_prompt(ask), system=ask.system, **options)
        session = self.session(ask.session, caller, owner=ask.owner, system=ask.system)
        turn_id = live.key.turn_id
        if ask.replaces is None:
            return await session.ask(_prompt(ask), turn_id=turn_id, resume=ask.resume, **options)
        if not ask.replaces:
            return await session.retry(turn_id=turn_id, **options)
        return await session.edit(ask.replaces, _prompt(ask), turn_id=turn_id, **options)

    def _stream(self, ask: Ask, caller: Caller, live: LiveTurn) -> AbstractAsyncContextManager[ChatStream[object]]:
        options = self.options(ask.options, caller, live=live if ask.session else None)
        if ask.session is None:
            return self.client.stream(_prompt(ask), system=ask.system, **options)
        session = self.session(ask.session, caller, owner=ask.owner, system=ask.system)
        return session.stream(_prompt(ask), turn_id=live.key.turn_id, resume=ask.resume, **options)

    def options(self, options: AskOptions, caller: Caller, *, live: LiveTurn | None = None) -> TurnKeywords:
        """The keyword arguments of a turn of this caller; one that is `live` can ask for the approval of a tool."""
        given = options.keywords()
        theirs = cast("Sequence[object]", given.pop("tools", ()))
        if self._tools or theirs:
            given["tools"] = [*self._tools, *theirs]
        if self._tools and live is not None:
            given["approve"] = _asks_approval(live)
        if caller.token is not None:
            given["access_token"] = caller.token
        if caller.principal is not None:
            given["tenant"] = caller.principal.tenant or caller.principal.id
        return cast("TurnKeywords", given)

    @property
    def tool_names(self) -> frozenset[str]:
        """The names of the tools that run here."""
        return frozenset(str(getattr(tool, "name", getattr(tool, "__name__", ""))) for tool in self._tools)

    def session(
        self, key: str, caller: Caller, *, owner: tuple[str, str] | None = None, system: str | None = None
    ) -> SessionRef:
        """The session that the caller means by `key`."""
        if caller.token is None:
            return self.client.session(key, system=system, owner=owner)
        return self.client.session(key, system=system, owner=owner, access_token=caller.token)

    # Other requests

    async def act(self, request: SessionRequest | Statistics, caller: Caller) -> list[msgspec.Struct]:
        """Do what is asked of a session, and give the messages that answer it; raises `GorouterError`."""
        self.check_system(request.system)
        session = self.session(cast("str", request.session), caller, owner=request.owner, system=request.system)
        value: bool | None = None
        match request:
            case Interrupt():
                value = await session.interrupt()
            case Clear():
                await session.clear()
            case Fork():
                await session.fork(request.target)
            case Undo():
                value = await session.undo(request.turn_id)
            case Compact():
                await session.compact()
            case Close():
                await session.aclose()
            case Answer():
                value = await self._reply(session, request, caller)
            case History():
                return _pages(request, await session.history(), size=self.config.limits.history_page_bytes)
            case Statistics():
                return [_statistics(request, await session.statistics())]
            case _:
                raise BadRequestError(f"there is no request {type(request).__name__}", status=400)
        return [Accepted(id=request.id, value=value)]

    async def _reply(self, session: SessionRef, request: Answer, caller: Caller) -> bool:
        roles = self.config.approver_roles
        if roles and not caller.has_role(roles):
            raise AccessDeniedError("only approvers may answer questions")
        by = "" if caller.principal is None else caller.principal.id
        return await session.answer(
            request.question_id, {"approved": request.approved, "reason": request.reason, "by": by}
        )


def _check_messages(ask: Ask) -> None:
    """Raise `BadRequestError` for messages that are missing, or that the last turn, taken again, has of its own."""
    if ask.replaces is None:
        # What nobody knows any more is in doubt, whatever it said.
        if ask.messages is None and not (ask.resumed and ask.session is None):
            raise BadRequestError("messages: a turn needs messages", status=400)
    elif ask.messages is None and ask.replaces:
        raise BadRequestError(f"messages: what is to be said in place of {ask.replaces!r}?", status=400)
    elif ask.messages is not None and not ask.replaces:
        raise BadRequestError("replaces: name the turn that the messages are in place of", status=400)


def _prompt(ask: Ask) -> Prompt:
    if ask.messages is None:
        return ""
    return ask.messages if isinstance(ask.messages, str) else list(ask.messages)


def _asks_approval(live: LiveTurn) -> Callable[[ApprovalRequest], object]:
    async def approve(request: ApprovalRequest) -> ApprovalDecision | None:
        """Tell the askers; the turn is parked until one of them answers."""
        live.publish(
            Question(
                id=0,
                seq=0,
                question_id=request.question_id,
                tool=request.tool,
                arguments=request.arguments,
                expires_at_s=request.expires_at_s,
            )
        )
        await trio.lowlevel.checkpoint()
        return None

    return approve


def _pages(request: History, entries: list[HistoryEntry], *, size: int) -> list[msgspec.Struct]:
    """The messages from `start` on, in pages of about `size` bytes."""
    pages: list[msgspec.Struct] = []
    page: list[HistoryEntry] = []
    used = 0
    for position, entry in enumerate(entries[request.start :], start=request.start + 1):
        page.append(entry)
        used += len(encode_json(entry))
        if used >= size and position < len(entries):
            return [HistoryPage(id=request.id, entries=page, next=position)]
    pages.append(HistoryPage(id=request.id, entries=page))
    return pages


def _statistics(request: Statistics, statistics: msgspec.Struct) -> RemoteStatistics:
    return RemoteStatistics(id=request.id, **msgspec.structs.asdict(statistics))

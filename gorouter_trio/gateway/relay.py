"""A request that is passed on to the gateway which has its session, and goes on elsewhere when that one dies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
import trio

from ..errors import ConnectError, GorouterError, StreamBrokenError, TurnInterruptedError
from .link import LinkBrokenError
from .protocol import MAX_NUMBER, Ask, Cancel, Grant, History, Statistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .backend import Caller
    from .cluster import Cluster, Owner
    from .link import Call
    from .protocol import SessionRequest

__all__ = ["Relay"]

_PAUSE_S: Final = 0.1

_Request: TypeAlias = "Ask | SessionRequest | Statistics"


class Relay:
    """One request on its way. `names` are those of its session."""

    def __init__(self, cluster: Cluster, request: _Request, *, caller: Caller, names: tuple[str, ...]) -> None:
        self._cluster = cluster
        self._caller = caller
        self._names = names
        self._call: Call | None = None
        self._unsent = 0
        self._was_sent = False
        self.request = request
        self.is_over = False
        self.is_stopped = False

    async def run(self, send: Callable[[str], Awaitable[None]]) -> None:
        """Pass the request on and its answers back, until it has its end or the session is this gateway's.

        Then `is_over` is false, and `request` is what is left to do here, with what is left of its credit; `is_stopped`
        says whether its asker wants it stopped. Raises `TurnInterruptedError` for a turn that is stopped before it was
        passed on, `StreamBrokenError` for a request that must not be sent twice, `StoreError`.
        """
        while True:
            owner = await self._cluster.owner(*self._names)
            if owner.is_self:
                return
            try:
                if await self._pass(owner, send):
                    self.is_over = True
                    return
            except ConnectError:
                # Nothing was sent. If it is dead, its word ends soon.
                pass
            except LinkBrokenError as exc:
                self._note_broken(exc)
            if self.is_stopped and not self._was_sent and isinstance(self.request, Ask):
                # Its owner may live, and out of reach, for ever.
                raise TurnInterruptedError("the turn was stopped")
            await trio.sleep(_PAUSE_S)

    def _note_broken(self, exc: LinkBrokenError) -> None:
        fatal = exc.fatal()
        if fatal is not None:
            raise fatal
        if isinstance(self.request, Ask):
            self.request = msgspec.structs.replace(self.request, resumed=True)
        elif not isinstance(self.request, (History, Statistics)):
            raise StreamBrokenError("the gateway of the session has ended before it answered") from exc

    async def _pass(self, owner: Owner, send: Callable[[str], Awaitable[None]]) -> bool:
        """Whether the request has its end; False where the owner takes nothing new."""
        link = await self._cluster.link(owner.url, self._caller.token)
        self._cluster.forwarded += 1
        # What was granted so far goes with the request.
        self._unsent = 0
        call = self._call = await link.begin(self.request)
        self._was_sent = True
        try:
            await self.steer()
            while True:
                head, text = await call.receive()
                if head.type == "failed" and '"code":"draining"' in text[:200]:
                    return False
                self._note_passed(head.seq, text)
                await send(text.replace(f'"id":{call.id}', f'"id":{self.request.id}', 1))
                if head.is_last:
                    return True
        finally:
            self._call = None
            link.end(call)

    def _note_passed(self, seq: int, text: str) -> None:
        if isinstance(self.request, Ask):
            credit = self.request.credit - (len(text) if text.isascii() else len(text.encode()))
            after = max(seq, self.request.after)
            self.request = msgspec.structs.replace(self.request, after=after, credit=max(credit, 0))

    def note(self, message: Grant | Cancel) -> None:
        """What its asker says about the request meanwhile; `steer` passes it on."""
        if isinstance(message, Cancel):
            self.is_stopped = True
        elif isinstance(self.request, Ask):
            self._unsent = min(self._unsent + message.credit, MAX_NUMBER)
            credit = min(self.request.credit + message.credit, MAX_NUMBER)
            self.request = msgspec.structs.replace(self.request, credit=credit)

    async def steer(self) -> None:
        """Pass on what was said, if the request is under way."""
        call = self._call
        if call is None:
            return
        credit, self._unsent = self._unsent, 0
        try:
            if self.is_stopped:
                await call.cancel()
            if credit:
                await call.grant(credit)
        except (LinkBrokenError, GorouterError):
            # Noticed where the answers are read.
            return

"""A request that is passed on to the gateway which has its session, and goes on elsewhere when that one dies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
import trio

from ..errors import ConnectError, GorouterError, StreamBrokenError
from .link import LinkBrokenError
from .protocol import Ask, History, Statistics

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
        self._is_stopped = False
        self._credit = 0
        self.request = request
        self.is_over = False

    async def run(self, send: Callable[[str], Awaitable[None]]) -> None:
        """Pass the request on and its answers back, until it has its end or the session is this gateway's.

        Then `is_over` is false, and `request` is what is left to do here. Raises `StreamBrokenError` for a request that
        must not be sent twice, `StoreError`.
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
        call = self._call = await link.begin(self.request)
        try:
            await self._catch_up(call)
            while True:
                head, text = await call.receive()
                if head.type == "failed" and '"code":"draining"' in text[:200]:
                    return False
                self._note(head.seq)
                await send(text.replace(f'"id":{call.id}', f'"id":{self.request.id}', 1))
                if head.is_last:
                    return True
        finally:
            self._call = None
            link.end(call)

    async def _catch_up(self, call: Call) -> None:
        """What was said before there was a call."""
        if self._is_stopped:
            await call.cancel()
        credit, self._credit = self._credit, 0
        if credit:
            await call.grant(credit)

    def _note(self, seq: int) -> None:
        if isinstance(self.request, Ask) and seq > self.request.after:
            self.request = msgspec.structs.replace(self.request, after=seq)

    async def grant(self, credit: int) -> None:
        """The asker takes more."""
        if self._call is None:
            self._credit += credit
        else:
            await self._steer(self._call.grant(credit))

    async def stop(self) -> None:
        """The asker wants the turn stopped."""
        self._is_stopped = True
        if self._call is not None:
            await self._steer(self._call.cancel())

    async def _steer(self, sending: Awaitable[None]) -> None:
        try:
            await sending
        except (LinkBrokenError, GorouterError):
            # Noticed where the answers are read.
            return

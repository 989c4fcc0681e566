"""What the connections of one gateway share: who is there, which turns run, what was counted, and how it ends."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import msgspec
import trio

from .._contain import contain_sync
from .._turns.gate import Gate
from ..errors import AuthenticationRequiredError, ConfigError
from .backend import Backend
from .census import Census
from .failures import TOO_MANY_REQUESTS, refusal
from .frames import Violation
from .protocol import ErrorInfo
from .turns import TurnHub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..client import Client
    from ..secret import Secret
    from ..security.manager import SecurityManager
    from ..security.rules import Principal
    from .backend import Caller
    from .cluster import Cluster
    from .config import GatewayConfig, GatewayLimits
    from .protocol import Ask, SessionRequest, Statistics
    from .turns import LiveTurn

__all__ = ["GatewayCore", "Member", "check_open"]

_PEER_RATE = 1_000_000
_PEER_REQUESTS = 10_000
_LAST_WORDS_S = 1.0
_LOG = logging.getLogger(__name__)


class Member(Protocol):
    """A connection, as far as the core has to do with it."""

    caller: Caller

    @property
    def is_open(self) -> bool:
        """Whether it is known who it is."""

    @property
    def close_code(self) -> int:
        """Why it has ended."""

    def leave_census(self) -> None:
        """Give the counts back."""

    def stop(self, violation: Violation) -> None:
        """End it."""

    async def answered(self) -> None:
        """Wait until nothing is asked whose answer has not been sent."""

    def announce(self, grace_s: float) -> None:
        """Tell the client that the gateway goes away."""

    def look(self, now: float) -> None:
        """Look whether it lives."""

    def identify_anew(self) -> None:
        """Ask the guard that stands there now who it is."""


class GatewayCore:
    """The state of a gateway. Made by `serve_gateway`; turns run in `nursery`."""

    def __init__(
        self,
        client: Client,
        config: GatewayConfig,
        *,
        nursery: trio.Nursery,
        wall: Callable[[], float],
        tools: Sequence[Callable[..., object]] = (),
        cluster: Cluster | None = None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self.client = client
        self.config = config
        self.limits = config.limits
        self.cluster = cluster
        self.backend = Backend(client, config, tools=tools)
        self.hub = TurnHub(nursery, config.limits, on_error=self.report)
        self.census = Census(config.limits)
        self.connections: dict[Member, None] = {}
        self.wall = wall
        self.started_at = trio.current_time()
        self.is_draining = False
        self.accepted = 0
        self.refused: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self._generation = self._generation_now()
        self._on_error = on_error
        self._turn_ids = secrets.token_hex(8)
        self._turns_named = 0

    # Who asks

    async def identify(self, token: Secret | None, *, source: str) -> Principal | None:
        """The principal behind a token; None for nobody, where nobody is let in. Raises `SecurityError`."""
        authenticate = getattr(self._guard, "authenticate", None)
        if authenticate is None:
            await trio.lowlevel.checkpoint()
            return None
        now, wall = trio.current_time(), self.wall()
        if hasattr(self._guard, "generation"):
            # A manager counts the failed attempts of an address.
            principal = await cast("SecurityManager", self._guard).authenticate(
                token, now=now, wall=wall, source=source
            )
        else:
            principal = await authenticate(token, now=now, wall=wall)
        if principal is None and not self.config.anonymous:
            raise AuthenticationRequiredError("an access token is required")
        return principal

    def admits_origin(self, origin: str | None) -> bool:
        """Whether pages of this origin may connect; who sends none is no page, and has to have a token."""
        return origin is None or origin in self.config.origins

    def limits_for(self, *, is_peer: bool) -> GatewayLimits:
        """The ceilings of a connection; another gateway speaks for many clients, whom it has held to theirs."""
        if not is_peer:
            return self.limits
        return msgspec.structs.replace(
            self.limits,
            frames_per_s=_PEER_RATE,
            frame_burst=_PEER_RATE,
            messages_per_s=_PEER_RATE,
            message_burst=_PEER_RATE,
            max_requests=_PEER_REQUESTS,
            max_message_bytes=2 * self.limits.max_message_bytes,
        )

    # Connections

    def entered(self, connection: Member) -> None:
        """A connection has begun; nobody knows yet who it is."""
        self.accepted += 1
        self.census.unauthenticated += 1
        self.connections[connection] = None

    def authenticated(self, connection: Member) -> None:
        """It is known who it is."""
        self.census.unauthenticated -= 1

    def left(self, connection: Member) -> None:
        """A connection has ended."""
        if connection not in self.connections:
            return
        del self.connections[connection]
        self.closed[str(connection.close_code)] += 1
        if not connection.is_open:
            self.census.unauthenticated -= 1
        connection.leave_census()

    def note_refused(self, why: str) -> None:
        """Something was not let in."""
        self.refused[why] += 1

    def report(self, exc: Exception) -> None:
        """A bug, of the gateway or of what the program put into it: it goes to the log."""
        if self._on_error is None:
            _LOG.error("an error inside the gateway", exc_info=exc)
        else:
            self._on_error(exc)

    async def keep(self) -> None:
        """Look after the connections: tokens that were revoked, clients that are silent. Until cancelled."""
        limits = self.limits
        recheck_at = look_at = trio.current_time()
        while True:
            await trio.sleep(limits.revoke_s)
            now = trio.current_time()
            generation = self._generation_now()
            if generation != self._generation or now >= recheck_at:
                before, self._generation, recheck_at = self._generation, generation, now + limits.recheck_s
                self._verify_all(is_guard_new=generation[0] is not before[0])
            if now >= look_at:
                look_at = now + limits.ping_s / 8
                self._look_at_all(now)

    def _look_at_all(self, now: float) -> None:
        self.hub.prune()
        for connection in list(self.connections):
            connection.look(now)

    @property
    def _guard(self) -> object:
        return self.client.security

    def _generation_now(self) -> tuple[object, int]:
        return self._guard, cast("int", getattr(self._guard, "generation", 0))

    def _verify_all(self, *, is_guard_new: bool) -> None:
        if is_guard_new and hasattr(self._guard, "authenticate"):
            for connection in list(self.connections):
                connection.identify_anew()
            return
        verify = getattr(self._guard, "verify", None)
        if verify is None:
            return
        failures: list[Exception] = []
        for connection in list(self.connections):
            principal = connection.caller.principal
            if principal is None:
                continue
            # Nobody holds whom the guard cannot tell about.
            if not contain_sync(partial(_holds, verify, principal, self.wall()), report=failures.append):
                connection.stop(Violation(4401, "the access token does not hold any more"))
        if failures:
            self.report(failures[0])

    # Requests

    def turn_for(self, ask: Ask, caller: Caller) -> LiveTurn | ErrorInfo:
        """The turn that is asked for: the one that runs, or a new one, or why there is none; raises `GorouterError`."""
        key = self.backend.key(ask, caller, turn_id=ask.turn_id or self._new_turn_id())
        turn = self.hub.find(key, resumed=ask.resumed)
        if turn is not None:
            return turn
        if self.is_draining:
            return refusal("the gateway goes away; ask another one")
        self.backend.check(ask)
        if not self.hub.has_room(key.tenant, key.principal):
            return ErrorInfo(code=TOO_MANY_REQUESTS, message="too many turns of this principal run")
        take = self.backend.turn(ask, caller)
        return self.hub.begin(key, take, after=ask.after if ask.resumed else 0)

    def _new_turn_id(self) -> str:
        self._turns_named += 1
        return f"{self._turn_ids}-{self._turns_named}"

    async def act(self, request: SessionRequest | Statistics, caller: Caller) -> Sequence[msgspec.Struct]:
        """The answer to a request about a session; raises `GorouterError`."""
        return await self.backend.act(request, caller)

    def check_reach(self, request: Ask | SessionRequest | Statistics, caller: Caller) -> None:
        """Raise `SessionNotFoundError` for a session that is named as another's and may not be reached.

        For a session that is there and one that is not this is the same, and it is before anything is looked up, or
        another gateway is asked: what comes back, and when, tells nothing about it.
        """
        if request.owner is not None and request.session is not None:
            Gate(self._guard, wall=self.wall).key_for(caller.principal, request.session, owner=request.owner)

    def may_look(self, caller: Caller) -> bool:
        """Whether the caller may see what the gateway does."""
        return caller.has_role(self.config.operator_roles) or not hasattr(self._guard, "authenticate")

    # The end

    async def drain(self) -> None:
        """Take nothing new, let running turns end within the time for it, stop the others, and close everything."""
        self.is_draining = True
        if self.cluster is not None:
            await self.cluster.leave()
        for connection in list(self.connections):
            connection.announce(self.limits.drain_s)
        with trio.move_on_after(self.limits.drain_s):
            await self.hub.wait_idle()
        self.hub.cancel_all()
        with trio.move_on_after(1.0):
            await self.hub.wait_idle()
        # What they said last is on its way for a moment more.
        await trio.sleep(min(0.05, self.limits.drain_s))
        with trio.move_on_after(min(_LAST_WORDS_S, self.limits.drain_s)):
            for connection in list(self.connections):
                await connection.answered()
        for connection in list(self.connections):
            connection.stop(Violation(1001, "the gateway goes away"))


def _holds(verify: Callable[..., object], principal: Principal, wall: float) -> bool:
    return verify(principal, wall=wall) is None


def check_open(client: Client, config: GatewayConfig) -> None:
    """Raise `ConfigError` for a gateway that everybody could use without having been meant to."""
    if not config.anonymous and not hasattr(client.security, "authenticate"):
        raise ConfigError(
            "the client has no `security` that could tell who asks: give it one, or say anonymous=True to let "
            "everybody in"
        )

"""One WebSocket connection: its machine decides on what comes, and each request is a task of the connection.

A turn is none: it runs in the hub, and the connection only follows it. Whatever goes wrong here ends this connection.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, cast

import msgspec
import trio
from trio_websocket import ConnectionClosed, wrap_server_stream
from wsproto.utilities import LocalProtocolError

from .._contain import contain
from ..errors import AccessDeniedError, GorouterError, SecurityError
from ..secret import Secret
from .backend import Caller
from .census import address_group
from .failures import error_info, internal_error
from .frames import Violation
from .machine import ConnectionMachine, Greet, Ignore, Refuse, Serve, Steer
from .metrics import snapshot
from .protocol import (
    CLOSE_CODES,
    SUBPROTOCOL,
    VERSION,
    Accepted,
    Ask,
    Authenticate,
    Cancel,
    Draining,
    ErrorInfo,
    Failed,
    Grant,
    Hello,
    Snapshot,
    Statistics,
    Welcome,
    encode_text,
)
from .relay import Relay
from .turns import SlowReaderError, Subscription

if TYPE_CHECKING:
    from trio_websocket import WebSocketConnection, WebSocketRequest

    from .core import GatewayCore
    from .protocol import ClientMessage, SessionRequest
    from .streams import GuardedStream
    from .turns import LiveTurn

__all__ = ["Connection"]

_CLOSE_S = 2.0
_BEARER = b"bearer "
# The connection has ended; the last one is what the library says when it is told to send then.
_GONE = (ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError, LocalProtocolError)
_RULES = frozenset({1002, 1007})


class _CloseError(Exception):
    """Ends the connection with a close code."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation.reason)
        self.violation = violation


class Connection:
    """A client, from the upgrade to the close."""

    def __init__(self, core: GatewayCore, stream: GuardedStream, *, deadline: float, is_peer: bool = False) -> None:
        self._core = core
        self._stream = stream
        self._deadline = deadline
        self._address = address_group(stream.address)
        self._limits = core.limits_for(is_peer=is_peer)
        self._machine = ConnectionMachine(self._limits, now=trio.current_time())
        # What was said of a turn whose task has not run yet is kept for what the turn becomes.
        self._steered: dict[int, Subscription | Relay | list[Grant | Cancel]] = {}
        self._is_peer = is_peer
        self._scope = trio.CancelScope()
        self._websocket: WebSocketConnection | None = None
        self._nursery: trio.Nursery | None = None
        self._pinged_at = -math.inf
        self._is_identified = False
        self._answers = 0
        # Who waits for all of them.
        self._answered: trio.Event | None = None
        self._violation: Violation | None = None
        self.caller = Caller(address=self._address)

    def __repr__(self) -> str:
        who = self.caller.identity[1] or "nobody"
        return f"<Connection of {who!r} from {self._address}: {self._machine.state}, {self._machine.running} requests>"

    @property
    def is_open(self) -> bool:
        """Whether it is known who it is."""
        return self._machine.state == "open"

    @property
    def close_code(self) -> int:
        """Why it has ended, as far as this side knows: 1000 for a client that left."""
        violation = self._violation or self._stream.violation
        return 1000 if violation is None else violation.code

    # The life of a connection

    async def run(self) -> None:
        """Serve the connection until either side ends it; nothing that goes wrong inside gets out."""
        failures: list[Exception] = []
        try:
            with self._scope:
                await contain(self._serve, report=failures.append)
        finally:
            # A rule that the client broke closes the stream beneath, which whoever is speaking then runs into.
            broken = self._violation or self._stream.violation
            if failures and broken is None:
                self._violation = Violation(1011, "an error inside the gateway")
                self._core.report(failures[0])
            try:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
                    await self._close()
            finally:
                # Whatever becomes of the close, also where its time is over: who is counted for ever takes a place.
                self._core.left(self)

    async def _serve(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    await self._converse(nursery)
                finally:
                    self._nursery = None
                nursery.cancel_scope.cancel()
        except* _GONE:
            pass
        except* _CloseError as group:
            self._violation = self._violation or _first(group).violation

    async def _converse(self, nursery: trio.Nursery) -> None:
        with trio.move_on_at(self._deadline) as scope:
            websocket = await self._upgrade(nursery)
            if websocket is None:
                return
            await self._greet(websocket)
        if scope.cancelled_caught:
            raise self._ended(Violation(4408, "no hello came in time"))
        while True:
            await self._take(nursery, await self._websocket_message())

    async def _websocket_message(self) -> str | bytes:
        return await cast("WebSocketConnection", self._websocket).get_message()

    async def _upgrade(self, nursery: trio.Nursery) -> WebSocketConnection | None:
        """Accept the upgrade, unless the origin is none that may."""
        limits = self._limits
        # The guard has the one bound on the size of messages; the library's own comes after it.
        request = await wrap_server_stream(
            nursery, self._stream, max_message_size=limits.max_message_bytes + 1, receive_buffer_size=None
        )
        token = _bearer(request)
        if not self._core.admits_origin(_header(request, b"origin")):
            self._core.note_refused("origin")
            await request.reject(403, body=b"this origin may not connect")
            return None
        offered = SUBPROTOCOL if SUBPROTOCOL in request.proposed_subprotocols else None
        websocket = self._websocket = await request.accept(subprotocol=offered)
        violation = self._core.census.enter(self._address)
        self._is_identified = True
        if violation is not None and not self._is_peer:
            raise self._ended(violation)
        self.caller = msgspec.structs.replace(self.caller, token=token)
        return websocket

    async def _greet(self, websocket: WebSocketConnection) -> None:
        """The hello, who it is, and the welcome."""
        while self._machine.state == "greeting":
            move = self._machine.take(await websocket.get_message(), now=trio.current_time())
            if isinstance(move, Violation):
                raise self._ended(move)
            if isinstance(move, Greet):
                token = Secret(move.hello.token) if move.hello.token else self.caller.token
                await self._identify(token)
        self._machine.open()
        self._core.authenticated(self)
        violation = self._core.census.identify(self.caller.identity)
        if violation is not None and not self._is_peer:
            raise self._ended(violation)
        limits = self._limits
        principal = self.caller.principal
        await self.send(
            Welcome(
                version=VERSION,
                principal=None if principal is None else principal.id,
                max_message_bytes=limits.max_message_bytes,
                max_requests=limits.max_requests,
                max_credit=limits.buffer_bytes,
                resume_s=limits.resume_s,
            )
        )

    async def _identify(self, token: Secret | None) -> None:
        try:
            principal = await self._core.identify(token, source=self._address)
        except SecurityError as exc:
            raise self._ended(Violation(4401, exc.message)) from exc
        self.caller = Caller(principal, None if principal is None else token, self._address)

    async def _close(self) -> None:
        """Say why, if the client can still hear it, and close the stream."""
        try:
            violation = self._violation or self._stream.violation or self._broken_rule()
            if violation is not None:
                await self._stream.close_with(violation)
            elif self._websocket is not None and self._websocket.closed is None:
                await self._websocket.aclose()
        except _GONE:
            pass
        finally:
            await self._stream.abort()  # noqa: ASYNC102 - never waits

    def _broken_rule(self) -> Violation | None:
        """What the library found wrong with a frame; it closes without a word."""
        closed = None if self._websocket is None else self._websocket.closed
        if closed is None or closed.code not in _RULES:
            return None
        self._violation = Violation(closed.code, closed.reason or CLOSE_CODES[closed.code])
        return self._violation

    # For the core

    def leave_census(self) -> None:
        """Give the counts back, those that were taken."""
        if self._is_identified:
            is_open = self._machine.state == "open"
            self._core.census.leave(self._address, self.caller.identity if is_open else None)

    def _ended(self, violation: Violation) -> _CloseError:
        """The error that ends the connection."""
        self._stream.hurry()
        return _CloseError(violation)

    def stop(self, violation: Violation) -> None:
        """End the connection from outside."""
        self._violation = self._violation or violation
        self._stream.hurry()
        self._scope.cancel()

    async def answered(self) -> None:
        """Wait until nothing is asked whose answer has not been sent."""
        while self._answers:
            self._answered = trio.Event()
            await self._answered.wait()

    def announce(self, grace_s: float) -> None:
        """Tell the client that the gateway goes away."""
        if self._nursery is not None and self.is_open:
            self._nursery.start_soon(self._send_quietly, Draining(grace_s=grace_s))

    def look(self, now: float) -> None:
        """Ping a client that is silent, and end the connection when it stays so."""
        limits = self._limits
        silence = now - self._stream.received_at
        if self._machine.state != "open" or self._nursery is None or self._websocket is None:
            return
        if silence < limits.ping_s:
            return
        if self._pinged_at <= self._stream.received_at:
            self._pinged_at = now
            self._nursery.start_soon(self._ping, self._websocket)
        elif now - self._pinged_at >= limits.ping_s:
            self.stop(Violation(1001, "no answer to a ping"))

    def identify_anew(self) -> None:
        """Ask the guard that stands there now who it is; the connection ends unless it is the same principal's."""
        if self._nursery is not None and self.is_open:
            self._nursery.start_soon(self._identify_anew, self.caller)

    async def _identify_anew(self, before: Caller) -> None:
        try:
            # No attempt of the client, which must not count as one where many have the same address.
            principal = await self._core.identify(before.token, source="")
        except SecurityError as exc:
            if self.caller is before:
                self.stop(Violation(4401, exc.message))
            return
        if self.caller is not before:
            return
        self.caller = msgspec.structs.replace(before, principal=principal)
        if self.caller.identity != before.identity:
            self.stop(Violation(4401, "the access token is somebody else's"))

    async def _ping(self, websocket: WebSocketConnection) -> None:
        # A pong, or anything else that comes, is noted by the stream; this only sends, and takes the answer off.
        with trio.move_on_after(self._core.limits.ping_s):
            await websocket.ping()

    async def _send_quietly(self, message: msgspec.Struct) -> None:
        await self.send(message)

    # Messages

    async def send(self, message: msgspec.Struct) -> None:
        """Send a message; raises `ConnectionClosed`."""
        await self._send_text(encode_text(message))

    async def _send_text(self, text: str) -> None:
        await cast("WebSocketConnection", self._websocket).send_message(text)

    async def _take(self, nursery: trio.Nursery, message: str | bytes) -> None:
        move = self._machine.take(message, now=trio.current_time())
        match move:
            case Violation():
                raise self._ended(move)
            case Serve(request, request_id):
                if isinstance(request, Ask):
                    self._steered[request_id] = []
                nursery.start_soon(self._answer, request, request_id)
            case Steer(steering):
                self._steer(nursery, steering)
            case Refuse(failed):
                await self.send(failed)
            case Ignore() | Greet():
                pass

    def _steer(self, nursery: trio.Nursery, message: Grant | Cancel) -> None:
        match self._steered.get(message.id):
            case Relay() as relay:
                relay.note(message)
                nursery.start_soon(relay.steer)
            case Subscription() as subscription:
                _heed(subscription, message)
            case list() as early:
                early.append(message)

    def _said_early(self, request_id: int) -> list[Grant | Cancel]:
        early = self._steered.get(request_id)
        return early if isinstance(early, list) else []

    async def _answer(self, request: ClientMessage, request_id: int) -> None:
        """Act on a request and send its answer; an error that nobody has foreseen ends the connection."""
        self._answers += 1
        try:
            await self._act_and_say(request, request_id)
        finally:
            self._answers -= 1
            if self._answered is not None and not self._answers:
                self._answered.set()

    async def _act_and_say(self, request: ClientMessage, request_id: int) -> None:
        failures: list[Exception] = []
        try:
            # What closes the connection passes: it is no failure of the request.
            closing = await contain(partial(self._act, request), report=failures.append)
        finally:
            self._machine.end(request_id)
            self._steered.pop(request_id, None)
        if closing is not None:
            raise self._ended(closing)
        if failures:
            await self._fail(request_id, failures[0])

    async def _fail(self, request_id: int, failure: Exception) -> None:
        if isinstance(failure, _GONE):
            raise failure
        if isinstance(failure, GorouterError):
            await self.send(Failed(id=request_id, error=error_info(failure)))
            return
        self._core.report(failure)
        await self.send(Failed(id=request_id, error=internal_error()))
        raise self._ended(Violation(1011, "an error inside the gateway"))

    async def _act(self, request: ClientMessage) -> Violation | None:
        match request:
            case Authenticate():
                return await self._authenticate(request)
            case Statistics(session=None):
                await self._show(request)
                return None
            case Hello() | Grant() | Cancel():
                return None
            case _:
                here = await self._passed_on(request)
                return None if here is None else await self._act_here(here)

    async def _passed_on(self, request: Ask | SessionRequest | Statistics) -> Ask | SessionRequest | Statistics | None:
        """What is to be done here: all, where there is no other gateway; nothing, where another one has done it."""
        cluster = self._core.cluster
        if cluster is None or self._is_peer or request.session is None:
            return request
        caller = self.caller
        self._core.check_reach(request, caller)
        relay = Relay(cluster, request, caller=caller, names=(*(request.owner or caller.identity), request.session))
        for message in self._said_early(request.id):
            relay.note(message)
        self._steered[request.id] = relay
        await relay.run(self._send_text)
        return None if relay.is_over else relay.request

    async def _act_here(self, request: Ask | SessionRequest | Statistics) -> Violation | None:
        if isinstance(request, Ask):
            return await self._ask(request)
        for message in await self._core.act(request, self.caller):
            await self.send(message)
        return None

    async def _show(self, request: Statistics) -> None:
        if not self._core.may_look(self.caller):
            raise AccessDeniedError("only operators may see what the gateway does")
        await self.send(Snapshot(id=request.id, snapshot=snapshot(self._core)))

    async def _authenticate(self, request: Authenticate) -> Violation | None:
        """A newer token: of the same principal, or the connection ends."""
        before = self.caller.identity
        try:
            principal = await self._core.identify(Secret(request.token), source=self._address)
        except SecurityError as exc:
            return Violation(4401, exc.message)
        caller = Caller(principal, Secret(request.token), self._address)
        if caller.identity != before:
            return Violation(4401, "the token is somebody else's")
        self.caller = caller
        await self.send(Accepted(id=request.id))
        return None

    # Turns

    async def _ask(self, ask: Ask) -> Violation | None:
        turn = self._core.turn_for(ask, self.caller)
        if isinstance(turn, ErrorInfo):
            await self.send(Failed(id=ask.id, error=turn))
            return None
        return await self.follow(turn, ask)

    async def follow(self, turn: LiveTurn, ask: Ask) -> Violation | None:
        """Send what the turn says until its end."""
        subscription = Subscription(
            turn,
            ask.id,
            after=ask.after,
            credit=ask.credit,
            is_streamed=ask.stream,
            limits=self._limits,
        )
        for message in self._said_early(ask.id):
            _heed(subscription, message)
        before = self._steered.get(ask.id)
        self._steered[ask.id] = subscription
        if isinstance(before, Relay) and before.is_stopped:
            turn.scope.cancel()
        try:
            await subscription.run(self._send_text)
        except SlowReaderError:
            return Violation(4413, "the stream is not read")
        return None


def _heed(subscription: Subscription, message: Grant | Cancel) -> None:
    if isinstance(message, Grant):
        subscription.grant(message.credit)
    else:
        subscription.turn.scope.cancel()


def _first(group: BaseExceptionGroup[_CloseError]) -> _CloseError:
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return cast("_CloseError", exc)


def _header(request: WebSocketRequest, name: bytes) -> str | None:
    found = [value for key, value in request.headers if key.lower() == name]
    return found[0].decode("latin-1") if found else None


def _bearer(request: WebSocketRequest) -> Secret | None:
    header = (_header(request, b"authorization") or "").encode("latin-1")
    return (
        Secret(header[len(_BEARER) :].decode("latin-1").strip()) if header[: len(_BEARER)].lower() == _BEARER else None
    )

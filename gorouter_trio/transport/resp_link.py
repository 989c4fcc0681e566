"""The links of a Redis client: how a connection to a server is made and greeted, and made again when it has broken.

Theory of operation. Each node has one connection for all callers, made by the first who needs it, in that caller's own
task. Who comes meanwhile waits for it; if the first is cancelled, the next goes on. Between two attempts lies a wait
with full jitter, the same for all callers, so that however many there are, a server that comes back sees one attempt in
0.1 to 0.9 s from each process.
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Final, cast, overload

import trio

from ..errors import ConnectError, StoreError, StoreErrorKind
from .resp import ErrorReply, Reply, RespConnection, pack, store_error
from .streams import SocketNetwork, UnixNetwork, bottom, closable, drop, reason_of
from .tls import make_tls_context, open_tls

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from ..network import TlsConfig
    from .http import Network
    from .resp_address import Place, RedisAddress

__all__ = ["PASSING", "SPACING_S", "RedisBackoff", "RedisLink", "RedisSettings"]

_OLDEST = (5, 0)
_IS_CROWDED = "max number of clients"
SPACING_S: Final = 0.1
"""The least time between two attempts to connect."""
_FIRST_BACKOFF_S = 0.05
_MOST_BACKOFF_S = 0.8

PASSING: Final[frozenset[StoreErrorKind]] = frozenset({"unreachable", "io", "loading", "locked"})
"""Errors that pass by themselves once the server is itself again."""


class RedisBackoff:
    """When the next attempt to connect may be made. Pure: `now` is given."""

    __slots__ = ("_failures", "_rng", "next_at")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._failures = 0
        self.next_at = float("-inf")

    def begin(self, now: float) -> None:
        """An attempt is made."""
        self.next_at = now + SPACING_S

    def fail(self, now: float) -> None:
        """It failed: a wait of up to 0.05 s, 0.1, 0.2 and so on up to 0.8, on top of the least distance."""
        longest = min(_FIRST_BACKOFF_S * 2.0**self._failures, _MOST_BACKOFF_S)
        self._failures = min(self._failures + 1, 16)
        self.next_at = max(self.next_at, now + SPACING_S + self._rng.uniform(0.0, longest))

    def succeed(self) -> None:
        """A connection is there."""
        self._failures = 0


class RedisSettings:
    """What all connections of a client have in common: how they are made, and that they end with the client."""

    def __init__(
        self,
        address: RedisAddress,
        *,
        timeout_s: float,
        tls: TlsConfig | ssl.SSLContext | None,
        network: Network | None,
        name: str,
        seed: int | None,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.name = name
        self.rng = random.Random(seed)
        self.context = make_tls_context(tls, environ=os.environ) if address.has_tls else None
        self._network = network
        self.attempts = self.connected = 0
        self.failure = ""
        self.is_cluster = False
        self.is_closed = False
        self._connections: set[RespConnection] = set()

    async def connect(self, place: Place, *, db: int = 0, has_credentials: bool = True) -> RespConnection:
        """A connection that has been greeted; raises `StoreError`. Cancelling leaves nothing open."""
        self.check_open()
        self.attempts += 1
        await self._release({other for other in self._connections if other.is_closed})
        connection = RespConnection(await self._dial(place), name=str(place))
        self._connections.add(connection)
        try:
            self.check_open()
            await self._greet(connection, db=db, has_credentials=has_credentials)
        except BaseException:
            await connection.aclose()  # noqa: ASYNC102 - shields itself, bounded
            raise
        self.connected += 1
        return connection

    def check_open(self) -> None:
        """Raise `StoreError` when the client is closed."""
        if self.is_closed:
            raise StoreError(f"{self.address}: the client is closed", kind="closed")

    async def aclose(self) -> None:
        """Close every connection, whoever has it; those that are being made are closed when they are there.

        All in one step; then those are waited for whose streams have to be.
        """
        self.is_closed = True
        for connection in self._connections:
            connection.close()
        await self._release(self._connections)

    async def _release(self, ended: set[RespConnection]) -> None:
        """Wait for what is left of connections that were closed."""
        self._connections = self._connections - ended
        for connection in ended:
            await connection.aclose()

    async def open_stream(self, place: Place) -> RespConnection:
        """As `connect`, to the data's own server and database."""
        return await self.connect(place, db=self.address.db)

    async def _dial(self, place: Place) -> trio.abc.Stream:
        network = self._network or (SocketNetwork() if place.port else UnixNetwork(place.host))
        try:
            stream = closable(await network.connect(place.host, place.port))
        except (OSError, UnicodeError) as exc:
            raise StoreError(f"cannot connect to Redis at {place}: {reason_of(exc)}", kind="unreachable") from exc
        try:
            return stream if self.context is None else await self._secure(stream, self.context, place=place)
        except ConnectError as exc:
            raise StoreError(exc.message, kind="unreachable") from exc

    async def _secure(
        self, stream: trio.abc.Stream, context: ssl.SSLContext, *, place: Place
    ) -> trio.SSLStream[trio.abc.Stream]:
        try:
            return await open_tls(stream, context, host=place.host, name=f"Redis at {place}")
        except BaseException:
            await drop(bottom(stream))  # noqa: ASYNC102 - shields itself, bounded
            raise

    async def _greet(self, connection: RespConnection, *, db: int, has_credentials: bool) -> None:
        """Agree on RESP3, or on RESP2 with a server that has no other, and show the password."""
        address = self.address
        password = None if address.password is None or not has_credentials else address.password.reveal()
        credentials: tuple[str, ...] = () if password is None else ("AUTH", address.username or "default", password)
        deadline = trio.current_time() + self.timeout_s
        hello = await connection.call(pack(("HELLO", "3", *credentials, "SETNAME", self.name)), deadline=deadline)
        if isinstance(hello, ErrorReply):
            if hello.code not in {"NOPROTO", "ERR"} or _IS_CROWDED in hello.text:
                raise self._refused(hello, connection)
            await self._greet_as_resp2(connection, password, deadline=deadline)
            hello = None
        if hello is not None or db == 0:
            told = hello if isinstance(hello, dict) else await self._ask_info(connection, deadline=deadline)
            self._check_version(told, connection)
        if db:
            self._expect_ok(await connection.call(pack(("SELECT", db)), deadline=deadline), connection)

    async def _greet_as_resp2(self, connection: RespConnection, password: str | None, *, deadline: float) -> None:
        if password is not None:
            user = (self.address.username,) if self.address.username else ()
            reply = await connection.call(pack(("AUTH", *user, password)), deadline=deadline)
            self._expect_ok(reply, connection)
        await connection.call(pack(("CLIENT", "SETNAME", self.name)), deadline=deadline)

    async def _ask_info(self, connection: RespConnection, *, deadline: float) -> dict[object, object]:
        """What HELLO would have told, from a server without it."""
        reply = await connection.call(pack(("INFO", "server")), deadline=deadline)
        if isinstance(reply, ErrorReply):
            raise self._refused(reply, connection)
        lines = (line.partition(b":") for line in cast("bytes", reply).splitlines())
        info = {name: value for name, _, value in lines}
        return {b"version": info.get(b"redis_version", b""), b"mode": info.get(b"redis_mode", b"")}

    def _check_version(self, told: dict[object, object], connection: RespConnection) -> None:
        version = cast("bytes", told.get(b"version") or b"").decode(errors="replace")
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if numbers and numbers < _OLDEST:
            raise StoreError(
                f"Redis at {connection.name} is version {version}; at least {_OLDEST[0]}.{_OLDEST[1]} is needed",
                kind="refused",
            )
        if told.get(b"mode") == b"cluster":
            self.is_cluster = True

    def _expect_ok(self, reply: Reply, connection: RespConnection) -> None:
        if isinstance(reply, ErrorReply):
            raise self._refused(reply, connection)

    def _refused(self, reply: ErrorReply, connection: RespConnection) -> StoreError:
        error = store_error(reply)
        if _IS_CROWDED in reply.text:
            error.kind = "locked"
        elif reply.code == "ERR" and ("AUTH" in reply.text or "password" in reply.text):
            error.kind = "denied"
        error.message = f"{connection.name}: {error.message}"
        error.args = (error.message,)
        return error


class RedisLink:
    """The connection to one node, made when it is needed; `find` tells where the node is."""

    def __init__(self, settings: RedisSettings, find: Callable[[], Awaitable[RespConnection]]) -> None:
        self._settings = settings
        self._find = find
        self._lock = trio.Lock()
        self._backoff = RedisBackoff(settings.rng)
        self._failure: StoreError | None = None
        self.connection: RespConnection | None = None
        self.old = [0, 0, 0]
        self.made = 0

    @overload
    async def ready(self, deadline: float) -> RespConnection: ...

    @overload
    async def ready(self, deadline: float, *, once: bool) -> RespConnection | None: ...

    async def ready(self, deadline: float, *, once: bool = False) -> RespConnection | None:
        """The connection that is open, or a new one; raises `StoreError`, at the deadline the last attempt's.

        `once` gives None after one attempt that has not made it.
        """
        with trio.CancelScope(deadline=deadline):
            while (connection := await self._wait_turn()) is None and not once:
                pass
            return connection
        raise self._not_reached()

    def _not_reached(self) -> StoreError:
        """Why there is no connection: whatever became of the greeting, nothing of the caller's was sent."""
        failure = self._failure
        error = StoreError(f"{self._settings.address} cannot be reached in time", kind="unreachable")
        if failure is not None and failure.kind == "io":
            error = StoreError(f"{error.message}: {failure.message}", kind="unreachable")
        elif failure is not None and failure.kind != "timeout":
            error = StoreError(failure.message, kind=failure.kind)
        error.__cause__ = failure
        return error

    async def _wait_turn(self) -> RespConnection | None:
        """The connection that others have made meanwhile, or that of one attempt."""
        async with self._lock:
            if self.connection is None or not self.connection.is_open:
                await self._try()
            return self.connection

    async def _try(self) -> None:
        """One attempt, when it is time for one; raises what trying again would not change."""
        self._retire()
        await trio.sleep_until(self._backoff.next_at)
        self._backoff.begin(trio.current_time())
        try:
            self.connection = await self._find()
        except StoreError as exc:
            self._backoff.fail(trio.current_time())
            self._failure = exc
            self._settings.failure = exc.message
            if exc.kind not in PASSING and exc.kind != "timeout":
                raise
            return
        self._backoff.succeed()
        self._failure = None
        self.made += 1

    def drop(self, connection: RespConnection, why: str) -> None:
        """This connection is of no use any more: its node has another part now."""
        connection.fail("io", why)

    def _retire(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()
            self.old = [a + b for a, b in zip(self.old, _counts(connection), strict=True)]

    def counts(self) -> list[int]:
        """Commands, sends and dropped replies of all connections so far."""
        current = [0, 0, 0] if self.connection is None else _counts(self.connection)
        return [a + b for a, b in zip(self.old, current, strict=True)]


def _counts(connection: RespConnection) -> list[int]:
    return [connection.commands, connection.sends, connection.dropped]

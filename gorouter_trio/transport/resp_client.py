"""`RedisClient`: a Redis, a master that sentinels name, or a cluster, behind one `execute`.

Theory of operation. Each node has a *link*: one connection for all callers, made by the first who needs it, in that
caller's own task. Who comes meanwhile waits for it; if the first is cancelled, the next goes on. Between two attempts
lies a wait with full jitter, the same for all callers, so that however many there are, a server that comes back sees one
attempt in 0.1 to 0.9 s from each process.

A command is sent once. When its connection breaks, nobody knows whether it was carried out, and the caller is told so;
`execute_again` is for commands that may be carried out twice without harm: it sends them anew until their time is over.

Commands that block, and subscriptions, would hold up everybody on a shared connection. They have connections of their
own; a blocking command that is cancelled takes its connection with it.

In a cluster the slot of a command's key says whose it is. What nodes answer with MOVED is remembered, ASK is followed.
"""

from __future__ import annotations

import binascii
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Protocol, Self, cast

import trio
from msgspec import Struct

from ..errors import ConfigError, ConnectError, StoreError, StoreErrorKind
from .resp import Argument, ErrorReply, Reply, RespConnection, RespReader, pack, store_error
from .resp_address import Place, RedisAddress, parse_place, parse_url
from .streams import SocketNetwork, UnixNetwork, bottom, closable, drop, reason_of
from .tls import make_tls_context, open_tls

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator
    from types import TracebackType

    from ..network import TlsConfig
    from .http import Network

__all__ = [
    "Published",
    "RedisBackoff",
    "RedisClient",
    "RedisExecutor",
    "RedisScript",
    "RedisStatistics",
    "Subscription",
]

_OLDEST = (5, 0)
_SPACING_S = 0.1
_FIRST_BACKOFF_S = 0.05
_MOST_BACKOFF_S = 0.8
_MOST_REDIRECTS = 5
_MOST_IDLE_BLOCKING = 4
_SLOTS = 16_384

_BLOCKING: Final = frozenset(
    "BLPOP BRPOP BLMOVE BLMPOP BRPOPLPUSH BZPOPMIN BZPOPMAX BZMPOP XREAD XREADGROUP WAIT WAITAOF".split()
)
_STATEFUL: Final = frozenset(
    "SUBSCRIBE PSUBSCRIBE SSUBSCRIBE MONITOR SYNC PSYNC MULTI EXEC DISCARD WATCH UNWATCH SELECT HELLO AUTH QUIT RESET "
    "ASKING READONLY READWRITE".split()
)
_SHUT: Final = _STATEFUL | (_BLOCKING - {"XREAD", "XREADGROUP"})
# An error that says that the command was not carried out, and may be once the server is itself again.
_PASSING: Final[frozenset[StoreErrorKind]] = frozenset({"unreachable", "io", "loading", "locked"})


class RedisExecutor(Protocol):
    """A client of a Redis: ours, or one that a user brings (`coredis.Redis.execute_command` behind a method)."""

    async def execute(self, *args: Argument) -> Reply:
        """Send one command and return its reply; raises what that client raises for an error reply."""


class RedisScript(Struct, frozen=True):
    """A Lua script, and the name that a server which has it knows it by."""

    source: str
    sha: str


class RedisStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot. `sends` are system calls' worth of `commands`; `dropped` are replies whose callers had gone.

    `connected` counts connections that were made, `attempts` all that were tried; `resent` commands that were sent
    anew because their connection broke.
    """

    in_flight: int
    commands: int
    sends: int
    dropped: int
    connected: int
    attempts: int
    resent: int
    failure: str


class RedisBackoff:
    """When the next attempt to connect may be made. Pure: `now` is given."""

    __slots__ = ("_failures", "_rng", "next_at")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._failures = 0
        self.next_at = float("-inf")

    def begin(self, now: float) -> None:
        """An attempt is made."""
        self.next_at = now + _SPACING_S

    def fail(self, now: float) -> None:
        """It failed: a wait of up to 0.05 s, 0.1, 0.2 and so on up to 0.8, on top of the least distance."""
        longest = min(_FIRST_BACKOFF_S * 2.0**self._failures, _MOST_BACKOFF_S)
        self._failures = min(self._failures + 1, 16)
        self.next_at = max(self.next_at, now + _SPACING_S + self._rng.uniform(0.0, longest))

    def succeed(self) -> None:
        """A connection is there."""
        self._failures = 0


class _Settings:
    """What all connections of a client have in common."""

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

    async def connect(self, place: Place, *, db: int = 0, has_credentials: bool = True) -> RespConnection:
        """A connection that has been greeted; raises `StoreError`. Cancelling leaves nothing open."""
        self.attempts += 1
        connection = RespConnection(await self._dial(place), name=str(place))
        try:
            await self._greet(connection, db=db, has_credentials=has_credentials)
        except BaseException:
            connection.close()
            raise
        self.connected += 1
        return connection

    async def open_stream(self, place: Place) -> RespConnection:
        """As `connect`, to the data's own server and database."""
        return await self.connect(place, db=self.address.db)

    async def _dial(self, place: Place) -> trio.abc.Stream:
        network = self._network or (SocketNetwork() if place.port else UnixNetwork(place.host))
        try:
            stream = closable(await network.connect(place.host, place.port))
        except (OSError, UnicodeError) as exc:
            raise StoreError(f"cannot connect to Redis at {place}: {reason_of(exc)}", kind="unreachable") from exc
        if self.context is None:
            return stream
        try:
            return await open_tls(stream, self.context, host=place.host, name=f"Redis at {place}")
        except ConnectError as exc:
            await drop(bottom(stream))  # noqa: ASYNC102 - shields itself, bounded
            raise StoreError(exc.message, kind="unreachable") from exc
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
            if hello.code not in {"NOPROTO", "ERR"}:
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
        if reply.code == "ERR" and ("AUTH" in reply.text or "password" in reply.text):
            error.kind = "denied"
        error.message = f"{connection.name}: {error.message}"
        error.args = (error.message,)
        return error


class _Link:
    """The connection to one node, made when it is needed; `find` tells where the node is."""

    def __init__(self, settings: _Settings, find: Callable[[], Awaitable[RespConnection]]) -> None:
        self._settings = settings
        self._find = find
        self._lock = trio.Lock()
        self._backoff = RedisBackoff(settings.rng)
        self._failure: StoreError | None = None
        self.connection: RespConnection | None = None
        self.old = [0, 0, 0]

    async def ready(self, deadline: float) -> RespConnection:
        """The connection that is open, or a new one; raises `StoreError`, at the deadline the last attempt's."""
        while True:
            with trio.CancelScope(deadline=deadline) as scope:
                async with self._lock:
                    connection = self.connection
                    if connection is not None and connection.is_open:
                        return connection
                    if await self._try():
                        return cast("RespConnection", self.connection)
            if scope.cancelled_caught:
                failure = self._failure
                kind: StoreErrorKind = "unreachable" if failure is None else failure.kind
                why = f"{self._settings.address} cannot be reached in time" if failure is None else failure.message
                raise StoreError(why, kind=kind) from failure

    async def _try(self) -> bool:
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
            if exc.kind not in _PASSING and exc.kind != "timeout":
                raise
            return False
        self._backoff.succeed()
        self._failure = None
        return True

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


class RedisClient:
    """The Redis at `url`: `async with RedisClient("redis://localhost") as redis: ...`, or `aclose` at the end.

    For URL forms see `docs/redis.md`. Any number of tasks may use it; what they send at the same time goes out
    together. It connects when it is first used, and again when a connection breaks. Nothing runs in the background.

    A call takes `timeout_s` at most, connecting included. Every method raises `StoreError` whose `kind` says what
    happened: with "unreachable", "loading", "read_only", "denied", "full", "locked" and "refused" the command did
    nothing; with "io" and "timeout" whether it was carried out is unknown. Cancelling leaves at once, and never gives
    a reply to somebody else. Raises `ConfigError` for a URL that cannot be.

    `tls` is for `rediss://`; `network` stands in for TCP, and `seed` makes the waits of its reconnecting repeatable.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 5.0,
        tls: TlsConfig | ssl.SSLContext | None = None,
        network: Network | None = None,
        name: str = "gorouter-trio",
        seed: int | None = None,
    ) -> None:
        if not timeout_s > 0:
            raise ConfigError("redis: timeout_s must be above 0")
        if not name.isascii() or not name.isprintable() or " " in name or not name:
            raise ConfigError("redis: name must be printable ASCII without spaces")
        self.address = parse_url(url)
        self._settings = _Settings(
            self.address, timeout_s=timeout_s, tls=tls, network=network, name=name, seed=seed
        )
        self._link = _Link(self._settings, self._find)
        self._links: dict[Place, _Link] = {}
        self._slots: dict[int, _Link] = {}
        self._idle: list[RespConnection] = []
        self._now: Callable[[], float] | None = None
        self._known: set[tuple[_Link, str]] = set()
        self._resent = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<RedisClient of {self.address}{', closed' if self._is_closed else ''}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def timeout_s(self) -> float:
        """How long a call may take."""
        return self._settings.timeout_s

    @property
    def is_cluster(self) -> bool:
        """Whether it is a cluster; known once it is connected."""
        return self._settings.is_cluster

    def statistics(self) -> RedisStatistics:
        """A snapshot; cheap."""
        links = [self._link, *self._links.values()]
        commands, sends, dropped = (sum(column) for column in zip(*(link.counts() for link in links), strict=True))
        settings = self._settings
        return RedisStatistics(
            in_flight=sum(0 if link.connection is None else link.connection.in_flight for link in links),
            commands=commands,
            sends=sends,
            dropped=dropped,
            connected=settings.connected,
            attempts=settings.attempts,
            resent=self._resent,
            failure=settings.failure,
        )

    async def execute(self, *args: Argument) -> Reply:
        """Send one command and return its reply.

        Commands that change the connection (`SELECT`, `MULTI`, `SUBSCRIBE`) or block it are refused with
        `ConfigError`: there are `execute_together`, `subscribe` and `execute_blocking` for them.
        """
        _check(args)
        return await self._send(args, self._deadline())

    async def execute_again(self, *args: Argument) -> Reply:
        """`execute`, and again when the connection breaks or the server is not ready yet, until `timeout_s` is over.

        For commands that do no harm when they are carried out twice.
        """
        _check(args)
        return await self._again(args)

    async def execute_together(self, *commands: Sequence[Argument]) -> list[Reply]:
        """Send commands as one transaction (`MULTI` and `EXEC`), which nothing of others comes between.

        Returns their replies. Raises for the first error among them; those before and behind it are carried out.
        """
        for command in commands:
            _check(tuple(command))
        deadline = self._deadline()
        first = tuple(commands[0]) if commands else ()
        packed = [pack(("MULTI",)), *(pack(tuple(command)) for command in commands), pack(("EXEC",))]
        link = self._link_for(first)
        connection = await link.ready(deadline)
        replies = await connection.call_all(packed, deadline=deadline)
        if isinstance(replies, ErrorReply):
            raise store_error(replies, "EXEC")
        for reply in cast("list[Reply]", replies):
            if isinstance(reply, ErrorReply):
                raise store_error(reply, "EXEC")
        return cast("list[Reply]", replies)

    async def execute_blocking(self, *args: Argument, wait_s: float) -> Reply:
        """Send a command that may block for `wait_s`, as its arguments say, on a connection of its own.

        Cancelling closes that connection; whether something was taken for it is unknown then.
        """
        deadline = trio.current_time() + wait_s + self.timeout_s
        connection = await self._take_blocking(deadline)
        try:
            reply = await connection.call(pack(args), deadline=deadline)
        except BaseException:
            connection.close()
            raise
        if len(self._idle) < _MOST_IDLE_BLOCKING and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.close()
        if isinstance(reply, ErrorReply):
            raise store_error(reply, str(args[0]))
        return reply

    async def evaluate(self, script: RedisScript, keys: Sequence[Argument], args: Sequence[Argument]) -> Reply:
        """Run a script that may run twice without harm, as `execute_again`; the server is sent its text once."""
        command: tuple[Argument, ...] = ("EVALSHA", script.sha, len(keys), *keys, *args)
        try:
            return await self._again(command)
        except StoreError as exc:
            if exc.kind != "refused" or "NOSCRIPT" not in exc.message:
                raise
        return await self._again(("EVAL", script.source, *command[2:]))

    @asynccontextmanager
    async def subscribe(self, *channels: str, patterns: Sequence[str] = ()) -> AsyncIterator[Subscription]:
        """Messages of channels, and of those that match patterns, on a connection of its own: `receive` has the next.

        Subscribed once entered. When the connection breaks, `receive` raises: what was said meanwhile is lost anyhow.
        """
        if not channels and not patterns:
            raise ConfigError("redis: subscribe needs a channel or a pattern")
        connection = await self._open_own(self._deadline())
        subscription = Subscription(connection)
        try:
            await subscription.begin(channels, patterns, deadline=self._deadline())
            yield subscription
        finally:
            connection.close()

    async def aclose(self) -> None:
        """Close the connections: what is in flight fails. Later calls raise `StoreError`."""
        self._is_closed = True
        for link in (self._link, *self._links.values()):
            if link.connection is not None:
                link.connection.close()
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await trio.lowlevel.checkpoint()

    # Sending

    def _deadline(self) -> float:
        if self._is_closed:
            raise StoreError(f"{self.address}: the client is closed", kind="closed")
        return trio.current_time() + self._settings.timeout_s

    async def _send(self, args: tuple[Argument, ...], deadline: float) -> Reply:
        link = self._link_for(args)
        data = pack(args)
        commands = (data,)
        for _ in range(_MOST_REDIRECTS):
            connection = link.connection
            if connection is None or not connection.is_open:
                connection = await link.ready(deadline)
            reply = await connection.call_all(commands, deadline=deadline)
            if type(reply) is not ErrorReply:
                return reply
            if reply.code not in {"MOVED", "ASK"}:
                break
            link, commands = self._redirected(reply, data)
        else:
            raise StoreError(f"{self.address}: the cluster sends a command round and round", kind="locked")
        if reply.code == "READONLY":
            link.drop(connection, f"{connection.name} is a replica now")
        raise store_error(reply, str(args[0]))

    async def _again(self, args: tuple[Argument, ...]) -> Reply:
        deadline = self._deadline()
        while True:
            try:
                return await self._send(args, deadline)
            except StoreError as exc:
                is_passing = exc.kind in _PASSING or (exc.kind == "read_only" and bool(self.address.master))
                if self._is_closed or not is_passing or trio.current_time() + _SPACING_S >= deadline:
                    raise
                self._resent += 1
                if exc.kind != "io":
                    await trio.sleep(self._settings.rng.uniform(0.0, _SPACING_S))

    # Who has what

    def _link_for(self, args: tuple[Argument, ...]) -> _Link:
        """The link to the node that has the command's key, as far as the cluster has told."""
        if not self._slots:
            return self._link
        at = 3 if str(args[0]).upper() in {"EVAL", "EVALSHA"} else 1
        return self._slots.get(_slot(args[at]), self._link) if len(args) > at else self._link

    def _redirected(self, reply: ErrorReply, data: bytes) -> tuple[_Link, tuple[bytes, ...]]:
        """Where a node says that a command belongs, and what is to be sent there."""
        parts = reply.text.split(" ")
        place = parse_place(parts[2])
        link = self._links.get(place)
        if link is None:
            link = self._links[place] = _Link(self._settings, lambda: self._settings.open_stream(place))
        if reply.code == "ASK":
            return link, (pack(("ASKING",)), data)
        self._slots[int(parts[1])] = link
        return link, (data,)

    async def _find(self) -> RespConnection:
        """A connection to the server of the URL, or to the master that the sentinels name now."""
        address = self.address
        if not address.master:
            return await self._settings.open_stream(address.places[0])
        failure: StoreError | None = None
        for place in address.places:
            try:
                master = await self._ask_sentinel(place)
            except StoreError as exc:
                failure = exc
                continue
            return await self._open_master(master)
        raise failure or StoreError(f"{address}: there is no sentinel", kind="unreachable")

    async def _ask_sentinel(self, place: Place) -> Place:
        """Where a sentinel says that the master is."""
        deadline = trio.current_time() + self._settings.timeout_s / 2
        connection = await self._settings.connect(place, has_credentials=False)
        try:
            question = pack(("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.master))
            reply = await connection.call(question, deadline=deadline)
        finally:
            connection.close()
        if isinstance(reply, ErrorReply):
            raise store_error(reply, "SENTINEL")
        if not isinstance(reply, list):
            raise StoreError(f"the sentinel {place} knows no master {self.address.master!r}", kind="unreachable")
        return Place(reply[0].decode(), int(reply[1]))

    async def _open_master(self, place: Place) -> RespConnection:
        """A connection to what is the master itself, not only by the word of a sentinel that may be late."""
        connection = await self._settings.open_stream(place)
        role = await connection.call(pack(("ROLE",)), deadline=trio.current_time() + self._settings.timeout_s)
        if isinstance(role, list) and role and role[0] == b"master":
            return connection
        connection.close()
        raise StoreError(f"{place} is no master any more, or not yet", kind="unreachable")

    # Connections for one

    async def _take_blocking(self, deadline: float) -> RespConnection:
        self._deadline()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                await trio.lowlevel.checkpoint_if_cancelled()
                return connection
        return await self._open_own(deadline)

    async def _open_own(self, deadline: float) -> RespConnection:
        if self._settings.is_cluster:
            raise StoreError(f"{self.address}: blocking commands are not supported in a cluster", kind="refused")
        with trio.CancelScope(deadline=deadline) as scope:
            return await self._find()
        assert scope.cancelled_caught
        raise StoreError(f"{self.address} cannot be reached in time", kind="unreachable")


class Published(Struct, frozen=True):
    """A message: the channel that it was sent to, and what it says."""

    channel: bytes
    data: bytes


class Subscription:
    """What `RedisClient.subscribe` gives. One task may receive at a time; cancelling loses nothing."""

    def __init__(self, connection: RespConnection) -> None:
        self._connection = connection
        self._reader = RespReader()
        self._messages: list[Published] = []

    async def begin(self, channels: Sequence[str], patterns: Sequence[str], *, deadline: float) -> None:
        """Subscribe, and wait until the server says so for each."""
        commands = [pack((name, *wanted)) for name, wanted in (("SUBSCRIBE", channels), ("PSUBSCRIBE", patterns)) if wanted]
        missing = len(channels) + len(patterns)
        with trio.CancelScope(deadline=deadline) as scope:
            await self._connection.send_raw(b"".join(commands))
            while missing > 0:
                missing -= await self._read()
        if scope.cancelled_caught:
            raise StoreError("the subscription was not confirmed in time", kind="timeout")

    async def receive(self) -> Published:
        """The next message; waits for one. Raises `StoreError` when the connection has broken."""
        while not self._messages:
            await self._read()
        await trio.lowlevel.checkpoint_if_cancelled()
        return self._messages.pop(0)

    async def _read(self) -> int:
        """Read on; returns how many subscriptions were confirmed."""
        confirmed = 0
        for item in self._reader.feed(await self._connection.receive_raw(), keeps_pushed=True):
            if isinstance(item, ErrorReply):
                raise store_error(item, "SUBSCRIBE")
            if not isinstance(item, list) or not item:
                continue
            kind = item[0]
            confirmed += kind in {b"subscribe", b"psubscribe"}
            if kind in {b"message", b"pmessage"}:
                self._messages.append(Published(item[-2], item[-1]))
        return confirmed


def _check(args: tuple[Argument, ...]) -> None:
    """Refuse what would harm everybody on a shared connection."""
    if not args:
        raise ConfigError("redis: a command needs a name")
    name = args[0]
    if name in _SHUT or (isinstance(name, str) and name.upper() in _SHUT):
        raise ConfigError(
            f"redis: {name} changes or blocks the shared connection; see execute_together, execute_blocking, subscribe"
        )


def _slot(key: Argument) -> int:
    """The slot of a key: of what stands in its first braces, if anything does."""
    data = key if isinstance(key, bytes) else str(key).encode()
    start = data.find(b"{")
    if start >= 0:
        end = data.find(b"}", start + 1)
        if end > start + 1:
            data = data[start + 1 : end]
    return binascii.crc_hqx(data, 0) % _SLOTS

"""`RedisClient`: a Redis, a master that sentinels name, or a cluster, behind one `execute`.

Theory of operation. A command is sent once. When its connection breaks, nobody knows whether it was carried out, and
the caller is told so; `execute_again` is for commands that may be carried out twice without harm: it sends them anew
until their time is over.

Commands that block, and subscriptions, would hold up everybody on a shared connection. They have connections of their
own; a blocking command that is cancelled takes its connection with it.

In a cluster the slot of a command's key says whose it is. What nodes answer with MOVED is remembered, ASK is followed.
What is remembered of a node that cannot be reached is forgotten: the node of the URL is asked who has its slots now.
"""

from __future__ import annotations

import binascii
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Protocol, Self, cast

import trio
from msgspec import Struct

from ..errors import ConfigError, StoreError
from .resp import ErrorReply, RespReader, pack, store_error
from .resp_address import Place, parse_place, parse_url
from .resp_link import PASSING, SPACING_S, RedisLink, RedisSettings

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Sequence
    from types import TracebackType

    from ..errors import StoreErrorKind
    from ..network import TlsConfig
    from .http import Network
    from .resp import Argument, Reply, RespConnection

__all__ = [
    "Published",
    "RedisClient",
    "RedisExecutor",
    "RedisScript",
    "RedisStatistics",
    "Subscription",
]

_MOST_REDIRECTS = 5
_MOST_IDLE_BLOCKING = 4
_SLOTS = 16_384

_IN_DOUBT: Final[frozenset[StoreErrorKind]] = frozenset({"io", "timeout"})
"""What was sent may have been carried out."""
_UNDONE: Final[frozenset[StoreErrorKind]] = frozenset(
    {"unreachable", "loading", "locked", "read_only", "full", "denied"}
)
"""What was sent last did nothing; this says nothing of what was sent before it."""

_BLOCKING: Final = frozenset(
    ("BLPOP", "BRPOP", "BLMOVE", "BLMPOP", "BRPOPLPUSH", "BZPOPMIN", "BZPOPMAX", "BZMPOP", "WAIT", "WAITAOF")
)
_MAY_BLOCK: Final = frozenset(("XREAD", "XREADGROUP"))
_STATEFUL: Final = frozenset(
    (
        *("SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "MONITOR", "SYNC", "PSYNC", "MULTI", "EXEC", "DISCARD", "WATCH"),
        # In RESP3 they are answered by a push, and so by nothing.
        *("UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"),
        *("UNWATCH", "SELECT", "HELLO", "AUTH", "QUIT", "RESET", "ASKING", "READONLY", "READWRITE"),
    )
)


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
        _check_settings(timeout_s, name)
        self.address = parse_url(url)
        self._settings = RedisSettings(
            self.address, timeout_s=timeout_s, tls=tls, network=network, name=name, seed=seed
        )
        self._link = RedisLink(self._settings, self._find)
        self._links: dict[Place, RedisLink] = {}
        self._slots: dict[int, RedisLink] = {}
        self._idle: list[RespConnection] = []
        self._now: Callable[[], float] | None = None
        self._known: set[tuple[RedisLink, str]] = set()
        self._resent = 0

    def __repr__(self) -> str:
        return f"<RedisClient of {self.address}{', closed' if self._settings.is_closed else ''}>"

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
    def connected(self) -> int:
        """How many shared connections to the server of the URL were made so far: each may be to another one."""
        return self._link.made

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

    async def execute_again(self, *args: Argument, beside: Argument | None = None) -> Reply:
        """`execute`, and again when the connection breaks or the server is not ready yet, until `timeout_s` is over.

        For commands that do no harm when they are carried out twice. One that is about a server and not about a key
        goes, in a cluster, to the node that had the key `beside` when that was used last.
        """
        _check(args)
        return await self._again(args, beside=beside)

    async def execute_together(self, *commands: Sequence[Argument]) -> list[Reply]:
        """Send commands as one transaction (`MULTI` and `EXEC`), which nothing of others comes between.

        Returns their replies. Raises for the first error among them; those before and behind it are carried out,
        unless the server refused it before it began (an unknown command, a full memory): then none is.
        """
        for command in commands:
            _check(tuple(command))
        deadline = self._deadline()
        if self._settings.is_cluster:
            raise StoreError(f"{self.address}: transactions are not supported in a cluster", kind="refused")
        packed = [pack(("MULTI",)), *(pack(tuple(command)) for command in commands), pack(("EXEC",))]
        connection = await self._link.ready(deadline)
        *begun, done = await connection.call_each(packed, deadline=deadline)
        # Where there was no transaction, what was refused while it was gathered says why.
        replies = cast("list[Reply]", done) if isinstance(done, list) else [*begun, done]
        names = ["MULTI", *(str(command[0]) for command in commands), "EXEC"]
        for name, reply in zip(names[1:] if replies is done else names, replies, strict=False):
            if isinstance(reply, ErrorReply):
                self._leave_replica(self._link, connection, reply)
                raise store_error(reply, name)
        return replies

    async def execute_blocking(self, *args: Argument, wait_s: float) -> Reply:
        """Send a command that may block for `wait_s`, as its arguments say, on a connection of its own.

        Cancelling closes that connection; whether something was taken for it is unknown then. Commands that change
        the connection are refused with `ConfigError`: it is the next call's as well.
        """
        _check_kept(args)
        deadline = trio.current_time() + wait_s + self.timeout_s
        connection = await self._take_blocking(deadline)
        try:
            reply = await connection.call(pack(args), deadline=deadline)
        except BaseException:
            await connection.aclose()  # noqa: ASYNC102 - shields itself, bounded
            raise
        is_replica = isinstance(reply, ErrorReply) and reply.code == "READONLY"
        if len(self._idle) < _MOST_IDLE_BLOCKING and not self._settings.is_closed and not is_replica:
            self._idle.append(connection)
        else:
            await connection.aclose()
        if isinstance(reply, ErrorReply):
            raise store_error(reply, str(args[0]))
        return reply

    async def evaluate(self, script: RedisScript, *, keys: Sequence[Argument], args: Sequence[Argument]) -> Reply:
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
            await connection.aclose()  # noqa: ASYNC102 - shields itself, bounded

    async def aclose(self) -> None:
        """Close the connections, also those that block or are subscribed: what is in flight fails.

        Later calls raise `StoreError`.
        """
        self._idle.clear()
        await self._settings.aclose()
        await trio.lowlevel.checkpoint()

    # Sending

    def _deadline(self) -> float:
        self._settings.check_open()
        return trio.current_time() + self._settings.timeout_s

    async def _send(self, args: tuple[Argument, ...], deadline: float, *, beside: Argument | None = None) -> Reply:
        link = self._link_for(args, beside)
        data = pack(args)
        commands: tuple[bytes, ...] = (data,)
        redirects = 0
        while True:
            connection = link.connection
            if connection is None or not connection.is_open:
                connection = await self._ready(link, deadline)
            if connection is None:
                link, commands, redirects = self._link, (data,), 0
                continue
            reply = await connection.call_all(commands, deadline=deadline)
            if type(reply) is not ErrorReply:
                return reply
            if reply.code not in {"MOVED", "ASK"}:
                break
            redirects += 1
            if redirects == _MOST_REDIRECTS:
                raise StoreError(f"{self.address}: the cluster sends a command round and round", kind="locked")
            link, commands = self._redirected(reply, data, connection.name)
        self._leave_replica(link, connection, reply)
        raise store_error(reply, str(args[0]))

    def _leave_replica(self, link: RedisLink, connection: RespConnection, reply: ErrorReply) -> None:
        """Drop the connection if its node was a master and is none any more."""
        if reply.code == "READONLY":
            link.drop(connection, f"{connection.name} is a replica now")

    async def _again(
        self, args: tuple[Argument, ...], *, beside: Argument | None = None, is_in_doubt: bool = False
    ) -> Reply:
        deadline = self._deadline()
        while True:
            try:
                return await self._send(args, deadline, beside=beside)
            except StoreError as exc:
                is_broken = exc.kind in _IN_DOUBT
                is_in_doubt = is_in_doubt or is_broken
                may_send_again = self._may_send_again(exc, deadline)
                if not may_send_again and is_in_doubt and exc.kind in _UNDONE:
                    raise _doubtful(exc) from exc
                if not may_send_again:
                    raise
            self._resent += 1
            if not is_broken:
                await trio.sleep(self._settings.rng.uniform(0.0, SPACING_S))

    def _may_send_again(self, error: StoreError, deadline: float) -> bool:
        """Whether there is time, and it may pass; a time that is over is that of somebody else on the connection."""
        is_passing = error.kind in PASSING or error.kind in _IN_DOUBT
        if error.kind == "read_only":
            is_passing = bool(self.address.master)
        return is_passing and not self._settings.is_closed and trio.current_time() + SPACING_S < deadline

    async def _ready(self, link: RedisLink, deadline: float) -> RespConnection | None:
        """The connection of a link, until the deadline; None for a node of a cluster that an attempt has not reached.

        Attempts on a node are spaced, and so are questions about one that stays unreachable.
        """
        if link is self._link:
            return await link.ready(deadline)
        connection = None
        try:
            connection = await link.ready(deadline, once=True)
        finally:
            if connection is None:
                self._slots = {slot: other for slot, other in self._slots.items() if other is not link}
        return connection

    # Who has what

    def _link_for(self, args: tuple[Argument, ...], beside: Argument | None) -> RedisLink:
        """The link to the node that has the command's key, or the one beside it, as far as the cluster has told."""
        if not self._slots:
            return self._link
        if beside is not None:
            return self._slots.get(_slot(beside), self._link)
        at = 3 if str(args[0]).upper() in {"EVAL", "EVALSHA"} else 1
        return self._slots.get(_slot(args[at]), self._link) if len(args) > at else self._link

    def _redirected(self, reply: ErrorReply, data: bytes, asked: str) -> tuple[RedisLink, tuple[bytes, ...]]:
        """Where the node at `asked` says that a command belongs, and what is to be sent there."""
        parts = reply.text.split(" ")
        place = _place_told(parts[2], asked)
        link = self._links.get(place)
        if link is None:
            link = self._links[place] = RedisLink(self._settings, lambda: self._settings.open_stream(place))
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
        """Where a sentinel says that the master is; each gets its part of the time."""
        deadline = trio.current_time() + self._settings.timeout_s / (1 + len(self.address.places))
        reply: Reply = None
        with trio.CancelScope(deadline=deadline) as scope:
            connection = await self._settings.connect(place, has_credentials=False)
            try:
                question = pack(("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.master))
                reply = await connection.call(question, deadline=deadline)
            finally:
                await connection.aclose()  # noqa: ASYNC102 - shields itself, bounded
        if scope.cancelled_caught:
            raise StoreError(f"the sentinel {place} does not answer", kind="unreachable")
        if isinstance(reply, ErrorReply):
            raise store_error(reply, "SENTINEL")
        if not isinstance(reply, list):
            raise StoreError(f"the sentinel {place} knows no master {self.address.master!r}", kind="unreachable")
        return Place(reply[0].decode(), int(reply[1]))

    async def _open_master(self, place: Place) -> RespConnection:
        """A connection to what is the master itself, not only by the word of a sentinel that may be late."""
        connection = await self._settings.open_stream(place)
        try:
            role = await connection.call(pack(("ROLE",)), deadline=trio.current_time() + self._settings.timeout_s)
            if not (isinstance(role, list) and role and role[0] == b"master"):
                raise StoreError(f"{place} is no master any more, or not yet", kind="unreachable")
        except BaseException:
            await connection.aclose()  # noqa: ASYNC102 - shields itself, bounded
            raise
        return connection

    # Connections for one

    async def _take_blocking(self, deadline: float) -> RespConnection:
        self._deadline()
        # A cancel comes before one is taken, which nobody would have any more.
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return await self._open_own(deadline)

    async def _open_own(self, deadline: float) -> RespConnection:
        if self._settings.is_cluster:
            raise StoreError(f"{self.address}: blocking commands are not supported in a cluster", kind="refused")
        with trio.CancelScope(deadline=deadline):
            return await self._find()
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
        commands = [
            pack((name, *wanted)) for name, wanted in (("SUBSCRIBE", channels), ("PSUBSCRIBE", patterns)) if wanted
        ]
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


def _doubtful(error: StoreError) -> StoreError:
    """The error of a command that was sent before: `error` tells of the last time alone."""
    why = f"{error.message}; it was sent before, and whether it was carried out is unknown"
    return StoreError(why, kind="io")


def _check_settings(timeout_s: object, name: object) -> None:
    if not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise ConfigError("redis: timeout_s must be above 0")
    if not isinstance(name, str) or not name.isascii() or not name.isprintable() or " " in name or not name:
        raise ConfigError("redis: name must be printable ASCII without spaces")


def _check(args: tuple[Argument, ...]) -> None:
    """Refuse what would harm everybody on a shared connection."""
    _check_kept(args)
    name = _word(args[0])
    if name in _BLOCKING or (name in _MAY_BLOCK and "BLOCK" in map(_word, args)):
        raise ConfigError(f"redis: {args[0]!r} blocks the shared connection; there is execute_blocking for that")


def _check_kept(args: tuple[Argument, ...]) -> None:
    """Refuse what would harm whoever uses the connection next."""
    if not args:
        raise ConfigError("redis: a command needs a name")
    name = _word(args[0])
    # Without its reply, a command would be answered with that of the next one.
    is_mute = name == "CLIENT" and len(args) > 1 and _word(args[1]) == "REPLY"
    if is_mute or name in _STATEFUL:
        raise ConfigError(
            f"redis: {args[0]!r} changes the connection, which others use as well; there are execute_together and "
            "subscribe for that"
        )


def _word(arg: Argument) -> str:
    """An argument as a keyword is compared."""
    return (arg.decode(errors="replace") if isinstance(arg, bytes) else str(arg)).upper()


def _place_told(text: str, asked: str) -> Place:
    """The place that a node tells: an IPv6 address without brackets, and no host where it does not know its own."""
    host, _, port = text.rpartition(":")
    return Place(host, int(port)) if host else parse_place(f"{asked.rpartition(':')[0]}:{port}")


def _slot(key: Argument) -> int:
    """The slot of a key: of what stands in its first braces, if anything does."""
    data = key if isinstance(key, bytes) else str(key).encode()
    start = data.find(b"{")
    if start >= 0:
        end = data.find(b"}", start + 1)
        if end > start + 1:
            data = data[start + 1 : end]
    return binascii.crc_hqx(data, 0) % _SLOTS

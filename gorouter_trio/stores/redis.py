"""The Redis store: histories that several processes and machines share, as durable as the server is set up to be."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Final, Self, cast

import trio
from msgspec import Struct

from ..abc import LeaseOffer, SessionLease, StoredHistory, StoredSession
from ..config import Seams
from ..errors import ConfigError, SessionConflictError, StoreError
from ..transport.resp_client import RedisClient, RedisExecutor, RedisScript
from .keys import check_key, prefix_range
from .redis_scripts import ACQUIRE, DELETE, DESCRIBE, HEAD_FORMAT, RELEASE, RENEW, WRITE
from .redis_server import ServerReport, inspect_server, inspect_through, rewrite_files

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from ..network import TlsConfig
    from ..transport.resp import Argument, Reply

__all__ = ["RedisStore", "RedisStoreStatistics"]

_LOG = logging.getLogger("gorouter_trio.stores.redis")
_PAGE = 200
_WAITING_MS = 1000
_RENEWED_AT_A_TIME = 500
_SCAN_COUNT = 500
# About three hundred years; what is much more is no number to the server.
_MOST_TTL_S = 10_000_000_000
_GLOB: Final = str.maketrans({character: f"\\{character}" for character in "*?[]^\\-"})


class RedisStoreStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot: writes that were stored and that were refused, how durable they are, and what is to be feared.

    `warnings` say, one sentence each, in what way the server may lose what was acknowledged.
    """

    writes: int
    conflicts: int
    durability: str
    warnings: tuple[str, ...]


class RedisStore:
    """Sessions in a Redis: `async with RedisStore("redis://localhost") as store: ...`, or `aclose` at the end.

    `client` is a URL, a `RedisClient`, or any object with `async def execute(*args)`; what was given as an object stays
    its maker's to close. `tls` and `timeout_s` are for a URL. All keys begin with `{prefix}:`, braces included, so that
    in a cluster they are in one slot. With `ttl_s` a session goes that long after its last change.

    Any number of tasks, processes and machines may use the store: whoever writes to a session that another has changed
    gets `SessionConflictError`. A write is sent again when its connection breaks, until `timeout_s` is over, and
    counts once. As for what a server may lose, `durability` says what it is set up for once the store was used (before,
    it is "unknown"), and what is to be feared is logged as a warning of `gorouter_trio.stores.redis`.

    Raises `StoreError`, whose `kind` says what happened; from a client of your own, what that raises.
    """

    def __init__(
        self,
        client: str | RedisClient | RedisExecutor,
        *,
        prefix: str = "gorouter",
        ttl_s: float | None = None,
        timeout_s: float = 5.0,
        tls: TlsConfig | ssl.SSLContext | None = None,
        erase_rewrites: bool = True,
        wall: Callable[[], float] | None = None,
    ) -> None:
        _check_settings(prefix, ttl_s)
        self._owns_client = isinstance(client, str)
        self._client: RedisClient | RedisExecutor = (
            RedisClient(client, timeout_s=timeout_s, tls=tls) if isinstance(client, str) else client
        )
        if not callable(getattr(self._client, "execute", None)):
            raise ConfigError("client: must be a URL, or have `async def execute(*args)`")
        self._own = self._client if isinstance(self._client, RedisClient) else None
        self._prefix = prefix
        self._ttl_ms = 0 if ttl_s is None else max(1, round(ttl_s * 1000))
        self._erase_rewrites = erase_rewrites
        seams = Seams()
        self._wall = wall or seams.wall
        self._write_ids = map(f"{seams.new_id()}-{{}}".format, itertools.count(1))
        self._sessions, self._leases = f"{{{prefix}}}:s:", f"{{{prefix}}}:l:"
        self._waiting = f"{{{prefix}}}:w:"
        self._index, self._due, self._token = f"{{{prefix}}}:sessions", f"{{{prefix}}}:due", f"{{{prefix}}}:token"
        self._versions = f"{{{prefix}}}:versions"
        self._report = ServerReport()
        self._inspected = -1
        self._inspecting = trio.Lock()
        self._writes = self._conflicts = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<RedisStore on {self._client!r}, prefix {self._prefix!r}, {self.durability}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def durability(self) -> str:
        """What the server keeps over a crash: "aof-always", "aof-everysec", "aof-no", "rdb", "none", or "unknown"."""
        return self._report.durability

    def statistics(self) -> RedisStoreStatistics:
        """A snapshot; cheap."""
        return RedisStoreStatistics(
            writes=self._writes,
            conflicts=self._conflicts,
            durability=self.durability,
            warnings=self._report.warnings,
        )

    async def check(self) -> RedisStoreStatistics:
        """Connect, and look at how the server is set up, now instead of at the first use. Raises `StoreError`."""
        self._inspected = -1
        await self._ready()
        return self.statistics()

    # Reading

    async def load(self, key: str) -> StoredHistory:
        """The whole session; one that was never written has version 0 and no entries."""
        name = self._session(key)
        await self._ready()
        items = cast("list[bytes]", await self._ask("LRANGE", name, 0, -1))
        if not items:
            return StoredHistory(0, ())
        return StoredHistory(_Head(items[0], key).version, tuple(items[1:]))

    async def version(self, key: str) -> int:
        """The version of the session, 0 for one that was never written."""
        name = self._session(key)
        await self._ready()
        head = cast("bytes | None", await self._ask("LINDEX", name, 0))
        return 0 if head is None else _Head(head, key).version

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        """Keys with the prefix, in code-point order, above `after`."""
        return [session.key for session in await self.list_sessions(prefix, after=after, limit=limit)]

    async def list_sessions(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[StoredSession]:
        """What is known of these sessions besides their entries. The server is asked page by page, in short steps."""
        start, end = prefix_range(prefix)
        below = b"(" + end if end else b"+"
        floor = check_key(after) if after else b""
        above = b"(" + floor if floor >= start and floor else b"[" + start if start else b"-"
        await self._ready()
        found: list[StoredSession] = []
        while len(found) < limit:
            size = min(_PAGE, limit - len(found))
            page = await self._run(DESCRIBE, (self._index, self._versions), (above, below, size, self._sessions))
            count, last, rows = cast("tuple[int, bytes, list[tuple[bytes, bytes, int]]]", page)
            found += [_Head(head, "").describe(key.decode(), entries) for key, head, entries in rows]
            above = b"(" + last
            if count < size:
                break
        else:
            await trio.lowlevel.checkpoint()
        return found

    # Writing

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Add entries; raises `SessionConflictError` when the version is another one, or somebody has a lease."""
        return await self._write("a", key, entries, expected_version=expected_version)

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Replace all entries; raises `SessionConflictError` as `append` does."""
        return await self._write("r", key, entries, expected_version=expected_version)

    async def append_leased(
        self, key: str, entries: Sequence[bytes], *, expected_version: int, lease: SessionLease, lease_s: float
    ) -> int:
        """`append` of the one who has the session."""
        return await self._write(
            "a", key, entries, expected_version=expected_version, lease=lease, lease_ms=_milliseconds(lease_s)
        )

    async def rewrite_leased(
        self, key: str, entries: Sequence[bytes], *, expected_version: int, lease: SessionLease, lease_s: float
    ) -> int:
        """`rewrite` of the one who has the session."""
        return await self._write(
            "r", key, entries, expected_version=expected_version, lease=lease, lease_ms=_milliseconds(lease_s)
        )

    async def delete(self, key: str) -> bool:
        """Remove the session; False when there was none, or when it went while a broken connection hid the answer."""
        name = self._session(key)
        await self._ready()
        return bool(await self._run(DELETE, (name, self._index, self._due, self._versions), (check_key(key),)))

    async def erase(self, key: str) -> bool:
        """Remove the session, and have the server write its files anew, which copies of it stand in.

        Waits until that is done. Raises `StoreError` of the kind "refused" or "denied" when the server does not let
        its files be rewritten: the session is removed then, and its text may stand in them until the server does so by
        itself. `erase_rewrites=False` leaves it at that without an error.
        """
        existed = await self.delete(key)
        if self._erase_rewrites:
            await rewrite_files(self._ask_node)
        return existed

    async def reindex(self) -> int:
        """Put sessions into the index that are not in it, as after a restore of single keys; returns how many were.

        Goes through all keys of the server with SCAN, in short steps.
        """
        await self._ready()
        # In a cluster this tells who has the sessions.
        await self._ask("ZCARD", self._index)
        pattern = f"{self._sessions.translate(_GLOB)}*"
        cursor, added, skip = b"0", 0, len(self._sessions.encode())
        while True:
            reply = await self._ask_node("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_COUNT)
            cursor, names = cast("tuple[bytes, list[bytes]]", reply)
            for name in names:
                added += cast("int", await self._ask("ZADD", self._index, 0, name[skip:]))
            if cursor == b"0":
                return added

    # Leases

    async def acquire_lease(self, key: str, *, owner: str, lease_s: float) -> LeaseOffer:
        """Take the session for `lease_s` seconds, unless somebody else has it."""
        name = self._session(key)
        await self._ready()
        keys = (self._lease(key), name, self._token, self._waiting.encode() + check_key(key))
        reply = await self._run(ACQUIRE, keys, (owner, _milliseconds(lease_s), _WAITING_MS))
        token, told = cast("tuple[int, int]", reply)
        if token < 0:
            raise _unreadable(token, key)
        if token == 0:
            return LeaseOffer(None, held_s=max(told, 0) / 1000)
        return LeaseOffer(SessionLease(key, owner, token), told)

    async def renew_leases(self, leases: Sequence[SessionLease], *, lease_s: float) -> Sequence[SessionLease]:
        """Hold them for `lease_s` from now on; returns those that somebody else has taken over."""
        await self._ready()
        lost: list[SessionLease] = []
        for part in _parts(leases):
            values: list[Argument] = [_milliseconds(lease_s), *map(_value, part)]
            numbers = await self._run(RENEW, [self._lease(lease.key) for lease in part], values)
            lost += [part[number - 1] for number in cast("list[int]", numbers)]
        return lost

    async def release_leases(self, leases: Sequence[SessionLease]) -> None:
        """Give them up; those that somebody else has taken over are theirs."""
        await self._ready()
        for part in _parts(leases):
            await self._run(RELEASE, [self._lease(lease.key) for lease in part], list(map(_value, part)))

    async def aclose(self) -> None:
        """Close the connection where it is the store's own; what is in flight fails, later calls raise."""
        self._is_closed = True
        if self._owns_client and self._own is not None:
            await self._own.aclose()
        else:
            await trio.lowlevel.checkpoint()

    # Within

    def _session(self, key: str) -> bytes:
        return self._sessions.encode() + check_key(key)

    def _lease(self, key: str) -> bytes:
        return self._leases.encode() + check_key(key)

    async def _write(
        self,
        how: str,
        key: str,
        entries: Sequence[bytes],
        *,
        expected_version: int,
        lease: SessionLease | None = None,
        lease_ms: int = 0,
    ) -> int:
        member = check_key(key)
        size = sum(map(len, entries))
        keys = (self._session(key), self._index, self._lease(key), self._due, self._versions)
        args: list[Argument] = [how, expected_version, repr(float(self._wall())), size, next(self._write_ids)]
        args += ["" if lease is None else _value(lease), lease_ms, member, self._ttl_ms, self._sessions]
        args += entries
        await self._ready()
        code, told = cast("tuple[int, int]", await self._run(WRITE, keys, args))
        if code == 1:
            self._writes += 1
            return told
        self._conflicts += 1
        if code == 0:
            raise SessionConflictError(f"the session is at version {told}, not at {expected_version}")
        if code == -1:
            raise SessionConflictError(f"the session is owned by another process for {max(told, 0) / 1000:.1f} s more")
        raise _unreadable(code, key)

    async def _ready(self) -> None:
        """Look at the server when it is a new connection, and maybe another server, that is to be used."""
        if self._is_closed:
            raise StoreError(f"{self!r} is closed", kind="closed")
        connected = 0 if self._own is None else self._own.connected
        if connected == self._inspected:
            return
        async with self._inspecting:
            if self._inspected == (0 if self._own is None else self._own.connected):
                return
            await trio.lowlevel.checkpoint_if_cancelled()
            inspect = inspect_through if self._own is None else inspect_server
            report = await inspect(self._ask, has_ttl=self._ttl_ms > 0)
            for warning in report.warnings:
                if warning not in self._report.warnings:
                    _LOG.warning("%r: %s", self._client, warning)
            self._report = report
            self._inspected = 0 if self._own is None else self._own.connected

    async def _ask(self, *command: Argument) -> Reply:
        """A command that may be carried out twice."""
        if self._own is not None:
            return await self._own.execute_again(*command)
        return await self._client.execute(*command)

    async def _ask_node(self, *command: Argument) -> Reply:
        """The same of one that is about the server which has the sessions, and not about a key."""
        if self._own is not None:
            return await self._own.execute_again(*command, beside=self._index)
        return await self._client.execute(*command)

    async def _run(self, script: RedisScript, keys: Sequence[Argument], args: Sequence[Argument]) -> Reply:
        if self._own is not None:
            return await self._own.evaluate(script, keys=keys, args=args)
        # Whether another client's error means that the server has not the script, only that client knows.
        return await self._client.execute("EVAL", script.source, len(keys), *keys, *args)


def _check_settings(prefix: object, ttl_s: object) -> None:
    if not isinstance(prefix, str) or not prefix or "{" in prefix or "}" in prefix or not prefix.isprintable():
        raise ConfigError("prefix: must be a printable text without braces that is not empty")
    if ttl_s is not None and not (isinstance(ttl_s, (int, float)) and 0 < ttl_s <= _MOST_TTL_S):
        raise ConfigError(f"ttl_s: must be above 0 and at most {_MOST_TTL_S:,}; None keeps sessions for ever")


class _Head:
    """The first item of a session; raises `StoreError` for one that is none, or of a newer version."""

    __slots__ = ("bytes", "updated_at_s", "version")

    def __init__(self, data: bytes, key: str) -> None:
        parts = data.split(b" ")
        if parts[0][:2] == b"gr" and parts[0][2:].isdigit() and int(parts[0][2:]) > HEAD_FORMAT:
            raise _unreadable(-3, key)
        try:
            _, version, size, at, _ = parts
            self.version, self.bytes, self.updated_at_s = int(version), int(size), float(at)
        except ValueError:
            raise _unreadable(-2, key) from None

    def describe(self, key: str, entries: int) -> StoredSession:
        return StoredSession(key, self.version, entries, self.bytes, self.updated_at_s)


def _unreadable(code: int, key: str) -> StoreError:
    about = f"session {key!r}" if key else "a session"
    if code == -3:
        return StoreError(f"{about} was written by a newer version; this one knows format {HEAD_FORMAT}", kind="newer")
    return StoreError(f"what the server has in the place of {about} is something else's", kind="foreign")


def _value(lease: SessionLease) -> str:
    return f"{lease.token} {lease.owner}"


def _milliseconds(seconds: float) -> int:
    return max(1, round(min(seconds, _MOST_TTL_S) * 1000))


def _parts(leases: Sequence[SessionLease]) -> list[Sequence[SessionLease]]:
    return [leases[at : at + _RENEWED_AT_A_TIME] for at in range(0, len(leases), _RENEWED_AT_A_TIME)]

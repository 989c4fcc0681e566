"""Several gateways in front of one Redis: whose a session is, and the way to its owner.

Theory of operation. A gateway that lives says so, every third of `member_s`; its word ends by itself. A session belongs
to the gateway that asked for it first, for as long as that one lives; then whoever asks next has it, under a higher
number. Requests are passed on to the owner over a connection like any client's, with the client's own token, so that
the owner decides by itself what they may do; a proof of the common secret says only that they were passed on, and
are not to be passed on again.

Who owns a session here decides where its turns run, and no more: what may be written is decided by the store, whose own
leases have fencing tokens. A gateway that slept through its end can hold up nobody and overwrite nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Final, cast

import trio
from msgspec import Struct

from .._contain import contain
from ..errors import ConnectError, GorouterError, StoreError
from ..transport.resp_client import RedisClient, RedisScript
from ..wire.codec import encode_json
from .link import LinkBrokenError, open_link

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..secret import Secret
    from .config import ClusterConfig
    from .link import Link

__all__ = ["PEER_HEADER", "Cluster", "Owner"]

PEER_HEADER: Final = "X-Gateway-Peer"

_LOG = logging.getLogger(__name__)
_OWNED_MS: Final = 3_600_000
_BEATS: Final = 3
_PROOF_S: Final = 60.0
_MOST_NONCES: Final = 10_000
_IDLE_S: Final = 60.0

_CLAIM_SOURCE: Final = """
local held = redis.call('GET', KEYS[1])
if held then
  local token, id = string.match(held, '^(%d+) (.*)$')
  local url = id == ARGV[1] and ARGV[2] or redis.call('GET', ARGV[4] .. id)
  if url then
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return {token, id, url}
  end
end
local token = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], token .. ' ' .. ARGV[1], 'PX', ARGV[3])
return {tostring(token), ARGV[1], ARGV[2]}
"""
# The name that a server knows a script by, and no secret.
_CLAIM: Final = RedisScript(_CLAIM_SOURCE, hashlib.sha1(_CLAIM_SOURCE.encode(), usedforsecurity=False).hexdigest())
"""Whose a session is (`KEYS` the session, the counter of tokens): token, id and URL of its owner, who lives."""


class Owner(Struct, frozen=True):
    """Whose a session is; `token` is higher than that of everybody who had it before."""

    token: int
    member: str
    url: str
    is_self: bool


class Cluster:
    """This gateway among the others; `run` has to run meanwhile. Links to others are tasks of `nursery`."""

    def __init__(self, config: ClusterConfig, *, name: str, nursery: trio.Nursery, wall: Callable[[], float]) -> None:
        self._config = config
        self._owns_redis = isinstance(config.redis, str)
        redis = config.redis
        self._redis = RedisClient(redis) if isinstance(redis, str) else redis
        self._nursery = nursery
        self._wall = wall
        self.member = f"{name}-{secrets.token_hex(6)}"
        prefix = f"{{{config.prefix}}}:g:"
        self._members, self._sessions, self._tokens = f"{prefix}m:", f"{prefix}s:", f"{prefix}token"
        self._links: dict[tuple[str, Secret | None], _PeerLink] = {}
        self._nonces: OrderedDict[str, float] = OrderedDict()
        self._has_left = False
        self._speaking = trio.Lock()
        self.forwarded = 0

    def __repr__(self) -> str:
        return f"<Cluster member {self.member!r}, {len(self._links)} links>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Say that this gateway lives, until it leaves or is cancelled.

        Raises `StoreError` when that cannot even be begun.
        """
        await self._beat()
        task_status.started()
        while not self._has_left:
            await trio.sleep(self._config.member_s / _BEATS)
            failures: list[Exception] = []
            await contain(self._beat, report=failures.append)
            for exc in failures:
                _LOG.warning("a sign of life could not be given: %s", exc)

    async def _beat(self) -> None:
        ttl_ms = max(1, round(self._config.member_s * 1000))
        # One word at a time: the last one is that it has left.
        async with self._speaking:
            if not self._has_left:
                await self._redis.execute("SET", self._members + self.member, self._config.url, "PX", ttl_ms)

    async def leave(self) -> None:
        """Let others have the sessions, for good: this gateway takes nothing new."""
        self._has_left = True
        failures: list[Exception] = []
        async with self._speaking:
            await contain(partial(self._redis.execute, "DEL", self._members + self.member), report=failures.append)

    async def aclose(self) -> None:
        """Close the connection to Redis, where it was made here."""
        if self._owns_redis:
            await self._redis.aclose()

    # Whose a session is

    async def owner(self, *names: str) -> Owner:
        """Whose the session with these names is: this gateway's from now on, if nobody's. Raises `StoreError`."""
        key = self._sessions + hashlib.sha256(encode_json(names)).hexdigest()
        args = (self.member, self._config.url, _OWNED_MS, self._members)
        reply = await self._redis.evaluate(_CLAIM, keys=(key, self._tokens), args=args)
        token, member, url = (part.decode() for part in cast("list[bytes]", reply))
        return Owner(int(token), member, url, member == self.member)

    # The way to others

    async def link(self, url: str, token: Secret | None) -> Link:
        """A connection to another gateway in the name of a client; raises `LinkBrokenError`, `ConnectError`."""
        known = self._links.get((url, token))
        if known is None or not known.is_good:
            known = self._links[url, token] = _PeerLink()
            self._nursery.start_soon(self._hold, url, token, known)
        await known.ready.wait()
        if known.link is None:
            raise known.failure or ConnectError(f"the gateway at {url} cannot be reached")
        return known.link

    async def _hold(self, url: str, token: Secret | None, peer: _PeerLink) -> None:
        failures: list[Exception] = []
        try:
            await contain(partial(self._open, url, token, peer), report=failures.append)
        finally:
            peer.failure = _first_failure(failures)
            peer.is_over = True
            peer.link = None
            peer.ready.set()
            if self._links.get((url, token)) is peer:
                del self._links[url, token]

    async def _open(self, url: str, token: Secret | None, peer: _PeerLink) -> None:
        headers = [(PEER_HEADER, self._proof())]
        async with open_link(url, token=token, tls=self._config.tls, headers=headers, agent="gateway") as link:
            peer.link = link
            peer.ready.set()
            while link.broken is None:
                with trio.move_on_after(_IDLE_S) as scope:
                    await link.closed()
                if scope.cancelled_caught and link.is_idle:
                    # Closing takes a moment, in which nobody may begin anything on it.
                    peer.is_over = True
                    return

    # Proofs

    def _proof(self) -> str:
        text = f"{self._wall():.3f} {secrets.token_hex(8)}"
        return f"{text} {self._mac(text)}"

    def _mac(self, text: str) -> str:
        return hmac.digest(self._config.secret.reveal().encode(), text.encode(), "sha256").hex()

    def is_peer(self, proof: str) -> bool:
        """Whether who shows this knows the secret of the cluster; a proof is good once, and for a minute."""
        text, _, mac = proof.rpartition(" ")
        at, _, nonce = text.partition(" ")
        if not proof.isascii() or not hmac.compare_digest(self._mac(text), mac) or nonce in self._nonces:
            return False
        now = self._wall()
        self._nonces[nonce] = now
        while len(self._nonces) > _MOST_NONCES or next(iter(self._nonces.values())) < now - 2 * _PROOF_S:
            self._nonces.popitem(last=False)
        return abs(now - float(at)) <= _PROOF_S


class _PeerLink:
    """A link that is being opened, is there, or has ended."""

    def __init__(self) -> None:
        self.ready = trio.Event()
        self.link: Link | None = None
        self.failure: Exception | None = None
        self.is_over = False

    @property
    def is_good(self) -> bool:
        """Whether a request can be begun on it, now or when it is open."""
        return not self.is_over and (self.link is None or self.link.broken is None)


def _first_failure(failures: list[Exception]) -> Exception | None:
    exc: BaseException | None = failures[0] if failures else None
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    if exc is None or isinstance(exc, (LinkBrokenError, GorouterError, StoreError)):
        return exc
    return ConnectError(f"the gateway cannot be reached: {type(exc).__name__}")

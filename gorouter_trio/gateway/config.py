"""The gateway's settings: what it lets in, how much of it, and how long it waits. All of it has a bound."""

from __future__ import annotations

import math
import ssl
from collections.abc import Collection, Mapping
from typing import cast

import msgspec
from msgspec import Struct

from ..errors import ConfigError
from ..network import TlsConfig
from ..secret import Secret
from ..transport.resp_address import parse_url
from ..transport.resp_client import RedisClient

__all__ = ["ClusterConfig", "GatewayConfig", "GatewayLimits"]

_MIN_SECRET = 16
# Clients are told of them, in JSON, which knows no infinity.
_TOLD = ("max_message_bytes", "max_requests", "buffer_bytes", "resume_s", "drain_s")


class GatewayLimits(Struct, frozen=True, kw_only=True):
    """Ceilings; each is enforced against the one connection that passes it."""

    max_connections: int = 20_000
    """WebSocket connections at once, all together; one more is closed with 1013."""
    max_unauthenticated: int = 256
    """Connections at once that have not said who they are; one more is closed before it is read."""
    max_per_address: int = 256
    """Connections at once from one address (IPv6: from one /64). Behind a proxy, everybody has its address."""
    max_per_principal: int = 64
    """Connections at once of one principal."""
    max_http_connections: int = 2_000
    """Plain HTTP connections at once; one more is answered 503."""
    authenticate_s: float = 5.0
    """From the accept to the `hello`, handshakes of TLS and WebSocket included; then the connection is closed.

    At most: a connection has 0.7 to 1.0 of it, so that a crowd that came together does not have to be closed together.
    """
    max_message_bytes: int = 1_048_576
    """A message of a client; a longer one closes with 1009, as soon as its frames say so."""
    max_fragments: int = 256
    """Frames that one message may come in."""
    frames_per_s: float = 200.0
    """Frames of a connection, with `frame_burst` at once."""
    frame_burst: int = 1_000
    control_frames_per_s: float = 5.0
    """Pings and pongs of a connection, with `control_frame_burst` at once."""
    control_frame_burst: int = 30
    messages_per_s: float = 50.0
    """Messages of a connection, with `message_burst` at once."""
    message_burst: int = 200
    min_bytes_per_s: float = 1_024.0
    """How fast a message that was begun has to come, after a grace of `message_grace_s`."""
    message_grace_s: float = 5.0
    max_requests: int = 64
    """Requests at once on one connection; one more is refused."""
    max_turns_per_principal: int = 256
    """Turns at once of one principal, over all connections; one more is refused."""
    buffer_bytes: int = 262_144
    """Memory for messages about one turn, kept for whoever reads slowly or comes back; the oldest go first."""
    max_kept_bytes: int = 67_108_864
    """The same for all turns that have ended, together."""
    resume_s: float = 60.0
    """How long an ended turn can still be joined by its `turn_id`."""
    slow_reader_s: float = 10.0
    """How long a client may leave a gap in its stream unread before it is closed with 4413."""
    send_s: float = 10.0
    """How long one frame may take to leave; then the connection is closed."""
    ping_s: float = 20.0
    """Silence after which a client is pinged; after as much again without a pong it is closed."""
    recheck_s: float = 30.0
    """How often the principal of every connection is looked at again; a revocation is noticed within `revoke_s`."""
    revoke_s: float = 0.25
    drain_s: float = 10.0
    """How long running turns may go on after the gateway was told to stop."""
    history_page_bytes: int = 262_144
    """About how long a page of a history is."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0 or math.isnan(value):
                raise ConfigError(f"limits.{name}: must be more than zero, not {value!r}")
        for name in _TOLD:
            if math.isinf(getattr(self, name)):
                raise ConfigError(f"limits.{name}: must be finite: clients are told of it")


class ClusterConfig(Struct, frozen=True, kw_only=True):
    """Several gateways in front of one store that can lease sessions: a `RedisStore`.

    `redis` is where they find each other, a URL or a `RedisClient`, `prefix` what its keys begin with. `url` is where
    the others reach this one, such as `ws://10.0.0.7:8080`; where it is empty, the address that it listens at.
    `secret` is known to all of them. `member_s` is how long a gateway that says nothing is still believed to live.
    `tls` are the settings for wss between them.
    """

    redis: str | RedisClient
    secret: Secret
    url: str = ""
    prefix: str = "gorouter"
    member_s: float = 5.0
    tls: TlsConfig | ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.redis, str) and not callable(getattr(self.redis, "execute", None)):
            raise ConfigError(f"cluster.redis: must be a URL or a RedisClient, not a {type(self.redis).__name__}")
        if isinstance(self.redis, str):
            parse_url(self.redis)
        if not isinstance(cast("object", self.prefix), str) or not isinstance(cast("object", self.url), str):
            raise ConfigError("cluster.prefix and cluster.url: must be texts")
        if self.url and not self.url.startswith(("ws://", "wss://")):
            raise ConfigError(f"cluster.url: must begin with ws:// or wss://, not {self.url!r}")
        given = cast("object", self.secret)
        if not isinstance(given, (str, Secret)):
            raise ConfigError(f"cluster.secret: must be a text or a Secret, not a {type(given).__name__}")
        secret = given if isinstance(given, Secret) else Secret(given)
        if len(secret.reveal()) < _MIN_SECRET:
            raise ConfigError(f"cluster.secret: must have at least {_MIN_SECRET} characters")
        msgspec.structs.force_setattr(self, "secret", secret)
        member_s = cast("object", self.member_s)
        is_number = isinstance(member_s, (int, float)) and not isinstance(member_s, bool)
        if not is_number or not 0 < self.member_s < math.inf:
            raise ConfigError(f"cluster.member_s: must be a number of seconds above zero, not {member_s!r}")

    def __repr__(self) -> str:
        # The URL has the password in it.
        redis = parse_url(self.redis) if isinstance(self.redis, str) else self.redis
        return f"ClusterConfig(redis={redis}, url={self.url!r}, prefix={self.prefix!r}, member_s={self.member_s})"


# Anything but a bool would let in, or let through, by being true.
_KINDS: Mapping[str, tuple[type, ...]] = {
    "anonymous": (bool,),
    "allow_system": (bool,),
    "limits": (GatewayLimits,),
    "cluster": (ClusterConfig, type(None)),
    "name": (str,),
}


class GatewayConfig(Struct, frozen=True, kw_only=True):
    """Who may connect and what they may ask for. By default nobody may who has no token.

    `origins` are the web origins whose pages may connect, exactly as browsers send them (`https://app.example.com`);
    what sends no Origin is no browser, and is let in by its token alone. `anonymous` lets everybody in, where the
    client has no `security`: all of them then share all sessions. `models` are the models that may be asked for, None
    for any. `allow_system` says whether askers may bring system messages of their own, by whatever way.
    `operator_roles` may see what the gateway does. `approver_roles` may approve tools, and nobody else; without them,
    whoever asked.
    """

    origins: Collection[str] = ()
    anonymous: bool = False
    models: Collection[str] | None = None
    allow_system: bool = True
    operator_roles: Collection[str] = ()
    approver_roles: Collection[str] = ()
    limits: GatewayLimits = GatewayLimits()
    cluster: ClusterConfig | None = None
    name: str = "gateway"

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            given = getattr(self, name)
            if not isinstance(given, kinds):
                wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
                raise ConfigError(f"{name}: must be {wanted}, not a {type(given).__name__}")
        for name in ("origins", "operator_roles", "approver_roles"):
            self._freeze(name)
        if self.models is not None:
            self._freeze("models")
        for origin in self.origins:
            _check_origin(origin)

    def _freeze(self, name: str) -> None:
        given = getattr(self, name)
        is_several = isinstance(given, Collection) and not isinstance(given, (str, bytes))
        if not is_several or not all(isinstance(item, str) and item for item in given):
            raise ConfigError(f"{name}: must be several texts, not {given!r}")
        msgspec.structs.force_setattr(self, name, frozenset(given))


def _check_origin(origin: str) -> None:
    scheme, _, rest = origin.partition("://")
    if scheme not in {"http", "https"} or not rest or "/" in rest or "*" in rest or rest != rest.lower():
        raise ConfigError(f"origins: must look like https://app.example.com, in lower case, not {origin!r}")

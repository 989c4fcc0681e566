"""Where a Redis is and who asks: the URL forms, checked before anything is connected. Pure.

redis://[[user]:password@]host[:port][/db]           TCP
rediss://...                                         the same with TLS
unix://[[user]:password@]/path/to/socket[?db=1]      a Unix domain socket
redis+sentinel://[[user]:password@]host[:port][,host[:port]...]/name[/db]
rediss+sentinel://...                                the master that the sentinels name; TLS with all of them
"""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl, unquote

from msgspec import Struct

from ..errors import ConfigError
from ..secret import Secret

__all__ = ["Place", "RedisAddress", "parse_place", "parse_url"]

_FORMS: Final = "redis://, rediss://, unix://, redis+sentinel:// or rediss+sentinel://"
_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379


class Place(Struct, frozen=True):
    """A server: a host and a port, or the path of a socket in the place of the host and port 0."""

    host: str
    port: int

    def __str__(self) -> str:
        if not self.port:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class RedisAddress(Struct, frozen=True, kw_only=True):
    """What a URL says. With a `master`, `places` are sentinels. The password shows itself nowhere."""

    places: tuple[Place, ...]
    has_tls: bool = False
    username: str = ""
    password: Secret | None = None
    db: int = 0
    master: str = ""

    def __str__(self) -> str:
        kind = "Redis at" if not self.master else f"the Redis {self.master!r} of the sentinels at"
        db = f", database {self.db}" if self.db else ""
        return f"{kind} {', '.join(map(str, self.places))}{db}"


def parse_url(url: str) -> RedisAddress:
    """The address that `url` is; raises `ConfigError` that says what is wrong with it, without the password."""
    if not isinstance(url, str):
        raise ConfigError(f"redis: the URL must be a text, not a {type(url).__name__}")
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in {"redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel"}:
        raise ConfigError(f"redis: the URL must begin with {_FORMS}")
    rest, _, query = rest.partition("?")
    # A path may have an @ in it.
    user, _, rest = ("", "", rest) if rest.startswith("/") else rest.rpartition("@")
    username, password = _parse_user(user)
    db, options = "", dict(parse_qsl(query, keep_blank_values=True))
    if options.keys() - {"db"}:
        # Not said which: a password with a ? in it that is not written %3F would be in there.
        raise ConfigError("redis: the URL has an option that is not known behind its ?; there is: db")
    authority, _, path = rest.partition("/")
    master = ""
    if scheme == "unix":
        places: tuple[Place, ...] = (_socket(rest),)
    else:
        is_sentinel = scheme.endswith("+sentinel")
        if is_sentinel:
            master, _, path = path.partition("/")
        db = path
        places = _places(authority, is_sentinel=is_sentinel)
        if is_sentinel and not master:
            raise ConfigError("redis: the URL must name the master that the sentinels watch: .../name or .../name/db")
    return RedisAddress(
        places=places,
        has_tls=scheme.startswith("rediss"),
        username=username,
        password=password,
        db=_number(options.get("db", db) or "0", "database", most=2**31),
        master=unquote(master),
    )


def parse_place(text: str, *, port: int = _PORT) -> Place:
    """A host with or without its port; raises `ConfigError`."""
    host, separator, number = text.rpartition(":")
    if not separator or "]" in number or (host.count(":") and not host.startswith("[")):
        host, number = text, str(port)
    host = host.removeprefix("[").removesuffix("]")
    if not host:
        raise ConfigError("redis: the URL has no host")
    return Place(unquote(host), _number(number, "port", most=65_535, least=1))


def _places(authority: str, *, is_sentinel: bool) -> tuple[Place, ...]:
    port = _SENTINEL_PORT if is_sentinel else _PORT
    named = authority.split(",") if is_sentinel else [authority]
    return tuple(parse_place(text, port=port) for text in named)


def _socket(path: str) -> Place:
    if not path.startswith("/"):
        raise ConfigError("redis: the URL of a socket must have its absolute path: unix:///path/to/socket")
    return Place(unquote(path), 0)


def _parse_user(text: str) -> tuple[str, Secret | None]:
    username, _, password = text.partition(":")
    if username and not password:
        raise ConfigError("redis: the URL has a user without a password; a password alone is written :password@")
    return unquote(username), Secret(unquote(password)) if password else None


def _number(text: str, what: str, *, most: int, least: int = 0) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise ConfigError(f"redis: the {what} in the URL must be a whole number from {least} to {most}")
    return int(text)

"""Settings: frozen values with their defaults, checked when they are made.

Durations are seconds (`_s`), sizes bytes, tokens tokens. A wrong value raises `ConfigError` that
names the field and what it takes.
"""

from __future__ import annotations

import math
import os
import random
import ssl
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from .errors import BadRequestError, ConfigError
from .network import Proxy, ProxyEnvironment, TlsConfig, parse_proxy, read_proxy_environment
from .secret import Secret, is_header_text
from .wire.codec import encode_call
from .wire.messages import Message
from .wire.preferences import ProviderPreferences, ResponseFormat
from .wire.requests import ChatKeywords

if TYPE_CHECKING:
    from .wire.mail import CallSettings

__all__ = [
    "DEFAULT_BASE_URL",
    "DEFAULT_MODEL",
    "DIRECT",
    "ClientConfig",
    "ContextPolicy",
    "Deadlines",
    "DoubleTexting",
    "PoolLimits",
    "RetryPolicy",
    "Seams",
    "Secret",
    "SessionConfig",
    "Summarise",
]

DEFAULT_BASE_URL = "https://openrouter.ai/api/v1"
DEFAULT_MODEL = "openai/gpt-4o-mini"

DIRECT = "direct"
"""As `proxy`: no proxy, whatever the environment says."""

DoubleTexting = Literal["queue", "reject", "interrupt", "merge"]
"""What a session does with a message that comes while a turn runs: take it afterwards, refuse it with
`SessionBusyError`, interrupt the running turn for it, or take it afterwards in one turn with the others that came."""

Summarise = Callable[[Sequence[Message]], Awaitable[Message | Mapping[str, object] | str]]
"""Makes one message, or the text of a system message, that stands for those given."""


def _check_at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: must be a whole number of at least {least}, not {value!r}")


def _check_seconds(name: str, value: object, *, zero: bool = False, endless: bool = True) -> None:
    """A duration; `zero` and `endless` say whether 0 and infinity are ones."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}: must be a number of seconds, not {value!r}")
    if not value >= 0 or (value == 0 and not zero) or (value == math.inf and not endless):
        bounds = ("zero or more" if zero else "more than zero") + ("" if endless else " and finite")
        raise ConfigError(f"{name}: must be {bounds}, not {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: must be one of {', '.join(choices)}, not {value!r}")


def _check_type(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise ConfigError(f"{name}: must be {wanted}, not a {type(value).__name__}")


def _check_header(name: str, value: str | None) -> None:
    """Refuse what cannot stand in an HTTP header."""
    _check_type(name, value, (str, type(None)))
    if value is not None and not is_header_text(value):
        raise ConfigError(f"{name}: must be printable ASCII text, not {value!r}")


def _check_base_url(url: str, *, insecure_http: bool) -> None:
    _check_type("base_url", url, str)
    # Before urlsplit, which drops tabs and line ends and keeps everything else.
    if not is_header_text(url) or " " in url or "\\" in url:
        raise ConfigError("base_url: must be printable ASCII without spaces; write other characters percent-encoded")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError("base_url: the host or the port is not one") from None
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise ConfigError("base_url: must not carry a query, a fragment or credentials")
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise ConfigError(f"base_url: must look like https://host/path, not {url!r}")
    loopback = parts.hostname in {"localhost", "127.0.0.1", "::1"}
    if parts.scheme == "http" and not loopback and not insecure_http:
        raise ConfigError(
            f"base_url: http would send the key to {parts.hostname} in the clear; use https or set insecure_http=True"
        )


def _check_socket_path(path: str) -> None:
    # The kernel's own limit, with the byte that ends it (unix(7)).
    if not path or len(os.fsencode(path)) > 107:
        raise ConfigError(f"unix_socket: must be a path of 1 to 107 bytes, not {path!r}")


class Seams(Struct, frozen=True, kw_only=True):
    """Where chance and the world come in: replaced by tests and simulations.

    `wall` gives seconds since the epoch. Durations are measured on the trio clock, which
    `trio.run(clock=...)` sets. `random` draws jitter. `new_id` makes turn ids.
    """

    wall: Callable[[], float] = time.time
    random: random.Random = msgspec.field(default_factory=random.Random)
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex

    def __post_init__(self) -> None:
        for name in ("wall", "new_id"):
            if not callable(getattr(self, name)):
                raise ConfigError(f"seams.{name}: must be callable")
        _check_type("seams.random", self.random, random.Random)


class RetryPolicy(Struct, frozen=True, kw_only=True):
    """When a failed request is sent again, and after how long.

    The delay before retry n is drawn from [0, min(base_delay_s * 2**n, max_delay_s)], and is at
    least the server's Retry-After; a Retry-After above `retry_after_cap_s` fails at once with its
    value. `ambiguous_retries` bounds retries after which the request may have been processed twice.
    A retry takes `transient_cost` or `throttle_cost` tokens from a quota of `quota_tokens`, which
    successes refill, so that an outage is not amplified.
    """

    max_retries: int = 3
    base_delay_s: float = 0.3
    max_delay_s: float = 4.0
    retry_after_cap_s: float = 120.0
    ambiguous_retries: int = 1
    quota_tokens: int = 500
    transient_cost: int = 14
    throttle_cost: int = 5

    def __post_init__(self) -> None:
        for name in ("max_retries", "ambiguous_retries", "quota_tokens", "transient_cost", "throttle_cost"):
            _check_at_least(f"retry.{name}", getattr(self, name), 0)
        for name in ("base_delay_s", "max_delay_s"):
            _check_seconds(f"retry.{name}", getattr(self, name), zero=True, endless=False)
        _check_seconds("retry.retry_after_cap_s", self.retry_after_cap_s, zero=True)


class Deadlines(Struct, frozen=True, kw_only=True):
    """Wall-clock ceilings of one request; the caller's own deadline holds as well.

    `headers_s` runs from the request's last byte to the reply's headers, `first_data_s` from there
    to the first data (for a plain reply: to its end), `data_idle_s` between two data events.
    Padding and comments that keep a connection alive are not data. `total_s` covers everything,
    retries included.
    """

    connect_s: float = 10.0
    headers_s: float = 90.0
    first_data_s: float = 90.0
    data_idle_s: float = 60.0
    total_s: float = 600.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            _check_seconds(f"deadlines.{name}", getattr(self, name))


class PoolLimits(Struct, frozen=True, kw_only=True):
    """Bounds of the worker pool.

    `max_connections` is the number of requests in flight at most, one connection each. Requests
    beyond that wait in a queue of `queue`; when it is full too, `overflow` says whether callers wait
    or get `PoolFullError`. A connection that was idle for `keepalive_s` is not used again.

    `max_body_bytes` bounds a reply's body as decoded. One of more than 8 MiB that is over
    `max_compression_ratio` times what went over the wire is refused as well: it is made to fill memory.
    """

    max_connections: int = 256
    queue: int = 4096
    overflow: Literal["block", "reject"] = "block"
    keepalive_s: float = 30.0
    max_header_bytes: int = 64 * 1024
    max_body_bytes: int = 64 * 1024 * 1024
    max_compression_ratio: int = 100

    def __post_init__(self) -> None:
        _check_at_least("pool.max_connections", self.max_connections, 1)
        _check_at_least("pool.queue", self.queue, 1)
        _check_at_least("pool.max_header_bytes", self.max_header_bytes, 1024)
        _check_at_least("pool.max_body_bytes", self.max_body_bytes, 1024)
        _check_at_least("pool.max_compression_ratio", self.max_compression_ratio, 1)
        _check_choice("pool.overflow", self.overflow, ("block", "reject"))
        _check_seconds("pool.keepalive_s", self.keepalive_s, zero=True)


class ContextPolicy(Struct, frozen=True, kw_only=True):
    """How much of a history goes into the requests of a session: all of it, unless this says less.

    `max_turns` is the number of past turns at most, `max_tokens` the tokens of a request's messages at most, the
    system message and the new one included: counted by the usage of earlier replies, estimated where there is none.
    The oldest turns are left out first, whole, and never a tool call without its result; so there may be a turn more
    than `max_turns`, and the new message goes out even if it is too long by itself. The log keeps everything.

    With `summarise`, an async function from messages to one message (or a text, for a system message), what would be
    left out is folded into a summary instead, once: it is stored, and stands in front of the `keep_turns` last turns
    from then on. The function runs as part of a turn, under its deadline; when it fails, the turn has the
    history in full. It must not ask its own session.
    """

    max_turns: int | None = None
    max_tokens: int | None = None
    keep_turns: int = 4
    summarise: Summarise | None = None

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_tokens"):
            if getattr(self, name) is not None:
                _check_at_least(f"context.{name}", getattr(self, name), 1)
        _check_at_least("context.keep_turns", self.keep_turns, 0)
        if self.summarise is not None:
            if not callable(self.summarise):
                raise ConfigError("context.summarise: must be an async function of messages")
            if self.max_turns is None and self.max_tokens is None:
                raise ConfigError("context.summarise: needs max_turns or max_tokens, which say when")


class SessionConfig(Struct, frozen=True, kw_only=True):
    """How session actors behave.

    `mailbox` bounds the turns that wait at one session; `overflow` says whether a sender who finds it full waits for
    room, gets `SessionBusyError`, or takes the place of whoever waits longest, who gets it then. `shutdown_grace_s`
    bounds the saving of what ran when the client closes. `context` limits what of a history is sent.

    `routing` keeps the turns of a session with one provider, whose prompt cache knows the conversation:
    they carry a `routing_id`, a hash of the session's key under the API key, unless they name one.

    A session that nobody has written to for `idle_s` gives its memory back, and so do those that were
    used the longest time ago when more than `max_active` are active; the next message loads it from
    the store again. Only idle sessions go, so while more than that have something to do there are more.
    """

    mailbox: int = 16
    overflow: Literal["block", "reject", "drop_oldest"] = "block"
    double_texting: DoubleTexting = "queue"
    context: ContextPolicy | None = None
    shutdown_grace_s: float = 10.0
    max_id_bytes: int = 4096
    restarts: int = 5
    restart_window_s: float = 30.0
    idle_s: float = 900.0
    max_active: int = 10_000
    routing: bool = True

    def __post_init__(self) -> None:
        _check_at_least("sessions.mailbox", self.mailbox, 1)
        _check_at_least("sessions.max_active", self.max_active, 1)
        _check_seconds("sessions.idle_s", self.idle_s)
        _check_at_least("sessions.max_id_bytes", self.max_id_bytes, 1)
        _check_choice("sessions.overflow", self.overflow, ("block", "reject", "drop_oldest"))
        _check_choice("sessions.double_texting", self.double_texting, ("queue", "reject", "interrupt", "merge"))
        _check_type("sessions.context", self.context, (ContextPolicy, type(None)))
        _check_seconds("sessions.shutdown_grace_s", self.shutdown_grace_s)
        _check_at_least("sessions.restarts", self.restarts, 0)
        _check_seconds("sessions.restart_window_s", self.restart_window_s)


class ClientConfig(Struct, frozen=True, kw_only=True):
    """Everything a client is opened with; each field can be given to `open_client` by name.

    `api_key` defaults to OPENROUTER_API_KEY and `base_url` to OPENROUTER_BASE_URL, both read when
    the client is opened. `app_name` and `referer` are sent as attribution headers. `store` keeps the
    histories, in memory when it is None. `insecure_http` allows plain http to hosts other than this
    machine, which sends the key in the clear. `plugins` are registered in order before the client is given
    out; see `Client.register`.

    How the API is reached: `tls` is a `TlsConfig` or an `ssl.SSLContext`; without one the system's trust
    store is used. `proxy` is a URL, http://, https:// or socks5://, with user and password in it where
    the proxy wants them; without one the environment's HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY
    hold, and "direct" is no proxy whatever they say. `unix_socket` is the path of a socket to connect to,
    in place of the base URL's host. `transport` replaces the built-in HTTP transport: an
    `httpx.AsyncBaseTransport`, an `httpx.AsyncClient`, a callable that makes one of these for each
    connection of the pool, or an object with `connect(host, port)` that gives a `trio.abc.Stream`. None
    of them reads the proxies of the environment through this client; httpx's have such settings of their own.

    `compression` asks for compressed replies: True for every coding that can be decoded here, or their
    names in the order they are liked: zstd and br, with the extra `compression`, gzip and deflate. Off by
    default, since a reply is small and unpacking it costs CPU (benchmarks/README.md). Whatever was asked
    for, a reply that comes compressed is decoded.

    The defaults of requests: `model`, `models` (fallbacks that the API tries in order), `provider`
    (routing preferences), `response_format`, and any other option of a request in `options`, by its
    keyword name. What a call says itself wins, then what its session says, field by field. `system` is
    the system message of conversations that have none; it is sent with them and never stored.
    """

    api_key: str | Secret | None = None
    base_url: str | None = None
    model: str = DEFAULT_MODEL
    models: Sequence[str] = ()
    provider: ProviderPreferences | Mapping[str, object] | None = None
    response_format: ResponseFormat | Mapping[str, object] | None = None
    options: ChatKeywords | Mapping[str, object] = {}
    system: str | None = None
    app_name: str | None = None
    referer: str | None = None
    retry: RetryPolicy = RetryPolicy()
    pool: PoolLimits = PoolLimits()
    deadlines: Deadlines = Deadlines()
    sessions: SessionConfig = SessionConfig()
    tls: object | None = None
    proxy: str | Secret | Proxy | None = None
    unix_socket: str | os.PathLike[str] | None = None
    compression: bool | Sequence[str] = False
    store: object | None = None
    transport: object | None = None
    plugins: Sequence[object] = ()
    insecure_http: bool = False
    seams: Seams = msgspec.field(default_factory=Seams)

    def __post_init__(self) -> None:
        if isinstance(self.api_key, str):
            msgspec.structs.force_setattr(self, "api_key", Secret(self.api_key))
        if isinstance(self.proxy, str) and self.proxy != DIRECT:
            msgspec.structs.force_setattr(self, "proxy", Secret(self.proxy))
        _check_type("api_key", self.api_key, (str, Secret, type(None)))
        _check_type("base_url", self.base_url, (str, type(None)))
        _check_type("model", self.model, str)
        if not self.model.strip():
            raise ConfigError("model: must not be blank")
        for name in ("app_name", "referer"):
            _check_header(name, getattr(self, name))
        _check_type("system", self.system, (str, type(None)))
        self._check_network()
        _check_type("plugins", self.plugins, (list, tuple))
        self.call_defaults()
        for name, kind in _PARTS.items():
            _check_type(name, getattr(self, name), kind)

    def _check_network(self) -> None:
        if isinstance(self.proxy, Secret):
            msgspec.structs.force_setattr(self, "proxy", parse_proxy(self.proxy, field="proxy"))
        _check_type("proxy", self.proxy, (str, Secret, Proxy, type(None)))
        _check_type("tls", self.tls, (TlsConfig, ssl.SSLContext, type(None)))
        _check_type("unix_socket", self.unix_socket, (str, os.PathLike, type(None)))
        if self.unix_socket is not None:
            _check_socket_path(os.fspath(self.unix_socket))
        if isinstance(self.compression, str) or not isinstance(self.compression, (bool, Sequence)):
            raise ConfigError(f"compression: must be True, False or names of codings, not {self.compression!r}")
        for name, other in (("unix_socket", "proxy"), ("unix_socket", "transport")):
            if getattr(self, name) is not None and getattr(self, other) not in {None, DIRECT}:
                raise ConfigError(f"{name}: cannot be used together with {other}")

    def call_defaults(self) -> tuple[bytes, CallSettings]:
        """The defaults of requests, encoded, and what of them is not part of a body.

        Raises `ConfigError` for a default that no request can have.
        """
        _check_type("options", self.options, Mapping)
        own: dict[str, object] = {"model": self.model, "provider": self.provider}
        own |= {"response_format": self.response_format, "models": list(self.models) or None}
        given = {name: value for name, value in own.items() if value is not None}
        try:
            return encode_call(cast("ChatKeywords", {**self.options, **given}))
        except BadRequestError as exc:
            raise ConfigError(exc.message) from None
        except TypeError as exc:
            raise ConfigError(f"options: {exc}") from None

    def resolved(self, environ: Mapping[str, str] | None = None) -> ClientConfig:
        """The same settings with key, base URL and proxy filled in from the environment, and checked.

        Raises `ConfigError` when there is no key, or when the base URL or the proxy is not one.
        """
        key, base_url, proxies = self._given(os.environ if environ is None else environ)
        # A traceback may show locals, and the environment holds more than this package's secrets.
        del environ
        if key.is_blank:
            raise ConfigError("api_key: no key given; pass api_key=... or set OPENROUTER_API_KEY")
        if not key.is_header_text:
            raise ConfigError("api_key: must be printable ASCII text")
        _check_base_url(base_url, insecure_http=self.insecure_http or self.unix_socket is not None)
        proxy = self.proxy
        if proxy is None and self.transport is None and self.unix_socket is None:
            proxy = proxies.proxy_for(base_url)
        return msgspec.structs.replace(self, api_key=key, base_url=base_url.rstrip("/"), proxy=proxy or DIRECT)

    def _given(self, environ: Mapping[str, str]) -> tuple[Secret, str, ProxyEnvironment]:
        key = self.api_key if isinstance(self.api_key, Secret) else Secret(environ.get("OPENROUTER_API_KEY", ""))
        base_url = self.base_url or environ.get("OPENROUTER_BASE_URL", "").strip() or DEFAULT_BASE_URL
        return key.stripped(), base_url, read_proxy_environment(environ)


_PARTS: dict[str, type] = {
    "retry": RetryPolicy,
    "pool": PoolLimits,
    "deadlines": Deadlines,
    "sessions": SessionConfig,
    "insecure_http": bool,
    "seams": Seams,
}

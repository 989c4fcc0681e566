"""Settings: frozen values with their defaults, checked when they are made.

Durations are seconds (`_s`), sizes bytes, tokens tokens. A wrong value raises `ConfigError` that
names the field and what it takes.
"""

from __future__ import annotations

import math
import os
import random
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NoReturn
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DEFAULT_BASE_URL",
    "DEFAULT_MODEL",
    "ClientConfig",
    "Deadlines",
    "DoubleTexting",
    "PoolLimits",
    "RetryPolicy",
    "Seams",
    "Secret",
    "SessionConfig",
]

DEFAULT_BASE_URL = "https://openrouter.ai/api/v1"
DEFAULT_MODEL = "openai/gpt-4o-mini"

DoubleTexting = Literal["queue", "reject", "interrupt"]
"""What a session does with a message that comes while a turn runs: take it afterwards, refuse it with
`SessionBusyError`, or interrupt the running turn for it."""


def _check_at_least(name: str, value: float, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: must be a whole number of at least {least}, not {value!r}")


def _check_seconds(name: str, value: float, *, zero: bool = False) -> None:
    if math.isnan(value) or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{name}: must be seconds, {'zero or more' if zero else 'more than zero'}, not {value!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: must be one of {', '.join(choices)}, not {value!r}")


def _check_header(name: str, value: str | None, *, secret: bool = False) -> None:
    """Refuse what cannot stand in an HTTP header; the value of a secret stays out of the message."""
    if value is not None and not (value.isascii() and value.isprintable()):
        shown = "" if secret else f", not {value!r}"
        raise ConfigError(f"{name}: must be printable ASCII text{shown}")


def _check_base_url(url: str, *, insecure_http: bool) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise ConfigError(f"base_url: {exc}") from exc
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise ConfigError(f"base_url: must look like https://host/path, not {url!r}")
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ConfigError("base_url: must not carry a query, a fragment or credentials")
    loopback = parts.hostname in {"localhost", "127.0.0.1", "::1"}
    if parts.scheme == "http" and not loopback and not insecure_http:
        raise ConfigError(
            f"base_url: http would send the key to {parts.hostname} in the clear; use https or set insecure_http=True"
        )


class Secret:
    """A string that shows itself nowhere: not in a repr, a format, a pickle or a traceback's locals."""

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        self.__value = value

    def reveal(self) -> str:
        """The string itself."""
        return self.__value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.__value == other.__value

    def __hash__(self) -> int:
        return hash((Secret, self.__value))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled")


class Seams(Struct, frozen=True, kw_only=True):
    """Where chance and the world come in: replaced by tests and simulations.

    `wall` gives seconds since the epoch. Durations are measured on the trio clock, which
    `trio.run(clock=...)` sets. `random` draws jitter. `new_id` makes turn ids.
    """

    wall: Callable[[], float] = time.time
    random: random.Random = msgspec.field(default_factory=random.Random)
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex


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
        for name in ("base_delay_s", "max_delay_s", "retry_after_cap_s"):
            _check_seconds(f"retry.{name}", getattr(self, name), zero=True)


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
    """

    max_connections: int = 256
    queue: int = 4096
    overflow: Literal["block", "reject"] = "block"
    keepalive_s: float = 30.0
    max_header_bytes: int = 64 * 1024
    max_body_bytes: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        _check_at_least("pool.max_connections", self.max_connections, 1)
        _check_at_least("pool.queue", self.queue, 1)
        _check_at_least("pool.max_header_bytes", self.max_header_bytes, 1024)
        _check_at_least("pool.max_body_bytes", self.max_body_bytes, 1024)
        _check_choice("pool.overflow", self.overflow, ("block", "reject"))
        _check_seconds("pool.keepalive_s", self.keepalive_s, zero=True)


class SessionConfig(Struct, frozen=True, kw_only=True):
    """How session actors behave.

    `mailbox` bounds the turns that wait at one session; `overflow` says whether a sender waits for
    room or gets `SessionBusyError`. `shutdown_grace_s` bounds the saving of what ran when the
    client closes.
    """

    mailbox: int = 16
    overflow: Literal["block", "reject"] = "block"
    double_texting: DoubleTexting = "queue"
    shutdown_grace_s: float = 10.0
    max_id_bytes: int = 4096
    restarts: int = 5
    restart_window_s: float = 30.0

    def __post_init__(self) -> None:
        _check_at_least("sessions.mailbox", self.mailbox, 1)
        _check_at_least("sessions.max_id_bytes", self.max_id_bytes, 1)
        _check_choice("sessions.overflow", self.overflow, ("block", "reject"))
        _check_choice("sessions.double_texting", self.double_texting, ("queue", "reject", "interrupt"))
        _check_seconds("sessions.shutdown_grace_s", self.shutdown_grace_s)


class ClientConfig(Struct, frozen=True, kw_only=True):
    """Everything a client is opened with; each field can be given to `open_client` by name.

    `api_key` defaults to OPENROUTER_API_KEY and `base_url` to OPENROUTER_BASE_URL, both read when
    the client is opened. `app_name` and `referer` are sent as attribution headers. `tls` is an
    `ssl.SSLContext`; without one the system's trust store is used. `transport` replaces the
    built-in HTTP transport: an `httpx.AsyncBaseTransport`, an `httpx.AsyncClient`, or an object
    with `connect(host, port)` that gives a `trio.abc.Stream`. `store` keeps the histories, in
    memory when it is None. `insecure_http` allows plain http to hosts other than this machine,
    which sends the key in the clear.
    """

    api_key: str | Secret | None = None
    base_url: str | None = None
    model: str = DEFAULT_MODEL
    app_name: str | None = None
    referer: str | None = None
    retry: RetryPolicy = RetryPolicy()
    pool: PoolLimits = PoolLimits()
    deadlines: Deadlines = Deadlines()
    sessions: SessionConfig = SessionConfig()
    tls: object | None = None
    store: object | None = None
    transport: object | None = None
    insecure_http: bool = False
    seams: Seams = msgspec.field(default_factory=Seams)

    def __post_init__(self) -> None:
        if isinstance(self.api_key, str):
            msgspec.structs.force_setattr(self, "api_key", Secret(self.api_key))
        if not self.model.strip():
            raise ConfigError("model: must not be blank")
        for name in ("app_name", "referer"):
            _check_header(name, getattr(self, name))

    def resolved(self, environ: Mapping[str, str] | None = None) -> ClientConfig:
        """The same settings with key and base URL filled in from the environment, and checked.

        Raises `ConfigError` when there is no key, or when the base URL is not one.
        """
        environ = os.environ if environ is None else environ
        key = self.api_key if isinstance(self.api_key, Secret) else Secret(environ.get("OPENROUTER_API_KEY", ""))
        text = key.reveal().strip()
        if not text:
            raise ConfigError("api_key: no key given; pass api_key=... or set OPENROUTER_API_KEY")
        _check_header("api_key", text, secret=True)
        base_url = self.base_url or environ.get("OPENROUTER_BASE_URL") or DEFAULT_BASE_URL
        _check_base_url(base_url, insecure_http=self.insecure_http)
        return msgspec.structs.replace(self, api_key=Secret(text), base_url=base_url.rstrip("/"))

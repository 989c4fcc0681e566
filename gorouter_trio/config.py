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
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Literal, TypeAlias, cast
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from .errors import BadRequestError, ConfigError
from .network import Proxy, ProxyEnvironment, TlsConfig, parse_proxy, read_proxy_environment
from .secret import Secret, is_header_text
from .wire.catalog import Pricing
from .wire.codec import encode_call
from .wire.messages import Message
from .wire.preferences import ProviderPreferences, ResponseFormat
from .wire.pricing import find_fault
from .wire.requests import ChatKeywords

if TYPE_CHECKING:
    from .wire.mail import CallSettings

__all__ = [
    "DEFAULT_BASE_URL",
    "DEFAULT_MODEL",
    "DIRECT",
    "LANES",
    "ApiKey",
    "BreakerPolicy",
    "Budget",
    "ClientConfig",
    "ContextPolicy",
    "Deadlines",
    "DoubleTexting",
    "KeyProvider",
    "LedgerConfig",
    "PoolLimits",
    "PricePolicy",
    "RateLimits",
    "RetryPolicy",
    "Seams",
    "Secret",
    "SessionConfig",
    "Summarise",
    "ToolLimits",
    "check_key",
    "hide_keys",
]

DEFAULT_BASE_URL = "https://openrouter.ai/api/v1"
DEFAULT_MODEL = "openai/gpt-4o-mini"

DIRECT = "direct"
"""As `proxy`: no proxy, whatever the environment says."""

LANES = ("interactive", "batch")

DoubleTexting = Literal["queue", "reject", "interrupt", "merge"]
"""What a session does with a message that comes while a turn runs: take it afterwards, refuse it with
`SessionBusyError`, interrupt the running turn for it, or take it afterwards in one turn with the others that came."""

Summarise = Callable[[Sequence[Message]], Awaitable[Message | Mapping[str, object] | str]]
"""Makes one message, or the text of a system message, that stands for those given."""

# Whole numbers have no end, but shares are floats: what a sum of them can still hold.
_MOST_WEIGHT = 1e300
# Sums and products of amounts must stay within what a Decimal holds.
_MOST_USD = Decimal("1e100")


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


def _checked_usd(name: str, value: object) -> Decimal:
    """An amount of money as it was written: a float stands for its shortest decimal form."""
    if isinstance(value, bool) or not isinstance(value, (Decimal, int, float, str)):
        raise ConfigError(f"{name}: must be an amount in USD, such as Decimal('1.50'), not {value!r}")
    try:
        usd = Decimal(str(value).strip())
    except InvalidOperation:
        raise ConfigError(f"{name}: must be an amount in USD, not {value!r}") from None
    if not (usd.is_finite() and usd >= 0):
        raise ConfigError(f"{name}: must be zero or more and finite, not {value!r}")
    if usd > _MOST_USD:
        raise ConfigError(f"{name}: must be at most {_MOST_USD}, not {value!r}")
    return usd


def _check_number(name: str, value: object, *, least: float = 0.0, most: float = math.inf) -> None:
    """A finite number above `least`, and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}: must be a number, not {value!r}")
    if not least < value <= most or value == math.inf:
        bounds = f"more than {least:g}" + ("" if most == math.inf else f" and at most {most:g}")
        raise ConfigError(f"{name}: must be {bounds}, not {value!r}")


def _check_share(name: str, value: object, *, most: float = 1.0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ConfigError(f"{name}: must be a share of 0 to {most:g}, not {value!r}")


def _check_weights(name: str, weights: Mapping[str, object], *, names: tuple[str, ...] = ()) -> None:
    """Shares, none below 0 and not all of them 0; `names` are all that there are, if there are only certain ones."""
    for part, weight in weights.items():
        if names and part not in names:
            raise ConfigError(f"{name}: there is no {part!r}, only {', '.join(names)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ConfigError(f"{name}: a weight must be a number of 0 or more, not {weight!r}")
        if weight > _MOST_WEIGHT:
            raise ConfigError(f"{name}: a weight must be at most {_MOST_WEIGHT:g}")
    if not sum(cast("Mapping[str, float]", weights).values()) > 0:
        raise ConfigError(f"{name}: the weights must not sum to zero")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: must be one of {', '.join(choices)}, not {value!r}")


def _check_type(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise ConfigError(f"{name}: must be {wanted}, not a {type(value).__name__}")


def _check_names(name: str, value: object, *, of: str) -> None:
    """Refuse a text, whose letters would be taken for names, and what has no length or is no collection of texts."""
    is_list = isinstance(value, Collection) and not isinstance(value, (str, bytes))
    if not is_list or not all(isinstance(each, str) for each in cast("Collection[object]", value)):
        raise ConfigError(f"{name}: must be names of {of}, not {value!r}")


def _check_header(name: str, value: str | None) -> None:
    """Refuse what cannot stand in an HTTP header."""
    _check_type(name, value, (str, type(None)))
    if value is not None and not is_header_text(value):
        raise ConfigError(f"{name}: must be printable ASCII text, not {value!r}")


def _check_text(name: str, value: str | None) -> None:
    """Refuse what cannot be sent: half a surrogate pair has no UTF-8."""
    _check_type(name, value, (str, type(None)))
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name}: is not valid Unicode") from None


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
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError:
        size = 0
    # The kernel's own limit, with the byte that ends it (unix(7)).
    if not 0 < size <= 107:
        raise ConfigError(f"unix_socket: must be a path of 1 to 107 bytes, not {path!r}")


KeyProvider: TypeAlias = Callable[[], str | Secret | Awaitable[str | Secret]]
"""Gives the API key that is good now; asked for every request, so that keys can change while a client runs."""


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

    `headers_s` runs from the request's first byte to the reply's headers; it is a second more for every
    64 KiB of the request, which have to go out in it too. `first_data_s` runs from there to the first
    data (for a plain reply: to its end), `data_idle_s` between two data events.
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
    """Bounds of the worker pool, and the order of its queue.

    `max_connections` is the number of requests in flight at most, one connection each. How many of
    them one model gets begins at `adaptive_from` and follows what its provider takes: it grows while
    that is what holds requests back, and is cut when they are answered 429. None lets every model have all.

    Requests beyond that, or beyond the rates, wait in a queue of `queue` for each lane; when a lane is full
    too, `overflow` says whether its callers wait or get `PoolFullError`. `lanes` are the shares of the
    lanes while several have something to send; what one does not use is the others'. A connection that
    was idle for `keepalive_s` is not used again.

    `max_body_bytes` bounds a reply's body as decoded. One of more than 8 MiB that is over
    `max_compression_ratio` times what went over the wire is refused as well: it is made to fill memory.
    """

    max_connections: int = 256
    adaptive_from: int | None = 32
    queue: int = 4096
    overflow: Literal["block", "reject"] = "block"
    lanes: Mapping[str, float] = msgspec.field(default_factory=lambda: {"interactive": 90.0, "batch": 10.0})
    keepalive_s: float = 30.0
    max_header_bytes: int = 64 * 1024
    max_body_bytes: int = 64 * 1024 * 1024
    max_compression_ratio: int = 100

    def __post_init__(self) -> None:
        _check_at_least("pool.max_connections", self.max_connections, 1)
        if self.adaptive_from is not None:
            _check_at_least("pool.adaptive_from", self.adaptive_from, 1)
        _check_at_least("pool.queue", self.queue, 1)
        _check_at_least("pool.max_header_bytes", self.max_header_bytes, 1024)
        _check_at_least("pool.max_body_bytes", self.max_body_bytes, 1024)
        _check_at_least("pool.max_compression_ratio", self.max_compression_ratio, 1)
        _check_choice("pool.overflow", self.overflow, ("block", "reject"))
        _check_type("pool.lanes", self.lanes, Mapping)
        _check_weights("pool.lanes", self.lanes, names=LANES)
        _check_seconds("pool.keepalive_s", self.keepalive_s, zero=True)


class PricePolicy(Struct, frozen=True, kw_only=True):
    """Where prices come from, and when a list of them is believed.

    The list of the API is fetched when the client opens, if `on_start`, and then every `refresh_s` seconds, give or
    take the part `jitter`; a `refresh_s` of None fetches it only when asked. A fetch that takes longer than `timeout_s`
    is given up. The last good list stays when a new one cannot be had or is refused: when it has fewer than
    `min_models` models and more were known, or less than the share `min_share` of those that were known.

    `own` prices stand before those of the list: USD for a unit, as the API writes them, by model:
    `{"author/model": {"prompt": "0.00000015", "completion": "0.0000006"}}`, or `Pricing` values.
    """

    own: Mapping[str, Pricing | Mapping[str, object]] = {}
    on_start: bool = True
    refresh_s: float | None = 6 * 3600.0
    jitter: float = 0.1
    timeout_s: float = 60.0
    min_models: int = 50
    min_share: float = 0.5

    def __post_init__(self) -> None:
        if self.refresh_s is not None:
            _check_seconds("prices.refresh_s", self.refresh_s, endless=False)
        _check_type("prices.on_start", self.on_start, bool)
        _check_share("prices.jitter", self.jitter)
        _check_seconds("prices.timeout_s", self.timeout_s)
        _check_at_least("prices.min_models", self.min_models, 0)
        _check_share("prices.min_share", self.min_share)
        self.own_prices()

    def own_prices(self) -> dict[str, Pricing]:
        """`own` as `Pricing` values; raises `ConfigError` for what is no price."""
        _check_type("prices.own", self.own, Mapping)
        return {model: _checked_pricing(model, given) for model, given in self.own.items()}


def _checked_pricing(model: str, given: object) -> Pricing:
    name = f"prices.own[{model!r}]"
    if not isinstance(given, (Pricing, Mapping)):
        raise ConfigError(f"{name}: must be a Pricing or a mapping, not a {type(given).__name__}")
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(Pricing.__struct_fields__))
        if unknown:
            raise ConfigError(f"{name}: there is no price called {unknown[0]!r}")
        texts = {kind: str(price) if isinstance(price, float) else price for kind, price in given.items()}
        try:
            given = msgspec.convert(texts, Pricing)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"{name}: {exc}") from None
    fault = find_fault(given)
    if fault is not None:
        raise ConfigError(f"{name}: {fault}")
    return given


class Budget(Struct, frozen=True, kw_only=True):
    """What may be spent, in USD. With any limit set, the worst case of a request is set aside before it is sent.

    `usd` bounds the client, `tenant_usd`, `session_usd` and `batch_usd` each tenant, session and batch, which is a job
    or a call of `client.batch`; `tenants` names other bounds for some tenants. A request has to fit all the budgets
    that it belongs to. `from_credits` also bounds the client by what the API says is left of the credits and of the
    key's limit, asked for every `credits_refresh_s` seconds.

    A request without a bound on its completion is given `max_tokens`, or fewer where the budget does not pay for that,
    down to `min_tokens`. One whose price is not known is refused with `UnpriceableRequestError`, unless
    `unpriced_usd` says what to set aside for it. `headroom` multiplies every worst case: prices are those of the
    provider that the API prefers, and another one may be dearer unless `provider.max_price` forbids it.

    When what is left is only held by requests in flight, `overflow` says whether a request waits for them, at most
    `max_waiting` of them, or gets `BudgetExceededError` at once. At most `max_accounts` tenants, sessions and batches
    have an account at a time.
    """

    usd: Decimal | float | str | None = None
    tenant_usd: Decimal | float | str | None = None
    session_usd: Decimal | float | str | None = None
    batch_usd: Decimal | float | str | None = None
    tenants: Mapping[str, Decimal | float | str] = {}
    from_credits: bool = False
    credits_refresh_s: float = 300.0
    max_tokens: int = 4096
    min_tokens: int = 64
    unpriced_usd: Decimal | float | str | None = None
    headroom: Decimal | float | str = Decimal(1)
    overflow: Literal["block", "reject"] = "block"
    max_waiting: int = 4096
    max_accounts: int = 100_000

    def __post_init__(self) -> None:
        for name in ("usd", "tenant_usd", "session_usd", "batch_usd", "unpriced_usd", "headroom"):
            value = getattr(self, name)
            if value is not None or name == "headroom":
                msgspec.structs.force_setattr(self, name, _checked_usd(f"budget.{name}", value))
        _check_type("budget.tenants", self.tenants, Mapping)
        tenants = {name: _checked_usd(f"budget.tenants[{name!r}]", usd) for name, usd in self.tenants.items()}
        msgspec.structs.force_setattr(self, "tenants", tenants)
        if cast("Decimal", self.headroom) < 1:
            raise ConfigError(f"budget.headroom: must be at least 1, not {self.headroom}")
        _check_type("budget.from_credits", self.from_credits, bool)
        _check_seconds("budget.credits_refresh_s", self.credits_refresh_s, endless=False)
        for name in ("max_tokens", "min_tokens", "max_accounts"):
            _check_at_least(f"budget.{name}", getattr(self, name), 1)
        _check_at_least("budget.max_waiting", self.max_waiting, 0)
        _check_choice("budget.overflow", self.overflow, ("block", "reject"))

    @property
    def is_set(self) -> bool:
        """Whether anything is bounded; without it no money is set aside."""
        limits = (self.usd, self.tenant_usd, self.session_usd, self.batch_usd)
        return self.from_credits or bool(self.tenants) or any(limit is not None for limit in limits)

    @property
    def may_wait(self) -> bool:
        """Whether requests wait for money that is only held."""
        return self.overflow == "block"


class LedgerConfig(Struct, frozen=True, kw_only=True):
    """The ledger: a row for every attempt at a request, with what it cost.

    `rows` are kept in memory, and `names` sessions, tenants and batches added up apart; sums are exact beyond. With a
    `path`, every row is also appended to that file, a line of JSON each.

    What an attempt cost whose answer was lost is looked up, `lookups` times at most, the first time `first_lookup_s`
    after its end and then after waits that double up to `last_lookup_s`; each lookup may take `lookup_timeout_s`. So
    many as `searches` rows are looked up at a time, by `seekers` tasks. With `lookups=0` nothing is asked for, which
    suits APIs that keep no generations.
    """

    rows: int = 10_000
    names: int = 10_000
    path: str | os.PathLike[str] | None = None
    searches: int = 4096
    seekers: int = 4
    lookups: int = 10
    first_lookup_s: float = 1.0
    last_lookup_s: float = 60.0
    lookup_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("rows", "searches", "seekers"):
            _check_at_least(f"ledger.{name}", getattr(self, name), 1)
        _check_at_least("ledger.lookups", self.lookups, 0)
        _check_at_least("ledger.names", self.names, self.searches + 1)
        for name in ("first_lookup_s", "last_lookup_s", "lookup_timeout_s"):
            _check_seconds(f"ledger.{name}", getattr(self, name), endless=False)
        _check_type("ledger.path", self.path, (str, os.PathLike, type(None)))


class RateLimits(Struct, frozen=True, kw_only=True):
    """What each API key may do: `requests_per_minute`, `tokens_per_minute` (of prompts and completions), and
    `max_in_flight` requests at a time. `models` says the same for single models of each key, beside the key's own.

    Requests wait until they keep within all of these; see `docs/limits.md`. Tokens are estimated before a
    request is sent, by its `max_tokens` or else `completion_tokens`, and put right when its usage is known;
    `counted_tokens="worst_case"` is for servers that count the estimate and give nothing back.

    `margin` is the share of a rate that is left unused, `burst` the share that may go at once after a
    pause, at least one request. The defaults suit windows that slide or are fixed; a server that keeps a
    token bucket takes a `burst` of up to 1.

    `free_requests_per_minute` is what all `:free` models have together, for all keys. It is kept from the moment in
    which the API first refuses for it.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_in_flight: int | None = None
    models: Mapping[str, RateLimits] = {}
    counted_tokens: Literal["used", "worst_case"] = "used"
    completion_tokens: int = 512
    margin: float = 0.015
    burst: float = 0.005
    free_requests_per_minute: float = 20.0

    def __post_init__(self) -> None:
        self.check("rates")

    def check(self, name: str) -> None:
        """Raise `ConfigError` that names the field, below `name`, with a value that cannot be."""
        for field in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, field) is not None:
                _check_number(f"{name}.{field}", getattr(self, field))
        if self.max_in_flight is not None:
            _check_at_least(f"{name}.max_in_flight", self.max_in_flight, 1)
        _check_number(f"{name}.free_requests_per_minute", self.free_requests_per_minute)
        _check_at_least(f"{name}.completion_tokens", self.completion_tokens, 0)
        _check_choice(f"{name}.counted_tokens", self.counted_tokens, ("used", "worst_case"))
        _check_share(f"{name}.margin", self.margin, most=0.9)
        _check_share(f"{name}.burst", self.burst)
        _check_type(f"{name}.models", self.models, Mapping)
        for model, limits in self.models.items():
            _check_type(f"{name}.models[{model!r}]", limits, RateLimits)
            if limits.models:
                raise ConfigError(f"{name}.models[{model!r}].models: a model has no models of its own")

    @property
    def is_empty(self) -> bool:
        """Whether it limits nothing."""
        own = (self.requests_per_minute, self.tokens_per_minute, self.max_in_flight)
        return own == (None, None, None) and all(limits.is_empty for limits in self.models.values())


class BreakerPolicy(Struct, frozen=True, kw_only=True):
    """When a model that keeps failing is left alone, and for how long.

    After `consecutive` requests in a row that failed at the provider (5xx, no answer in time, broken replies), or
    when `share` of at least `least_attempts` attempts within `window_s` did, its requests are refused with
    `CircuitOpenError` for `open_s`; those of the batch lane wait instead. Then one request is the probe: if it fails
    as well, the time doubles, up to `most_open_s`; it never becomes less than `open_s`.
    """

    consecutive: int = 5
    share: float = 0.5
    least_attempts: int = 20
    window_s: float = 10.0
    open_s: float = 5.0
    most_open_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("consecutive", "least_attempts"):
            _check_at_least(f"breaker.{name}", getattr(self, name), 1)
        _check_number("breaker.share", self.share, most=1.0)
        for name in ("window_s", "open_s", "most_open_s"):
            _check_seconds(f"breaker.{name}", getattr(self, name), endless=False)


class ApiKey(Struct, frozen=True, kw_only=True):
    """One of several API keys: its share of the requests, limits of its own in place of `rates`, and a name for it.

    `name` stands for it in statistics and records, where the key itself never shows; its number by default.
    """

    key: str | Secret
    weight: float = 1.0
    rates: RateLimits | None = None
    name: str = ""

    def __post_init__(self) -> None:
        _check_type("api_key.key", self.key, (str, Secret))
        if isinstance(self.key, str):
            msgspec.structs.force_setattr(self, "key", Secret(self.key))
        _check_weights("api_key.weight", {"weight": self.weight, "": 1.0})
        _check_type("api_key.rates", self.rates, (RateLimits, type(None)))
        _check_type("api_key.name", self.name, str)
        # The ledger could not write what requests with it cost.
        _check_text("api_key.name", self.name)

    @property
    def secret(self) -> Secret:
        """The key."""
        return cast("Secret", self.key)


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
    the store again. Only idle sessions go, so while more than that have something to do there are more; those
    above the cap go as they come to rest.

    Where processes share a store that can lease sessions (`RedisStore`), a session is owned while a turn of it runs.
    A session whose owner gives no sign of life answers again in another process within `lease_s`: leases last nine
    tenths of it, and are renewed three times as often. None goes without: the version of a session alone decides who
    may write.
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
    lease_s: float | None = 15.0

    def __post_init__(self) -> None:
        _check_at_least("sessions.mailbox", self.mailbox, 1)
        if self.lease_s is not None:
            _check_seconds("sessions.lease_s", self.lease_s)
        _check_at_least("sessions.max_active", self.max_active, 1)
        _check_seconds("sessions.idle_s", self.idle_s)
        _check_at_least("sessions.max_id_bytes", self.max_id_bytes, 1)
        _check_choice("sessions.overflow", self.overflow, ("block", "reject", "drop_oldest"))
        _check_choice("sessions.double_texting", self.double_texting, ("queue", "reject", "interrupt", "merge"))
        _check_type("sessions.context", self.context, (ContextPolicy, type(None)))
        _check_seconds("sessions.shutdown_grace_s", self.shutdown_grace_s)
        _check_at_least("sessions.restarts", self.restarts, 0)
        _check_seconds("sessions.restart_window_s", self.restart_window_s)


_TOOL_COUNTS = (
    "max_parallel",
    "max_repeats",
    "max_running",
    "max_threads",
    "max_abandoned_threads",
    "max_processes",
)


class ToolLimits(Struct, frozen=True, kw_only=True):
    """Bounds of the tools that a model may call.

    A turn: at most `max_rounds` answers with calls and `max_calls` calls, `max_parallel` of a round at the
    same time, or one after the other when `parallel` is false; the same call, tool and arguments, at most
    `max_repeats` times. A call: `timeout_s` from when its turn comes, and `approval_s` more for whoever has
    to approve it; arguments of at most `max_argument_bytes` and a result of at most `max_result_bytes`, which
    is cut there and marked. A call that has not ended `grace_s` after its deadline is given up. A tool's own
    settings stand instead of these. `include_results` keeps the values that tools return in the report.

    The whole client, so of effect in `open_client` only: `max_running` calls at the same time; `max_threads`
    threads for sync tools, and no new ones while `max_abandoned_threads` hang past their deadline, since
    threads cannot be killed; `max_processes` processes for tools that have one of their own, each with
    `max_process_bytes` of memory where that is not None, and with the variables named in `process_env`
    besides those that a Python needs.
    """

    max_rounds: int = 5
    max_calls: int = 32
    parallel: bool = True
    max_parallel: int = 8
    max_repeats: int = 3
    timeout_s: float = 30.0
    approval_s: float = 300.0
    grace_s: float = 0.5
    max_argument_bytes: int = 256 * 1024
    max_result_bytes: int = 64 * 1024
    include_results: bool = False
    max_running: int = 64
    max_threads: int = 64
    max_abandoned_threads: int = 32
    max_processes: int = 8
    max_process_bytes: int | None = None
    process_env: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("max_rounds", "max_calls"):
            _check_at_least(f"tools.{name}", getattr(self, name), 0)
        for name in _TOOL_COUNTS:
            _check_at_least(f"tools.{name}", getattr(self, name), 1)
        for name in ("max_argument_bytes", "max_result_bytes"):
            _check_at_least(f"tools.{name}", getattr(self, name), 1024)
        if self.max_process_bytes is not None:
            _check_at_least("tools.max_process_bytes", self.max_process_bytes, 64 * 1024 * 1024)
        _check_seconds("tools.timeout_s", self.timeout_s, endless=False)
        _check_seconds("tools.approval_s", self.approval_s, endless=False)
        _check_seconds("tools.grace_s", self.grace_s, endless=False)
        for name in ("parallel", "include_results"):
            _check_type(f"tools.{name}", getattr(self, name), bool)
        _check_names("tools.process_env", self.process_env, of="variables")


class ClientConfig(Struct, frozen=True, kw_only=True):
    """Everything a client is opened with; each field can be given to `open_client` by name.

    `api_key` defaults to OPENROUTER_API_KEY and `base_url` to OPENROUTER_BASE_URL, both read when
    the client is opened. Several keys are a sequence of keys or `ApiKey`s, or a mapping from keys to
    weights; a function, async or not, gives the key that is good now. `rates` are the limits that each
    key has, `breaker` says when a failing model is left alone, None for never. `app_name` and `referer`
    are sent as attribution headers. `store` keeps the histories, in memory when it is None. `security` is a
    `SecurityConfig` or a `SecurityManager`, which knows access tokens and guards tools, or any other guard of tools;
    without one the rules that tools declare hold all the same.
    `insecure_http` allows plain http to hosts other than this machine, which sends the key in the clear.
    `plugins` are registered in order before the client is given out; see `Client.register`. `shared` is where
    limits and budgets are counted that several processes keep together: a `redis.RedisLimits`.

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

    api_key: str | Secret | Sequence[str | Secret | ApiKey] | Mapping[str, float] | KeyProvider | None = None
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
    rates: RateLimits = RateLimits()
    breaker: BreakerPolicy | None = BreakerPolicy()
    deadlines: Deadlines = Deadlines()
    sessions: SessionConfig = SessionConfig()
    tools: ToolLimits = ToolLimits()
    budget: Budget = Budget()
    ledger: LedgerConfig = LedgerConfig()
    prices: PricePolicy = PricePolicy()
    tls: object | None = None
    proxy: str | Secret | Proxy | None = None
    unix_socket: str | os.PathLike[str] | None = None
    compression: bool | Sequence[str] = False
    store: object | None = None
    security: object | None = None
    transport: object | None = None
    shared: object | None = None
    plugins: Sequence[object] = ()
    insecure_http: bool = False
    seams: Seams = msgspec.field(default_factory=Seams)

    def __post_init__(self) -> None:
        try:
            hidden = _hidden(self.api_key)
        except ConfigError:
            # A traceback may show locals, and this is one of them.
            msgspec.structs.force_setattr(self, "api_key", None)
            raise
        msgspec.structs.force_setattr(self, "api_key", hidden)
        if isinstance(self.proxy, str) and self.proxy != DIRECT:
            msgspec.structs.force_setattr(self, "proxy", Secret(self.proxy))
        _check_type("base_url", self.base_url, (str, type(None)))
        _check_type("model", self.model, str)
        if not self.model.strip():
            raise ConfigError("model: must not be blank")
        _check_names("models", self.models, of="models")
        for name in ("app_name", "referer"):
            _check_header(name, getattr(self, name))
        _check_text("system", self.system)
        self._check_network()
        _check_type("plugins", self.plugins, (list, tuple))
        if self.shared is not None and not callable(getattr(self.shared, "take_rate", None)):
            raise ConfigError("shared: must be a RedisLimits, or have its methods")
        self.call_defaults()
        for name, kind in _PARTS.items():
            _check_type(name, getattr(self, name), kind)
        _check_type("breaker", self.breaker, (BreakerPolicy, type(None)))

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
            # Not in a set: a transport of the user's own need not be hashable.
            if getattr(self, name) is not None and getattr(self, other) not in (None, DIRECT):
                raise ConfigError(f"{name}: cannot be used together with {other}")

    def call_defaults(self) -> tuple[bytes, CallSettings]:
        """The defaults of requests, encoded, and what of them is not part of a body.

        Raises `ConfigError` for a default that no request can have.
        """
        _check_type("options", self.options, Mapping)
        _check_type("models", self.models, (list, tuple))
        if "model" in self.options:
            raise ConfigError("options: model is a setting of its own, which would win over this one")
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
        api_key, base_url, proxies = self._given(os.environ if environ is None else environ)
        # A traceback may show locals, and the environment holds more than this package's secrets.
        del environ
        _check_keys(api_key)
        _check_base_url(base_url, insecure_http=self.insecure_http or self.unix_socket is not None)
        proxy = self.proxy
        if proxy is None and self.transport is None and self.unix_socket is None:
            proxy = proxies.proxy_for(base_url)
        return msgspec.structs.replace(self, api_key=api_key, base_url=base_url.rstrip("/"), proxy=proxy or DIRECT)

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """The keys of resolved settings; none where a function gives them."""
        api_key = self.api_key
        if isinstance(api_key, Secret):
            return (ApiKey(key=api_key),)
        return cast("tuple[ApiKey, ...]", api_key) if isinstance(api_key, tuple) else ()

    def _given(self, environ: Mapping[str, str]) -> tuple[_Hidden, str, ProxyEnvironment]:
        api_key = cast("_Hidden", self.api_key)
        if api_key is None:
            api_key = Secret(environ.get("OPENROUTER_API_KEY", ""))
        base_url = self.base_url or environ.get("OPENROUTER_BASE_URL", "").strip() or DEFAULT_BASE_URL
        return _stripped(api_key), base_url, read_proxy_environment(environ)


_Hidden: TypeAlias = "Secret | tuple[ApiKey, ...] | KeyProvider | None"


def _hidden(given: object) -> _Hidden:
    """API keys in the form in which they show themselves nowhere."""
    if isinstance(given, str):
        return Secret(given)
    if given is None or isinstance(given, Secret) or callable(given):
        return cast("_Hidden", given)
    if isinstance(given, Mapping):
        weights = list(given.values())
        given = [Secret(key) if isinstance(key, str) else key for key in given]
        return tuple(ApiKey(key=key, weight=weight) for key, weight in zip(given, weights, strict=True))
    if isinstance(given, Sequence) and not isinstance(given, (bytes, bytearray)):
        given = [Secret(key) if isinstance(key, str) else key for key in given]
        return tuple(key if isinstance(key, ApiKey) else ApiKey(key=key) for key in given)
    found = type(given).__name__
    del given
    kinds = "a str, a Secret, a sequence or mapping of keys, a function that gives one, or None"
    raise ConfigError(f"api_key: must be {kinds}, not a {found}")


def hide_keys(given: object) -> object:
    """API keys in the form in which they show themselves nowhere; raises `ConfigError` for what is none."""
    hidden = None
    try:
        hidden = _hidden(given)
    finally:
        # A traceback may show locals, and this is one of them.
        del given
    return hidden


def _stripped(api_key: _Hidden) -> _Hidden:
    if isinstance(api_key, Secret):
        return api_key.stripped()
    if isinstance(api_key, tuple):
        return tuple(msgspec.structs.replace(key, key=key.secret.stripped()) for key in api_key)
    return api_key


def _check_keys(api_key: _Hidden) -> None:
    """Raise `ConfigError` unless there is a key, or a function that will give one."""
    if isinstance(api_key, tuple):
        if not api_key:
            raise ConfigError("api_key: the list of keys is empty")
        if len({key.secret for key in api_key}) < len(api_key):
            raise ConfigError("api_key: a key stands twice in the list")
        _check_weights("api_key", {str(number): key.weight for number, key in enumerate(api_key)})
        for number, key in enumerate(api_key):
            check_key(key.secret, f"api_key[{number}]")
    elif isinstance(api_key, Secret):
        if api_key.is_blank:
            raise ConfigError("api_key: no key given; pass api_key=... or set OPENROUTER_API_KEY")
        check_key(api_key, "api_key")


def check_key(key: Secret, name: str) -> None:
    """Raise `ConfigError` about `name` unless the key can stand in a header."""
    if key.is_blank:
        raise ConfigError(f"{name}: must not be blank")
    if not key.is_header_text:
        raise ConfigError(f"{name}: must be printable ASCII text")


_PARTS: dict[str, type] = {
    "retry": RetryPolicy,
    "pool": PoolLimits,
    "rates": RateLimits,
    "deadlines": Deadlines,
    "sessions": SessionConfig,
    "tools": ToolLimits,
    "budget": Budget,
    "ledger": LedgerConfig,
    "prices": PricePolicy,
    "insecure_http": bool,
    "seams": Seams,
}

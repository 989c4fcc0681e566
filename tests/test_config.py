"""Settings: every wrong value is refused with the field's name, and the key shows nowhere."""

from __future__ import annotations

import base64
import copy
import math
import pickle
import random
import re
import traceback
import urllib.parse
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from gorouter_trio._turns.output import OutputPolicy
from gorouter_trio.config import (
    DEFAULT_BASE_URL,
    ApiKey,
    BreakerPolicy,
    Budget,
    ClientConfig,
    ContextPolicy,
    Deadlines,
    LedgerConfig,
    PoolLimits,
    PricePolicy,
    RateLimits,
    RetryPolicy,
    Seams,
    Secret,
    SessionConfig,
    ToolLimits,
)
from gorouter_trio.errors import ConfigError
from gorouter_trio.gateway import ClusterConfig, GatewayConfig, GatewayLimits
from gorouter_trio.network import TlsConfig
from gorouter_trio.security import SecurityConfig, SessionPolicy, ToolPolicy, ToolRules, UrlPolicy

KEY = "sk-or-v1-c4n4ry0f7h3m1n3"
OTHER = "hunter2-of-the-environment"

COUNTS: list[tuple[type, str, str, int]] = [
    (RetryPolicy, "retry", "max_retries", 0),
    (RetryPolicy, "retry", "ambiguous_retries", 0),
    (RetryPolicy, "retry", "quota_tokens", 0),
    (RetryPolicy, "retry", "transient_cost", 0),
    (RetryPolicy, "retry", "throttle_cost", 0),
    (PoolLimits, "pool", "max_connections", 1),
    (PoolLimits, "pool", "queue", 1),
    (PoolLimits, "pool", "max_header_bytes", 1024),
    (PoolLimits, "pool", "max_body_bytes", 1024),
    (SessionConfig, "sessions", "mailbox", 1),
    (SessionConfig, "sessions", "max_id_bytes", 1),
    (SessionConfig, "sessions", "restarts", 0),
]
# Whether zero, and whether infinity, is a duration there.
DURATIONS: list[tuple[type, str, str, bool, bool]] = [
    (RetryPolicy, "retry", "base_delay_s", True, False),
    (RetryPolicy, "retry", "max_delay_s", True, False),
    (RetryPolicy, "retry", "retry_after_cap_s", True, True),
    (PoolLimits, "pool", "keepalive_s", True, True),
    (SessionConfig, "sessions", "shutdown_grace_s", False, True),
    (SessionConfig, "sessions", "restart_window_s", False, True),
    *((Deadlines, "deadlines", name, False, True) for name in Deadlines.__struct_fields__),
]
CHOICES = [
    (PoolLimits, "pool", "overflow", "block"),
    (SessionConfig, "sessions", "overflow", "reject"),
    (SessionConfig, "sessions", "double_texting", "interrupt"),
]


def _id(value: object) -> str:
    # Without addresses: workers of a parallel run have to find the same tests.
    return value.__name__ if isinstance(value, type) else re.sub(r" at 0x\w+", "", repr(value))


def refused(kind: type, field: str, value: object) -> str:
    with pytest.raises(ConfigError) as raised:
        kind(**{field: value})
    return raised.value.message


@pytest.mark.parametrize(("kind", "part", "field", "least"), COUNTS, ids=_id)
def test_counts(kind: type, part: str, field: str, least: int) -> None:
    """Whole numbers from their least value; nothing else, and no booleans."""
    assert getattr(kind(**{field: least}), field) == least
    assert getattr(kind(**{field: 10**9}), field) == 10**9
    for bad in (least - 1, -1, 1.5, 4.0, "4", None, True, False, math.nan, math.inf, [4], object()):
        assert refused(kind, field, bad).startswith(f"{part}.{field}: must be a whole number of at least {least}")


@pytest.mark.parametrize(("kind", "part", "field", "zero", "endless"), DURATIONS, ids=_id)
def test_durations(kind: type, part: str, field: str, zero: bool, endless: bool) -> None:
    """Numbers of seconds above zero; zero and infinity only where they mean something."""
    for good in (0.001, 1, 1e6):
        assert getattr(kind(**{field: good}), field) == good
    for value, allowed in ((0, zero), (0.0, zero), (math.inf, endless)):
        if allowed:
            assert getattr(kind(**{field: value}), field) == value
        else:
            assert refused(kind, field, value).startswith(f"{part}.{field}: must be ")
    for bad in (-0.1, -1, math.nan, -math.inf, "1", None, True, [1], object(), 1j):
        assert refused(kind, field, bad).startswith(f"{part}.{field}: must be ")


@pytest.mark.parametrize(("kind", "part", "field", "good"), CHOICES, ids=_id)
def test_choices(kind: type, part: str, field: str, good: str) -> None:
    """One of the words, and the message lists them."""
    assert getattr(kind(**{field: good}), field) == good
    for bad in ("", "Block", "drop", None, 1, ["block"], {}):
        message = refused(kind, field, bad)
        assert message.startswith(f"{part}.{field}: must be one of ")
        assert good in message


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("api_key", [5, b"sk", 1.5]), ("base_url", [5, b"http://x"]), ("model", ["", " \n", None, 5]),
        ("app_name", ["a\nb", "Café", "\x7f", 5, b"x"]), ("referer", ["a\r\nX: y", "é", 5]), ("retry", [{}, None, 3]),
        ("pool", [{"max_connections": 3}, None, PoolLimits]), ("deadlines", [None, 5, RetryPolicy()]),
        ("sessions", [None, {}]), ("insecure_http", [None, 1, "yes"]), ("seams", [None, random.Random()]),
        ("system", [5, b"x", "half a pair: \ud800"]),
    ],
    ids=_id,
)  # fmt: skip
def test_fields_of_the_client(field: str, values: list[object]) -> None:
    """Values of the wrong kind are refused when the settings are made, not when they are used."""
    for value in values:
        assert refused(ClientConfig, field, value).startswith(f"{field}: ")


@pytest.mark.parametrize("name", [None, 5, b"x", "half a pair: \ud800"])
def test_names_of_keys(name: object) -> None:
    """A key's name is a text that a ledger can write."""
    with pytest.raises(ConfigError, match=r"^api_key\.name: "):
        ApiKey(key=KEY, name=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "values"), [("wall", [None, 5]), ("random", [random, None]), ("new_id", ["x", None])]
)
def test_seams(field: str, values: list[object]) -> None:
    """What stands in for the world has the shape of it."""
    for value in values:
        assert refused(Seams, field, value).startswith(f"seams.{field}: ")


SETTINGS: list[tuple[type[msgspec.Struct], dict[str, object]]] = [
    *(
        (kind, {})
        for kind in (BreakerPolicy, Budget, ClientConfig, ContextPolicy, Deadlines, LedgerConfig, OutputPolicy)
    ),
    *((kind, {}) for kind in (PoolLimits, PricePolicy, RateLimits, RetryPolicy, Seams, SessionConfig, ToolLimits)),
    *((kind, {}) for kind in (SecurityConfig, SessionPolicy, ToolPolicy, ToolRules, TlsConfig, UrlPolicy)),
    *((kind, {}) for kind in (GatewayConfig, GatewayLimits)),
    (ClusterConfig, {"redis": "redis://127.0.0.1", "secret": Secret("0123456789abcdef"), "url": "ws://127.0.0.1:1"}),
    (ApiKey, {"key": KEY}),
]
JUNK: list[object] = [
    *(None, 0, -1, 1.5, True, "x", "", b"x", math.nan, math.inf, object()),
    *([], {}, (), [None], {"x": None}, {None: 1}, (1,), {1}),
]


@pytest.mark.parametrize(("kind", "needed"), SETTINGS, ids=_id)
def test_junk_in_every_field(kind: type[msgspec.Struct], needed: dict[str, object]) -> None:
    """Whatever a field is given, it is taken or is a `ConfigError`, never another exception."""
    for field in kind.__struct_fields__:
        for value in JUNK:
            with suppress(ConfigError):
                kind(**{**needed, field: value})


@pytest.mark.parametrize(
    ("kind", "field", "values", "message"),
    [
        (Budget, "headroom", [None, [], "x"], "budget.headroom: must be an amount"),
        (ToolLimits, "process_env", ["HOME", b"HOME", None, 1, [1]], "tools.process_env: must be names of variables"),
        (ClientConfig, "models", ["a/b", None, 1, [None]], "models: must be names of models"),
        (OutputPolicy, "on_invalid", [[], {}, None, "stop"], "output.on_invalid: must be one of raise, none"),
        (OutputPolicy, "reasks", [True, None, -1, [], 1.0], "output.reasks: must be a whole number"),
    ],
    ids=_id,
)
def test_fields_that_name_themselves(kind: type, field: str, values: list[object], message: str) -> None:
    """The field is in the message; a text is no list of names."""
    for value in values:
        assert refused(kind, field, value).startswith(message)


def test_defaults() -> None:
    """The defaults are those of the documentation."""
    config = ClientConfig()
    assert (config.retry.max_retries, config.retry.base_delay_s, config.retry.max_delay_s) == (3, 0.3, 4.0)
    assert (config.retry.retry_after_cap_s, config.retry.ambiguous_retries, config.retry.quota_tokens) == (
        120.0,
        1,
        500,
    )
    assert (config.retry.transient_cost, config.retry.throttle_cost) == (14, 5)
    assert msgspec.structs.astuple(config.deadlines) == (10.0, 90.0, 90.0, 60.0, 600.0)
    assert (config.pool.max_connections, config.pool.queue, config.pool.overflow) == (256, 4096, "block")
    assert (config.pool.max_header_bytes, config.pool.max_body_bytes) == (64 * 1024, 64 * 1024 * 1024)
    assert (config.sessions.mailbox, config.sessions.overflow, config.sessions.double_texting) == (16, "block", "queue")
    assert (config.sessions.shutdown_grace_s, config.sessions.max_id_bytes, config.sessions.restarts) == (10.0, 4096, 5)
    assert len({ClientConfig().seams.new_id() for _ in range(100)}) == 100


# --- the environment and the URL --------------------------------------------------------------------------------------


def test_key_and_url_from_the_environment() -> None:
    """What was given wins over the environment, blank variables count as unset, white space around is dropped."""
    environ = {"OPENROUTER_API_KEY": f" {KEY}\n", "OPENROUTER_BASE_URL": "https://eu.openrouter.ai/api/v1/"}
    found = ClientConfig().resolved(environ)
    assert isinstance(found.api_key, Secret)
    assert (found.api_key.reveal(), found.base_url) == (KEY, "https://eu.openrouter.ai/api/v1")
    given = ClientConfig(api_key="given", base_url="https://x.example/v1").resolved(environ)
    assert isinstance(given.api_key, Secret)
    assert (given.api_key.reveal(), given.base_url) == ("given", "https://x.example/v1")
    blank = ClientConfig(api_key=Secret("k")).resolved({"OPENROUTER_BASE_URL": "  "})
    assert blank.base_url == DEFAULT_BASE_URL


@pytest.mark.parametrize("environ", [{}, {"OPENROUTER_API_KEY": ""}, {"OPENROUTER_API_KEY": " \n"}], ids=repr)
def test_no_key(environ: dict[str, str]) -> None:
    """Without a key the error says which variable to set."""
    with pytest.raises(ConfigError, match=r"^api_key: .*OPENROUTER_API_KEY"):
        ClientConfig().resolved(environ)
    with pytest.raises(ConfigError, match=r"^api_key: "):
        ClientConfig(api_key="").resolved({"OPENROUTER_API_KEY": KEY})


@pytest.mark.parametrize("key", ["a\nb", "a\r\nX: y", "é", "a\x00b", "a\u2028b"], ids=repr)
def test_a_key_that_cannot_be_sent(key: str) -> None:
    """A key that would break out of its header is refused, and not shown."""
    with pytest.raises(ConfigError, match=r"^api_key: must be printable ASCII text$"):
        ClientConfig(api_key=key).resolved({})


@pytest.mark.parametrize(
    ("url", "resolved"),
    [
        ("https://openrouter.ai/api/v1", "https://openrouter.ai/api/v1"), ("https://h.example/", "https://h.example"),
        ("https://h.example", "https://h.example"), ("HTTPS://H.example:8443/a/b//", "HTTPS://H.example:8443/a/b"),
        ("http://127.0.0.1:8000/api/v1", "http://127.0.0.1:8000/api/v1"), ("http://localhost", "http://localhost"),
        ("http://[::1]:80/x", "http://[::1]:80/x"), ("https://[2001:db8::1]/x", "https://[2001:db8::1]/x"),
        ("https://h.example/%20x", "https://h.example/%20x"),
    ],
)  # fmt: skip
def test_base_urls(url: str, resolved: str) -> None:
    """https anywhere, http to this machine, any path; slashes at the end are dropped."""
    assert ClientConfig(api_key="k", base_url=url).resolved({}).base_url == resolved
    assert ClientConfig(api_key="k").resolved({"OPENROUTER_BASE_URL": url}).base_url == resolved


@pytest.mark.parametrize(
    "url",
    [
        "openrouter.ai/api",
        "//openrouter.ai",
        "ftp://h.example",
        "https://",
        "https:///x",
        "https://h.example:0/",
        "https://h.example:99999",
        "https://h.example:x",
        "https://h.example/?a=1",
        "https://h.example/#f",
        "https://h.example/?",
        "https://user@h.example",
        "https://user:pw@h.example",
        "https://@h.example",
        "https://h.example/a b",
        "https://h.example/\r\nX: y",
        "https://h.\nexample",
        "https://h.example/\t",
        "https://bücher.example/",
        "https://h.example\\x",
        "https://[::1",
        "wss://h.example",
        "\x00",
    ],
    ids=repr,
)
def test_base_urls_that_are_none(url: str) -> None:
    """Anything that is no plain URL of a host is refused by name, and credentials in it are not repeated."""
    cases = [(ClientConfig(api_key="k", base_url=url), {})]
    if url == url.strip():
        cases.append((ClientConfig(api_key="k"), {"OPENROUTER_BASE_URL": url}))
    for config, environ in cases:
        with pytest.raises(ConfigError, match=r"^base_url: ") as raised:
            config.resolved(environ)
        assert "pw" not in raised.value.message


def test_plain_http_to_somewhere_else() -> None:
    """The key goes out in the clear only when that was asked for."""
    config = ClientConfig(api_key="k", base_url="http://h.example/v1")
    with pytest.raises(ConfigError, match="insecure_http"):
        config.resolved({})
    allowed = msgspec.structs.replace(config, insecure_http=True).resolved({})
    assert allowed.base_url == "http://h.example/v1"


# --- secrets ----------------------------------------------------------------------------------------------------------


def shows(text: str, secret: str = KEY) -> bool:
    """Whether the secret is in the text, plain or in a usual encoding."""
    forms = {secret, base64.b64encode(secret.encode()).decode().rstrip("="), urllib.parse.quote(secret), secret[::-1]}
    return any(form in text for form in forms)


def with_locals(error: BaseException) -> str:
    return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


def test_a_secret_shows_itself_nowhere() -> None:
    """Not in a repr, a str, a format, a container, a copy's repr, or a pickle."""
    secret = Secret(KEY)
    copies = [secret, copy.copy(secret), copy.deepcopy(secret), copy.deepcopy([secret])[0]]
    for text in (
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret!r}",
        f"{secret!s}",
        repr(copies),
    ):
        assert not shows(text)
    assert all(c.reveal() == KEY for c in copies)
    assert not hasattr(secret, "__dict__")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(secret, protocol)
    with pytest.raises(TypeError):
        msgspec.json.encode(secret)
    with pytest.raises(TypeError):
        f"{secret:>10}"


def test_secrets_compare_by_value() -> None:
    """Equal secrets are equal and hash alike, and a secret is not its text."""
    assert Secret("a") == Secret("a")
    assert hash(Secret("a")) == hash(Secret("a"))
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    with pytest.raises(ConfigError):
        Secret(b"a")  # type: ignore[arg-type]


def test_settings_do_not_show_the_key() -> None:
    """The settings' repr, their parts and their pickle hold no key."""
    config = ClientConfig(api_key=KEY)
    for each in (config, config.resolved({}), ClientConfig().resolved({"OPENROUTER_API_KEY": KEY})):
        assert not shows(repr(each))
        assert not shows(str(msgspec.structs.asdict(each)))
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
            pickle.dumps(each)


@pytest.mark.parametrize(
    ("fields", "environ"),
    [
        ({"api_key": KEY, "base_url": "ftp://x"}, {}),
        ({"api_key": KEY + "\n\x00x"}, {}),
        ({"base_url": "nope"}, {"OPENROUTER_API_KEY": KEY}),
        ({}, {"OPENROUTER_API_KEY": KEY + "\x00x"}),
        ({}, {"OPENROUTER_API_KEY": ""}),
        ({"base_url": "http://h.example"}, {"OPENROUTER_API_KEY": KEY}),
    ],
)
def test_tracebacks_do_not_show_the_key(fields: dict[str, Any], environ: dict[str, str]) -> None:
    """A traceback with the locals of every frame of this package shows neither the key nor the environment."""
    config = ClientConfig(**fields)
    fields.clear()
    error = _resolve(config, {**environ, "DATABASE_PASSWORD": OTHER})
    environ.clear()
    text = with_locals(error)
    assert "config.py" in text
    assert not shows(text)
    assert not shows(text, OTHER)


def _resolve(config: ClientConfig, environ: dict[str, str]) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        config.resolved(environ)
    environ.clear()
    return raised.value


def test_a_wrong_setting_beside_the_key() -> None:
    """Settings refused while they are made do not show the key that stands beside the mistake."""
    with pytest.raises(ConfigError) as raised:
        ClientConfig(api_key=KEY, model="")
    frames = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
    inside = [str(frame.locals) for frame in frames.stack if frame.filename.endswith("config.py")]
    assert inside
    assert not any(shows(text) for text in inside)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"requests_per_minute": 0}, "rates.requests_per_minute: must be more than 0"),
        ({"requests_per_minute": -5}, "rates.requests_per_minute: must be more than 0"),
        ({"requests_per_minute": math.inf}, "rates.requests_per_minute: must be more than 0"),
        ({"tokens_per_minute": "many"}, "rates.tokens_per_minute: must be a number"),
        ({"tokens_per_minute": True}, "rates.tokens_per_minute: must be a number"),
        ({"max_in_flight": 0}, "rates.max_in_flight: must be a whole number of at least 1"),
        ({"max_in_flight": 1.5}, "rates.max_in_flight: must be a whole number"),
        ({"completion_tokens": -1}, "rates.completion_tokens: must be a whole number of at least 0"),
        ({"counted_tokens": "all"}, "rates.counted_tokens: must be one of used, worst_case"),
        ({"margin": 1.0}, "rates.margin: must be a share of 0 to 0.9"),
        ({"burst": -0.1}, "rates.burst: must be a share of 0 to 1"),
        ({"free_requests_per_minute": 0}, "rates.free_requests_per_minute: must be more than 0"),
        ({"models": {"m": 5}}, r"rates.models\['m'\]: must be RateLimits"),
        ({"models": {"m": RateLimits(models={"n": RateLimits()})}}, r"rates.models\['m'\].models: a model has no"),
        ({"models": []}, "rates.models: must be Mapping"),
    ],
    ids=str,
)
def test_rates_that_cannot_be(fields: dict[str, object], message: str) -> None:
    """Each is refused with its name when it is made."""
    with pytest.raises(ConfigError, match=message):
        RateLimits(**fields)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize(
    ("lanes", "message"),
    [
        ({"interactive": 0, "batch": 0}, "pool.lanes: the weights must not sum to zero"),
        ({}, "pool.lanes: the weights must not sum to zero"),
        ({"interactive": -1}, "pool.lanes: a weight must be a number of 0 or more"),
        ({"interactive": math.nan}, "pool.lanes: a weight must be a number of 0 or more"),
        ({"express": 1}, "pool.lanes: there is no 'express', only interactive, batch"),
        (None, "pool.lanes: must be Mapping"),
    ],
    ids=str,
)
def test_lanes_that_cannot_be(lanes: object, message: str) -> None:
    """Weights are shares of the lanes that there are."""
    with pytest.raises(ConfigError, match=message):
        PoolLimits(lanes=lanes)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"consecutive": 0}, "breaker.consecutive: must be a whole number of at least 1"),
        ({"share": 0}, "breaker.share: must be more than 0 and at most 1"),
        ({"share": 1.1}, "breaker.share: must be more than 0 and at most 1"),
        ({"window_s": 0}, "breaker.window_s: must be more than zero"),
        ({"open_s": math.inf}, "breaker.open_s: must be more than zero and finite"),
    ],
    ids=str,
)
def test_breakers_that_cannot_be(fields: dict[str, object], message: str) -> None:
    """Each is refused with its name."""
    with pytest.raises(ConfigError, match=message):
        BreakerPolicy(**fields)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("field", ["rates", "breaker", "pool"])
def test_parts_of_the_wrong_kind(field: str) -> None:
    """Parts of the settings are of their own type; the breaker may be none."""
    with pytest.raises(ConfigError, match=f"{field}: must be"):
        ClientConfig(**{field: {"requests_per_minute": 5}})  # type: ignore[arg-type]  # that is the point
    assert ClientConfig(breaker=None).breaker is None


def test_adapting_can_be_turned_off() -> None:
    """`adaptive_from` is a number of requests, or None."""
    assert PoolLimits(adaptive_from=None).adaptive_from is None
    with pytest.raises(ConfigError, match=r"pool\.adaptive_from"):
        PoolLimits(adaptive_from=0)

"""The settings of a security manager: frozen values, checked whole when they are made.

Every mistake is a `SecurityConfigError` that names its place, such as `tools['delete'].scopes[0]`. Keys are taken
out of sight first: no message, repr or traceback shows one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import msgspec
from msgspec import Struct

from ..config import Secret
from ..errors import SecurityConfigError
from ._checks import check_choice, check_count, check_kind, check_name, check_names, check_seconds, frozen_mapping
from .arguments import check_patterns
from .jwt import check_jwt_keys
from .rules import Principal, RateLimit
from .sessions import SessionPolicy
from .text import folded

__all__ = [
    "ApiKeyAuth",
    "Auth",
    "CustomAuth",
    "DangerousArguments",
    "DefaultPolicy",
    "JwtAlgorithm",
    "JwtAuth",
    "RolePolicy",
    "SecurityConfig",
    "ToolPolicy",
    "digest_of_key",
]

DefaultPolicy = Literal["deny-all", "allow-all"]
"""What happens to a call that no rule is about."""

JwtAlgorithm = Literal[
    "HS256",
    "HS384",
    "HS512",
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
    "Ed25519",
]
"""The signatures that a token may carry; a configuration pins one."""

_ALGORITHMS: tuple[JwtAlgorithm, ...] = get_args(JwtAlgorithm)
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_DAY_S = 86_400.0
_MAX_LEEWAY_S = 60.0
_MAX_CACHE_TTL_S = 3_600.0
_MAX_ENTRIES = 10_000_000


class ToolPolicy(Struct, frozen=True, kw_only=True):
    """What the configuration says about one tool, or under the name `*` about every tool.

    `allow` True lets in who meets the rest, False nobody, None leaves it to the rules that follow. Of `roles` the
    caller needs one, of `scopes` all; `rate_limit` holds for each caller and tool. What `*` demands is demanded
    beside what the tool's own policy demands.
    """

    allow: bool | None = None
    roles: Collection[str] = ()
    scopes: Collection[str] = ()
    rate_limit: RateLimit | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.allow, (bool, type(None))):
            raise SecurityConfigError(f"tool policy: allow must be True, False or None, not {self.allow!r}")
        for field in ("roles", "scopes"):
            msgspec.structs.force_setattr(self, field, check_names(f"tool policy: {field}", getattr(self, field)))
        if not isinstance(self.rate_limit, (RateLimit, type(None))):
            raise SecurityConfigError("tool policy: rate_limit must be a RateLimit")


class RolePolicy(Struct, frozen=True, kw_only=True):
    """What the configuration says about who has a role.

    `allowed_tools` names the tools that the role may call, `*` for every one. Who has a role that names tools may
    call no others, unless another of their roles or the tool's own policy allows it; an empty list therefore allows
    none. None says nothing about tools. `rate_limits` holds limits by tool, and under `*` for each tool.
    """

    allowed_tools: Collection[str] | None = None
    rate_limits: Mapping[str, RateLimit] = {}

    def __post_init__(self) -> None:
        if self.allowed_tools is not None:
            tools = check_names("role policy: allowed_tools", self.allowed_tools)
            msgspec.structs.force_setattr(self, "allowed_tools", tools)
        limits = frozen_mapping("role policy: rate_limits", self.rate_limits, RateLimit)
        msgspec.structs.force_setattr(self, "rate_limits", limits)


class DangerousArguments(Struct, frozen=True, kw_only=True):
    """What must not stand in the arguments of a call.

    `patterns` hold for every tool, `tool_patterns` for one each: regular expressions in RE2's syntax (the extra
    `security`; without it a pattern is refused here, since `re` could be made to run for hours). A pattern is
    searched for in each text, each key and each number by itself, whatever the case; `(?-i:...)` minds it.
    `blocked_values` are found anywhere in a text or number, whatever the case. All are matched with the text as it is
    and in NFKC form. With `audit_only` a hit is an event and the next rules are asked; otherwise it denies.

    Arguments of more than `max_chars` of text cannot be checked in time and count as a hit.
    """

    patterns: Sequence[str] = ()
    tool_patterns: Mapping[str, Sequence[str]] = {}
    blocked_values: Sequence[str] = ()
    audit_only: bool = False
    max_chars: int = 1024 * 1024

    def __post_init__(self) -> None:
        self._freeze()
        check_kind("dangerous_arguments.audit_only", self.audit_only, bool)
        check_count("dangerous_arguments.max_chars", self.max_chars, least=1024, most=64 * 1024 * 1024)
        for index, value in enumerate(self.blocked_values):
            if not folded(value).strip():
                raise SecurityConfigError(f"dangerous_arguments.blocked_values[{index}]: holds nothing visible")
        check_patterns("dangerous_arguments.patterns", self.patterns)
        for tool, patterns in self.tool_patterns.items():
            check_patterns(f"dangerous_arguments.tool_patterns[{tool!r}]", patterns)

    def _freeze(self) -> None:
        for field in ("patterns", "blocked_values"):
            names = check_names(f"dangerous_arguments.{field}", getattr(self, field))
            msgspec.structs.force_setattr(self, field, names)
        given = frozen_mapping("dangerous_arguments.tool_patterns", self.tool_patterns, object)
        by_tool = {
            tool: check_names(f"dangerous_arguments.tool_patterns[{tool!r}]", patterns)
            for tool, patterns in given.items()
        }
        msgspec.structs.force_setattr(self, "tool_patterns", MappingProxyType(by_tool))


class ApiKeyAuth(Struct, frozen=True, kw_only=True):
    """API keys, each with the principal that it stands for: `ApiKeyAuth(api_keys={"the key": Principal(id="u-1")})`.

    Only digests are kept; `digest_of_key` makes one beforehand, so that a configuration file need hold no key. A
    principal's `expires_at_s` is looked at on every call. A key shorter than `min_key_chars` is refused, because it
    can be guessed.
    """

    api_keys: Mapping[str | Secret, Principal]
    min_key_chars: int = 16

    def __post_init__(self) -> None:
        # First of all, and without a name for the keys: a traceback of an error below may show what this frame holds.
        found, problem = _digested(self.api_keys, self.min_key_chars)
        msgspec.structs.force_setattr(self, "api_keys", found)
        check_count("auth.min_key_chars", self.min_key_chars, least=1, most=1024)
        if problem is not None:
            raise SecurityConfigError(f"auth.api_keys: {problem}")

    def by_digest(self) -> dict[str, Principal]:
        """The principals, each under the digest that is kept of their key."""
        return {name: principal for name, principal in self.api_keys.items() if isinstance(name, str)}

    def __repr__(self) -> str:
        return f"ApiKeyAuth({len(self.api_keys)} keys)"


class JwtAuth(Struct, frozen=True, kw_only=True):
    """JSON Web Tokens, signed with one pinned algorithm (RFC 7519, RFC 8725; the extra `security`).

    `key` is the secret of HS256, HS384 or HS512, at least as long as the hash (32, 48 or 64 bytes), or a PEM key for
    the others: the private one where tokens are issued, else the public one. Tokens signed with one of `former_keys`
    are accepted too, so that a key can be changed while tokens live.

    A token needs `sub` and `exp`; `nbf` and `iat` are minded where present, all by the wall clock give or take
    `leeway_s`, at most 60. `audience` and `issuer` must match where they are set; a token with an `aud` is refused
    where no audience is set. Issued tokens live `token_ttl_s`.
    """

    key: str | Secret
    algorithm: JwtAlgorithm = "HS256"
    former_keys: Sequence[str | Secret] = ()
    audience: str | None = None
    issuer: str | None = None
    leeway_s: float = 30.0
    token_ttl_s: float = _DAY_S

    def __post_init__(self) -> None:
        # As with API keys: out of sight before anything can raise.
        msgspec.structs.force_setattr(self, "key", _secret(self.key))
        msgspec.structs.force_setattr(self, "former_keys", _secrets(self.former_keys))
        check_choice("auth.algorithm", self.algorithm, _ALGORITHMS)
        for field in ("audience", "issuer"):
            if getattr(self, field) is not None:
                check_name(f"auth.{field}", getattr(self, field))
        check_seconds("auth.leeway_s", self.leeway_s, most=_MAX_LEEWAY_S, zero=True)
        check_seconds("auth.token_ttl_s", self.token_ttl_s, most=3_650 * _DAY_S)
        check_jwt_keys(self.algorithm, self.all_keys())

    def all_keys(self) -> tuple[Secret, ...]:
        """The key, then the former ones."""
        return tuple(key for key in (self.key, *self.former_keys) if isinstance(key, Secret))


class CustomAuth(Struct, frozen=True, kw_only=True):
    """An authenticator of the program's own.

    `authenticate` gets the token and gives the principal, or None for a token that it does not know; it may be async.
    What it raises counts as a refusal. Its answer is kept for the token cache's time, so a token that it would refuse
    by now may be accepted that long, unless it is revoked at the manager or the cache's time is 0.
    """

    authenticate: Callable[[str], Principal | None | Awaitable[Principal | None]]

    def __post_init__(self) -> None:
        if not callable(self.authenticate):
            raise SecurityConfigError("auth.authenticate: must be callable")


Auth: TypeAlias = ApiKeyAuth | JwtAuth | CustomAuth


class SecurityConfig(Struct, frozen=True, kw_only=True):
    """Who may call which tools, how often, and with what.

    `default_policy` decides what no rule is about; it denies unless it says `allow-all`. `require_authentication`
    refuses callers without a principal, `allow_unauthenticated` lifts that again. Tokens that were accepted are
    remembered for `token_cache_ttl_s` (0: not at all), `token_cache_entries` of them at most. After
    `failed_attempts` refused tokens from one source, that source has to wait; None counts nothing. `max_buckets`
    bounds the rate limits' memory: when so many callers are active at once, further ones are refused.

    Where `known_roles` or `known_tools` is set, every role or tool that a rule names must be in it: a rule with a
    slip in its name would never apply. `sessions` says who may reach the sessions of others. With `audit_arguments`
    events and audit records of calls carry the arguments, otherwise not. `debug` writes each decision to the log
    `gorouter_trio.security`.
    """

    default_policy: DefaultPolicy = "deny-all"
    require_authentication: bool = False
    allow_unauthenticated: bool = False
    auth: Auth | None = None
    tools: Mapping[str, ToolPolicy] = {}
    roles: Mapping[str, RolePolicy] = {}
    dangerous_arguments: DangerousArguments | None = None
    token_cache_ttl_s: float = 300.0
    token_cache_entries: int = 10_000
    failed_attempts: RateLimit | None = RateLimit(limit=10, period_s=60.0)
    max_buckets: int = 1_000_000
    known_roles: Collection[str] | None = None
    known_tools: Collection[str] | None = None
    sessions: SessionPolicy = SessionPolicy()
    audit_arguments: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        check_choice("default_policy", self.default_policy, ("deny-all", "allow-all"))
        for field in ("require_authentication", "allow_unauthenticated", "audit_arguments", "debug"):
            check_kind(field, getattr(self, field), bool)
        for field, kind in (("tools", ToolPolicy), ("roles", RolePolicy)):
            msgspec.structs.force_setattr(self, field, frozen_mapping(field, getattr(self, field), kind))
        self._check_parts()
        check_seconds("token_cache_ttl_s", self.token_cache_ttl_s, most=_MAX_CACHE_TTL_S, zero=True)
        check_count("token_cache_entries", self.token_cache_entries, least=1, most=_MAX_ENTRIES)
        check_count("max_buckets", self.max_buckets, least=1, most=_MAX_ENTRIES)
        self._check_known()

    def _check_parts(self) -> None:
        if not isinstance(self.auth, (ApiKeyAuth, JwtAuth, CustomAuth, type(None))):
            raise SecurityConfigError("auth: must be an ApiKeyAuth, a JwtAuth, a CustomAuth or None")
        if not isinstance(self.dangerous_arguments, (DangerousArguments, type(None))):
            raise SecurityConfigError("dangerous_arguments: must be a DangerousArguments or None")
        if not isinstance(self.sessions, SessionPolicy):
            raise SecurityConfigError("sessions: must be a SessionPolicy")
        if not isinstance(self.failed_attempts, (RateLimit, type(None))):
            raise SecurityConfigError("failed_attempts: must be a RateLimit or None")

    def _check_known(self) -> None:
        for field, named in (("known_roles", self.named_roles()), ("known_tools", self.named_tools())):
            known = getattr(self, field)
            if known is None:
                continue
            names = frozenset(check_names(field, known))
            msgspec.structs.force_setattr(self, field, names)
            _check_all_known(field, named, names)

    def named_roles(self) -> dict[str, str]:
        """The roles that rules name, each with the place where it stands."""
        places = {role: f"roles[{role!r}]" for role in self.roles}
        for tool, policy in self.tools.items():
            places |= dict.fromkeys(policy.roles, f"tools[{tool!r}].roles")
        if isinstance(self.auth, ApiKeyAuth):
            for principal in self.auth.api_keys.values():
                places |= dict.fromkeys(principal.roles, f"auth.api_keys: principal {principal.id!r}")
        return places

    def named_tools(self) -> dict[str, str]:
        """The tools that rules name, each with the place where it stands; `*` is none."""
        places = {tool: f"tools[{tool!r}]" for tool in self.tools}
        for role, policy in self.roles.items():
            places |= dict.fromkeys(policy.allowed_tools or (), f"roles[{role!r}].allowed_tools")
            places |= dict.fromkeys(policy.rate_limits, f"roles[{role!r}].rate_limits")
        if self.dangerous_arguments is not None:
            where = "dangerous_arguments.tool_patterns"
            places |= {tool: f"{where}[{tool!r}]" for tool in self.dangerous_arguments.tool_patterns}
        return {tool: place for tool, place in places.items() if tool != "*"}

    def check_tools(self, known: Collection[str]) -> None:
        """Raise `SecurityConfigError` when a rule names a tool that is not among `known`."""
        _check_all_known("tools", self.named_tools(), frozenset(known))


def _check_all_known(field: str, named: Mapping[str, str], known: frozenset[str]) -> None:
    for name, place in named.items():
        if name not in known:
            raise SecurityConfigError(f"{place}: {name!r} is not among the {field.replace('_', ' ')}")


def digest_of_key(key: str | Secret) -> str:
    """What a configuration may hold in place of an API key: `sha256:` and 64 hexadecimal digits."""
    text = key.reveal() if isinstance(key, Secret) else key
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _digested(given: object, min_chars: object) -> tuple[Mapping[str, Principal], str | None]:
    """The principals by digest, and what is wrong, if anything. Raises nothing: its frame holds keys."""
    found: dict[str, Principal] = {}
    if not isinstance(given, Mapping):
        return found, f"must be a mapping of keys to principals, not a {type(given).__name__}"
    least = min_chars if isinstance(min_chars, int) else 1
    for key, principal in given.items():
        if not isinstance(principal, Principal):
            return found, f"a key stands for a {type(principal).__name__}, not for a Principal"
        text = key.reveal() if isinstance(key, Secret) else key
        problem = _key_problem(text, least)
        if problem is not None:
            return found, f"the key of principal {principal.id!r} {problem}"
        digest = text if _DIGEST.fullmatch(text) else digest_of_key(text)
        if digest in found:
            return found, f"the key of principal {principal.id!r} is there twice"
        found[digest] = principal
    return MappingProxyType(found), None


def _key_problem(text: object, least: int) -> str | None:
    if not isinstance(text, str):
        return f"is a {type(text).__name__}, not a str"
    if not (text.isascii() and text.isprintable()) or text != text.strip() or not text:
        return "must be printable ASCII without spaces around it"
    if text.startswith("sha256:") and not _DIGEST.fullmatch(text):
        return "begins as a digest, which is sha256: and 64 hexadecimal digits in lower case"
    if len(text) < least and not _DIGEST.fullmatch(text):
        return f"has {len(text)} characters, fewer than {least}"
    return None


def _secret(given: object) -> Secret:
    """What is no key becomes an empty one, which the check of keys refuses by name."""
    if isinstance(given, Secret):
        return given
    return Secret(given if isinstance(given, str) else "")


def _secrets(given: object) -> tuple[Secret, ...]:
    return tuple(map(_secret, given)) if isinstance(given, (list, tuple)) else (Secret(""),)

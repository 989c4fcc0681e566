"""The security manager: authenticates callers, decides on tool calls, counts them, and tells who watches.

It keeps no clock and starts no task; every method but `authenticate` decides at once. What fails while it decides
is a denial: a guard that cannot tell says no.
"""

from __future__ import annotations

import copy
import logging
import secrets
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import msgspec
import trio
from msgspec import Struct

from .._contain import contain_sync
from ..config import Secret
from ..errors import AuthenticationRequiredError, InvalidTokenError, SecurityConfigError, SecurityError
from ._checks import check_kind, is_finite
from .arguments import ArgumentChecker, Finding
from .auth import Digests, Refused, TokenCache, Verdict, Vouched, Voucher, with_credential
from .config import ApiKeyAuth, DangerousArguments, JwtAuth, SecurityConfig
from .events import (
    AccessDenied,
    AccessGranted,
    ArgumentAudited,
    AuthFailed,
    AuthSucceeded,
    ConfigUpdated,
    Emitter,
    RateLimitHit,
    RateLimitsCleared,
    SecurityEvent,
    SecurityFault,
    TokenCacheCleared,
    ToolCalled,
)
from .jwt import sign_jwt
from .limiter import Lane, Level, LimiterStatistics, RateLimiter, caller_of, caller_of_source
from .policy import decide_access, levels_of
from .rules import Allow, Decision, Deny, Principal, ToolAudit, ToolCheck
from .text import escape_controls

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from trio import TaskStatus

    from ..errors import TokenProblem
    from .sessions import SessionPolicy

__all__ = ["SecurityManager", "SecurityStatistics"]

E = TypeVar("E", bound=SecurityEvent)

_LOG = logging.getLogger("gorouter_trio.security")
_ALLOW = Allow()
_CLOSED = Deny(reason="access", message="the security manager is closed")
_MASK = Secret("masked")
_NOBODYS = "\x00"
_MAX_REVOKED = 100_000
_MAX_SOURCES = 100_000
_ATTEMPTS = Lane("failed attempts", "")
_MAX_TTL_S = 3_650 * 86_400.0
_TRIES = 3

_SAID: dict[TokenProblem, str] = {
    "unknown": "the access token is not known",
    "malformed": "the access token is not one",
    "expired": "the access token has expired",
    "not_yet_valid": "the access token does not hold yet",
    "revoked": "the access token was revoked",
    "too_many_attempts": "too many access tokens were refused; wait before the next",
    "unavailable": "the access token could not be checked",
}


class SecurityStatistics(Struct, frozen=True, kw_only=True):
    """What the manager remembers now, and what became of its events."""

    cached_tokens: int
    revoked_tokens: int
    revoked_principals: int
    limits: LimiterStatistics
    handlers_failed: int
    events_dropped: int


class _State:
    """One configuration, ready to decide. Exchanged as a whole."""

    def __init__(self, config: SecurityConfig, digests: Digests, epoch: int) -> None:
        _refuse_masked(config)
        self.config = config
        self.epoch = epoch
        self.voucher = Voucher(config.auth, digests)
        rules = config.dangerous_arguments
        self.audit_only = rules is not None and rules.audit_only
        self.checker = None if rules is None else _checker(rules)
        self.cache = TokenCache(ttl_s=config.token_cache_ttl_s, entries=config.token_cache_entries)


class SecurityManager:
    """Guards tool calls and authenticates callers, by one `SecurityConfig`; it can be exchanged while calls run.

    `audit` is called with a record of every call that has ended; what it raises is counted and goes no further. Not
    for several threads. In every method `now` is the trio clock and `wall` seconds since the epoch.
    """

    def __init__(self, config: SecurityConfig, *, audit: Callable[[ToolAudit], None] | None = None) -> None:
        self._digests = Digests()
        # In what principals carry, so that no other manager takes them for its own.
        self._name = secrets.token_hex(4)
        self._state = _State(config, self._digests, 0)
        self._limiter = RateLimiter(max_buckets=config.max_buckets)
        self._attempts = RateLimiter(max_buckets=_MAX_SOURCES)
        self._emitter = Emitter()
        self._audit = audit
        self._revoked: set[bytes] = set()
        self._revoked_principals: set[tuple[str, str]] = set()
        self._generation = 0
        self._audits_failed = 0
        self._is_closed = False

    def __repr__(self) -> str:
        auth = type(self._state.config.auth).__name__ if self._state.config.auth else "no auth"
        return f"SecurityManager({self._state.config.default_policy}, {auth}, generation {self._generation})"

    # --- who asks -----------------------------------------------------------------------------------------------------

    async def authenticate(
        self, token: str | Secret | None, *, now: float, wall: float, source: str = ""
    ) -> Principal | None:
        """The principal that `token` stands for, or None where no token was given and none is required.

        `source` is where the attempt came from, such as an address: after too many refused tokens its further ones are
        not looked at for a while, unless they are remembered from before; without one nothing is counted. Raises
        `InvalidTokenError`, or `AuthenticationRequiredError` where no token was given and one is required. A token that
        is given and cannot be checked, because no kind of authentication is configured, is refused and not ignored.
        """
        token = _hidden(token)
        await trio.lowlevel.checkpoint()
        if token is None:
            if self._state.config.require_authentication and not self._state.config.allow_unauthenticated:
                self._tell(AuthFailed, wall, problem="missing", source=source)
                raise AuthenticationRequiredError("an access token is required")
            return None
        verdict, cached = await self._vouch(token, now=now, wall=wall, source=source)
        if isinstance(verdict, Refused):
            self._tell(AuthFailed, wall, problem=verdict.problem, source=source)
            wait_s = self._wait_s(source, now) if verdict.problem == "too_many_attempts" else None
            raise InvalidTokenError(_SAID[verdict.problem], problem=verdict.problem, retry_after_s=wait_s)
        principal = verdict.principal
        self._tell(AuthSucceeded, wall, principal=principal.id, tenant=principal.tenant, cached=cached)
        return principal

    def verify(self, principal: Principal, *, wall: float) -> Deny | None:
        """Whether a principal that was authenticated earlier still holds: long connections ask before each use.

        None when it does; a denial when it has expired, its token or it was revoked, the configuration that vouched for
        it is no longer that, or the manager is closed.
        """
        if self._is_closed:
            return _CLOSED
        if (principal.tenant, principal.id) in self._revoked_principals:
            return _unheld(principal, "was revoked")
        if principal.expires_at_s is not None and wall >= principal.expires_at_s:
            return _unheld(principal, "has expired")
        if principal.credential and not self._is_vouched(principal):
            return _unheld(principal, "has to authenticate anew")
        return None

    def create_access_token(self, principal: Principal, *, wall: float, ttl_s: float | None = None) -> str:
        """A JSON Web Token for `principal`, valid for `ttl_s`, by default the configuration's `token_ttl_s` (24 h).

        Raises `SecurityConfigError` unless the configuration has a `JwtAuth` whose key can sign, and `SecurityError`
        for a time that is none, metadata that is not JSON, and a principal of which every token would be refused.
        """
        auth = self._state.config.auth
        if not isinstance(auth, JwtAuth):
            raise SecurityConfigError("auth: only a JwtAuth can create access tokens")
        ttl_s = auth.token_ttl_s if ttl_s is None else ttl_s
        if not (is_finite(ttl_s) and 1 <= ttl_s <= _MAX_TTL_S):
            raise SecurityError(f"ttl_s: must be 1 second to ten years, not {ttl_s!r}")
        claims: dict[str, object] = {"iat": int(wall), "exp": int(wall + ttl_s)}
        claims |= {"aud": auth.audience} if auth.audience is not None else {}
        claims |= {"iss": auth.issuer} if auth.issuer is not None else {}
        try:
            token = sign_jwt(principal, algorithm=auth.algorithm, key=auth.all_keys()[0], claims=claims)
        except (TypeError, ValueError, RecursionError):
            raise SecurityError(f"principal {principal.id!r}: its metadata is not JSON") from None
        if not self._state.voucher.is_accepted(token, wall=wall):
            raise SecurityError(
                f"principal {principal.id!r}: is more than a token holds, or its username or the names in its metadata "
                "are no text"
            )
        return token.reveal()

    def revoke_token(self, token: str | Secret) -> None:
        """Refuse this token from now on, also to whoever was authenticated by it.

        100,000 can be revoked; beyond that `SecurityError` is raised, and the key should be exchanged.
        """
        if len(self._revoked) >= _MAX_REVOKED:
            raise SecurityError("too many tokens are revoked: exchange the key that they hang on")
        hidden = _hidden(token)
        if hidden is not None:
            self._revoked.add(self._digests.of(hidden))
        self._next_generation()

    def revoke_principal(self, principal_id: str, *, tenant: str = "") -> None:
        """Refuse this principal from now on, whatever its token says; `reinstate_principal` ends that."""
        if len(self._revoked_principals) >= _MAX_REVOKED:
            raise SecurityError("too many principals are revoked")
        self._revoked_principals.add((tenant, principal_id))
        self._next_generation()

    def reinstate_principal(self, principal_id: str, *, tenant: str = "") -> None:
        """Take `revoke_principal` back."""
        self._revoked_principals.discard((tenant, principal_id))
        self._next_generation()

    @property
    def session_policy(self) -> SessionPolicy:
        """Who may reach the sessions of others, now."""
        return self._state.config.sessions

    @property
    def generation(self) -> int:
        """Changes whenever something that was accepted may not be any longer: what is kept by others is to be asked
        about again."""
        return self._generation

    # --- what they may do ---------------------------------------------------------------------------------------------

    def check(self, principal: Principal | None, call: ToolCheck, *, now: float, wall: float) -> Decision:
        """Whether `call` may run for `principal`; never raises. See `policy.py` for the order of the rules."""
        failures: list[Exception] = []
        decide = partial(self._decide, principal, call, now=now, wall=wall)
        decision = contain_sync(decide, report=failures.append)
        if decision is None:
            message = f"the check failed: {type(failures[0]).__name__}"
            self._tell_call(SecurityFault, principal, call, wall, message=message)
            decision = Deny(reason="access", message=message)
        if self._state.config.debug:
            _log(principal, call, decision)
        return decision

    def audit(self, record: ToolAudit) -> None:
        """Tell the event handlers and the audit hook of a call that has ended."""
        if not self._state.config.audit_arguments:
            record = msgspec.structs.replace(record, arguments=None)
        call = ToolCheck(tool=record.tool, arguments=None, call_id=record.call_id, session=record.session)
        said: dict[str, object] = {"status": record.status, "error": record.error, "duration_s": record.duration_s}
        self._tell_call(ToolCalled, record.principal, call, record.at_s, arguments=record.arguments, **said)
        if self._audit is not None:
            contain_sync(partial(self._audit, record), report=self._note_failed_audit)

    def clear_rate_limits(
        self, principal_id: str | None = None, *, tenant: str = "", wall: float | None = None
    ) -> None:
        """Forget the calls of one principal, and of no other; without an id, of everybody."""
        who = None if principal_id is None else caller_of(Principal(id=principal_id, tenant=tenant))
        self._limiter.reset(who)
        self._tell(RateLimitsCleared, wall, principal=principal_id, tenant=tenant)

    def clear_token_cache(self, *, wall: float | None = None) -> None:
        """Forget every token that was accepted: each is checked anew."""
        self._next_generation()
        self._tell(TokenCacheCleared, wall)

    # --- the configuration --------------------------------------------------------------------------------------------

    def get_config(self) -> SecurityConfig:
        """The configuration to look at: frozen, with every key and secret masked. It cannot be used as one."""
        shown = copy.copy(self._state.config)
        auth = copy.copy(shown.auth)
        if isinstance(auth, ApiKeyAuth):
            numbered = {f"key {n}": principal for n, principal in enumerate(auth.api_keys.values(), start=1)}
            msgspec.structs.force_setattr(auth, "api_keys", MappingProxyType(numbered))
        elif isinstance(auth, JwtAuth):
            msgspec.structs.force_setattr(auth, "key", _MASK)
            msgspec.structs.force_setattr(auth, "former_keys", tuple(_MASK for _ in auth.former_keys))
        msgspec.structs.force_setattr(shown, "auth", auth)
        return shown

    def update_config(
        self, config: SecurityConfig | None = None, /, *, wall: float | None = None, **fields: object
    ) -> None:
        """Exchange the configuration, or some fields of it, at once and whole; a wrong one raises and changes nothing.

        Every remembered token is forgotten. Where `auth` changed, principals that a token vouched for have to
        authenticate anew, except by an API key that is still there for the same principal. Counted calls stay counted.
        """
        old = self._state
        new = old.config if config is None else check_kind("config", config, SecurityConfig)
        if fields:
            unknown = fields.keys() - set(new.__struct_fields__)
            if unknown:
                raise SecurityConfigError(f"{min(unknown)}: is no field of a SecurityConfig")
            new = msgspec.structs.replace(new, **fields)
        epoch = old.epoch + (new.auth != old.config.auth)
        self._state = _State(new, self._digests, epoch)
        self._limiter.max_buckets = new.max_buckets
        self._generation += 1
        changed = [name for name in new.__struct_fields__ if getattr(new, name) != getattr(old.config, name)]
        self._tell(ConfigUpdated, wall, changed=tuple(changed))

    # --- who watches --------------------------------------------------------------------------------------------------

    def on(self, kind: type[E], handler: Callable[[E], Awaitable[None] | None]) -> int:
        """Call `handler` with every event of `kind` (`SecurityEvent`: with all); gives the number that `off` takes.

        Handlers are called in the order they came and after the decision is made. See `Emitter` for async ones.
        """
        return self._emitter.on(kind, handler)

    def off(self, number: int) -> None:
        """Call that handler no more."""
        self._emitter.off(number)

    async def run_events(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Deliver events in a task of their own, so that no handler delays a decision; ends by being cancelled."""
        await self._emitter.run_events(task_status=task_status)

    def statistics(self) -> SecurityStatistics:
        """What is remembered now, and what became of the events."""
        return SecurityStatistics(
            cached_tokens=len(self._state.cache),
            revoked_tokens=len(self._revoked),
            revoked_principals=len(self._revoked_principals),
            limits=self._limiter.statistics(),
            handlers_failed=self._emitter.failed + self._audits_failed,
            events_dropped=self._emitter.dropped,
        )

    def close(self) -> None:
        """Forget everything; from now on every token and every call is refused."""
        self._is_closed = True
        self._next_generation()
        self._limiter.reset()
        self._attempts.reset()

    # --- authentication, inside ---------------------------------------------------------------------------------------

    async def _vouch(self, token: Secret, *, now: float, wall: float, source: str) -> tuple[Verdict, bool]:
        """The verdict on a token, and whether it was remembered."""
        digest = self._digests.of(token)
        if self._is_closed:
            return Refused("unavailable"), False
        known = self._state.cache.get(digest, now=now, wall=wall)
        if known is not None:
            return Vouched(known), True
        if self._wait_s(source, now) > 0:
            return Refused("too_many_attempts"), False
        verdict = await self._ask(token, digest, now=now, wall=wall)
        limit = self._state.config.failed_attempts
        is_attempt = isinstance(verdict, Refused) and verdict.problem != "unavailable"
        if is_attempt and source and limit is not None:
            self._attempts.take(caller_of_source(source), [Level(_ATTEMPTS, limit)], now=now)
        return verdict, False

    async def _ask(self, token: Secret, digest: bytes, *, now: float, wall: float) -> Verdict:
        """Ask whoever knows. What was revoked or exchanged meanwhile counts: then the question is asked again."""
        for _ in range(_TRIES):
            state, generation = self._state, self._generation
            verdict = self._unless_revoked(digest, await state.voucher.ask(token, wall=wall))
            if self._generation != generation:
                continue
            if isinstance(verdict, Vouched):
                verdict = self._remember(state, digest, verdict, now)
            return verdict
        return Refused("unavailable")

    def _unless_revoked(self, digest: bytes, verdict: Verdict) -> Verdict:
        if not isinstance(verdict, Vouched):
            return verdict
        who = (verdict.principal.tenant, verdict.principal.id)
        revoked = self._is_closed or digest in self._revoked or who in self._revoked_principals
        return Refused("revoked") if revoked else verdict

    def _remember(self, state: _State, digest: bytes, verdict: Vouched, now: float) -> Vouched:
        principal = with_credential(verdict.principal, f"{self._name}-{state.epoch}.{digest.hex()}")
        vouched = Vouched(principal, verdict.not_before_s)
        if not state.voucher.is_cheap:
            state.cache.put(digest, vouched, now=now)
        return vouched

    def _wait_s(self, source: str, now: float) -> float:
        limit = self._state.config.failed_attempts
        if limit is None or not source:
            return 0.0
        return self._attempts.wait_s(caller_of_source(source), Level(_ATTEMPTS, limit), now=now)

    def _is_vouched(self, principal: Principal) -> bool:
        """Whether the token behind the principal's credential would still be accepted."""
        epoch, _, name = principal.credential.partition(".")
        try:
            digest = bytes.fromhex(name)
        except ValueError:
            return False
        if digest in self._revoked:
            return False
        if epoch == f"{self._name}-{self._state.epoch}":
            return True
        known = self._state.voucher.find_key(digest)
        return known is not None and with_credential(known, principal.credential) == principal

    def _next_generation(self) -> None:
        self._generation += 1
        self._state.cache.clear()

    # --- decisions, inside --------------------------------------------------------------------------------------------

    def _decide(self, principal: Principal | None, call: ToolCheck, *, now: float, wall: float) -> Decision:
        state = self._state
        denied = self._deny_caller(principal, wall) or decide_access(state.config, principal, call=call, wall=wall)
        # Whatever was decided: a call that is denied counts too, or probing would be free.
        wait_s = self._limiter.take(caller_of(principal), levels_of(state.config, principal, call=call), now=now)
        if denied is not None:
            said = {"reason": denied.reason, "message": denied.message}
            self._tell_call(AccessDenied, principal, call, wall, **said)
            return denied
        if wait_s is not None:
            self._tell_call(RateLimitHit, principal, call, wall, retry_after_s=wait_s)
            message = f"too many calls of tool {call.tool!r}; there is room in {wait_s:.3g} s"
            return Deny(reason="rate_limit", message=message, retry_after_s=wait_s)
        return self._decide_arguments(state, principal, call, wall)

    def _deny_caller(self, principal: Principal | None, wall: float) -> Deny | None:
        if self._is_closed:
            return _CLOSED
        return None if principal is None else self.verify(principal, wall=wall)

    def _decide_arguments(self, state: _State, principal: Principal | None, call: ToolCheck, wall: float) -> Decision:
        found = () if state.checker is None else state.checker.check(call.tool, call.arguments)
        if found and not state.audit_only:
            message = _said(found[0])
            self._tell_call(SecurityFault, principal, call, wall, message=message)
            return Deny(reason="dangerous_argument", message=message)
        for finding in found:
            self._tell_call(ArgumentAudited, principal, call, wall, finding=finding.kind, rule=finding.rule)
        self._tell_call(AccessGranted, principal, call, wall)
        return _ALLOW

    # --- events, inside -----------------------------------------------------------------------------------------------

    def _tell(self, kind: Callable[..., SecurityEvent], wall: float | None, **fields: object) -> None:
        if self._emitter.is_heard:
            self._emitter.emit(kind(at_s=wall, **fields))

    def _tell_call(
        self,
        kind: Callable[..., SecurityEvent],
        principal: Principal | None,
        call: ToolCheck,
        wall: float,
        **fields: object,
    ) -> None:
        if not self._emitter.is_heard:
            return
        who, tenant = (None, "") if principal is None else (principal.id, principal.tenant)
        common: Mapping[str, object] = {"tool": call.tool, "session": call.session, "call_id": call.call_id}
        self._emitter.emit(kind(at_s=wall, principal=who, tenant=tenant, **common, **fields))

    def _note_failed_audit(self, _: Exception) -> None:
        self._audits_failed += 1


def _checker(rules: DangerousArguments) -> ArgumentChecker:
    blocked = rules.blocked_values
    return ArgumentChecker(rules.patterns, rules.tool_patterns, blocked_values=blocked, max_chars=rules.max_chars)


def _hidden(token: object) -> Secret | None:
    """The token out of sight of tracebacks; None for a blank one, which is no token.

    What is neither a str nor a Secret becomes a token that nobody has: an error here would show it.
    """
    if token is None:
        return None
    hidden = token if isinstance(token, Secret) else Secret(token if isinstance(token, str) else _NOBODYS)
    return None if hidden.is_blank else hidden.stripped()


def _unheld(principal: Principal, why: str) -> Deny:
    return Deny(reason="authentication", message=f"principal {principal.id!r} {why}")


def _said(finding: Finding) -> str:
    match finding.kind:
        case "blocked_value":
            return f"an argument holds the blocked value {finding.rule!r}"
        case "pattern":
            return f"an argument matches the pattern {finding.rule!r}"
        case "unreadable":
            return f"the arguments cannot be checked: {finding.rule}"


def _refuse_masked(config: SecurityConfig) -> None:
    """A masked copy must not become the rules: its secret is one that everybody knows."""
    auth = config.auth
    if isinstance(auth, ApiKeyAuth) and not all(name.startswith("sha256:") for name in auth.by_digest()):
        raise SecurityConfigError("auth: is the masked copy that get_config gives; use the configuration itself")
    if isinstance(auth, JwtAuth) and _MASK in auth.all_keys():
        raise SecurityConfigError("auth: is the masked copy that get_config gives; use the configuration itself")


def _log(principal: Principal | None, call: ToolCheck, decision: Decision) -> None:
    who = "nobody" if principal is None else repr(principal.id)
    said = "allowed" if isinstance(decision, Allow) else f"denied ({decision.reason}): {decision.message}"
    _LOG.debug("%s", escape_controls(f"call of {call.tool!r} by {who}: {said}"))

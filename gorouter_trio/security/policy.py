"""Which calls are allowed: pure functions of the configuration, the caller and the call.

Theory of operation. The rules are asked in this order; the first that denies ends it, except where it says otherwise:

1. *Authentication.* Somebody has to be authenticated, where that is required; a principal whose time is over is nobody.
2. *The tool's own rules*: its role, one of its any-roles, all its scopes.
3. *The configuration.* The tool's `allow=False` denies. The roles (one is enough) and the scopes (all) of the tool's
   policy and of `*` are demanded. Then the tool's `allow=True` allows. Then `*`'s `allow=False` denies. Then, for a
   caller with a role that names tools, the tools that all their roles name decide. Then `*`'s `allow=True` allows.
   Then the default decides.
4. *Rate limits*: the tool's own, its policy's, `*`'s, and of each of the caller's roles the tool's and `*`'s, all of
   them. A call that a rule denied is counted too; one that a limit denied is not, so that the wait is what was said.
5. *Dangerous arguments.* They come after the limits, since a caller with none left must not go on trying what passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import (
    AccessDeniedError,
    AuthenticationRequiredError,
    DangerousArgumentError,
    SecurityError,
    ToolRateLimitError,
)
from .config import RolePolicy, SecurityConfig, ToolPolicy
from .limiter import Lane, Level
from .rules import Deny, Principal, ToolCheck, ToolRules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Set as AbstractSet

__all__ = ["decide_access", "decide_own_rules", "deny_expired", "error_of", "levels_of"]

_NO_POLICY = ToolPolicy()


def decide_access(config: SecurityConfig, principal: Principal | None, *, call: ToolCheck, wall: float) -> Deny | None:
    """Steps 1 to 3: why the call is denied, or None when they let it through."""
    return (
        deny_expired(principal, wall=wall)
        or _decide_authentication(config, principal, call.tool)
        or decide_own_rules(principal, call)
        or _decide_policy(config, principal, call.tool)
    )


def deny_expired(principal: Principal | None, *, wall: float) -> Deny | None:
    """Step 1 for somebody: a principal holds until its expiry."""
    if principal is None or principal.expires_at_s is None or wall < principal.expires_at_s:
        return None
    return Deny(reason="authentication", message=f"principal {principal.id!r} has expired")


def decide_own_rules(principal: Principal | None, call: ToolCheck) -> Deny | None:
    """Step 2, which holds whatever guard there is."""
    rules = call.rules
    if rules is None:
        return None
    roles, scopes = _held(principal)
    if rules.role is not None and rules.role not in roles:
        return _denied(f"tool {call.tool!r} demands the role {rules.role!r}")
    if rules.any_role and roles.isdisjoint(rules.any_role):
        return _denied(f"tool {call.tool!r} demands one of the roles {', '.join(rules.any_role)}")
    missing = [scope for scope in rules.scopes if scope not in scopes]
    return _denied(f"tool {call.tool!r} demands the scope {missing[0]!r}") if missing else None


def levels_of(config: SecurityConfig | None, principal: Principal | None, *, call: ToolCheck) -> list[Level]:
    """Step 4: every limit that applies to the call, each with what it is counted by."""
    found = _own_levels(call.tool, call.rules)
    if config is not None:
        found += _policy_levels(config.tools, call.tool)
        if principal is not None:
            for role in sorted(principal.roles):
                found += _role_levels(config.roles.get(role), role, call.tool)
    return found


def error_of(deny: Deny) -> SecurityError:
    """The error that a denial is raised as, where a caller and not a model is told."""
    match deny.reason:
        case "access":
            return AccessDeniedError(deny.message)
        case "authentication":
            return AuthenticationRequiredError(deny.message)
        case "rate_limit":
            return ToolRateLimitError(deny.message, retry_after_s=deny.retry_after_s)
        case "dangerous_argument":
            return DangerousArgumentError(deny.message)


def _decide_authentication(config: SecurityConfig, principal: Principal | None, tool: str) -> Deny | None:
    if principal is not None or not config.require_authentication or config.allow_unauthenticated:
        return None
    return Deny(reason="authentication", message=f"tool {tool!r} takes calls from authenticated callers only")


def _decide_policy(config: SecurityConfig, principal: Principal | None, tool: str) -> Deny | None:
    own, every = config.tools.get(tool, _NO_POLICY), config.tools.get("*", _NO_POLICY)
    if own.allow is False:
        return _denied(f"tool {tool!r} is denied by its policy")
    demanded = _decide_demands(own, principal, tool) or _decide_demands(every, principal, tool)
    if demanded is not None or own.allow is True:
        return demanded
    if every.allow is False:
        return _denied(f"tool {tool!r} is denied by the policy of every tool")
    named = _tools_of_roles(config, principal)
    if named is not None:
        allowed = tool in named or "*" in named
        return None if allowed else _denied(f"no role of the caller allows tool {tool!r}")
    if every.allow is True or config.default_policy == "allow-all":
        return None
    return _denied(f"no rule allows tool {tool!r}")


def _decide_demands(policy: ToolPolicy, principal: Principal | None, tool: str) -> Deny | None:
    roles, scopes = _held(principal)
    if policy.roles and roles.isdisjoint(policy.roles):
        return _denied(f"the policy of tool {tool!r} demands one of the roles {', '.join(policy.roles)}")
    missing = [scope for scope in policy.scopes if scope not in scopes]
    return _denied(f"the policy of tool {tool!r} demands the scope {missing[0]!r}") if missing else None


def _tools_of_roles(config: SecurityConfig, principal: Principal | None) -> frozenset[str] | None:
    """The tools that the caller's roles name together, or None where no role names any."""
    roles, _ = _held(principal)
    policies = [config.roles[role] for role in roles if role in config.roles]
    named = [policy.allowed_tools for policy in policies if policy.allowed_tools is not None]
    return frozenset(tool for tools in named for tool in tools) if named else None


def _held(principal: Principal | None) -> tuple[AbstractSet[str], AbstractSet[str]]:
    return (frozenset(), frozenset()) if principal is None else (principal.roles, principal.scopes)


def _own_levels(tool: str, rules: ToolRules | None) -> list[Level]:
    limit = None if rules is None else rules.rate_limit
    return [] if limit is None else [Level(Lane("own", tool), limit)]


def _policy_levels(tools: Mapping[str, ToolPolicy], tool: str) -> Iterator[Level]:
    for level, name in (("tool", tool), ("*", "*")):
        limit = tools.get(name, _NO_POLICY).rate_limit
        if limit is not None:
            yield Level(Lane(level, tool), limit)


def _role_levels(policy: RolePolicy | None, role: str, tool: str) -> Iterator[Level]:
    for level, name in (("role", tool), ("role*", "*")):
        limit = None if policy is None else policy.rate_limits.get(name)
        if limit is not None:
            yield Level(Lane(f"{level}:{role}", tool), limit)


def _denied(message: str) -> Deny:
    return Deny(reason="access", message=message)

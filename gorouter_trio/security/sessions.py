"""Whose session is it: the name a session has in a store, and who may reach it. Pure; acting on it is elsewhere.

A session belongs to the principal that speaks in it. Its full name is its *scope*: tenant, principal and the key that
the program gave it, three texts that stay three, so that no two sessions of different owners can share a name. Who may
not reach a session learns nothing about it: the answer is the one for a session that is not there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Struct

from ._checks import check_choice, check_names

if TYPE_CHECKING:
    from .rules import Principal

__all__ = [
    "Owner",
    "SessionPolicy",
    "SessionScope",
    "Sharing",
    "may_reach",
    "resolve_session",
    "session_scope",
]

Sharing = Literal["own", "tenant", "all"]
"""Who may reach a session beside its owner: nobody, everybody of its tenant, or everybody."""


class SessionScope(NamedTuple):
    """The full name of a session. Without a principal, tenant and principal are empty, which no principal's are."""

    tenant: str
    principal: str
    key: str


Owner: TypeAlias = tuple[str, str]
"""A tenant and the id of a principal in it."""


class SessionPolicy(Struct, frozen=True, kw_only=True):
    """Who may reach sessions that are not their own.

    `sharing` opens them to a tenant or to everybody who is authenticated. `tenant_roles` reach every session of their
    own tenant, `global_roles` every session at all. Nobody who is not authenticated reaches a principal's session, and
    a session without an owner is reached by those without a principal and by `global_roles`.
    """

    sharing: Sharing = "own"
    tenant_roles: Collection[str] = ()
    global_roles: Collection[str] = ()

    def __post_init__(self) -> None:
        check_choice("session_policy.sharing", self.sharing, ("own", "tenant", "all"))
        for field in ("tenant_roles", "global_roles"):
            names = frozenset(check_names(f"session_policy.{field}", getattr(self, field)))
            msgspec.structs.force_setattr(self, field, names)


def session_scope(principal: Principal | None, key: str) -> SessionScope:
    """The scope of the session that `principal` calls `key`."""
    return SessionScope("", "", key) if principal is None else SessionScope(principal.tenant, principal.id, key)


def resolve_session(
    policy: SessionPolicy, principal: Principal | None, *, key: str, owner: Owner | None = None
) -> SessionScope | None:
    """The scope that `principal` means by `key`, their own or that of `owner` (tenant, principal id).

    None where they may not reach it; answer as for a session that is not there.
    """
    if owner is None:
        return session_scope(principal, key)
    scope = SessionScope(*owner, key)
    return scope if may_reach(policy, principal, scope=scope) else None


def may_reach(policy: SessionPolicy, principal: Principal | None, *, scope: SessionScope) -> bool:
    """Whether `principal` may see and use the session."""
    if principal is None:
        return not scope.principal and not scope.tenant
    if not principal.roles.isdisjoint(policy.global_roles):
        return True
    if not scope.principal:
        return False
    if (principal.tenant, principal.id) == (scope.tenant, scope.principal) or policy.sharing == "all":
        return True
    shared = policy.sharing == "tenant" or not principal.roles.isdisjoint(policy.tenant_roles)
    return shared and principal.tenant == scope.tenant

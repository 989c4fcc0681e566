"""The words of security: who asks, what a tool demands, what the guard says. Values only; deciding is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

from msgspec import Struct

__all__ = [
    "Allow",
    "Decision",
    "Deny",
    "DenyReason",
    "Principal",
    "RateLimit",
    "ToolAudit",
    "ToolCheck",
    "ToolGuard",
    "ToolRules",
]

DenyReason = Literal["access", "authentication", "rate_limit", "dangerous_argument"]
"""Why a call was denied: no right to it, nobody authenticated, too many calls, or an argument that a rule forbids."""


class RateLimit(Struct, frozen=True, kw_only=True):
    """At most `limit` calls in every window of `period_s` seconds."""

    limit: int
    period_s: float


class ToolRules(Struct, frozen=True, kw_only=True):
    """What a tool demands of its caller; all of it must hold, whether a guard is configured or not.

    `role` is one that the caller must have, `any_role` are roles of which one is enough, `scopes` must all be
    there, `rate_limit` holds for each caller. `sensitive` calls need an approval.
    """

    role: str | None = None
    any_role: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    rate_limit: RateLimit | None = None
    sensitive: bool = False


class Principal(Struct, frozen=True, kw_only=True):
    """Who asks: authenticated, and never changed by anything that a model says.

    `id` is unique within `tenant`. `expires_at_s` is wall-clock seconds since the epoch, None for never.
    """

    id: str
    tenant: str = ""
    roles: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    username: str | None = None
    expires_at_s: float | None = None
    metadata: Mapping[str, object] = {}


class ToolCheck(Struct, frozen=True, kw_only=True):
    """One call that wants to run: its arguments are decoded JSON, as the tool would get them."""

    tool: str
    arguments: object
    rules: ToolRules | None = None
    call_id: str = ""
    session: str | None = None


class Allow(Struct, frozen=True, tag=True):
    """The call may run."""


class Deny(Struct, frozen=True, tag=True, kw_only=True):
    """The call must not run.

    `message` is for the log and the report and may name the rule; the model is told `reason` and
    `retry_after_s` only, so that it cannot feel its way around a rule.
    """

    reason: DenyReason
    message: str
    retry_after_s: float | None = None


Decision: TypeAlias = Allow | Deny


class ToolAudit(Struct, frozen=True, kw_only=True):
    """What became of one call, for the audit log: `at_s` is wall-clock seconds since the epoch."""

    tool: str
    principal: Principal | None
    arguments: object
    status: str
    call_id: str = ""
    session: str | None = None
    error: str | None = None
    duration_s: float = 0.0
    at_s: float = 0.0


class ToolGuard(Protocol):
    """What stands in front of every tool call. Never waits; `now` is the trio clock, `wall` seconds since the epoch."""

    def check(self, principal: Principal | None, call: ToolCheck, *, now: float, wall: float) -> Decision:
        """Whether `call` may run for `principal` (None: nobody authenticated); a call that is denied counts too."""

    def audit(self, record: ToolAudit) -> None:
        """Take note of a call that has ended, in whatever way."""

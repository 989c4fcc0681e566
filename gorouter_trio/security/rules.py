"""The words of security: who asks, what a tool demands, what the guard says. Values only; deciding is elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import msgspec
from msgspec import Struct

from ..errors import SecurityConfigError
from ._checks import check_count, check_name, check_names, check_seconds, is_finite

if TYPE_CHECKING:
    from ..config import Secret

__all__ = [
    "Allow",
    "Authenticator",
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

_MAX_LIMIT = 1_000_000
_MAX_PERIOD_S = 31 * 86_400.0


class RateLimit(Struct, frozen=True, kw_only=True):
    """At most `limit` calls in every window of `period_s` seconds.

    `limit` is 1 to 1,000,000, `period_s` at most 31 days; anything else raises `SecurityConfigError`.
    """

    limit: int
    period_s: float

    def __post_init__(self) -> None:
        check_count("rate_limit.limit", self.limit, least=1, most=_MAX_LIMIT)
        check_seconds("rate_limit.period_s", self.period_s, most=_MAX_PERIOD_S)


class ToolRules(Struct, frozen=True, kw_only=True):
    """What a tool demands of its caller; all of it must hold, whether a guard is configured or not.

    `role` is one that the caller must have, `any_role` are roles of which one is enough, `scopes` must all be
    there, `rate_limit` holds for each caller. `sensitive` calls need an approval. A rule that cannot be one, such
    as a str where several names belong, raises `SecurityConfigError`.
    """

    role: str | None = None
    any_role: Collection[str] = ()
    scopes: Collection[str] = ()
    rate_limit: RateLimit | None = None
    sensitive: bool = False

    def __post_init__(self) -> None:
        if self.role is not None:
            check_name("rules.role", self.role)
        for field in ("any_role", "scopes"):
            names = check_names(f"rules.{field}", getattr(self, field))
            msgspec.structs.force_setattr(self, field, names)
        if not isinstance(self.rate_limit, (RateLimit, type(None))):
            raise SecurityConfigError("rules.rate_limit: must be a RateLimit")


class Principal(Struct, frozen=True, kw_only=True):
    """Who asks: authenticated, and never changed by anything that a model says.

    `id` is unique within `tenant`. `expires_at_s` is wall-clock seconds since the epoch, None for never.
    `credential` says by which access token a security manager knew it, in words that only that manager
    understands, so that revoking the token reaches calls already under way; it is empty for a principal that the
    program made itself, and in no repr. Raises `SecurityConfigError` for an id that is blank or roles that are a str.
    """

    id: str
    tenant: str = ""
    roles: AbstractSet[str] = frozenset()
    scopes: AbstractSet[str] = frozenset()
    username: str | None = None
    expires_at_s: float | None = None
    metadata: Mapping[str, object] = {}
    credential: str = ""

    def __post_init__(self) -> None:
        check_name("principal.id", self.id)
        if self.tenant != "":
            check_name("principal.tenant", self.tenant)
        for field in ("roles", "scopes"):
            names = frozenset(check_names(f"principal.{field}", getattr(self, field)))
            msgspec.structs.force_setattr(self, field, names)
        if self.expires_at_s is not None and not is_finite(self.expires_at_s):
            raise SecurityConfigError(f"principal.expires_at_s: must be a time, not {self.expires_at_s!r}")

    def __repr__(self) -> str:
        tenant = f", tenant={self.tenant!r}" if self.tenant else ""
        return f"Principal(id={self.id!r}{tenant}, roles={sorted(self.roles)}, scopes={sorted(self.scopes)})"


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


class Authenticator(Protocol):
    """What turns an access token into a principal. `now` is the trio clock, `wall` seconds since the epoch."""

    async def authenticate(
        self, token: str | Secret | None, *, now: float, wall: float, source: str = ""
    ) -> Principal | None:
        """The principal that `token` stands for, or None where no token was given and none is required.

        `source` is where the attempt came from, such as an address; failed attempts are counted by it. Raises
        `InvalidTokenError`, or `AuthenticationRequiredError` where there is no token and one is required.
        """

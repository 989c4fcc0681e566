"""The guard where none is configured: what tools declare holds all the same."""

from __future__ import annotations

from .limiter import RateLimiter, caller_of
from .policy import decide_own_rules, deny_expired, levels_of
from .rules import Allow, Decision, Deny, Principal, ToolAudit, ToolCheck

__all__ = ["SimpleGuard"]

_ALLOW = Allow()


class SimpleGuard:
    """Enforces the rules that tools declare: roles, scopes and rate limits. A tool without rules may be called by all.

    `now` is the trio clock and `wall` seconds since the epoch. Not for several threads.
    """

    def __init__(self) -> None:
        self._limiter = RateLimiter()

    def check(self, principal: Principal | None, call: ToolCheck, *, now: float, wall: float) -> Decision:
        """Whether the call's own rules let `principal` make it; a call that they deny is counted too."""
        if call.rules is None:
            return deny_expired(principal, wall=wall) or _ALLOW
        denied = deny_expired(principal, wall=wall) or decide_own_rules(principal, call)
        wait_s = self._limiter.take(caller_of(principal), levels_of(None, principal, call=call), now=now)
        if denied is not None:
            return denied
        if wait_s is None:
            return _ALLOW
        message = f"too many calls of tool {call.tool!r}; there is room in {wait_s:.3g} s"
        return Deny(reason="rate_limit", message=message, retry_after_s=wait_s)

    def audit(self, record: ToolAudit) -> None:
        """Nobody watches here."""

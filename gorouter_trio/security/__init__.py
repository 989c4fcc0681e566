"""Who may do what: principals, the rules of tools, and the guard that decides."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ApiKeyAuth as ApiKeyAuth
    from .config import Auth as Auth
    from .config import CustomAuth as CustomAuth
    from .config import DangerousArguments as DangerousArguments
    from .config import JwtAuth as JwtAuth
    from .config import RolePolicy as RolePolicy
    from .config import SecurityConfig as SecurityConfig
    from .config import ToolPolicy as ToolPolicy
    from .config import digest_of_key as digest_of_key
    from .events import AccessDenied as AccessDenied
    from .events import AccessGranted as AccessGranted
    from .events import ArgumentAudited as ArgumentAudited
    from .events import AuthFailed as AuthFailed
    from .events import AuthSucceeded as AuthSucceeded
    from .events import ConfigUpdated as ConfigUpdated
    from .events import EventHandler as EventHandler
    from .events import RateLimitHit as RateLimitHit
    from .events import RateLimitsCleared as RateLimitsCleared
    from .events import SecurityEvent as SecurityEvent
    from .events import SecurityFault as SecurityFault
    from .events import TokenCacheCleared as TokenCacheCleared
    from .events import ToolCalled as ToolCalled
    from .manager import SecurityManager as SecurityManager
    from .manager import SecurityStatistics as SecurityStatistics
    from .paths import safe_join as safe_join
    from .policy import error_of as error_of
    from .rules import Allow as Allow
    from .rules import Authenticator as Authenticator
    from .rules import Decision as Decision
    from .rules import Deny as Deny
    from .rules import DenyReason as DenyReason
    from .rules import Principal as Principal
    from .rules import RateLimit as RateLimit
    from .rules import ToolAudit as ToolAudit
    from .rules import ToolCheck as ToolCheck
    from .rules import ToolGuard as ToolGuard
    from .rules import ToolRules as ToolRules
    from .sessions import SessionPolicy as SessionPolicy
    from .sessions import SessionScope as SessionScope
    from .sessions import may_reach as may_reach
    from .sessions import resolve_session as resolve_session
    from .sessions import session_scope as session_scope
    from .simple import SimpleGuard as SimpleGuard
    from .text import escape_controls as escape_controls
    from .urls import CheckedUrl as CheckedUrl
    from .urls import UrlPolicy as UrlPolicy
    from .urls import check_address as check_address
    from .urls import check_addresses as check_addresses
    from .urls import check_url as check_url
    from .urls import join_redirect as join_redirect

__all__ = [
    "AccessDenied",
    "AccessGranted",
    "Allow",
    "ApiKeyAuth",
    "ArgumentAudited",
    "Auth",
    "AuthFailed",
    "AuthSucceeded",
    "Authenticator",
    "CheckedUrl",
    "ConfigUpdated",
    "CustomAuth",
    "DangerousArguments",
    "Decision",
    "Deny",
    "DenyReason",
    "EventHandler",
    "JwtAuth",
    "Principal",
    "RateLimit",
    "RateLimitHit",
    "RateLimitsCleared",
    "RolePolicy",
    "SecurityConfig",
    "SecurityEvent",
    "SecurityFault",
    "SecurityManager",
    "SecurityStatistics",
    "SessionPolicy",
    "SessionScope",
    "SimpleGuard",
    "TokenCacheCleared",
    "ToolAudit",
    "ToolCalled",
    "ToolCheck",
    "ToolGuard",
    "ToolPolicy",
    "ToolRules",
    "UrlPolicy",
    "check_address",
    "check_addresses",
    "check_url",
    "digest_of_key",
    "error_of",
    "escape_controls",
    "join_redirect",
    "may_reach",
    "resolve_session",
    "safe_join",
    "session_scope",
]

# Where each name is defined: they are loaded when first asked for, since many programs guard nothing.
_HOMES = {
    "config": (
        "ApiKeyAuth",
        "Auth",
        "CustomAuth",
        "DangerousArguments",
        "JwtAuth",
        "RolePolicy",
        "SecurityConfig",
        "ToolPolicy",
        "digest_of_key",
    ),
    "events": (
        "AccessDenied",
        "AccessGranted",
        "ArgumentAudited",
        "AuthFailed",
        "AuthSucceeded",
        "ConfigUpdated",
        "EventHandler",
        "RateLimitHit",
        "RateLimitsCleared",
        "SecurityEvent",
        "SecurityFault",
        "TokenCacheCleared",
        "ToolCalled",
    ),
    "manager": (
        "SecurityManager",
        "SecurityStatistics",
    ),
    "paths": ("safe_join",),
    "policy": ("error_of",),
    "rules": (
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
    ),
    "sessions": (
        "SessionPolicy",
        "SessionScope",
        "may_reach",
        "resolve_session",
        "session_scope",
    ),
    "simple": ("SimpleGuard",),
    "text": ("escape_controls",),
    "urls": (
        "CheckedUrl",
        "UrlPolicy",
        "check_address",
        "check_addresses",
        "check_url",
        "join_redirect",
    ),
}


def __getattr__(name: str) -> object:
    """Load the module that has the name."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What the rules of a security configuration mean, a second time: from their description, with nothing of the code.

A configuration here is a plain dict. `Reference.decide` says `allow` or the reason of a denial. `draw_world` makes
configurations, `build_config` turns one into the package's own.
"""

from __future__ import annotations

import random
from typing import Any

from gorouter_trio.security import (
    DangerousArguments,
    Principal,
    RateLimit,
    RolePolicy,
    SecurityConfig,
    ToolPolicy,
    ToolRules,
)


class Reference:
    """Decides calls by one configuration; remembers when calls were made."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.calls: dict[object, list[float]] = {}

    def decide(self, who: dict[str, Any] | None, call: dict[str, Any], at: float) -> str:
        denied = self.access(who, call)
        full = self.count(who, call, at)
        if denied:
            return denied
        if full:
            return "rate_limit"
        return "dangerous_argument" if self.dangerous(call) and not self.config["audit_only"] else "allow"

    def access(self, who: dict[str, Any] | None, call: dict[str, Any]) -> str | None:
        config, rules, tool = self.config, call["rules"], call["tool"]
        if who is None and config["require"] and not config["anonymous"]:
            return "authentication"
        if who is not None and who["expired"]:
            return "authentication"
        roles, scopes = (who["roles"], who["scopes"]) if who else (set(), set())
        own, every = config["tools"].get(tool, {}), config["tools"].get("*", {})
        if rules.get("role") and rules["role"] not in roles:
            return "access"
        if own.get("allow") is False:
            return "access"
        for any_of, all_of in (
            (rules.get("any_role"), rules.get("scopes")),
            (own.get("roles"), own.get("scopes")),
            (every.get("roles"), every.get("scopes")),
        ):
            if (any_of and not roles & set(any_of)) or (all_of and not set(all_of) <= scopes):
                return "access"
        if own.get("allow") is True:
            return None
        if every.get("allow") is False:
            return "access"
        lists = [config["roles"][role]["tools"] for role in roles if role in config["roles"]]
        lists = [names for names in lists if names is not None]
        if lists:
            return None if any(tool in names or "*" in names for names in lists) else "access"
        return None if every.get("allow") is True or config["default"] == "allow-all" else "access"

    def count(self, who: dict[str, Any] | None, call: dict[str, Any], at: float) -> bool:
        """Whether a limit has no room left; if all have, the call is counted at each."""
        tool = call["tool"]
        levels: dict[object, Any] = {}
        levels["own"] = call["rules"].get("limit")
        for name in (tool, "*"):
            levels["tool", name] = self.config["tools"].get(name, {}).get("limit")
            for role in who["roles"] if who else ():
                levels["role", role, name] = self.config["roles"].get(role, {"limits": {}})["limits"].get(name)
        caller = (who["tenant"], who["id"]) if who else None
        logs = [(limit, self.calls.setdefault((caller, tool, level), [])) for level, limit in levels.items() if limit]
        if any(sum(at - then < limit[1] for then in log) >= limit[0] for limit, log in logs):
            return True
        for _, log in logs:
            log.append(at)
        return False

    def dangerous(self, call: dict[str, Any]) -> bool:
        words = self.config["words"] + self.config["tool_words"].get(call["tool"], [])
        return any(word in str(call["arguments"]) for word in words)


ROLES, SCOPES, TOOLS = ("a", "b", "c"), ("s", "t"), ("x", "y")


def draw_world(rng: random.Random) -> dict[str, Any]:
    """A configuration in which most rules are about the few callers and tools that `draw_call` knows."""
    return {
        "default": rng.choice(["deny-all", "allow-all"]),
        "require": rng.random() < 0.3,
        "anonymous": rng.random() < 0.3,
        "audit_only": rng.random() < 0.2,
        "words": rng.choice([[], [], ["bad"]]),
        "tool_words": {"x": ["evil"]} if rng.random() < 0.2 else {},
        "tools": {name: _draw_policy(rng) for name in (*TOOLS, "*") if rng.random() < 0.6},
        "roles": {role: _draw_role(rng) for role in ROLES if rng.random() < 0.5},
    }


def draw_who(rng: random.Random) -> dict[str, Any] | None:
    """Nobody, or one of a few principals with chance roles."""
    if rng.random() < 0.2:
        return None
    roles, scopes = _some(rng, ROLES), _some(rng, SCOPES)
    name = rng.choice(["u", "v", "u|x", "nobody"])
    return {"id": name, "tenant": rng.choice(["", "t"]), "roles": set(roles), "scopes": set(scopes),
            "expired": rng.random() < 0.05}  # fmt: skip


def draw_call(rng: random.Random, tools: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A call of one of the tools, each of which has its own rules."""
    arguments = rng.choice([{}, {"q": "fine"}, {"q": ["bad"]}, {"evil": 1}, {"q": {"r": "an evil thing"}}])
    tool = rng.choice(TOOLS)
    return {"tool": tool, "rules": tools[tool], "arguments": arguments}


def draw_tools(rng: random.Random) -> dict[str, dict[str, Any]]:
    """The rules that each tool declares, if any."""
    return {tool: _draw_rules(rng) for tool in TOOLS}


def _draw_rules(rng: random.Random) -> dict[str, Any]:
    rules: dict[str, Any] = {}
    if rng.random() < 0.4:
        rules = {"role": rng.choice([None, None, "a"]), "any_role": _some(rng, ROLES) if rng.random() < 0.3 else [],
                 "scopes": _some(rng, SCOPES) if rng.random() < 0.3 else [], "limit": _draw_limit(rng)}  # fmt: skip
    return rules


def _some(rng: random.Random, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if rng.random() < 0.5]


def _draw_limit(rng: random.Random) -> tuple[int, float] | None:
    return (rng.randint(1, 3), rng.choice([1.0, 2.5, 5.0])) if rng.random() < 0.4 else None


def _draw_policy(rng: random.Random) -> dict[str, Any]:
    return {
        "allow": rng.choice([None, None, True, False]),
        "roles": _some(rng, ROLES) if rng.random() < 0.3 else [],
        "scopes": _some(rng, SCOPES) if rng.random() < 0.3 else [],
        "limit": _draw_limit(rng),
    }


def _draw_role(rng: random.Random) -> dict[str, Any]:
    limits = {name: _draw_limit(rng) for name in (*TOOLS, "*")}
    tools = rng.choice([None, [], ["x"], ["y"], ["x", "y"], ["*"]])
    return {"tools": tools, "limits": {name: limit for name, limit in limits.items() if limit}}


def build_config(world: dict[str, Any]) -> SecurityConfig:
    """The same configuration in the package's own words."""
    return SecurityConfig(
        default_policy=world["default"],
        require_authentication=world["require"],
        allow_unauthenticated=world["anonymous"],
        tools={
            name: ToolPolicy(allow=p["allow"], roles=p["roles"], scopes=p["scopes"], rate_limit=_limit(p["limit"]))
            for name, p in world["tools"].items()
        },
        roles={
            name: RolePolicy(
                allowed_tools=p["tools"],
                rate_limits={t: RateLimit(limit=n[0], period_s=n[1]) for t, n in p["limits"].items()},
            )
            for name, p in world["roles"].items()
        },
        dangerous_arguments=DangerousArguments(
            blocked_values=world["words"], tool_patterns=world["tool_words"], audit_only=world["audit_only"]
        ),
    )


def build_principal(who: dict[str, Any] | None) -> Principal | None:
    """The caller in the package's own words; the wall clock stands at 1000."""
    if who is None:
        return None
    expires = 1000.0 if who["expired"] else 1000.5
    return Principal(id=who["id"], tenant=who["tenant"], roles=who["roles"], scopes=who["scopes"], expires_at_s=expires)


def build_rules(rules: dict[str, Any]) -> ToolRules | None:
    """A tool's own rules in the package's own words."""
    if not rules:
        return None
    return ToolRules(
        role=rules["role"], any_role=rules["any_role"], scopes=rules["scopes"], rate_limit=_limit(rules["limit"])
    )


def _limit(limit: tuple[int, float] | None) -> RateLimit | None:
    return None if limit is None else RateLimit(limit=limit[0], period_s=limit[1])

"""The defects of GoRouter Kit's security that must not come back, one by one.

Each test fails on the behaviour that its first line names. What is about forged tokens, rate limits, arguments and
events in detail is in the tests of those parts.
"""

# Wrong settings are made on purpose, and what a decision or a field is, the next line tells.
# mypy: disable-error-code="arg-type,dict-item,index,misc,return-value,union-attr"

from __future__ import annotations

import pytest
from jwt_forge import GOOD_CLAIMS, GOOD_HEADER, SECRET, WALL, signed

import gorouter_trio as gr
from gorouter_trio.security import (
    Allow,
    ApiKeyAuth,
    DangerousArguments,
    JwtAuth,
    Principal,
    RateLimit,
    RolePolicy,
    SecurityConfig,
    SecurityManager,
    SimpleGuard,
    ToolAudit,
    ToolCheck,
    ToolPolicy,
    ToolRules,
)

USER = Principal(id="u", roles={"user"}, scopes={"s"})
OPEN = ToolPolicy(allow=True)
ONE = RateLimit(limit=1, period_s=60.0)
NEVER = RateLimit(limit=100, period_s=60.0)


def decide(manager: SecurityManager | SimpleGuard, principal, tool="x", arguments=None, rules=None, now=0.0) -> str:
    decision = manager.check(principal, ToolCheck(tool=tool, arguments=arguments, rules=rules), now=now, wall=WALL)
    return "allow" if decision == Allow() else decision.reason


def managed(**fields) -> SecurityManager:
    return SecurityManager(SecurityConfig(**fields))


@pytest.mark.parametrize(
    "rules", [ToolRules(role="admin"), ToolRules(any_role=["admin", "root"]), ToolRules(scopes=["s", "t"])]
)
def test_a1_a2_declared_rules_hold_without_a_guard(rules: ToolRules) -> None:
    """A1, A2: no guard enforced nothing, and the simple one skipped scopes."""
    good = Principal(id="u", roles={"admin"}, scopes={"s", "t"})
    for principal in (None, USER, Principal(id="u", roles={"adm"}, scopes={"s t"})):
        assert decide(SimpleGuard(), principal, rules=rules) == "access"
    assert decide(SimpleGuard(), good, rules=rules) == "allow"
    assert decide(SimpleGuard(), None) == "allow"


def test_a2_the_simple_guard_counts() -> None:
    """A2: the simple guard skipped rate limits; denied calls count too, and callers are told apart."""
    guard, rules = SimpleGuard(), ToolRules(rate_limit=ONE)
    assert [decide(guard, USER, rules=rules) for _ in range(2)] == ["allow", "rate_limit"]
    assert decide(guard, None, rules=rules) == "allow"
    assert decide(guard, USER, rules=rules, now=60.0) == "allow"
    strict = ToolRules(role="admin", rate_limit=ONE)
    assert decide(guard, USER, tool="y", rules=strict) == "access"
    grown = Principal(id="u", roles={"admin"})
    assert decide(guard, grown, tool="y", rules=strict) == "rate_limit"
    expired = Principal(id="v", expires_at_s=WALL - 1.0)
    assert decide(guard, expired) == decide(guard, expired, rules=rules) == "authentication"
    guard.audit(ToolAudit(tool="x", principal=USER, arguments=None, status="success"))


def test_a3_an_empty_list_allows_nothing() -> None:
    """A3: a role without allowed tools could call every tool."""
    for role in (RolePolicy(), RolePolicy(allowed_tools=[])):
        assert decide(managed(roles={"user": role}), USER) == "access"
    assert decide(managed(roles={"user": RolePolicy(allowed_tools=["x"])}), USER) == "allow"
    assert decide(managed(roles={"user": RolePolicy(allowed_tools=["*"])}), USER) == "allow"


def test_a3_a_denial_of_all_tools_beats_a_role() -> None:
    """A3: `Tools["*"].Allow=false` was asked after the role, which had allowed by then."""
    roles = {"user": RolePolicy(allowed_tools=["*"])}
    closed = {"*": ToolPolicy(allow=False)}
    assert decide(managed(roles=roles, tools=closed), USER) == "access"
    assert decide(managed(roles=roles, tools={"x": ToolPolicy(allow=False)}), USER) == "access"
    assert decide(managed(roles=roles, tools={**closed, "x": OPEN}), USER) == "allow"


def test_a4_what_all_tools_demand_is_demanded() -> None:
    """A4: roles and scopes of `*` were never read, so everybody came in."""
    for every in (ToolPolicy(allow=True, scopes=["admin"]), ToolPolicy(allow=True, roles=["admin"])):
        manager = managed(tools={"*": every, "y": OPEN}, default_policy="allow-all")
        assert [decide(manager, who, tool) for who in (USER, None) for tool in ("x", "y")] == ["access"] * 4
        good = Principal(id="a", roles={"admin"}, scopes={"admin"})
        assert [decide(manager, good, tool) for tool in ("x", "y")] == ["allow"] * 2


def test_a4_allowed_tools_restrict_under_allow_all() -> None:
    """A4: under allow-all a role's list of tools restricted nothing."""
    roles = {"user": RolePolicy(allowed_tools=["x"])}
    for more in ({"default_policy": "allow-all"}, {"tools": {"*": OPEN}}):
        manager = managed(roles=roles, **more)
        assert (decide(manager, USER, "x"), decide(manager, USER, "y")) == ("allow", "access")
        assert decide(manager, Principal(id="v"), "y") == "allow"


def test_a5_every_role_counts() -> None:
    """A5: only `role` was looked at, not `roles`: neither lists nor limits applied to such users."""
    manager = managed(
        roles={
            "reader": RolePolicy(allowed_tools=["x"], rate_limits={"x": NEVER}),
            "writer": RolePolicy(allowed_tools=["y"], rate_limits={"y": ONE}),
        }
    )
    both = Principal(id="u", roles={"reader", "writer"})
    assert [decide(manager, both, tool) for tool in ("x", "y", "y", "z")] == ["allow", "allow", "rate_limit", "access"]


@pytest.mark.parametrize("level", ["own", "tool", "*", "role", "role*"])
def test_a6_every_limit_counts(level: str) -> None:
    """A6: the first limit won, so that a loose one switched a strict one off."""
    limits = {name: ONE if name == level else NEVER for name in ("own", "tool", "*", "role", "role*")}
    manager = managed(
        tools={"x": ToolPolicy(allow=True, rate_limit=limits["tool"]), "*": ToolPolicy(rate_limit=limits["*"])},
        roles={"user": RolePolicy(allowed_tools=["*"], rate_limits={"x": limits["role"], "*": limits["role*"]})},
    )
    rules = ToolRules(rate_limit=limits["own"])
    assert [decide(manager, USER, rules=rules) for _ in range(2)] == ["allow", "rate_limit"]


@pytest.mark.parametrize("header", [{"alg": "none"}, {"alg": "HS512", "typ": "JWT"}, {"typ": "JWT"}, []])
async def test_a7_the_header_is_read(header: object) -> None:
    """A7: the header of a token was never looked at."""
    manager = managed(auth=JwtAuth(key=SECRET))
    with pytest.raises(gr.InvalidTokenError):
        await manager.authenticate(signed(header, GOOD_CLAIMS), now=0.0, wall=WALL)


@pytest.mark.parametrize("exp", [0, -1, None, "gone"])
async def test_a8_no_token_is_for_ever(exp: object) -> None:
    """A8: without `exp`, or with one of zero or less, a token never expired."""
    claims = {**GOOD_CLAIMS, "exp": exp} if exp != "gone" else {"sub": "u"}
    with pytest.raises(gr.InvalidTokenError):
        await managed(auth=JwtAuth(key=SECRET)).authenticate(signed(GOOD_HEADER, claims), now=0.0, wall=WALL)


async def test_a13_a_token_without_a_checker() -> None:
    """A13: a token was ignored where the guard could not check it."""
    with pytest.raises(gr.InvalidTokenError):
        await managed().authenticate("any token at all", now=0.0, wall=WALL)


def test_a14_the_configuration_is_masked() -> None:
    """A14: `GetConfig` gave the live maps, and keys and secrets with them."""
    key = "a key of enough letters"
    by_key = managed(auth=ApiKeyAuth(api_keys={key: USER}), tools={"x": OPEN})
    shown = by_key.get_config()
    assert list(shown.auth.api_keys.items()) == [("key 1", USER)]
    assert shown.tools == {"x": OPEN}
    with pytest.raises(TypeError):
        shown.tools["y"] = OPEN
    by_token = managed(auth=JwtAuth(key=SECRET, former_keys=(SECRET[::-1],)))
    assert [secret.reveal() for secret in by_token.get_config().auth.all_keys()] == ["masked"] * 2
    for manager in (by_key, by_token):
        with pytest.raises(gr.SecurityConfigError, match="masked copy"):
            manager.update_config(manager.get_config())
        with pytest.raises(gr.SecurityConfigError, match="masked copy"):
            SecurityManager(manager.get_config())
        assert key not in repr(manager.get_config()) + repr(manager)


def test_a16_nobody_is_not_a_name() -> None:
    """A16: callers without a name shared a bucket with one called "anonymous", and `a|b` with `a` and tool `b|...`."""
    manager = managed(tools={"*": ToolPolicy(allow=True, rate_limit=ONE)})
    for who in (None, Principal(id="anonymous"), Principal(id="nobody"), Principal(id="a"), Principal(id="a|b")):
        for tool in ("x", "b|x"):
            assert [decide(manager, who, tool) for _ in range(2)] == ["allow", "rate_limit"]
    manager.clear_rate_limits("a")
    assert [decide(manager, Principal(id=name)) for name in ("a", "a|b")] == ["allow", "rate_limit"]
    manager.clear_rate_limits()
    assert [decide(manager, Principal(id=name)) for name in ("a|b", "nobody")] == ["allow", "allow"]
    with pytest.raises(gr.SecurityConfigError, match="blank"):
        manager.clear_rate_limits("")


def test_a20_a_check_that_fails_denies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A20: arguments that could not be encoded passed unchecked; whatever fails here, the answer is no."""
    rules = DangerousArguments(blocked_values=["bad"])
    manager = managed(default_policy="allow-all", dangerous_arguments=rules)
    assert decide(manager, USER, arguments={"x": object()}) == "dangerous_argument"
    faults: list[str] = []
    manager.on(gr.security.SecurityFault, lambda event: faults.append(event.message))
    monkeypatch.setattr("gorouter_trio.security.manager.decide_access", lambda *a, **k: 1 / 0)
    assert decide(manager, USER) == "access"
    assert faults == ["the check failed: ZeroDivisionError"]


@pytest.mark.parametrize(
    ("arguments", "tool", "reason"), [(None, "closed", "access"), ({"q": "bad"}, "x", "dangerous_argument")]
)
def test_a22_denied_calls_count(arguments: object, tool: str, reason: str) -> None:
    """A22: denied calls were free, so that rules could be felt out; and who has none left is told no more of them."""
    tools = {"*": ToolPolicy(rate_limit=RateLimit(limit=3, period_s=60.0)), "closed": ToolPolicy(allow=False)}
    rules = DangerousArguments(blocked_values=["bad"])
    manager = managed(tools=tools, default_policy="allow-all", dangerous_arguments=rules)
    assert [decide(manager, USER, tool, arguments) for _ in range(3)] == [reason] * 3
    manager.update_config(tools={"*": tools["*"]})
    assert decide(manager, USER, tool, arguments) == "rate_limit"
    assert decide(manager, USER, tool) == "rate_limit"


def test_errors_of_denials() -> None:
    """Each denial can be raised, as the error that its reason names, with the wait."""
    manager = managed(tools={"x": ToolPolicy(allow=True, rate_limit=ONE)}, require_authentication=True)
    call = ToolCheck(tool="x", arguments=None)
    manager.check(USER, call, now=0.0, wall=WALL)
    late = gr.security.error_of(manager.check(USER, call, now=1.0, wall=WALL))
    assert isinstance(late, gr.ToolRateLimitError)
    assert late.retry_after_s == pytest.approx(59.0, abs=0.01)
    nobody = gr.security.error_of(manager.check(None, call, now=1.0, wall=WALL))
    assert isinstance(nobody, gr.AuthenticationRequiredError)
    kinds = {"access": gr.AccessDeniedError, "dangerous_argument": gr.DangerousArgumentError}
    for reason, kind in kinds.items():
        assert type(gr.security.error_of(gr.security.Deny(reason=reason, message="m"))) is kind


def test_updates_are_whole_or_nothing() -> None:
    """A configuration that is wrong changes nothing, and an unknown field is an error."""
    manager = managed(tools={"x": OPEN})
    for wrong in ({"default_policy": "open"}, {"tool": {}}, {"tools": {"x": None}}):
        with pytest.raises(gr.SecurityConfigError):
            manager.update_config(**wrong)
    assert decide(manager, USER) == "allow"
    manager.update_config(SecurityConfig())
    assert decide(manager, USER) == "access"
    assert "deny-all" in repr(manager)

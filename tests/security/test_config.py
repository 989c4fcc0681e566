"""Settings: every mistake is an error when they are made, with its place; what is made cannot be changed."""

# Wrong settings are made on purpose, and what a decision or a field is, the next line tells.
# mypy: disable-error-code="arg-type,dict-item,index,misc,return-value,union-attr"

from __future__ import annotations

import math
import re
from typing import Any

import pytest

import gorouter_trio as gr
from gorouter_trio.security import (
    ApiKeyAuth,
    CustomAuth,
    DangerousArguments,
    Principal,
    RateLimit,
    RolePolicy,
    SecurityConfig,
    SessionPolicy,
    ToolPolicy,
    ToolRules,
    digest_of_key,
)

KEY = "a key of enough letters"
WHO = Principal(id="u", roles={"user"})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SecurityConfig(default_policy="allow"), "default_policy: must be one of deny-all, allow-all"),
        (lambda: SecurityConfig(require_authentication="yes"), "require_authentication: must be a bool"),
        (lambda: SecurityConfig(debug=1), "debug: must be a bool"),
        (lambda: SecurityConfig(tools=["sum"]), "tools: must be a mapping"),
        (lambda: SecurityConfig(tools={"sum": {"allow": True}}), "tools['sum']: must be a ToolPolicy, not a dict"),
        (lambda: SecurityConfig(tools={" ": ToolPolicy()}), "tools: a key: must not be blank"),
        (lambda: SecurityConfig(tools={7: ToolPolicy()}), "tools: a key: must be a str"),
        (lambda: SecurityConfig(roles={"r": ToolPolicy()}), "roles['r']: must be a RolePolicy"),
        (lambda: SecurityConfig(auth="api-key"), "auth: must be an ApiKeyAuth"),
        (lambda: SecurityConfig(dangerous_arguments={}), "dangerous_arguments: must be"),
        (lambda: SecurityConfig(failed_attempts=5), "failed_attempts: must be"),
        (lambda: SecurityConfig(token_cache_ttl_s=-1), "token_cache_ttl_s: must be from 0"),
        (lambda: SecurityConfig(token_cache_ttl_s=math.inf), "token_cache_ttl_s: must be a number"),
        (lambda: SecurityConfig(token_cache_entries=0), "token_cache_entries: must be a whole number from 1"),
        (lambda: SecurityConfig(max_buckets=True), "max_buckets: must be a whole number"),
        (lambda: ToolPolicy(allow="no"), "allow must be True, False or None"),
        (lambda: ToolPolicy(roles="admin"), "roles: must be several names"),
        (lambda: ToolPolicy(scopes=("a", "")), "scopes[1]: must not be blank"),
        (lambda: ToolPolicy(rate_limit=(1, 2)), "rate_limit must be a RateLimit"),
        (lambda: RolePolicy(allowed_tools="sum"), "allowed_tools: must be several names"),
        (lambda: RolePolicy(rate_limits={"sum": 5}), "rate_limits['sum']: must be a RateLimit"),
        (lambda: RateLimit(limit=0, period_s=1), "rate_limit.limit: must be a whole number from 1"),
        (lambda: RateLimit(limit=-1, period_s=1), "rate_limit.limit"),
        (lambda: RateLimit(limit=1.5, period_s=1), "rate_limit.limit"),
        (lambda: RateLimit(limit=10**9, period_s=1), "rate_limit.limit"),
        (lambda: RateLimit(limit=True, period_s=1), "rate_limit.limit"),
        (lambda: RateLimit(limit=1, period_s=0), "rate_limit.period_s: must be more than 0"),
        (lambda: RateLimit(limit=1, period_s=math.nan), "rate_limit.period_s: must be a number"),
        (lambda: RateLimit(limit=1, period_s=1e9), "rate_limit.period_s"),
        (lambda: ToolRules(role=""), "rules.role: must not be blank"),
        (lambda: ToolRules(any_role="admin"), "rules.any_role: must be several names"),
        (lambda: ToolRules(scopes={"s": 1}), "rules.scopes: must be several names"),
        (lambda: ToolRules(rate_limit=3), "rules.rate_limit: must be a RateLimit"),
        (lambda: Principal(id=""), "principal.id: must not be blank"),
        (lambda: Principal(id="\ud800"), "principal.id: holds half of a surrogate pair"),
        (lambda: Principal(id="x" * 5_000), "principal.id: is 5000 bytes long"),
        (lambda: Principal(id="u", tenant=" "), "principal.tenant: must not be blank"),
        (lambda: Principal(id="u", roles="admin"), "principal.roles: must be several names"),
        (lambda: Principal(id="u", expires_at_s=math.nan), "principal.expires_at_s: must be a time"),
        (lambda: Principal(id="u", expires_at_s=10**400), "principal.expires_at_s: must be a time"),
        (lambda: RateLimit(limit=1, period_s=10**400), "rate_limit.period_s: must be a number"),
        (lambda: Principal(id="u", expires_at_s="soon"), "principal.expires_at_s: must be a time"),
        (lambda: CustomAuth(authenticate="me"), "auth.authenticate: must be callable"),
        (lambda: SessionPolicy(sharing="world"), "session_policy.sharing: must be one of"),
        (lambda: SessionPolicy(tenant_roles="admin"), "session_policy.tenant_roles: must be several names"),
        (lambda: ApiKeyAuth(api_keys=["k"]), "auth.api_keys: must be a mapping"),
        (lambda: ApiKeyAuth(api_keys={KEY: "u"}), "auth.api_keys: a key stands for a str"),
        (lambda: ApiKeyAuth(api_keys={"short": WHO}), "the key of principal 'u' has 5 characters, fewer than 16"),
        (lambda: ApiKeyAuth(api_keys={KEY + "\n": WHO}), "printable ASCII"),
        (lambda: ApiKeyAuth(api_keys={KEY + "é": WHO}), "printable ASCII"),
        (lambda: ApiKeyAuth(api_keys={" " + KEY: WHO}), "without spaces around it"),
        (lambda: ApiKeyAuth(api_keys={"sha256:" + "A" * 64: WHO}), "begins as a digest"),
        (lambda: ApiKeyAuth(api_keys={"sha256:" + "a" * 40: WHO}), "begins as a digest"),
        (lambda: ApiKeyAuth(api_keys={7: WHO}), "is a int, not a str"),
        (lambda: ApiKeyAuth(api_keys={KEY: WHO, digest_of_key(KEY): WHO}), "is there twice"),
        (lambda: ApiKeyAuth(api_keys={KEY: WHO}, min_key_chars=0), "auth.min_key_chars"),
    ],
)
def test_mistakes(make, said: str) -> None:
    """Each is a SecurityConfigError, which is a ConfigError too, and says where and what (P8)."""
    with pytest.raises(gr.SecurityConfigError, match=re.escape(said)) as caught:
        make()
    assert isinstance(caught.value, gr.ConfigError)
    assert isinstance(caught.value, gr.SecurityError)
    assert KEY not in str(caught.value)


LIMIT = RateLimit(limit=1, period_s=1.0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": {"delete_flie": ToolPolicy(allow=False)}}, "tools['delete_flie']: 'delete_flie' is not among"),
        ({"roles": {"user": RolePolicy(allowed_tools=["delete_flie"])}}, "roles['user'].allowed_tools: 'delete_flie'"),
        ({"roles": {"user": RolePolicy(rate_limits={"x": LIMIT})}}, "roles['user'].rate_limits: 'x'"),
        ({"dangerous_arguments": DangerousArguments(tool_patterns={"x": ["rm"]})}, "tool_patterns['x']: 'x'"),
        ({"roles": {"usre": RolePolicy()}}, "roles['usre']: 'usre' is not among the known roles"),
        ({"tools": {"delete_file": ToolPolicy(roles=["usre"])}}, "tools['delete_file'].roles: 'usre'"),
        ({"auth": ApiKeyAuth(api_keys={KEY: Principal(id="u", roles={"usre"})})}, "principal 'u': 'usre'"),
        ({"known_tools": "delete_file"}, "known_tools: must be several names"),
    ],
)
def test_names_that_nobody_knows(fields: dict[str, Any], said: str) -> None:
    """Where roles and tools are declared, a rule about another one is a slip and an error."""
    known = {"known_tools": ["delete_file"], "known_roles": ["user", "admin"]}
    with pytest.raises(gr.SecurityConfigError, match=re.escape(said)):
        SecurityConfig(**{**known, **fields})


def test_names_that_are_known() -> None:
    """Declared names pass, `*` is no name, and a program can ask about the tools it has."""
    config = SecurityConfig(
        known_tools=["delete_file"],
        known_roles={"user"},
        tools={"*": ToolPolicy(), "delete_file": ToolPolicy(roles=["user"])},
        roles={"user": RolePolicy(allowed_tools=["*", "delete_file"], rate_limits={"*": LIMIT})},
    )
    config.check_tools(["delete_file", "others"])
    with pytest.raises(gr.SecurityConfigError, match="is not among the tools"):
        config.check_tools(["others"])


def test_the_seeds_sample() -> None:
    """The configuration in the seed's documentation, in this package's words; its short token needs to be asked for."""
    who = Principal(id="u-1", roles=["user"], scopes=["tools:run"])
    config = SecurityConfig(
        default_policy="deny-all",
        require_authentication=True,
        auth=ApiKeyAuth(api_keys={"demo-token": who}, min_key_chars=8),
        tools={"sum": ToolPolicy(allow=True, scopes=["tools:run"])},
    )
    assert list(config.auth.api_keys) == [digest_of_key("demo-token")]
    assert config.auth.api_keys[digest_of_key("demo-token")] is who


def test_nothing_changes_afterwards() -> None:
    """Fields are frozen, mappings are copies, lists are tuples: what was checked is what decides (A14)."""
    tools, limits, patterns = {"x": ToolPolicy()}, {"x": LIMIT}, ["rm"]
    config = SecurityConfig(
        tools=tools,
        roles={"r": RolePolicy(rate_limits=limits)},
        dangerous_arguments=DangerousArguments(patterns=patterns, tool_patterns={"t": patterns}),
    )
    tools["y"], limits["y"] = ToolPolicy(allow=True), LIMIT
    patterns.append("(")
    assert set(config.tools) == {"x"}
    assert set(config.roles["r"].rate_limits) == {"x"}
    assert config.dangerous_arguments.patterns == ("rm",)
    assert config.dangerous_arguments.tool_patterns["t"] == ("rm",)
    with pytest.raises(TypeError):
        config.tools["y"] = ToolPolicy()
    with pytest.raises(AttributeError):
        config.debug = True


def test_words_of_the_rules() -> None:
    """Lists and sets are taken where several names belong, and kept in one form."""
    assert ToolRules(any_role=["a", "b"], scopes=("s",)) == ToolRules(any_role=("a", "b"), scopes=["s"])
    assert Principal(id="u", roles=["a", "a"], scopes=("s",)) == Principal(id="u", roles={"a"}, scopes={"s"})
    assert repr(Principal(id="u", tenant="t", roles={"b", "a"}, credential="0.ab", metadata={"pin": 7})) == (
        "Principal(id='u', tenant='t', roles=['a', 'b'], scopes=[])"
    )

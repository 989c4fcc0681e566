"""Whose session it is: names that cannot meet, and who may reach them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.security import (
    Principal,
    SessionPolicy,
    SessionScope,
    may_reach,
    resolve_session,
    scope_name,
    session_scope,
)

OWN = SessionPolicy()
ADA, BOB = Principal(id="ada", tenant="t"), Principal(id="bob", tenant="t")
STRANGER = Principal(id="ada", tenant="other")
ADMIN = Principal(id="root", tenant="t", roles={"admin"})
SUPPORT = Principal(id="support", tenant="s", roles={"support"})

TEXTS = st.text(alphabet="ab@:/0123 é\n", max_size=6)
SCOPES = st.builds(SessionScope, TEXTS, TEXTS, TEXTS)


def test_scopes() -> None:
    """A session's name is its tenant, its principal and the key; without a principal the key alone."""
    assert session_scope(ADA, "k") == ("t", "ada", "k")
    assert session_scope(None, "k") == ("", "", "k")
    assert scope_name(session_scope(None, "user:42")) == "user:42"
    assert scope_name(session_scope(ADA, "k")) == "@1:t3:ada/k"
    assert scope_name(session_scope(None, "@1:t3:ada/k")) == "@0:0:/@1:t3:ada/k"


@given(SCOPES, SCOPES)
def test_names_are_injective(one: SessionScope, other: SessionScope) -> None:
    """Different scopes have different names, whatever stands in them."""
    assert (scope_name(one) == scope_name(other)) == (one == other)


def test_a_name_can_be_read_back() -> None:
    """10^4 scopes that were made to collide do not."""
    parts = ["", "a", "@", ":", "/", "1:", "@1:a", "1:a0:/", "0:0:/", "@0:0:/"]
    scopes = {
        SessionScope(t, p, k) for t in parts for p in parts for k in [*parts, *(x + y for x in parts for y in parts)]
    }
    assert len({scope_name(scope) for scope in scopes}) == len(scopes)


def test_only_the_owner() -> None:
    """Without a policy a session is reached by its own principal, tenant included, and by nobody else (BOLA)."""
    scope = session_scope(ADA, "k")
    assert may_reach(OWN, ADA, scope=scope)
    for other in (BOB, STRANGER, ADMIN, SUPPORT, None):
        assert not may_reach(OWN, other, scope=scope)
    assert may_reach(OWN, None, scope=session_scope(None, "k"))
    assert not may_reach(OWN, ADA, scope=session_scope(None, "k"))


def test_what_a_policy_opens() -> None:
    """Sharing opens a tenant or everything; roles open a tenant or everything to who has them."""
    scope, free = session_scope(ADA, "k"), session_scope(None, "k")
    callers = (ADA, BOB, STRANGER, ADMIN, SUPPORT, None)

    def reach(policy: SessionPolicy, of: SessionScope = scope) -> list[bool]:
        return [may_reach(policy, caller, scope=of) for caller in callers]

    assert reach(SessionPolicy(sharing="tenant")) == [True, True, False, True, False, False]
    assert reach(SessionPolicy(sharing="all")) == [True, True, True, True, True, False]
    assert reach(SessionPolicy(tenant_roles=["admin", "support"])) == [True, False, False, True, False, False]
    assert reach(SessionPolicy(global_roles=["support"])) == [True, False, False, False, True, False]
    assert reach(SessionPolicy(sharing="all"), free) == [False, False, False, False, False, True]
    assert reach(SessionPolicy(global_roles=["support"]), free) == [False, False, False, False, True, True]


def test_a_foreign_session_is_a_missing_one() -> None:
    """Asking for another's session gives nothing to tell it from one that does not exist (row 36)."""
    assert resolve_session(OWN, ADA, key="k") == ("t", "ada", "k")
    assert resolve_session(OWN, ADA, key="k", owner=("t", "ada")) == ("t", "ada", "k")
    assert resolve_session(OWN, BOB, key="k", owner=("t", "ada")) is None
    assert resolve_session(OWN, BOB, key="no such session", owner=("t", "nobody")) is None
    assert resolve_session(OWN, None, key="k", owner=("t", "ada")) is None
    assert resolve_session(SessionPolicy(sharing="tenant"), BOB, key="k", owner=("t", "ada")) == ("t", "ada", "k")


@given(st.builds(Principal, id=st.sampled_from("ab"), tenant=st.sampled_from(["", "t"])), SCOPES)
def test_nobody_gets_in_by_chance(principal: Principal, scope: SessionScope) -> None:
    """Under the default policy, only the exact owner does."""
    assert may_reach(OWN, principal, scope=scope) == ((principal.tenant, principal.id) == scope[:2])

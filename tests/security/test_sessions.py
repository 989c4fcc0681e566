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
    """A session is named by its tenant, its principal and the key; without a principal by the key alone."""
    assert session_scope(ADA, "k") == ("t", "ada", "k")
    assert session_scope(None, "k") == ("", "", "k")


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

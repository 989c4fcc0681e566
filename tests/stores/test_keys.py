"""Keys of sessions: texts and parts are one to one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gorouter_trio as gr
from gorouter_trio.stores import SessionKey

# Texts that come close to the form of a key.
PIECES = [
    "tenant:",
    "/principal:",
    "tenant:/principal:/",
    "/",
    ":",
    "%",
    "%25",
    "%2F",
    "%3A",
    "%2f",
    "a",
    "Иван",
    "\n",
    "\0",
]
tricky = st.lists(st.sampled_from(PIECES), max_size=7).map("".join) | st.text(max_size=8)


@given(text=tricky)
def test_every_text_is_a_key(text):
    """A text that becomes a key becomes the same text again."""
    assert str(SessionKey.parse(text)) == text


@given(tenant=tricky, principal=tricky, name=tricky)
def test_every_key_is_a_text(tenant, principal, name):
    """A key that becomes a text becomes the same key again: no two keys share one."""
    key = SessionKey(tenant=tenant, principal=principal, id=name)
    assert SessionKey.parse(str(key)) == key


@given(tenant=tricky, principal=tricky, name=tricky, stranger=tricky)
def test_an_id_reaches_nobody_else(tenant, principal, name, stranger):
    """Whatever an id says, its key is its owner's, and has its owner's prefix."""
    owned = bool(tenant or principal)
    for text in (name, str(SessionKey(tenant=stranger, principal=stranger, id=name))):
        key = SessionKey.parse(str(SessionKey(tenant=tenant, principal=principal, id=text)))
        assert (key.tenant, key.principal) == (tenant, principal)
        if owned:
            assert str(key).startswith(SessionKey.prefix(tenant=tenant, principal=principal))


def test_the_form():
    """Plain where there is no owner; names encoded; the id as it is."""
    assert str(SessionKey(id="user:42")) == "user:42"
    assert str(SessionKey(tenant="a/b", principal="50%:x", id="c/d:%")) == "tenant:a%2Fb/principal:50%25%3Ax/c/d:%"
    assert str(SessionKey(principal="bob", id="")) == "tenant:/principal:bob/"
    assert SessionKey.parse("tenant:acme/notes") == SessionKey(id="tenant:acme/notes")
    assert str(SessionKey(id="tenant:a/principal:b/c")) == "tenant:/principal:/tenant:a/principal:b/c"


def test_names_that_a_file_system_would_mix_up():
    """Names that the seed kept in one file are different keys."""
    names = [
        "a/b",
        "a_b",
        "a:b",
        "a\\b",
        "a?b",
        "a#b",
        "a%b",
        "Иван",
        "Пётр",
        "Олег",
        "用户甲乙",
        "____",
        "É",
        "E\u0301",
    ]
    keys = [str(SessionKey(tenant=t, principal=p, id=i)) for t, p, i in itertools.product(names, names, names[:3])]
    assert len(set(keys)) == len(keys)


def test_a_prefix_needs_a_name():
    """Keys without an owner have no prefix of their own."""
    for names in ({"tenant": ""}, {"tenant": "", "principal": ""}):
        with pytest.raises(gr.ConfigError, match="prefix"):
            SessionKey.prefix(**names)
    assert SessionKey.prefix(tenant="acme") == "tenant:acme/"
    assert SessionKey.prefix(tenant="acme", principal="") == "tenant:acme/principal:/"

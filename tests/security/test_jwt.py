"""JSON Web Tokens: what is good is taken, everything else is refused, and no token has a second spelling."""

# Wrong settings are made on purpose, and what a decision or a field is, the next line tells.
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import joserfc.jwk
import joserfc.jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from jwt_forge import (
    GOOD,
    GOOD_CLAIMS,
    GOOD_HEADER,
    SECRET,
    WALL,
    bad_claims,
    draw_forgery,
    fixed_forgeries,
    signed,
)

import gorouter_trio as gr
from gorouter_trio.security import JwtAuth, Principal, SecurityConfig, SecurityManager
from gorouter_trio.security.jwt import JwtRefused, JwtVerifier, Verified


def verifier(**changes) -> JwtVerifier:
    auth = JwtAuth(key=gr.Secret(SECRET), **{"leeway_s": 60.0, **changes})
    return JwtVerifier(
        auth.algorithm, auth.all_keys(), audience=auth.audience, issuer=auth.issuer, leeway_s=auth.leeway_s
    )


def is_accepted(token: str, by: JwtVerifier | None = None, *, wall: float = WALL) -> bool:
    return isinstance((by or verifier()).verify(gr.Secret(token), wall=wall), Verified)


def test_a_good_token() -> None:
    """The claims become the principal; it holds until its expiry and the leeway."""
    verdict = verifier().verify(gr.Secret(GOOD), wall=WALL)
    assert isinstance(verdict, Verified)
    assert verdict.principal == Principal(
        id="u-1", roles={"user"}, scopes={"s"}, expires_at_s=WALL + 3_660.0, metadata={}
    )
    assert verdict.not_before_s == WALL - 10 - 60


def test_every_claim() -> None:
    """`role` beside `roles`, `scope` beside `scopes`, and the rest of the principal."""
    more = {"role": "admin", "scope": "read  write", "tenant": "t", "username": "ada", "metadata": {"a": [1.5]}}
    verdict = verifier().verify(gr.Secret(signed(GOOD_HEADER, {**GOOD_CLAIMS, **more})), wall=WALL)
    assert isinstance(verdict, Verified)
    principal = verdict.principal
    assert (principal.roles, principal.scopes) == ({"user", "admin"}, {"s", "read", "write"})
    assert (principal.tenant, principal.username, principal.metadata) == ("t", "ada", {"a": [1.5]})


@pytest.mark.parametrize("kind", ["JWT", "jwt", "at+jwt", "application/at+jwt"])
def test_types(kind: str) -> None:
    """The types that RFC 7519 and RFC 9068 name are taken, and a key id, which chooses nothing."""
    assert is_accepted(signed({"alg": "HS256", "typ": kind, "kid": "7"}, GOOD_CLAIMS))
    assert is_accepted(signed({"alg": "HS256"}, GOOD_CLAIMS))


def test_fixed_forgeries() -> None:
    """Every listed attack is refused: other algorithms, header tricks, odd numbers, twins, junk, a megabyte (A7-A9)."""
    by = verifier()
    tokens = fixed_forgeries()
    assert len(tokens) > 200
    assert [token[:200] for token in tokens if is_accepted(token, by)] == []


@pytest.mark.parametrize("claims", bad_claims(), ids=lambda claims: repr(claims)[:60])
def test_wrong_claims(claims: object) -> None:
    """A genuine signature does not excuse any of these."""
    assert not is_accepted(signed(GOOD_HEADER, claims))


def test_forged_tokens(rng: random.Random, record_property) -> None:
    """20,000 chance forgeries: none accepted (row 41)."""
    _forge(rng, 20_000, record_property)


@pytest.mark.long
def test_a_million_forged_tokens(rng: random.Random, record_property) -> None:
    """10^6 chance forgeries: none accepted (row 41)."""
    _forge(rng, 1_000_000, record_property)


def _forge(rng: random.Random, count: int, record_property) -> None:
    by, problems = verifier(), Counter[str]()
    for _ in range(count):
        token = draw_forgery(rng)
        verdict = by.verify(gr.Secret(token), wall=WALL)
        assert isinstance(verdict, JwtRefused), token
        problems[verdict.problem] += 1
    assert is_accepted(GOOD, by)
    assert {"unknown", "malformed", "expired", "not_yet_valid"} <= problems.keys()
    record_property("figure", f"{count:,} mutated tokens, 0 accepted: {dict(problems)}")


@pytest.mark.parametrize(
    ("claims", "first", "last"),
    [
        ({"exp": WALL}, 0, WALL + 59.999),
        ({"exp": WALL + 100, "nbf": WALL}, WALL - 60, WALL + 159.999),
        ({"exp": WALL + 100, "iat": WALL}, WALL - 60, WALL + 159.999),
    ],
)
def test_boundaries(claims: dict[str, Any], first: float, last: float) -> None:
    """Times hold to the instant, give or take the leeway and no more."""
    token = signed(GOOD_HEADER, {"sub": "u", **claims})
    assert is_accepted(token, wall=first)
    assert is_accepted(token, wall=last)
    assert not is_accepted(token, wall=last + 0.002)
    assert first == 0 or not is_accepted(token, wall=first - 0.001)
    strict = verifier(leeway_s=0)
    assert not is_accepted(token, strict, wall=claims["exp"])
    assert is_accepted(token, strict, wall=claims["exp"] - 0.001)


def test_audience_and_issuer() -> None:
    """Where they are set they have to match; a token for an audience is refused where none is set (RFC 7519, 4.1.3)."""
    by = verifier(audience="bots", issuer="https://issuer.invalid")
    good = {**GOOD_CLAIMS, "aud": ["others", "bots"], "iss": "https://issuer.invalid"}
    assert is_accepted(signed(GOOD_HEADER, good), by)
    assert is_accepted(signed(GOOD_HEADER, {**good, "aud": "bots"}), by)
    for change in ({"aud": "bot"}, {"aud": ["others"]}, {"aud": None}, {"iss": "https://evil.invalid"}, {"iss": None}):
        assert not is_accepted(signed(GOOD_HEADER, {**good, **change}), by)
    assert not is_accepted(GOOD, by)
    assert not is_accepted(signed(GOOD_HEADER, {**GOOD_CLAIMS, "aud": "bots"}))
    assert not is_accepted(signed(GOOD_HEADER, {**GOOD_CLAIMS, "iss": 1}))


def test_former_keys() -> None:
    """While a key is changed, tokens of the former one are taken, and those of no other."""
    old = "the former secret, also long enough!!"
    by = verifier(former_keys=(old,))
    assert is_accepted(GOOD, by)
    assert is_accepted(signed(GOOD_HEADER, GOOD_CLAIMS, secret=old), by)
    assert not is_accepted(signed(GOOD_HEADER, GOOD_CLAIMS, secret=old + "!"), by)
    assert not is_accepted(signed(GOOD_HEADER, GOOD_CLAIMS, secret=old))


def _pem(kind: str) -> tuple[str, str]:
    made: Any = {
        "RS": lambda: joserfc.jwk.RSAKey.generate_key(2048),
        "PS": lambda: joserfc.jwk.RSAKey.generate_key(2048),
        "ES256": lambda: joserfc.jwk.ECKey.generate_key("P-256"),
        "ES384": lambda: joserfc.jwk.ECKey.generate_key("P-384"),
        "ES512": lambda: joserfc.jwk.ECKey.generate_key("P-521"),
        "Ed25519": lambda: joserfc.jwk.OKPKey.generate_key("Ed25519"),
        "Ed448": lambda: joserfc.jwk.OKPKey.generate_key("Ed448"),
    }[kind]()
    return made.as_pem(private=True).decode(), made.as_pem(private=False).decode()


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [("RS256", "RS"), ("PS384", "PS"), ("ES256", "ES256"), ("ES384", "ES384"), ("ES512", "ES512"), ("Ed25519",) * 2],
)
async def test_asymmetric_keys(algorithm: str, kind: str) -> None:
    """The private key issues, the public one verifies and cannot issue, and its text is no HS256 secret."""
    private, public = _pem(kind)
    issuer = SecurityManager(SecurityConfig(auth=JwtAuth(key=private, algorithm=algorithm)))
    token = issuer.create_access_token(Principal(id="u", roles={"r"}), wall=WALL)
    reader = SecurityManager(SecurityConfig(auth=JwtAuth(key=public, algorithm=algorithm)))
    principal = await reader.authenticate(token, now=0.0, wall=WALL)
    assert principal is not None
    assert (principal.id, principal.roles) == ("u", {"r"})
    with pytest.raises(gr.SecurityConfigError, match="public key cannot sign"):
        reader.create_access_token(Principal(id="u"), wall=WALL)
    for forged in (
        signed({"alg": "HS256", "typ": "JWT"}, GOOD_CLAIMS, secret=public),
        signed({"alg": algorithm, "typ": "JWT"}, GOOD_CLAIMS, secret=public),
        signed({"alg": "none"}, GOOD_CLAIMS, secret=public),
        GOOD,
    ):
        with pytest.raises(gr.InvalidTokenError):
            await reader.authenticate(forged, now=0.0, wall=WALL)


def _ssh_key() -> str:
    """A public key in the form of OpenSSH, without its first word."""
    number = ed25519.Ed25519PrivateKey.from_private_bytes(b"k" * 32).public_key()
    line = number.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    return line.partition(" ")[2]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"key": "short"}, "auth.key: HS256 needs a secret of at least 32 bytes"),
        ({"key": ""}, "auth.key: HS256 needs"),
        ({"key": 7}, "auth.key: HS256 needs"),
        ({"key": "x" * 47, "algorithm": "HS384"}, "at least 48 bytes"),
        ({"key": "x" * 63, "algorithm": "HS512"}, "at least 64 bytes"),
        ({"key": SECRET, "former_keys": ("x" * 40, "y")}, r"auth.former_keys\[1\]"),
        ({"key": SECRET, "former_keys": "x" * 40}, r"auth.former_keys\[0\]"),
        ({"key": "-----BEGIN PUBLIC KEY-----\n" + "A" * 40}, "takes a secret, not a key of a pair"),
        ({"key": "ssh-ed25519 " + _ssh_key()}, "takes a secret, not a key of a pair"),
        ({"key": SECRET, "algorithm": "RS256"}, "auth.key: is no PEM key of the kind that RS256 needs"),
        ({"key": SECRET, "algorithm": "none"}, "auth.algorithm: must be one of HS256"),
        ({"key": SECRET, "leeway_s": 61}, "auth.leeway_s: must be from 0 and at most 60"),
        ({"key": SECRET, "leeway_s": -1}, "auth.leeway_s"),
        ({"key": SECRET, "token_ttl_s": 0}, "auth.token_ttl_s"),
        ({"key": SECRET, "audience": ""}, "auth.audience: must not be blank"),
        ({"key": SECRET, "issuer": 3}, "auth.issuer: must be a str"),
    ],
)
def test_settings_that_cannot_be_right(fields: dict[str, Any], said: str) -> None:
    """Each mistake is an error when the setting is made, with its place and without the key (A8)."""
    with pytest.raises(gr.SecurityConfigError, match=said) as caught:
        JwtAuth(**fields)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "kind", "said"),
    [
        ("ES256", "ES384", "P-256"),
        ("RS256", "ES256", "RS256"),
        ("ES256", "RS", "ES256"),
        ("Ed25519", "Ed448", "on that curve"),
        ("Ed25519", "ES256", "Ed25519"),
    ],
)
def test_keys_of_another_kind(algorithm: str, kind: str, said: str) -> None:
    """A key that does not fit the algorithm is refused at start."""
    with pytest.raises(gr.SecurityConfigError, match=said):
        JwtAuth(key=_pem(kind)[1], algorithm=algorithm)


def test_weak_rsa() -> None:
    """An RSA key of 1,024 bits is refused."""
    weak = rsa.generate_private_key(65537, 1024)
    pem = weak.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(gr.SecurityConfigError, match="1024 bits is too short"):
        JwtAuth(key=pem.decode(), algorithm="RS256")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without joserfc, and with one that is too old, the error says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "joserfc.jws", None)
    with pytest.raises(gr.SecurityConfigError, match=r"pip install gorouter-trio\[security\]"):
        JwtAuth(key=SECRET)
    monkeypatch.undo()
    monkeypatch.delitem(joserfc.jws.JWSRegistry.algorithms, "Ed25519")
    with pytest.raises(gr.SecurityConfigError, match="too old for Ed25519"):
        JwtAuth(key=SECRET, algorithm="Ed25519")


async def test_access_tokens() -> None:
    """A token made here is accepted here, lives 24 hours by default, and another library reads it."""
    auth = JwtAuth(key=SECRET, audience="bots", issuer="me", leeway_s=0)
    manager = SecurityManager(SecurityConfig(auth=auth))
    who = Principal(id="u", tenant="t", roles={"a", "b"}, scopes={"s"}, username="ada", metadata={"n": 1})
    token = manager.create_access_token(who, wall=WALL + 0.9)
    claims = joserfc.jwt.decode(token, joserfc.jwk.OctKey.import_key(SECRET), algorithms=["HS256"]).claims
    assert claims == {
        "sub": "u", "tenant": "t", "roles": ["a", "b"], "scopes": ["s"], "username": "ada", "metadata": {"n": 1},
        "iat": WALL, "exp": WALL + 86_400, "aud": "bots", "iss": "me",
    }  # fmt: skip
    known = await manager.authenticate(token, now=0.0, wall=WALL + 86_399)
    assert known is not None
    assert (known.id, known.tenant, known.roles, known.metadata) == ("u", "t", {"a", "b"}, {"n": 1})
    with pytest.raises(gr.InvalidTokenError) as caught:
        await manager.authenticate(token, now=0.0, wall=WALL + 86_400)
    assert caught.value.problem == "expired"
    assert manager.create_access_token(who, wall=WALL, ttl_s=60) != token


def test_tokens_that_cannot_be_made() -> None:
    """No JwtAuth, no lifetime, or metadata that is not JSON: an error that says so."""
    who = Principal(id="u")
    with pytest.raises(gr.SecurityConfigError, match="only a JwtAuth"):
        SecurityManager(SecurityConfig()).create_access_token(who, wall=WALL)
    manager = SecurityManager(SecurityConfig(auth=JwtAuth(key=SECRET)))
    for ttl_s in (0, -1, float("nan"), float("inf"), 1e12, 10**400, "60"):
        with pytest.raises(gr.SecurityError, match="ttl_s"):
            manager.create_access_token(who, wall=WALL, ttl_s=ttl_s)
    for metadata in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(gr.SecurityError, match="metadata is not JSON"):
            manager.create_access_token(Principal(id="u", metadata=metadata), wall=WALL)
    wrong: list[dict[str, Any]] = [
        {"metadata": {"a": "x" * 20_000}},
        {"metadata": {1: "one", "1": "two"}},
        {"roles": {f"r{number}" for number in range(1_001)}},
        {"username": 7},
    ]
    for fields in wrong:
        with pytest.raises(gr.SecurityError, match="more than a token holds"):
            manager.create_access_token(Principal(id="u", **fields), wall=WALL)


def test_refusing_is_quick(record_property) -> None:
    """A megabyte of anything costs less than a good token does."""
    by = verifier()
    by.verify(gr.Secret(GOOD), wall=WALL)
    start = time.process_time()
    for token in ("a" * 1_000_000, "a.b." * 250_000, GOOD + "A" * 1_000_000):
        assert not is_accepted(token, by)
    took = time.process_time() - start
    record_property("figure", f"three tokens of a megabyte refused in {took * 1e3:.2f} ms")
    assert took < 0.05

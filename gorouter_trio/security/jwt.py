"""JSON Web Tokens: signatures through joserfc, everything around them strict (RFC 7515, 7519, 8725).

A token is refused for anything that it does not need: another algorithm than the pinned one, header parameters
beside `alg`, `typ` and `kid`, spellings of base64 other than the shortest, a name twice in an object, numbers that
are no whole seconds. So no token has a second spelling, and nothing in a header chooses how it is verified.

Nothing here raises on a bad token, and what holds a token is gone when a verdict is given: a traceback would show it.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import math
import re
import warnings
from typing import TYPE_CHECKING, Literal, NoReturn, TypeAlias

from msgspec import Struct

from ..config import Secret
from ..errors import SecurityConfigError
from .rules import Principal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from joserfc.jwk import Key

__all__ = ["JwtProblem", "JwtRefused", "JwtVerifier", "Verdict", "Verified", "check_jwt_keys", "sign_jwt"]

_MAX_TOKEN_CHARS = 16 * 1024
_MAX_NAMES = 1_000
_MAX_TIME_S = 2**53
_FORM = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_HEADER = frozenset({"alg", "typ", "kid"})
_TYPES = frozenset({"jwt", "at+jwt", "application/jwt", "application/at+jwt"})
_MIN_RSA_BITS = 2048
_PUBLIC_MARKS = ("-----BEGIN ", "---- BEGIN ", "ssh-rsa ", "ssh-dss ", "ssh-ed25519 ", "ecdsa-sha2-")

JwtProblem = Literal["unknown", "malformed", "expired", "not_yet_valid"]
"""Why a token does not hold."""


class Verified(Struct, frozen=True):
    """A token that holds: its principal, and the wall-clock time from which on it does."""

    principal: Principal
    not_before_s: float


class JwtRefused(Struct, frozen=True):
    """A token that does not hold. `expired` and `not_yet_valid` are said of genuine tokens only."""

    problem: JwtProblem


Verdict: TypeAlias = Verified | JwtRefused


class _BadClaimError(ValueError):
    """A claim that is not what it has to be; never leaves this module."""


class JwtVerifier:
    """Verifies tokens of one configuration. `keys` are tried in turn; `kid` is not trusted to choose one."""

    def __init__(
        self, algorithm: str, keys: Sequence[Secret], *, audience: str | None, issuer: str | None, leeway_s: float
    ) -> None:
        jws = importlib.import_module("joserfc.jws")
        self._algorithm = algorithm
        self._keys = [_load(algorithm, key) for key in keys]
        self._registry = jws.JWSRegistry(algorithms=[algorithm])
        self._deserialize = jws.deserialize_compact
        self._errors = (importlib.import_module("joserfc.errors").JoseError, ValueError)
        self._audience = audience
        self._issuer = issuer
        self._leeway_s = leeway_s

    def verify(self, token: Secret, *, wall: float) -> Verdict:
        """Whether `token` holds at `wall`, seconds since the epoch; never raises."""
        if not self._has_form(token):
            return JwtRefused("malformed")
        if not self._is_signed(token):
            return JwtRefused("unknown")
        try:
            claims = _object(_decoded(token.reveal().split(".")[1]))
            return self._judge(claims, wall)
        except (ValueError, RecursionError):
            # Signed by a key of ours, and still not what a token has to be.
            return JwtRefused("malformed")

    def _has_form(self, token: Secret) -> bool:
        """Everything that can be told before the signature is looked at."""
        if len(token.reveal()) > _MAX_TOKEN_CHARS:
            return False
        found = _FORM.fullmatch(token.reveal())
        if found is None:
            return False
        try:
            header, _, _ = (_decoded(part) for part in found.groups())
            return self._is_header(_object(header))
        except (ValueError, RecursionError):
            return False

    def _is_header(self, header: Mapping[str, object]) -> bool:
        if not header.keys() <= _HEADER or header.get("alg") != self._algorithm:
            return False
        kind = header.get("typ", "JWT")
        return isinstance(kind, str) and kind.lower() in _TYPES and isinstance(header.get("kid", ""), str)

    def _is_signed(self, token: Secret) -> bool:
        return any(self._is_signed_by(key, token) for key in self._keys)

    def _is_signed_by(self, key: Key, token: Secret) -> bool:
        try:
            self._deserialize(token.reveal().encode("ascii"), key, registry=self._registry)
        except self._errors:
            return False
        return True

    def _judge(self, claims: Mapping[str, object], wall: float) -> Verdict:
        expires = _time(claims, "exp")
        not_before = max(_time(claims, "nbf", 0), _time(claims, "iat", 0)) - self._leeway_s
        self._check_names(claims)
        principal = _principal(claims, expires + self._leeway_s)
        if wall >= expires + self._leeway_s:
            return JwtRefused("expired")
        if wall < not_before:
            return JwtRefused("not_yet_valid")
        return Verified(principal, not_before)

    def _check_names(self, claims: Mapping[str, object]) -> None:
        if self._issuer is not None and claims.get("iss") != self._issuer:
            raise _BadClaimError("iss")
        _text(claims, "iss", "")
        audience = claims.get("aud")
        if isinstance(audience, str):
            audience = [audience]
        # RFC 7519, 4.1.3: a token meant for others must be refused; without a name of our own it is.
        if audience is None and self._audience is None and "aud" not in claims:
            return
        if not isinstance(audience, list) or not all(isinstance(name, str) for name in audience):
            raise _BadClaimError("aud")
        if self._audience is None or self._audience not in audience:
            raise _BadClaimError("aud")


def sign_jwt(
    principal: Principal,
    *,
    algorithm: str,
    key: Secret,
    claims: Mapping[str, object],
) -> Secret:
    """A token for `principal` with `claims` (the times, `aud`, `iss`) beside its own.

    Raises `SecurityConfigError` when `key` cannot sign, and `ValueError` when the metadata is not JSON.
    """
    loaded = _load(algorithm, key)
    if algorithm[:2] != "HS" and not loaded.is_private:
        raise SecurityConfigError("auth.key: a public key cannot sign; give the private key where tokens are issued")
    body = _claims(principal) | dict(claims)
    payload = json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")
    jws = importlib.import_module("joserfc.jws")
    registry = jws.JWSRegistry(algorithms=[algorithm])
    return Secret(jws.serialize_compact({"alg": algorithm, "typ": "JWT"}, payload, loaded, registry=registry))


def check_jwt_keys(algorithm: str, keys: Sequence[Secret]) -> None:
    """Raise `SecurityConfigError` when one of `keys` cannot be used, or joserfc is not installed."""
    try:
        jws = importlib.import_module("joserfc.jws")
    except ImportError:
        raise SecurityConfigError(
            "auth: JwtAuth needs joserfc; install the extra with `pip install gorouter-trio[security]`"
        ) from None
    if algorithm not in jws.JWSRegistry.algorithms:
        raise SecurityConfigError(f"auth.algorithm: the installed joserfc is too old for {algorithm}; upgrade it")
    for index, key in enumerate(keys):
        problem = _key_problem(algorithm, key)
        if problem is not None:
            raise SecurityConfigError(f"auth.{'key' if index == 0 else f'former_keys[{index - 1}]'}: {problem}")


def _key_problem(algorithm: str, key: Secret) -> str | None:
    """What is wrong with a key, in words without it."""
    is_secret = algorithm[:2] == "HS"
    least = int(algorithm[2:]) // 8 if is_secret else 0
    if len(key.reveal().encode("utf-8", "replace")) < least:
        return f"{algorithm} needs a secret of at least {least} bytes (RFC 7518, 3.2)"
    if is_secret and any(mark in key.reveal() for mark in _PUBLIC_MARKS):
        return f"{algorithm} takes a secret, not a key of a pair: whoever has the public one could sign"
    try:
        loaded = _load(algorithm, key)
    except (ValueError, TypeError, importlib.import_module("joserfc.errors").JoseError):
        return f"is no {'secret' if is_secret else 'PEM key'} of the kind that {algorithm} needs"
    return None if is_secret else _pair_problem(algorithm, loaded)


def _pair_problem(algorithm: str, loaded: Key) -> str | None:
    """What is wrong with a public or private key."""
    size = getattr(loaded.raw_value, "key_size", _MIN_RSA_BITS)
    if algorithm[0] in "RP" and size < _MIN_RSA_BITS:
        return f"an RSA key of {size} bits is too short; {_MIN_RSA_BITS} are needed"
    if algorithm[:2] == "ES" and getattr(loaded, "curve_name", "") != _CURVES[algorithm]:
        return f"{algorithm} needs a key on the curve {_CURVES[algorithm]}"
    if algorithm == "Ed25519" and getattr(loaded, "curve_name", "") != "Ed25519":
        return "Ed25519 needs a key on that curve"
    return None


_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
_KEY_CLASSES = {"HS": "OctKey", "RS": "RSAKey", "PS": "RSAKey", "ES": "ECKey", "Ed": "OKPKey"}


def _load(algorithm: str, key: Secret) -> Key:
    kind = getattr(importlib.import_module("joserfc.jwk"), _KEY_CLASSES[algorithm[:2]])
    with warnings.catch_warnings():
        # joserfc warns of weak keys, which are refused here.
        warnings.simplefilter("ignore")
        loaded: Key = kind.import_key(key.reveal().encode("utf-8"))
    return loaded


def _decoded(part: str) -> bytes:
    """The bytes behind one segment; only its one canonical spelling is taken."""
    try:
        data = base64.b64decode(part + "=" * (-len(part) % 4), b"-_", validate=True)
    except binascii.Error:
        raise _BadClaimError("base64") from None
    if base64.urlsafe_b64encode(data).rstrip(b"=") != part.encode("ascii"):
        raise _BadClaimError("base64")
    return data


def _object(data: bytes) -> Mapping[str, object]:
    text = data.decode("utf-8")
    found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    if not isinstance(found, dict):
        raise _BadClaimError("not an object")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _BadClaimError("a name twice")
    return found


def _no_constant(_: str) -> NoReturn:
    raise _BadClaimError("NaN or Infinity")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _BadClaimError("a number without end")
    return value


def _time(claims: Mapping[str, object], name: str, default: int | None = None) -> int:
    """A whole number of seconds after the epoch; without a default the claim has to be there."""
    value = claims.get(name, default) if default is not None else claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_TIME_S:
        raise _BadClaimError(name)
    if default is None and value == 0:
        raise _BadClaimError(name)
    return value


def _text(claims: Mapping[str, object], name: str, default: str) -> str:
    value = claims.get(name, default)
    if not isinstance(value, str):
        raise _BadClaimError(name)
    value.encode("utf-8")
    return value


def _texts(claims: Mapping[str, object], name: str) -> list[str]:
    value = claims.get(name, [])
    if not isinstance(value, list) or len(value) > _MAX_NAMES or not all(isinstance(v, str) and v for v in value):
        raise _BadClaimError(name)
    return value


def _principal(claims: Mapping[str, object], expires_at_s: float) -> Principal:
    role, scope = _text(claims, "role", ""), _text(claims, "scope", "")
    metadata = claims.get("metadata", {})
    if not isinstance(metadata, dict):
        raise _BadClaimError("metadata")
    try:
        return Principal(
            id=_text(claims, "sub", ""),
            tenant=_text(claims, "tenant", ""),
            roles=frozenset([*_texts(claims, "roles"), *([role] if role else [])]),
            scopes=frozenset([*_texts(claims, "scopes"), *scope.split()]),
            username=_text(claims, "username", "") or None,
            expires_at_s=expires_at_s,
            metadata=metadata,
        )
    except SecurityConfigError:
        raise _BadClaimError("sub") from None


def _claims(principal: Principal) -> dict[str, object]:
    """The principal as claims; what is empty is left out."""
    given: dict[str, object] = {
        "sub": principal.id,
        "tenant": principal.tenant,
        "roles": sorted(principal.roles),
        "scopes": sorted(principal.scopes),
        "username": principal.username,
        "metadata": dict(principal.metadata),
    }
    return {name: value for name, value in given.items() if value}

"""Makes JSON Web Tokens that must not be accepted: damaged, foreign, and signed by the right key with wrong contents.

Signs with `hmac` alone, so that nothing of the code under test is part of the proof.
"""

from __future__ import annotations

import base64
import hmac
import json
import random

SECRET = "an HS256 secret of more than 32 bytes"
WALL = 1_800_000_000
GOOD_HEADER = {"alg": "HS256", "typ": "JWT"}
GOOD_CLAIMS = {"sub": "u-1", "roles": ["user"], "scopes": ["s"], "iat": WALL - 10, "exp": WALL + 3_600}
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(header: object, claims: object, *, secret: str = SECRET, hash_name: str = "sha256") -> str:
    """A token; header and claims may also be the JSON text itself."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    body = ".".join(map(encoded, parts))
    return body + "." + encoded(hmac.digest(secret.encode(), body.encode(), hash_name))


GOOD = signed(GOOD_HEADER, GOOD_CLAIMS)


def _these(*values: object) -> tuple[object, ...]:
    return values


def bad_headers() -> list[object]:
    """Headers that choose how they are verified, or are none."""
    names = ["none", "None", "NONE", "nOnE", "", "HS384", "HS512", "RS256", "ES256", "PS256", "hs256", "HS256 ", None]
    extras = {
        "crit": ["exp"], "b64": False, "jku": "https://evil.invalid/k", "x5u": "https://evil.invalid/c", "x5c": ["A"],
        "jwk": {"kty": "oct", "k": encoded(b"x" * 32)}, "kid": 7, "cty": "JWT", "zip": "DEF", "enc": "A128GCM", "x": 1,
    }  # fmt: skip
    found: list[object] = [{**GOOD_HEADER, "alg": name} for name in names]
    found += [{**GOOD_HEADER, name: value} for name, value in extras.items()]
    found += [{**GOOD_HEADER, "typ": kind} for kind in ("JWE", "", 1, None, "jwt ", "secevent+jwt")]
    found += [{"typ": "JWT"}, {}, [], "HS256", None, 1]
    found += [b'{"alg":"none","alg":"HS256"}', b'{"alg":"HS256","alg":"HS256"}', b"{", b"", b'{"alg":"HS256"} x']
    found += [b'{"alg":"HS256","typ":NaN}', b"\xff\xfe{}", b'{"alg":"HS256"', b"[" * 5_000, b'{"a":' * 2_000]
    return found


def bad_claims() -> list[object]:
    """Claims that a genuine key has signed, and that are not good enough all the same."""
    times: list[object] = [0, -1, -WALL, 1.5, WALL + 0.5, str(WALL + 60), True, False, [], {}, 2**53 + 1, 10**300]
    found: list[object] = [
        {**GOOD_CLAIMS, name: t} for name in ("exp", "nbf", "iat") for t in times if t not in (0, False)
    ]
    found += [{**GOOD_CLAIMS, "exp": t} for t in (0, False, None, WALL - 61, WALL - 86_400, 1)]
    found += [{**GOOD_CLAIMS, "nbf": WALL + 61}, {**GOOD_CLAIMS, "iat": WALL + 61}, {**GOOD_CLAIMS, "nbf": False}]
    found += [{k: v for k, v in GOOD_CLAIMS.items() if k != gone} for gone in ("exp", "sub")]
    found += [{**GOOD_CLAIMS, "sub": s} for s in ("", " ", 1, None, ["u-1"], True, "\ud800", "x" * 5_000)]
    found += [{**GOOD_CLAIMS, "aud": a} for a in _these("other", ["other"], [], 1, None, {}, [1], "")]
    found += [{**GOOD_CLAIMS, "roles": r} for r in ("admin", [1], {"a": 1}, None, ["a", ""], [["a"]], [" "])]
    found += [{**GOOD_CLAIMS, "scopes": r} for r in ("s", [1], {"a": 1}, None)]
    found += [{**GOOD_CLAIMS, "role": 1}, {**GOOD_CLAIMS, "scope": ["s"]}, {**GOOD_CLAIMS, "tenant": None}]
    found += [{**GOOD_CLAIMS, "metadata": m} for m in _these([], "x", 1, None)]
    text = json.dumps(GOOD_CLAIMS)
    found += [text.replace(str(WALL + 3_600), t).encode() for t in ("1e400", "1e10", "NaN", "Infinity", "9" * 5_000)]
    more = (("exp", WALL + 9_999), ("sub", '"root"'), ("roles", '["admin"]'), ("x", "NaN"), ("x", "1e999"))
    found += [f'{text[:-1]}, "{name}": {value}}}'.encode() for name, value in more]
    found += [text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), b"", b"null", b"[]", b"1", b"{" * 3_000]
    found += [(text[:-1] + ', "metadata": ' + '{"a":' * 3_000 + "1" + "}" * 3_000 + "}").encode()]
    return found


def fixed_forgeries() -> list[str]:
    """Every forgery that needs no chance."""
    found = [signed(header, GOOD_CLAIMS) for header in bad_headers()]
    found += [signed(GOOD_HEADER, claims) for claims in bad_claims()]
    for alg, hash_name in (("HS384", "sha384"), ("HS512", "sha512")):
        found.append(signed({**GOOD_HEADER, "alg": alg}, GOOD_CLAIMS, hash_name=hash_name))
    found += [signed(GOOD_HEADER, GOOD_CLAIMS, secret=s) for s in ("", "x", SECRET + " ", SECRET.upper(), SECRET[:-1])]
    found += _respelled(GOOD)
    return [token for token in found if token != GOOD]


def _respelled(token: str) -> list[str]:
    """The same token in spellings that lenient decoders take."""
    header, claims, signature = token.split(".")
    found = [f"{header}.{claims}.", f"{header}.{claims}", f"{header}..{signature}", f".{claims}.{signature}", "..", "."]
    found += [
        token + "=",
        f"{header}=.{claims}.{signature}",
        token + ".",
        "." + token,
        token + "." + signature,
        token * 2,
    ]
    found += [token + junk for junk in ("\n", "\r\n", " ", "\x00", "!", "\u200b", "é", "%00", "==")]
    found += [f"{header}.{claims}.{signature[:9]}{junk}{signature[9:]}" for junk in ("\n", "\r", " ", "=", "\t", ".")]
    found += [f"{header}.{claims}.{signature[:-1]}{c}" for c in ALPHABET if c != signature[-1]]
    found += [
        " " + token,
        "Bearer " + token,
        token.replace(".", ".\n"),
        token.replace("-", "+").replace("_", "/") + "+",
    ]
    none = encoded(b'{"alg":"none"}')
    found += [
        f"{none}.{claims}.",
        f"{none}.{claims}.{signature}",
        f"{header}.{claims}.{encoded(b'')}",
        f"{header}.{claims}.AA",
    ]
    found += ["a" * 1_000_000, "a." * 500_000, f"{header}.{'A' * 1_000_000}.{signature}", token + "A" * 1_000_000]
    return found


def draw_forgery(rng: random.Random) -> str:
    """The good token with chance damage, or chance claims and headers put together and signed well or badly."""
    while True:
        token = rng.choice([_damage_text, _damage_text, _damage_text, _mix])(rng)
        if token != GOOD:
            return token


def _damage_text(rng: random.Random) -> str:
    text = list(GOOD)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(text))
        kind = rng.randrange(5)
        if kind == 0:
            text[at] = rng.choice(ALPHABET)
        elif kind == 1:
            text[at] = chr(ord(text[at]) ^ 1 << rng.randrange(7))
        elif kind == 2:
            text.insert(at, rng.choice(ALPHABET + "=.+/ \n\x00é"))
        elif kind == 3:
            del text[at]
        else:
            other = rng.randrange(len(text))
            text[at], text[other] = text[other], text[at]
    return "".join(text)


_HEADERS, _CLAIMS = bad_headers(), bad_claims()


def _mix(rng: random.Random) -> str:
    """At least one of header, claims and signature is wrong."""
    header = rng.choice([GOOD_HEADER, rng.choice(_HEADERS)])
    claims = rng.choice([{**GOOD_CLAIMS, "sub": f"u-{rng.randrange(99)}"}, rng.choice(_CLAIMS)])
    secret = rng.choice([SECRET, "another HS256 secret of 32 bytes or more"])
    is_good = header is GOOD_HEADER and isinstance(claims, dict) and claims not in _CLAIMS
    if is_good and secret == SECRET:
        return _damage_text(rng)
    return signed(header, claims, secret=secret, hash_name=rng.choice(["sha256", "sha256", "sha512"]))

"""Who a token stands for: API keys, JSON Web Tokens and the program's own authenticators, and what was accepted before.

A token travels as a `Secret`, and what is kept of it is a digest under a key that lives as long as the process.
"""

from __future__ import annotations

import hashlib
import hmac
import inspect
import secrets
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import msgspec
from msgspec import Struct

from .._contain import contain
from ..errors import InvalidTokenError, TokenProblem
from .config import ApiKeyAuth, CustomAuth, JwtAuth
from .jwt import JwtVerifier, Verified
from .rules import Principal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from ..config import Secret
    from .config import Auth

__all__ = ["Digests", "Refused", "TokenCache", "Verdict", "Vouched", "Voucher", "with_credential"]

_DIGEST_BYTES = 16


class Vouched(Struct, frozen=True):
    """A token that holds, from `not_before_s` on the wall clock."""

    principal: Principal
    not_before_s: float = 0.0


class Refused(Struct, frozen=True):
    """A token that does not hold."""

    problem: TokenProblem


Verdict: TypeAlias = Vouched | Refused


class Digests:
    """Digests of tokens under a key that nobody else has: they tell equal tokens, and nothing about them."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def of(self, token: Secret) -> bytes:
        """The digest of a token."""
        return self.of_sha256(hashlib.sha256(token.reveal().encode("utf-8", "surrogatepass")).digest())

    def of_sha256(self, digest: bytes) -> bytes:
        """The same for a token of which only the SHA-256 is known."""
        return hashlib.blake2b(digest, digest_size=_DIGEST_BYTES, key=self._key).digest()


class Voucher:
    """What one configuration knows about tokens."""

    def __init__(self, auth: Auth | None, digests: Digests) -> None:
        self._digests = digests
        self._keys = _key_table(auth, digests)
        self._verifier = _verifier(auth)
        self._custom = auth.authenticate if isinstance(auth, CustomAuth) else None

    @property
    def is_cheap(self) -> bool:
        """Whether asking again costs no more than remembering: API keys are looked up each time."""
        return self._verifier is None and self._custom is None

    def find_key(self, digest: bytes) -> Principal | None:
        """The principal of the API key with that digest."""
        found = self._keys.get(digest)
        # The lookup has told the equal ones already; this keeps the answer's time from telling how equal.
        return found[1] if found is not None and hmac.compare_digest(found[0], digest) else None

    async def ask(self, token: Secret, *, wall: float) -> Verdict:
        """Whether the token holds now; never raises what an authenticator of the program raised."""
        if self._verifier is not None:
            return self._verify(self._verifier, token, wall)
        if self._custom is not None:
            return _until(await _ask_custom(self._custom, token), wall)
        principal = self.find_key(self._digests.of(token))
        return Refused("unknown") if principal is None else _until(Vouched(principal), wall)

    def is_accepted(self, token: Secret, *, wall: float) -> bool:
        """Whether a JSON Web Token holds; False where it is no such tokens that are asked for."""
        return self._verifier is not None and isinstance(self._verify(self._verifier, token, wall), Vouched)

    def _verify(self, verifier: JwtVerifier, token: Secret, wall: float) -> Verdict:
        verdict = verifier.verify(token, wall=wall)
        if isinstance(verdict, Verified):
            return Vouched(verdict.principal, verdict.not_before_s)
        return Refused(verdict.problem)


def _key_table(auth: Auth | None, digests: Digests) -> Mapping[bytes, tuple[bytes, Principal]]:
    if not isinstance(auth, ApiKeyAuth):
        return {}
    found: dict[bytes, tuple[bytes, Principal]] = {}
    for name, principal in auth.by_digest().items():
        digest = digests.of_sha256(bytes.fromhex(name.removeprefix("sha256:")))
        found[digest] = (digest, principal)
    return found


def _verifier(auth: Auth | None) -> JwtVerifier | None:
    if not isinstance(auth, JwtAuth):
        return None
    return JwtVerifier(
        auth.algorithm, auth.all_keys(), audience=auth.audience, issuer=auth.issuer, leeway_s=auth.leeway_s
    )


def _until(verdict: Verdict, wall: float) -> Verdict:
    """A principal whose own time is over is refused, whoever vouched for it."""
    if isinstance(verdict, Vouched):
        expires = verdict.principal.expires_at_s
        if expires is not None and wall >= expires:
            return Refused("expired")
    return verdict


async def _ask_custom(authenticate: Callable[[str], object], token: Secret) -> Verdict:
    failures: list[Exception] = []
    found = await contain(partial(_call, authenticate, token), report=failures.append)
    if failures:
        return Refused("unknown" if isinstance(failures[0], InvalidTokenError) else "unavailable")
    if found is None:
        return Refused("unknown")
    return Vouched(found) if isinstance(found, Principal) else Refused("unavailable")


async def _call(authenticate: Callable[[str], object], token: Secret) -> object:
    found = authenticate(token.reveal())
    return await _awaited(found) if inspect.isawaitable(found) else found


async def _awaited(found: Awaitable[object]) -> object:
    return await found


class _Entry(Struct, frozen=True):
    vouched: Vouched
    until: float


class TokenCache:
    """Tokens that were accepted, by digest: at most `entries` of them, each for `ttl_s`, the least used go first."""

    def __init__(self, *, ttl_s: float, entries: int) -> None:
        self._ttl_s = ttl_s
        self._bound = entries
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, digest: bytes, *, now: float, wall: float) -> Principal | None:
        """Who the token stands for; None for one that is not remembered, or whose own time is not now."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        expires = entry.vouched.principal.expires_at_s
        if now >= entry.until or (expires is not None and wall >= expires):
            del self._entries[digest]
            return None
        if wall < entry.vouched.not_before_s:
            return None
        self._entries.move_to_end(digest)
        return entry.vouched.principal

    def put(self, digest: bytes, vouched: Vouched, *, now: float) -> None:
        """Remember a token that was accepted."""
        if self._ttl_s <= 0:
            return
        self._entries[digest] = _Entry(vouched, now + self._ttl_s)
        self._entries.move_to_end(digest)
        if len(self._entries) > self._bound:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget all of them."""
        self._entries.clear()


def with_credential(principal: Principal, credential: str) -> Principal:
    """The same principal, vouched for."""
    return msgspec.structs.replace(principal, credential=credential)

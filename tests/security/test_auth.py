"""Authentication: who is let in, for how long, and how soon somebody is out again."""

# Wrong settings are made on purpose, and what a decision or a field is, the next line tells.
# mypy: disable-error-code="arg-type,dict-item,union-attr"

from __future__ import annotations

import contextlib
import random

import pytest
import trio
import trio.lowlevel
from hypothesis import given
from hypothesis import strategies as st
from jwt_forge import GOOD_CLAIMS, GOOD_HEADER, SECRET, WALL, signed

import gorouter_trio as gr
from gorouter_trio.security import (
    ApiKeyAuth,
    AuthFailed,
    AuthSucceeded,
    CustomAuth,
    Deny,
    JwtAuth,
    Principal,
    RateLimit,
    SecurityConfig,
    SecurityManager,
    ToolCheck,
    digest_of_key,
)
from gorouter_trio.security.auth import TokenCache, Vouched

KEY, OTHER_KEY = "the key of the first user", "the key of another user"
ADA, BOB = Principal(id="ada", roles={"admin"}), Principal(id="bob", expires_at_s=WALL + 10.0)
CALL = ToolCheck(tool="t", arguments={})


def keys(**more: Principal) -> ApiKeyAuth:
    return ApiKeyAuth(api_keys={KEY: ADA, OTHER_KEY: BOB, **more})


def managed(auth=None, **fields) -> SecurityManager:
    return SecurityManager(SecurityConfig(auth=auth, **{"default_policy": "allow-all", **fields}))


async def who(manager: SecurityManager, token, *, now: float = 0.0, wall: float = WALL, source: str = ""):
    return await manager.authenticate(token, now=now, wall=wall, source=source)


async def problem(manager: SecurityManager, token, **given) -> gr.TokenProblem:
    with pytest.raises(gr.InvalidTokenError) as caught:
        await who(manager, token, **given)
    return caught.value.problem


async def test_api_keys() -> None:
    """A key stands for its principal, as a str, as a Secret, with spaces around it; anything else for nobody."""
    manager = managed(keys())
    for token in (KEY, gr.Secret(KEY), f"  {KEY}\n"):
        assert (await who(manager, token)).id == "ada"
    for token in (KEY[:-1], KEY + "x", KEY.upper(), "ada", digest_of_key(KEY), "é" * 20, "\ud800", "x" * 1_000_000):
        assert await problem(manager, token, source=token[:9]) == "unknown"


async def test_keys_by_digest() -> None:
    """A configuration may hold the digest in place of the key, and holds nothing else in any case (A11)."""
    manager = managed(ApiKeyAuth(api_keys={digest_of_key(gr.Secret(KEY)): ADA}))
    assert (await who(manager, KEY)).id == "ada"
    assert KEY not in str(vars(manager)) + str(manager._state.config.auth.api_keys)


async def test_expiry_of_a_key() -> None:
    """A key's expiry is looked at on every call, and so is that of whoever was authenticated before it (A11)."""
    manager = managed(keys())
    bob = await who(manager, OTHER_KEY, wall=WALL + 9.999)
    assert manager.check(bob, CALL, now=0.0, wall=WALL + 9.999) == gr.security.Allow()
    assert await problem(manager, OTHER_KEY, wall=WALL + 10) == "expired"
    denied = manager.check(bob, CALL, now=0.0, wall=WALL + 10)
    assert isinstance(denied, Deny)
    assert denied.reason == "authentication"


async def test_no_token() -> None:
    """Without a token there is nobody, or an error where somebody is required; a blank one is none."""
    for token in (None, "", " \n", gr.Secret("")):
        assert await who(managed(keys()), token) is None
        with pytest.raises(gr.AuthenticationRequiredError):
            await who(managed(keys(), require_authentication=True), token)
        assert await who(managed(keys(), require_authentication=True, allow_unauthenticated=True), token) is None


async def test_a_token_is_never_ignored() -> None:
    """Where nothing can check tokens, a token is refused and not taken for none (A13)."""
    assert await problem(managed(None), KEY) == "unknown"
    for no_token in (7, b"bytes", ["list"]):
        assert await problem(managed(keys()), no_token) == "unknown"


async def test_authenticating_is_a_checkpoint() -> None:
    """`authenticate` is one on every call, whatever comes of it."""
    manager = managed(keys())
    for token in (KEY, None, "unknown, and long enough"):
        with trio.testing.assert_checkpoints(), contextlib.suppress(gr.InvalidTokenError):
            await who(manager, token)


@pytest.mark.parametrize("is_async", [False, True])
async def test_custom_authenticators(is_async: bool) -> None:
    """A function of the program's own, async or not; its answer is kept for the cache's time and no longer."""
    asked: list[str] = []

    def look_up(token: str) -> Principal | None:
        asked.append(token)
        return ADA if token == "good" else None

    async def look_up_slowly(token: str) -> Principal | None:
        await trio.lowlevel.checkpoint()
        return look_up(token)

    manager = managed(CustomAuth(authenticate=look_up_slowly if is_async else look_up), token_cache_ttl_s=60.0)
    for now in (0.0, 1.0, 59.9):
        assert (await who(manager, "good", now=now)).id == "ada"
    assert asked == ["good"]
    assert (await who(manager, "good", now=60.0)).id == "ada"
    assert asked == ["good", "good"]
    assert await problem(manager, "bad") == "unknown"


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (RuntimeError("database down"), "unavailable"),
        (ExceptionGroup("two", [ValueError(), OSError()]), "unavailable"),
        (gr.InvalidTokenError("no", problem="unknown"), "unknown"),
        ("ada", "unavailable"),
        (True, "unavailable"),
        ({"id": "ada"}, "unavailable"),
        (None, "unknown"),
        (Principal(id="ada", expires_at_s=WALL - 1.0), "expired"),
    ],
)
async def test_authenticators_that_fail(outcome: object, expected: str) -> None:
    """What is raised, and what is no principal, is a refusal; nothing of it reaches the caller."""

    def authenticate(token: str) -> object:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    manager = managed(CustomAuth(authenticate=authenticate))
    assert await problem(manager, "token") == expected
    with pytest.raises(gr.InvalidTokenError) as caught:
        await who(manager, "token")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


async def test_cancelling_an_authenticator(autojump_clock: trio.testing.MockClock) -> None:
    """A cancel goes through the program's authenticator and leaves nothing behind."""

    async def hang(token: str) -> Principal | None:
        await trio.sleep_forever()

    manager = managed(CustomAuth(authenticate=hang))
    with trio.move_on_after(5) as scope:
        await who(manager, "token")
    assert scope.cancelled_caught
    assert manager.statistics().cached_tokens == 0


async def test_the_cache_of_tokens() -> None:
    """JWTs are remembered, by digest; their own expiry, and the day they begin, are looked at all the same."""
    manager = managed(JwtAuth(key=SECRET, leeway_s=0))
    seen: list[bool] = []
    manager.on(AuthSucceeded, lambda event: seen.append(event.cached))
    token = signed(GOOD_HEADER, {"sub": "u", "exp": WALL + 100, "nbf": WALL})
    for wall in (WALL, WALL + 99):
        await who(manager, token, wall=wall)
    assert seen == [False, True]
    assert manager.statistics().cached_tokens == 1
    assert await problem(manager, token, wall=WALL - 1) == "not_yet_valid"
    assert await problem(manager, token, wall=WALL + 100) == "expired"
    assert manager.statistics().cached_tokens == 0
    assert token not in str(vars(manager._state.cache))


async def test_the_cache_can_be_off() -> None:
    """A time of 0 remembers nothing (A10)."""
    asked: list[str] = []

    def look_up(token: str) -> Principal:
        asked.append(token)
        return ADA

    custom = CustomAuth(authenticate=look_up)
    manager = managed(custom, token_cache_ttl_s=0)
    for _ in range(3):
        await who(manager, "token")
    assert len(asked) == 3
    assert manager.statistics().cached_tokens == 0


async def test_the_cache_is_bounded() -> None:
    """At the cap the least used go; one token in many spellings is one entry or none (A9, A10)."""
    manager = managed(JwtAuth(key=SECRET), token_cache_entries=3, failed_attempts=None)
    tokens = [signed(GOOD_HEADER, {**GOOD_CLAIMS, "sub": f"u-{n}"}) for n in range(5)]
    for token in (*tokens[:3], tokens[0], *tokens[3:]):
        await who(manager, token)
    assert manager.statistics().cached_tokens == 3
    for junk in ("\n", "==", " x", "A"):
        await problem(manager, tokens[0] + junk if junk != "\n" else tokens[0].replace(".", ".\n"))
    assert manager.statistics().cached_tokens == 3


class CacheModel:
    """A cache as a list, least used first."""

    def __init__(self, ttl_s: float, entries: int) -> None:
        self.ttl_s, self.bound, self.items = ttl_s, entries, []

    def get(self, name: bytes, now: float) -> bool:
        found = next((item for item in self.items if item[0] == name), None)
        if found is None:
            return False
        self.items.remove(found)
        if now >= found[1]:
            return False
        self.items.append(found)
        return True

    def put(self, name: bytes, now: float) -> None:
        self.items = [item for item in self.items if item[0] != name]
        self.items.append((name, now + self.ttl_s))
        del self.items[: -self.bound]


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_the_cache_is_its_model(seed: int, entries: int) -> None:
    """Chance gets and puts agree with a list that is kept in order of use."""
    rng = random.Random(seed)
    cache, model, now = TokenCache(ttl_s=5.0, entries=entries), CacheModel(5.0, entries), 0.0
    for _ in range(40):
        now += rng.choice([0.0, 1.0, 2.0])
        name = rng.choice([b"a", b"b", b"c", b"d", b"e"])
        if rng.random() < 0.5:
            cache.put(name, Vouched(ADA), now=now)
            model.put(name, now)
        else:
            assert (cache.get(name, now=now, wall=0.0) is not None) == model.get(name, now)
        assert len(cache) <= entries


async def test_revoking_a_token() -> None:
    """It is out on the next call: for whoever brings it, and for whoever was authenticated by it (row 41)."""
    token, other = (signed(GOOD_HEADER, {**GOOD_CLAIMS, "sub": name}) for name in ("u", "v"))
    manager = managed(JwtAuth(key=SECRET))
    held, others = await who(manager, token), await who(manager, other)
    generation = manager.generation
    manager.revoke_token(token)
    assert manager.generation != generation
    assert await problem(manager, token) == "revoked"
    assert manager.check(held, CALL, now=0.0, wall=WALL).reason == "authentication"
    assert manager.check(others, CALL, now=0.0, wall=WALL) == gr.security.Allow()
    assert (await who(manager, other)).id == "v"
    manager.revoke_token("")
    assert manager.statistics().revoked_tokens == 1


async def test_revoking_a_key_and_a_custom_token() -> None:
    """The same for the other kinds, and a new configuration does not bring a revoked key back."""
    for auth, token in ((keys(), KEY), (CustomAuth(authenticate=lambda token: ADA), "token")):
        manager = managed(auth)
        held = await who(manager, token)
        manager.revoke_token(gr.Secret(token))
        assert await problem(manager, token) == "revoked"
        manager.update_config(debug=False, token_cache_ttl_s=1.0)
        assert await problem(manager, token) == "revoked"
        assert manager.verify(held, wall=WALL) is not None


async def test_revoking_a_principal() -> None:
    """A principal is out whatever token they bring, until they are reinstated; the same name elsewhere is not."""
    manager = managed(JwtAuth(key=SECRET))
    token, elsewhere = (signed(GOOD_HEADER, {**GOOD_CLAIMS, "tenant": t}) for t in ("", "t"))
    held = await who(manager, token)
    manager.revoke_principal("u-1")
    assert await problem(manager, token) == "revoked"
    assert manager.check(held, CALL, now=0.0, wall=WALL).reason == "authentication"
    assert manager.check(Principal(id="u-1"), CALL, now=0.0, wall=WALL).reason == "authentication"
    assert (await who(manager, elsewhere)).tenant == "t"
    manager.reinstate_principal("u-1")
    assert (await who(manager, token)).id == "u-1"
    assert manager.verify(held, wall=WALL) is None


async def test_revoking_while_an_authenticator_thinks(autojump_clock: trio.testing.MockClock) -> None:
    """A token that is revoked while it is being checked is refused, and is not remembered."""
    manager: SecurityManager

    async def slow(token: str) -> Principal:
        await trio.sleep(1)
        return ADA

    manager = managed(CustomAuth(authenticate=slow))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_revoke_after, manager, "token", 0.5)
        assert await problem(manager, "token") == "revoked"
    assert manager.statistics().cached_tokens == 0


async def _revoke_after(manager: SecurityManager, token: str, delay_s: float) -> None:
    await trio.sleep(delay_s)
    manager.revoke_token(token)


async def test_a_configuration_that_never_rests(autojump_clock: trio.testing.MockClock) -> None:
    """When the configuration changes each time while a token is checked, it is refused, not accepted by an old one."""
    manager: SecurityManager

    async def slow(token: str) -> Principal:
        manager.update_config(token_cache_ttl_s=trio.current_time() % 7 + 1)
        await trio.sleep(1)
        return ADA

    manager = managed(CustomAuth(authenticate=slow))
    assert await problem(manager, "token") == "unavailable"


async def test_revocations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the cap a revocation fails loudly; none that was made is forgotten (P7, P8)."""
    monkeypatch.setattr("gorouter_trio.security.manager._MAX_REVOKED", 2)
    manager = managed(CustomAuth(authenticate=lambda token: ADA))
    for token in ("one", "two"):
        manager.revoke_token(token)
        manager.revoke_principal(token)
    with pytest.raises(gr.SecurityError, match="too many tokens"):
        manager.revoke_token("three")
    with pytest.raises(gr.SecurityError, match="too many principals"):
        manager.revoke_principal("three")
    assert await problem(manager, "one") == "revoked"


async def test_a_new_configuration_counts_at_once() -> None:
    """Removed keys, changed roles and exchanged secrets are gone on the next call, for held principals too (A10)."""
    manager = managed(keys())
    ada, bob = await who(manager, KEY), await who(manager, OTHER_KEY)
    manager.update_config(auth=ApiKeyAuth(api_keys={KEY: ADA}))
    assert await problem(manager, OTHER_KEY) == "unknown"
    assert manager.verify(ada, wall=WALL) is None
    assert manager.verify(bob, wall=WALL) is not None
    manager.update_config(auth=ApiKeyAuth(api_keys={KEY: Principal(id="ada", roles={"user"})}))
    assert manager.verify(ada, wall=WALL) is not None
    assert (await who(manager, KEY)).roles == {"user"}


async def test_exchanging_a_secret() -> None:
    """Tokens of the old secret are refused at once, remembered or not; other settings leave them alone."""
    token = signed(GOOD_HEADER, GOOD_CLAIMS)
    manager = managed(JwtAuth(key=SECRET))
    held = await who(manager, token)
    manager.update_config(default_policy="allow-all", debug=False, max_buckets=10)
    assert manager.verify(held, wall=WALL) is None
    manager.update_config(auth=JwtAuth(key="another secret of more than 32 bytes"))
    assert await problem(manager, token) == "unknown"
    assert manager.verify(held, wall=WALL) is not None


@pytest.mark.parametrize("config", [5, {"default_policy": "allow-all"}])
async def test_what_is_no_configuration(config) -> None:
    """It is refused as such, and the one that is there stays."""
    manager = managed(keys())
    with pytest.raises(gr.SecurityConfigError, match="config: must be a SecurityConfig"):
        manager.update_config(config)
    assert (await who(manager, KEY)).id == "ada"


async def test_credentials_cannot_be_made_up() -> None:
    """A principal of the program's own needs no credential, and one that no token vouched for does not hold."""
    manager = managed(keys())
    assert manager.verify(Principal(id="x"), wall=WALL) is None
    for credential in ("7.00", "nonsense", "0.zz", "."):
        assert manager.verify(Principal(id="x", credential=credential), wall=WALL) is not None


async def test_principals_of_another_manager() -> None:
    """They have to authenticate here: this one has not seen their tokens, and may not know them."""
    ada = await who(managed(keys()), KEY)
    other = managed(ApiKeyAuth(api_keys={KEY[::-1]: Principal(id="eve")}))
    assert other.verify(ada, wall=WALL) is not None
    assert isinstance(other.check(ada, CALL, now=0.0, wall=WALL), Deny)


async def test_failed_attempts() -> None:
    """After ten refused tokens a source has to wait; others, and tokens known from before, do not (A12)."""
    manager = managed(JwtAuth(key=SECRET), failed_attempts=RateLimit(limit=10, period_s=60.0))
    good, known = (signed(GOOD_HEADER, {**GOOD_CLAIMS, "sub": name}) for name in ("u", "v"))
    await who(manager, known, source="1.2.3.4")
    for _ in range(10):
        assert await problem(manager, "guess", now=0.0, source="1.2.3.4") == "malformed"
    with pytest.raises(gr.InvalidTokenError) as caught:
        await who(manager, good, now=5.0, source="1.2.3.4")
    assert caught.value.problem == "too_many_attempts"
    assert caught.value.retry_after_s == pytest.approx(55.0, abs=0.01)
    assert (await who(manager, known, now=5.0, source="1.2.3.4")).id == "v"
    assert (await who(manager, good, now=5.0, source="1.2.3.5")).id == "u"
    assert await problem(manager, "guess", now=60.0, source="1.2.3.4") == "malformed"


async def test_an_outage_is_no_attempt() -> None:
    """An authenticator that fails locks nobody out, and no counting is a setting."""

    def fail(token: str) -> Principal:
        raise OSError

    manager = managed(CustomAuth(authenticate=fail), failed_attempts=RateLimit(limit=1, period_s=60.0))
    for _ in range(3):
        assert await problem(manager, "token") == "unavailable"
    manager = managed(keys(), failed_attempts=None)
    for _ in range(30):
        assert await problem(manager, "guess") == "unknown"


async def test_what_is_told() -> None:
    """Every attempt is an event, with the problem and the source, and never with the token."""
    manager = managed(keys(), require_authentication=True)
    seen: list[object] = []
    manager.on(AuthFailed, seen.append)
    await problem(manager, "a token nobody knows", source="1.2.3.4")
    with pytest.raises(gr.AuthenticationRequiredError):
        await who(manager, None)
    assert seen == [
        AuthFailed(problem="unknown", source="1.2.3.4", at_s=WALL),
        AuthFailed(problem="missing", source="", at_s=WALL),
    ]


async def test_closing() -> None:
    """A closed manager lets nobody in and nothing run (A24)."""
    manager = managed(keys())
    ada = await who(manager, KEY)
    manager.close()
    assert await problem(manager, KEY) == "unavailable"
    for caller in (ada, None, Principal(id="x")):
        assert isinstance(manager.check(caller, CALL, now=0.0, wall=WALL), Deny)
    assert isinstance(manager.verify(ada, wall=WALL), Deny)
    assert isinstance(manager.verify(Principal(id="x"), wall=WALL), Deny)


@pytest.mark.long
async def test_a_million_tokens(record_property) -> None:
    """10^6 callers, good and bad, from as many places: cache, sources and revocations stay within their caps."""
    manager = managed(CustomAuth(authenticate=lambda token: Principal(id=token) if token[0] == "u" else None))
    for n in range(500_000):
        now = n / 10_000
        await who(manager, f"u-{n}", now=now)
        assert await problem(manager, f"x-{n}", now=now, source=f"from {n}") == "unknown"
    cached, sources = manager.statistics().cached_tokens, manager._attempts.statistics().buckets
    record_property("figure", f"after 1,000,000 callers {cached:,} tokens and {sources:,} sources are remembered")
    assert cached == 10_000
    assert sources <= 100_000

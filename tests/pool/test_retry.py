"""Retries, decided: every row of the table, the delays, and the quota that keeps an outage from being multiplied."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.config import RetryPolicy
from gorouter_trio.errors import (
    ActorGoneError,
    ApiError,
    CircuitOpenError,
    ConnectError,
    DeadlineExceededError,
    DecodeError,
    GorouterError,
    InsufficientCreditsError,
    PoolClosedError,
    PoolFullError,
    RateLimitError,
    StreamBrokenError,
)
from gorouter_trio.pool.retry import (
    FailureKind,
    GiveUp,
    Retry,
    RetryQuota,
    RetryState,
    classify,
    decide,
    is_about_key,
    warrants_fallback,
)
from gorouter_trio.wire.faults import api_error, status_of
from gorouter_trio.wire.responses import ErrorBody


def answered(
    status: int, code: int | str | None = None, *, wait_s: float | None = None, **metadata: object
) -> ApiError:
    """An error as the wire gives it."""
    return api_error(ErrorBody("m", code, metadata or None), status=status, retry_after_s=wait_s)


def free_tier(message: str) -> ApiError:
    return api_error(
        ErrorBody(message, 429, {"limit_source": "openrouter_free_tier_daily"}), status=429, retry_after_s=20.0
    )


DAILY = "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests per day"
TABLE: list[tuple[GorouterError, FailureKind]] = [
    # nothing was sent
    (ConnectError("DNS, TCP, TLS or proxy"), "unsent"),
    (StreamBrokenError("found closed", sent=False), "unsent"),
    (DeadlineExceededError("late", phase="connect"), "unsent"),
    # answered refusals
    (answered(408), "refused"),
    (answered(409), "refused"),
    (answered(425), "refused"),
    (answered(503), "refused"),
    (answered(529), "refused"),
    (answered(503, wait_s=3.0), "throttled"),
    (answered(429), "throttled"),
    (answered(429, wait_s=1.0), "throttled"),
    (answered(200, 429), "throttled"),
    (answered(200, "rate_limit_exceeded"), "throttled"),
    (answered(200, 503), "refused"),
    (answered(200, "provider_overloaded"), "refused"),
    (answered(200, "529"), "refused"),
    (answered(402, limit_source="openrouter_in_flight_budget", wait_s=120.0), "throttled"),
    (free_tier("Rate limit exceeded: free-models-per-min. "), "throttled"),
    # failed in vain
    (answered(500), "failed"),
    (answered(502), "failed"),
    (answered(200, 500), "failed"),
    (answered(200, 502), "failed"),
    (answered(200, "server_error"), "failed"),
    (answered(200), "failed"),
    (answered(200, "something_new"), "failed"),
    (answered(200, None, error_type="provider_unavailable"), "failed"),
    # ambiguous
    (StreamBrokenError("cut"), "ambiguous"),
    (answered(504), "ambiguous"),
    (answered(524), "ambiguous"),
    (answered(200, 504), "ambiguous"),
    (answered(200, "timeout"), "ambiguous"),
    (DeadlineExceededError("late", phase="headers"), "ambiguous"),
    (DeadlineExceededError("late", phase="first_data"), "ambiguous"),
    # never
    (answered(400), "final"),
    (answered(401), "final"),
    (answered(402), "final"),
    (answered(403), "final"),
    (answered(404), "final"),
    (answered(413), "final"),
    (answered(422), "final"),
    (answered(402, limit_source="openrouter_credits", wait_s=5.0), "final"),
    (answered(402, limit_source="openrouter_in_flight_budget"), "final"),
    (answered(403, reasons=["violence"]), "final"),
    (free_tier(DAILY), "final"),
    (free_tier("free-models-per-day-high-balance"), "final"),
    (answered(200, 400), "final"),
    (answered(200, "invalid_prompt"), "final"),
    (answered(200, 10**9), "final"),
    (answered(501), "final"),
    (answered(302), "final"),
    (DecodeError("not JSON"), "final"),
    (DeadlineExceededError("late", phase="total"), "final"),
    (DeadlineExceededError("late", phase="queue"), "final"),
    (DeadlineExceededError("late", phase="data_idle"), "final"),
    (PoolClosedError("closed"), "final"),
    (PoolFullError("full"), "final"),
    (ActorGoneError("gone"), "final"),
]


def _name(error: object) -> str:
    if isinstance(error, ApiError):
        return f"{error.status}/{error.code}"
    return f"{type(error).__name__} {error}" if isinstance(error, GorouterError) else str(error)


@pytest.mark.parametrize(("error", "kind"), TABLE, ids=_name)
def test_every_row_of_the_table(error: GorouterError, kind: FailureKind) -> None:
    """Each failure is of its kind."""
    assert classify(error) == kind


def decided(
    error: GorouterError,
    *,
    policy: RetryPolicy | None = None,
    state: RetryState | None = None,
    quota: RetryQuota | None = None,
    remaining_s: float = math.inf,
) -> Retry | GiveUp:
    return decide(
        error,
        policy=policy or RetryPolicy(),
        state=state or RetryState(),
        quota=quota or RetryQuota(500),
        rng=random.Random(1),
        remaining_s=remaining_s,
    )


RETRIES_IN_A_ROW = {"unsent": 3, "refused": 3, "throttled": 3, "failed": 3, "ambiguous": 1, "final": 0}


@pytest.mark.parametrize(("error", "kind"), TABLE, ids=_name)
def test_how_often_each_is_tried_again(error: GorouterError, kind: FailureKind) -> None:
    """Each kind of failure, again and again, is retried as often as the table says, and marked as it says."""
    state, quota = RetryState(), RetryQuota(500)
    verdicts = [decided(error, state=state, quota=quota) for _ in range(5)]
    retries = [verdict for verdict in verdicts if isinstance(verdict, Retry)]
    expected = min(RETRIES_IN_A_ROW[kind], 2 if _is_500(error) else 9)
    assert len(retries) == expected
    assert all(isinstance(verdict, GiveUp) for verdict in verdicts[expected:])
    billed = kind == "ambiguous" or isinstance(error, DecodeError)
    assert {verdict.maybe_billed for verdict in verdicts} == {billed}
    cost = 5 if kind == "throttled" else 14
    assert quota.tokens == 500 - cost * expected


def _is_500(error: GorouterError) -> bool:
    if not isinstance(error, ApiError):
        return False
    return (error.status if error.status >= 300 else status_of(error.code, error.metadata)) == 500


def test_once_perhaps_billed_always_perhaps_billed() -> None:
    """After an ambiguous failure every later verdict of the request says so."""
    state = RetryState()
    first = decided(StreamBrokenError("cut"), state=state)
    assert first.maybe_billed
    assert decided(ConnectError("x"), state=state).maybe_billed
    assert decided(answered(400), state=state).maybe_billed


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_bounds_of_the_policy(limit: int) -> None:
    """`max_retries` bounds all retries, `ambiguous_retries` those that may be billed twice; a call's own limit wins."""
    state = RetryState()
    expected = [Retry] * limit + [GiveUp] * (7 - limit)
    policy = RetryPolicy(max_retries=limit)
    assert [type(decided(ConnectError("x"), policy=policy, state=state)) for _ in range(7)] == expected
    policy = RetryPolicy(max_retries=9, ambiguous_retries=limit)
    state = RetryState()
    verdicts = [type(decided(StreamBrokenError("x"), policy=policy, state=state)) for _ in range(7)]
    assert verdicts == expected
    state = RetryState()
    state.ambiguous_limit = limit
    verdicts = [type(decided(StreamBrokenError("x"), policy=RetryPolicy(max_retries=9), state=state)) for _ in range(7)]
    assert verdicts == expected


# --- delays -----------------------------------------------------------------------------------------------------------


def delays(
    count: int, *, retry: int, policy: RetryPolicy | None = None, error: GorouterError | None = None
) -> list[float]:
    rng, found = random.Random(7), []
    for _ in range(count):
        state = RetryState()
        state.retries = retry
        verdict = decide(
            error or ConnectError("x"),
            policy=policy or RetryPolicy(max_retries=100),
            state=state,
            quota=RetryQuota(500),
            rng=rng,
            remaining_s=math.inf,
        )
        assert isinstance(verdict, Retry)
        found.append(verdict.delay_s)
    return found


@pytest.mark.parametrize(
    ("retry", "ceiling_s"), [(0, 0.3), (1, 0.6), (2, 1.2), (3, 2.4), (4, 4.0), (10, 4.0), (99, 4.0)]
)
def test_full_jitter(retry: int, ceiling_s: float) -> None:
    """Delays are uniform from 0 to the ceiling, which doubles and is cut: Kolmogorov and Smirnov have no objection."""
    drawn = sorted(delays(10_000, retry=retry))
    assert drawn[0] >= 0
    assert drawn[-1] <= ceiling_s
    distance = max(abs((i + 1) / len(drawn) - value / ceiling_s) for i, value in enumerate(drawn))
    assert distance < 1.63 / math.sqrt(len(drawn))  # p = 0.01


def test_clients_spread_after_an_outage() -> None:
    """1,000 clients that fail together do not come back together."""
    bins = Counter(int(delay_s / 0.3 * 20) for delay_s in delays(1_000, retry=0))
    assert max(bins.values()) <= 2 * 1_000 / 20


def test_delays_of_other_policies() -> None:
    """The ceiling never exceeds `max_delay_s`, also where the base does; a base of 0 means at once."""
    assert max(delays(100, retry=5, policy=RetryPolicy(base_delay_s=9, max_delay_s=2, max_retries=9))) <= 2
    assert set(delays(10, retry=2, policy=RetryPolicy(base_delay_s=0, max_retries=9))) == {0.0}
    assert set(delays(10, retry=2, policy=RetryPolicy(max_delay_s=0, max_retries=9))) == {0.0}


def test_the_servers_wait_is_the_least() -> None:
    """A Retry-After is waited out and not undercut; a shorter one leaves the jitter."""
    assert set(delays(100, retry=0, error=answered(429, wait_s=7.0))) == {7.0}
    drawn = delays(1_000, retry=4, error=answered(429, wait_s=1.0))
    assert min(drawn) == 1.0
    assert max(drawn) > 3.0


@pytest.mark.parametrize(
    ("wait_s", "retried"), [(0.0, True), (119.9, True), (120.0, True), (120.1, False), (1e15, False)]
)
def test_a_wait_above_the_cap_fails_fast(wait_s: float, retried: bool) -> None:
    """Up to the cap it is waited; above, the caller gets the error at once, with its value, and no token is spent."""
    quota, error = RetryQuota(500), answered(429, wait_s=wait_s)
    verdict = decided(error, quota=quota)
    assert isinstance(verdict, Retry if retried else GiveUp)
    assert error.retry_after_s == wait_s
    assert quota.tokens == (495 if retried else 500)


def test_a_wait_past_the_deadline_is_not_begun() -> None:
    """A delay that would not end before the deadline gives up, and spends nothing."""
    quota = RetryQuota(500)
    error = answered(429, wait_s=5.0)
    assert isinstance(decided(error, quota=quota, remaining_s=5.0), GiveUp)
    assert isinstance(decided(error, quota=quota, remaining_s=-1.0), GiveUp)
    assert quota.tokens == 500
    assert isinstance(decided(error, quota=quota, remaining_s=5.1), Retry)


# --- the quota --------------------------------------------------------------------------------------------------------


def test_the_quota_drains_and_refills() -> None:
    """It pays for 35 transient retries; a success gives back what its retry took, or one token, up to the top."""
    quota = RetryQuota(500)
    retried = sum(isinstance(decided(answered(502), quota=quota), Retry) for _ in range(100))
    assert (retried, quota.tokens) == (35, 10)
    assert isinstance(decided(answered(429), quota=quota), Retry)
    quota.give_back(14)
    quota.give_back(0)
    assert quota.tokens == 5 + 14 + 1
    for _ in range(1_000):
        quota.give_back(0)
    assert quota.tokens == 500
    quota.give_back(14)
    assert quota.tokens == 500


@given(steps=st.lists(st.integers(-20, 20), max_size=60), capacity=st.integers(0, 60))
def test_the_quota_is_a_bucket(steps: list[int], capacity: int) -> None:
    """Taking and giving back in any order keeps it between empty and full, and takes all or nothing."""
    quota, level = RetryQuota(capacity), capacity
    for step in steps:
        if step < 0:
            fits = -step <= level
            assert quota.take(-step) == fits
            level -= -step if fits else 0
        else:
            quota.give_back(step)
            level = min(capacity, level + max(step, 1))
        assert quota.tokens == level


def test_without_a_quota_nothing_is_retried() -> None:
    """A quota of 0 turns retries off; costs of 0 turn the quota off."""
    assert isinstance(decided(ConnectError("x"), quota=RetryQuota(0)), GiveUp)
    free = RetryPolicy(transient_cost=0, throttle_cost=0)
    assert isinstance(decided(ConnectError("x"), quota=RetryQuota(0), policy=free), Retry)


def test_classes_of_the_table_are_the_errors_of_the_wire() -> None:
    """What the rows stand for has the classes that callers catch."""
    assert isinstance(answered(402), InsufficientCreditsError)
    assert isinstance(free_tier(DAILY), RateLimitError)


# --- cooldowns, keys, fallbacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cooldown_s", "retried"), [(0.0, True), (9.9, True), (10.0, False), (1e9, False)])
def test_a_wait_for_all_is_one_of_the_request(cooldown_s: float, retried: bool) -> None:
    """A pause that others were given counts against the deadline like the request's own; it takes no token then."""
    quota = RetryQuota(500)
    verdict = decide(
        answered(503),
        policy=RetryPolicy(),
        state=RetryState(),
        quota=quota,
        rng=random.Random(1),
        remaining_s=10.0,
        cooldown_s=cooldown_s,
    )
    assert isinstance(verdict, Retry) == retried
    assert quota.tokens == (486 if retried else 500)


ABOUT_KEY = [
    (answered(401), True),
    (answered(402, limit_source="openrouter_credits"), True),
    (answered(402, limit_source="openrouter_in_flight_budget", wait_s=9.0), True),
    (answered(403, limit_source="openrouter_key_limit"), True),
    (answered(429, wait_s=3.0), True),
    (free_tier(DAILY), True),
    (answered(429), False),
    (answered(429, wait_s=3.0, provider_name="P"), False),
    (answered(403, reasons=["violence"]), False),
    (answered(503), False),
    (answered(400), False),
    (ConnectError("x"), False),
]


@pytest.mark.parametrize(("error", "is_keys"), ABOUT_KEY, ids=_name)
def test_what_another_key_may_mend(error: GorouterError, is_keys: bool) -> None:
    """With another key at hand it is tried at once, for no token and no retry, a few times at most."""
    assert is_about_key(error) is is_keys
    state, quota = RetryState(), RetryQuota(500)
    verdicts = [
        decide(
            error,
            policy=RetryPolicy(max_retries=0),
            state=state,
            quota=quota,
            rng=random.Random(1),
            remaining_s=10.0,
            has_other_key=True,
        )
        for _ in range(20)
    ]
    at_once = [verdict for verdict in verdicts if verdict == Retry(0.0, False)]
    assert len(at_once) == (8 if is_keys else 0)
    assert (state.retries, quota.tokens) == (0, 500)


def _marked(error: GorouterError) -> GorouterError:
    error.maybe_billed = True
    return error


FALLBACK = [
    (answered(429), True),
    (free_tier(DAILY), True),
    (answered(500), True),
    (answered(502), True),
    (answered(503), True),
    (answered(529), True),
    (answered(404), True),
    (answered(403, reasons=["violence"]), True),
    (answered(400, error_type="context_length_exceeded"), True),
    (api_error(ErrorBody("no/such is not a valid model ID", 400), status=400), True),
    (CircuitOpenError("open", retry_after_s=5.0), True),
    (answered(400), False),
    (answered(401), False),
    (answered(402), False),
    (answered(403), False),
    (answered(413), False),
    (_marked(answered(504)), False),
    (_marked(StreamBrokenError("cut")), False),
    (ConnectError("x"), False),
    (DeadlineExceededError("late", phase="queue"), False),
    (DeadlineExceededError("late", phase="total"), False),
    (PoolFullError("full"), False),
    (PoolClosedError("closed"), False),
]


@pytest.mark.parametrize(("error", "warranted"), FALLBACK, ids=_name)
def test_what_warrants_another_model(error: GorouterError, warranted: bool) -> None:
    """What is wrong with the model, and nothing that may have been billed or would be the same with another."""
    assert warrants_fallback(error) is warranted

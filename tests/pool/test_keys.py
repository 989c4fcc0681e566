"""API keys: shares, refusals and what follows from them, keys that change while a client runs, and that none shows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
import trio
import trio.testing
from pooled import Place, open_place, together
from scripted import Network, Peer, Request, answering, chat, error, shown_by

from gorouter_trio.config import ApiKey, ClientConfig, PoolLimits, RateLimits, RetryPolicy, Secret
from gorouter_trio.errors import (
    AuthenticationError,
    ConfigError,
    InsufficientCreditsError,
    PermissionDeniedError,
    RateLimitError,
)

NEVER = RetryPolicy(max_retries=0)


def key_of(request: Request) -> str:
    return request.headers["authorization"].removeprefix("Bearer ")


def keys_of(network: Network) -> list[str]:
    return [key_of(request) for request in network.requests]


def refusing(key: str, refusal: bytes):
    """A server that refuses one key and answers the others."""
    return answering(lambda request: refusal if key_of(request) == key else chat(key_of(request)))


def held_back(go: trio.Event):
    """A server that answers chats when it may, and all else at once."""

    async def late(request: Request) -> bytes:
        if request.method == "POST":
            await go.wait()
        return chat()

    return answering(late)


async def ask(place: Place, count: int, *, model: str = "") -> Counter[str]:
    """Requests one after the other; with which key each was sent."""
    before = len(place.network.requests)
    for _ in range(count):
        await place.ask(model=model)
    return Counter(keys_of(place.network)[before:])


async def test_shares_by_weight() -> None:
    """Keys are used in proportion to their weights, evenly mixed."""
    async with open_place(answering(lambda r: chat()), api_key={"a": 2, "b": 1, "c": 1}) as place:
        assert await ask(place, 400) == {"a": 200, "b": 100, "c": 100}
        assert len(set(keys_of(place.network)[:4])) == 3
        assert [(key.name, key.sent) for key in place.statistics.keys] == [("0", 200), ("1", 100), ("2", 100)]


async def test_a_key_for_emergencies(autojump_clock: trio.testing.MockClock) -> None:
    """A key of weight 0 is used when no other can be."""
    keys = [ApiKey(key="a", name="first"), ApiKey(key="b", weight=0, name="spare")]
    async with open_place(answering(lambda r: chat()), api_key=keys) as place:
        assert await ask(place, 20) == {"a": 20}
    async with open_place(refusing("a", error(401)), api_key=keys) as place:
        assert await ask(place, 3) == {"a": 1, "b": 3}
        assert [(key.name, key.state) for key in place.statistics.keys] == [("first", "disabled"), ("spare", "ready")]


async def test_a_key_that_is_refused_is_left_out(autojump_clock: trio.testing.MockClock) -> None:
    """A 401 costs no request: it goes with another key at once; the key is tried again after five minutes."""
    async with open_place(refusing("a", error(401)), api_key=["a", "b"], retry=NEVER) as place:
        assert await ask(place, 10) == {"a": 1, "b": 10}
        assert trio.current_time() == 0
        assert place.statistics.retries == 1
        await trio.sleep(301)
        assert await ask(place, 10) == {"a": 1, "b": 10}
        await place.check_clean()


async def test_all_keys_refused(autojump_clock: trio.testing.MockClock) -> None:
    """When no key is left the request gets the 401, and so do later ones, of which nothing is sent."""
    async with open_place(answering(lambda r: error(401)), api_key=["a", "b"]) as place:
        for number in range(5):
            with pytest.raises(AuthenticationError) as refused:
                await place.ask()
            assert refused.value.attempts == (2 if number == 0 else 0)
        assert keys_of(place.network) == ["a", "b"]
        with pytest.raises(AuthenticationError):
            await place.ask(method="GET")
        await place.check_clean()


async def test_a_lone_key_is_never_left_out() -> None:
    """With one key every request gets its own answer: a 401 that passes stops nothing."""
    serve = answering(lambda r: error(401) if r.number < 3 else chat())
    async with open_place(serve) as place:
        for _ in range(3):
            with pytest.raises(AuthenticationError):
                await place.ask()
        await place.ask()


@pytest.mark.parametrize(
    ("refusal", "kind", "back_after_s"),
    [
        (error(402, limit_source="openrouter_credits"), InsufficientCreditsError, 60),
        (error(403, limit_source="openrouter_key_limit"), PermissionDeniedError, 300),
    ],
    ids=["credit", "limit"],
)
async def test_keys_without_credit_cool_down(
    refusal: bytes, kind: type[Exception], back_after_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    """What one key cannot pay another can; it is tried again after a while. When none can, the request is told."""
    async with open_place(refusing("a", refusal), api_key=["a", "b"]) as place:
        assert await ask(place, 5) == {"a": 1, "b": 5}
        await trio.sleep(back_after_s + 1)
        assert await ask(place, 5) == {"a": 1, "b": 5}
    async with open_place(answering(lambda r: refusal), api_key=["a", "b"]) as place:
        with pytest.raises(kind):
            await place.ask()
        assert len(place.network.requests) == 2


@pytest.mark.parametrize(
    "refusal",
    [error(402, limit_source="openrouter_credits"), error(403, limit_source="openrouter_key_limit")],
    ids=["credit", "limit"],
)
async def test_what_costs_nothing_needs_no_credit(refusal: bytes) -> None:
    """While no key can pay for a chat, what is left of its credit can be asked for, and what a lost answer cost."""
    async with open_place(
        answering(lambda request: refusal if request.method == "POST" else chat()), api_key=["a", "b"]
    ) as place:
        for _ in range(2):
            with pytest.raises((InsufficientCreditsError, PermissionDeniedError)):
                await place.ask()
        assert len(place.network.requests) == 2
        await place.ask(method="GET")
        await place.check_clean()


async def test_a_key_that_is_back_before_the_others(autojump_clock: trio.testing.MockClock) -> None:
    """A request that waits for a key to be free goes with one that was left out, when its time is over first."""

    def serve(request: Request) -> bytes:
        if trio.current_time() > 1:
            return chat(key_of(request))
        if key_of(request) == "a":
            return error(402, limit_source="openrouter_credits")
        return error(429, headers=["Retry-After: 110"])

    async with open_place(answering(serve), api_key=["a", "b"], retry=NEVER) as place:
        with pytest.raises(RateLimitError):
            await place.ask()
        with pytest.raises(RateLimitError):
            await place.ask(deadline=50)
        assert trio.current_time() == 0
        assert (await place.ask()).text == "a"
        assert trio.current_time() == 60
        await place.check_clean()


async def test_other_refusals_are_no_fault_of_the_key() -> None:
    """A moderation or a bad request says nothing of the key, and is not tried with another."""
    async with open_place(answering(lambda r: error(403, reasons=["violence"])), api_key=["a", "b"]) as place:
        for _ in range(4):
            with pytest.raises(PermissionDeniedError):
                await place.ask()
        assert Counter(keys_of(place.network)) == {"a": 2, "b": 2}


async def test_a_key_at_its_limit_gives_way(autojump_clock: trio.testing.MockClock) -> None:
    """A 429 of the platform pauses its key alone: the request goes with the other, without a wait."""

    def answer(request: Request) -> bytes:
        return error(429, headers=["Retry-After: 50"]) if request.number == 0 else chat()

    async with open_place(answering(answer), api_key=["a", "b"]) as place:
        assert await ask(place, 6) == {"a": 1, "b": 6}
        assert trio.current_time() == 0
        assert [key.state for key in place.statistics.keys] == ["paused", "ready"]
        await trio.sleep(51)
        assert (await ask(place, 6)).keys() == {"a", "b"}


async def test_a_providers_refusal_is_the_same_for_all_keys(autojump_clock: trio.testing.MockClock) -> None:
    """Another key does not help where the provider is full."""
    full = error(429, headers=["Retry-After: 5"], provider_name="P")
    async with open_place(answering(lambda r: full), api_key=["a", "b"], retry=NEVER) as place:
        with pytest.raises(RateLimitError):
            await place.ask()
        assert len(place.network.requests) == 1


async def test_the_daily_limit_is_one_of_the_key(autojump_clock: trio.testing.MockClock) -> None:
    """Free models of one account go on with the key of another when the day's are used up."""
    daily = error(429, headers=["X-RateLimit-Reset: 9999999999999"], limit_source="openrouter_free_tier_daily")
    async with open_place(refusing("a", daily), api_key=["a", "b"]) as place:
        assert await ask(place, 5, model="x:free") == {"a": 1, "b": 5}
        assert (await ask(place, 4, model="x")).keys() == {"a", "b"}


async def test_rates_of_each_key(autojump_clock: trio.testing.MockClock) -> None:
    """Each key has its rate, one of its own where it says so; together they make their sum."""
    keys = [ApiKey(key="a"), ApiKey(key="b", rates=RateLimits(requests_per_minute=120, margin=0))]
    rates = RateLimits(requests_per_minute=60, margin=0)
    async with open_place(answering(lambda r: chat()), api_key=keys, rates=rates) as place:
        await together(*[place.ask] * 60)
        assert trio.current_time() == pytest.approx(19, abs=1)
        counts = Counter(keys_of(place.network))
        assert counts["b"] / counts["a"] == pytest.approx(2, rel=0.1)


# --- keys that somebody gives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_key_that_changes(is_async: bool) -> None:
    """A function, async or not, is asked for each request: what it gives is used from then on."""
    current = "one"

    def give() -> str:
        return current

    async def give_later() -> Secret:
        await trio.lowlevel.checkpoint()
        return Secret(f" {current}\n")

    async with open_place(answering(lambda r: chat()), api_key=give_later if is_async else give) as place:
        await place.ask()
        current = "two"
        await place.ask()
        await place.ask()
        assert keys_of(place.network) == ["one", "two", "two"]
        assert place.statistics.workers == 1
        assert [key.sent for key in place.statistics.keys] == [1, 2]


async def test_a_key_that_ran_out_meanwhile() -> None:
    """After a 401 the function is asked once more: with another key the request is sent again, else it is not."""
    given: list[str] = []

    def give() -> str:
        given.append("old" if len(given) < 1 else "new")
        return given[-1]

    async with open_place(refusing("old", error(401)), api_key=give) as place:
        assert (await place.ask()).text == "new"
        assert keys_of(place.network) == ["old", "new"]
    async with open_place(answering(lambda r: error(401)), api_key=lambda: "same") as place:
        with pytest.raises(AuthenticationError):
            await place.ask()
        assert keys_of(place.network) == ["same"]


async def test_few_old_keys_are_remembered() -> None:
    """A key for every request does not make the client grow."""
    given = iter(range(1_000))
    async with open_place(answering(lambda r: chat()), api_key=lambda: f"k{next(given)}") as place:
        for _ in range(100):
            await place.ask()
        assert len(place.statistics.keys) <= 8
        assert place.statistics.models[0].limit <= 9 * 32


@pytest.mark.parametrize("bad", [None, 5, "", " ", "a\nb", "é", b"x"])
async def test_a_function_that_gives_no_key(bad: object) -> None:
    """What is no key is refused before anything is sent."""
    async with open_place(answering(lambda r: chat()), api_key=lambda: bad) as place:
        with pytest.raises(ConfigError, match="api_key"):
            await place.ask()
        assert place.network.attempts == 0
        await place.check_clean()


async def test_a_function_that_fails() -> None:
    """Its exception reaches the caller as it is, and the pool goes on."""
    fails = True

    def give() -> str:
        if fails:
            raise RuntimeError("the vault is closed")
        return "k"

    async with open_place(answering(lambda r: chat()), api_key=give) as place:
        with pytest.raises(RuntimeError, match="vault"):
            await place.ask()
        fails = False
        await place.ask()
        await place.check_clean()


# --- secrets ----------------------------------------------------------------------------------------------------------


async def test_no_key_shows(autojump_clock: trio.testing.MockClock) -> None:
    """Not in errors with all their locals, reprs, statistics or records, whichever way the keys were given."""
    canaries = ["sk-or-v1-canary-one", "sk-or-v1-canary-two"]
    records: list[object] = []
    for api_key in (canaries[0], canaries, dict.fromkeys(canaries, 1), lambda: canaries[0]):
        serve = answering(lambda r: error(401))
        limits = PoolLimits(max_connections=2)
        async with open_place(serve, api_key=api_key, pool=limits, on_attempt=records.append) as place:
            with pytest.raises(AuthenticationError) as refused:
                await place.ask()
            pool = place.pool
            seen = [shown_by(refused.value), repr(pool), repr(place.statistics), repr(records)]
            seen += [repr(vars(pool)), repr(list(pool._ring)), repr(list(pool._admission.gates.values()))]
            for canary in canaries:
                assert not any(canary in text for text in seen)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "the list of keys is empty"),
        ({}, "the list of keys is empty"),
        ({"canary-a": 0, "canary-b": 0}, "must not sum to zero"),
        ({"canary-a": -1}, "a weight must be a number of 0 or more"),
        ({"canary-a": "x"}, "a weight must be"),
        ({"canary-a": 10**400}, r"a weight must be at most 1e\+300"),
        (["canary-a", "canary-a"], "stands twice"),
        (["canary-a", " "], r"api_key\[1\]: must not be blank"),
        (["canary-a", "canary\n-b"], r"api_key\[1\]: must be printable ASCII"),
        (["canary-a", 5], "must be str or Secret"),
        (5, "api_key: must be a str"),
    ],
    ids=str,
)
async def test_keys_that_cannot_be(keys: object, message: str) -> None:
    """Each is refused when the client is opened, by name, without showing a key."""
    with pytest.raises((ConfigError, BaseExceptionGroup)) as raised:
        async with open_place(answering(lambda r: chat()), api_key=keys):
            pass
    error_ = raised.value
    while isinstance(error_, BaseExceptionGroup):
        error_ = error_.exceptions[0]
    assert isinstance(error_, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise error_
    assert "canary" not in str(error_)


async def test_a_function_is_exchanged_while_requests_wait(autojump_clock: trio.testing.MockClock) -> None:
    """Those that wait go with a key of the new settings, and every place comes back."""
    for after in (lambda: "new", ["new", "newer"]):
        go = trio.Event()
        async with open_place(held_back(go), api_key=lambda: "old", pool=PoolLimits(adaptive_from=1)) as place:
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(partial(place.ask, model="m"))
                    await trio.testing.wait_all_tasks_blocked()
                assert keys_of(place.network) == ["old"]
                place.pool.change_keys(
                    ClientConfig(api_key=after, base_url="http://localhost", pool=PoolLimits(adaptive_from=1))
                )
                go.set()
            assert await ask(place, 4, model="m") <= Counter({"new": 4, "newer": 2})
            assert "old" not in keys_of(place.network)[1:]
            assert [key.in_flight for key in place.statistics.keys] == [0] * len(place.statistics.keys)
            await place.check_clean()


async def test_keys_are_exchanged_for_a_function(autojump_clock: trio.testing.MockClock) -> None:
    """What waits without a key asks the function for one, also where the one of before does not come back."""
    go = trio.Event()

    async def hangs() -> str:
        await trio.sleep_forever()
        return ""

    async with open_place(held_back(go), api_key=["a", "b"], pool=PoolLimits(adaptive_from=1)) as place:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(partial(place.ask, model="m"))
            await trio.testing.wait_all_tasks_blocked()
            for function in (hangs, lambda: "new"):
                place.pool.change_keys(ClientConfig(api_key=function, base_url="http://localhost"))
            await trio.testing.wait_all_tasks_blocked()
            go.set()
        assert Counter(keys_of(place.network)) == {"a": 1, "b": 1, "new": 2}


async def test_the_wait_before_a_change_of_keys_counts(autojump_clock: trio.testing.MockClock) -> None:
    """Who waits in the queue until the keys change, and goes with a new one then, has waited until then."""
    go, waits = trio.Event(), []

    async def ask(place: Place) -> None:
        waits.append((await place.ask(model="m")).exchange.queue_wait_s)

    limits = PoolLimits(adaptive_from=1)
    async with (
        open_place(held_back(go), api_key=lambda: "old", pool=limits) as place,
        trio.open_nursery() as nursery,
    ):
        for _ in range(2):
            nursery.start_soon(ask, place)
        await trio.sleep(10)
        place.pool.change_keys(ClientConfig(api_key=lambda: "old", base_url="http://localhost", pool=limits))
        go.set()
    assert sorted(waits) == [0, 10]


async def test_a_key_that_waits_keeps_no_other(autojump_clock: trio.testing.MockClock) -> None:
    """With a function, the requests of one key wait for it, and those of another one go, for whatever model."""
    given = ["slow"]
    server = answering(
        lambda r: (
            error(429, headers=["Retry-After: 50"]) if key_of(r) == "slow" and trio.current_time() < 40 else chat()
        )
    )
    async with open_place(server, api_key=lambda: given[0], retry=NEVER) as place:
        with pytest.raises(RateLimitError):
            await place.ask(model="m")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(place.ask, model="m"))
            await trio.sleep(1)
            given[0] = "other"
            for model in ("m", "another"):
                await place.ask(model=model)
                assert trio.current_time() == 1
        assert trio.current_time() == 50


@pytest.mark.parametrize("count", [8, 9, 40])
async def test_limits_of_many_keys_of_a_function(autojump_clock: trio.testing.MockClock, count: int) -> None:
    """The limits are those of each key, however many a function gives in turn."""
    keys: Iterator[str] = itertools.cycle([f"k{number}" for number in range(count)])
    rates = RateLimits(requests_per_minute=1, margin=0, burst=0)
    async with open_place(answering(lambda r: chat()), api_key=lambda: next(keys), rates=rates) as place:
        for _ in range(3 * count):
            await place.ask(model="m")
        assert trio.current_time() >= 120
        # Those that have nothing to remember are forgotten in time.
        await trio.sleep(100)
        for number in range(50):
            keys = iter([f"another{number}"])
            await place.ask(model="m")
            await trio.sleep(61)
        assert len(place.statistics.keys) <= 8


async def test_the_same_of_a_models_own_rate(autojump_clock: trio.testing.MockClock) -> None:
    """A model's rate with one key is not forgotten while another key is used."""
    keys = itertools.cycle(["a", "b"])
    rates = RateLimits(models={"m": RateLimits(requests_per_minute=1, margin=0, burst=0)})
    async with open_place(answering(lambda r: chat()), api_key=lambda: next(keys), rates=rates) as place:
        for _ in range(6):
            await place.ask(model="m")
        assert trio.current_time() >= 120


@pytest.mark.parametrize("keys", ["a", ["a", "b"]])
async def test_what_is_for_no_model_waits_for_none(autojump_clock: trio.testing.MockClock, keys: object) -> None:
    """A GET goes at once while a chat is kept by its key, or by all of them."""
    go = trio.Event()
    server = held_back(go)
    async with open_place(server, api_key=keys, rates=RateLimits(max_in_flight=1)) as place:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(partial(place.ask, model="m"))
            await trio.testing.wait_all_tasks_blocked()
            assert place.statistics.queued
            with trio.fail_after(1):
                await place.ask(method="GET", model="m")
            assert place.statistics.queued
            go.set()
        await place.check_clean()


@pytest.mark.parametrize("first", ["a", "b"])
async def test_room_on_another_key_is_noticed(autojump_clock: trio.testing.MockClock, first: str) -> None:
    """A request that two keys keep for different reasons goes when either of them has room, whichever comes first."""
    taken = ApiKey(key="a", name="a", rates=RateLimits(max_in_flight=1))
    models = ApiKey(key="b", name="b", rates=RateLimits(models={"y": RateLimits(max_in_flight=1)}))
    sent: list[tuple[str, float]] = []

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            text = request.json()["q"]
            sent.append((text, trio.current_time()))
            await trio.sleep({"long": 80, "short": 10}.get(text, 0))
            await peer.send(chat())

    keys = [taken, models] if first == "a" else [models, taken]
    async with open_place(serve, api_key=keys) as place:
        async with trio.open_nursery() as nursery:
            # One place of y for each of the keys is all that there is.
            for text, model in (("long", "y"), ("short", "x" if first == "b" else "y"), ("next", "y")):
                nursery.start_soon(partial(place.ask, text, model=model))
                await trio.testing.wait_all_tasks_blocked()
        assert ("next", 10.0) in sent


async def test_a_refusal_without_a_hint_ends_no_wait(autojump_clock: trio.testing.MockClock) -> None:
    """The wait that a provider has asked for holds, whatever the replies say that were under way."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            text = request.json()["q"]
            if text == "hint":
                await peer.send(error(429, headers=["Retry-After: 50"], provider_name="P"))
            elif text == "none":
                await trio.sleep(1)
                await peer.send(error(429, provider_name="P"))
            else:
                await peer.send(chat())

    async with open_place(serve, retry=NEVER) as place:

        async def refused(text: str) -> None:
            with pytest.raises(RateLimitError):
                await place.ask(text, model="m")

        await together(partial(refused, "none"), partial(refused, "hint"))
        assert place.statistics.models[0].paused_s == 49
        await place.ask("now", model="m")
        assert trio.current_time() == 50

"""A plan of faults aims at what it says, as often as it says, and a store fails when it is told to."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal

import pytest
import trio
from trio.testing import MockClock

from gorouter_trio.errors import ConfigError, SessionConflictError
from gorouter_trio.stores import MemoryStore
from gorouter_trio.testing import (
    Cut,
    Delay,
    Drop,
    EventLog,
    FailOperation,
    FailStore,
    Fault,
    FaultyStore,
    HangStore,
    Link,
    Refuse,
    SkewClock,
    World,
    run,
)
from gorouter_trio.testing.faults import FaultPlan


def plan_of(*faults: Fault) -> FaultPlan:
    return FaultPlan(faults, rng=random.Random, log=EventLog(lambda: 0.0))


def aimed(plan: FaultPlan, *, request: int = 1, connection: int = 1, host: str = "host", now: float = 0.0) -> int:
    """At how many messages of a request and its reply the plan aims."""
    aims = plan.on_request(connection=connection, host=host, request=request, now=now)
    return sum(map(len, aims.values()))


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_a_fault_without_a_selector_takes_everything() -> None:
    """What is not named matches every request."""
    plan = plan_of(Cut())
    assert [aimed(plan, request=n, connection=n) for n in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("fault", "hit", "missed"),
    [
        (Cut(request=2), {"request": 2}, {"request": 1}),
        (Cut(connection=3), {"connection": 3}, {"connection": 4}),
        (Cut(host="a.example"), {"host": "a.example"}, {"host": "b.example"}),
        (Cut(since_s=10, until_s=20), {"now": 10}, {"now": 20}),
        (Cut(since_s=10), {"now": 11}, {"now": 9.9}),
    ],
)
def test_a_selector_is_kept(fault: Fault, hit: dict[str, Any], missed: dict[str, Any]) -> None:
    """A fault strikes what it names and leaves the rest alone."""
    assert aimed(plan_of(fault), **hit) == 1
    assert aimed(plan_of(fault), **missed) == 0


def test_times_bounds_how_often() -> None:
    """Only so many are taken, the first ones that match."""
    plan = plan_of(Cut(times=2))
    assert [aimed(plan, request=n) for n in range(1, 5)] == [1, 1, 0, 0]


def test_probability_is_kept_and_drawn_from_the_seed() -> None:
    """About as many are taken as it says, the same ones for the same seed."""
    taken = [aimed(plan, request=n) for plan in (plan_of(Cut(probability=0.3)),) for n in range(2_000)]
    assert 500 < sum(taken) < 700
    again = plan_of(Cut(probability=0.3))
    assert [aimed(again, request=n) for n in range(2_000)] == taken


def test_the_luck_of_one_fault_is_not_that_of_another() -> None:
    """A fault put behind others in a plan changes nothing of theirs."""
    alone, together = plan_of(Cut(probability=0.5)), plan_of(Cut(probability=0.5), Delay(probability=0.5, by_s=1))
    first = [aimed(alone, request=n) for n in range(200)]
    both = [aimed(together, request=n) for n in range(200)]
    assert all(b - a in {0, 1} for a, b in zip(first, both, strict=True))
    assert len(set(both)) == 3


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Cut(probability=1.5), "probability"),
        (lambda: Cut(request=0), "request"),
        (lambda: Cut(after_bytes=-1), "after_bytes"),
        (lambda: Delay(by_s=-1), "by_s"),
        (lambda: FailStore(nth=0), "nth"),
        (lambda: Refuse(times=0), "times"),
        (lambda: Cut(since_s=10, until_s=10), "until_s"),
        (lambda: Cut(how="rst"), "how"),  # type: ignore[arg-type]
        (lambda: Refuse(how="reset"), "how"),  # type: ignore[arg-type]
        (lambda: Drop(direction="up"), "direction"),  # type: ignore[arg-type]
        (lambda: FailStore(operation="save"), "operation"),  # type: ignore[arg-type]
        (lambda: HangStore(when="later"), "when"),  # type: ignore[arg-type]
        (lambda: FailStore(error=OSError("full")), "error"),  # type: ignore[arg-type]
        (lambda: FailOperation(nth=0), "nth"),
        (lambda: SkewClock(at_s=0, by_s=float("nan")), "by_s"),
    ],
)
def test_a_wrong_fault_is_refused(make: Callable[[], object], field: str) -> None:
    """A setting out of range, or a word that there is not, is named when the fault is made."""
    with pytest.raises(ConfigError, match=field):
        make()


# --- connecting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "message"), [("refused", "Connection refused"), ("unreachable", "No route to host")])
def test_connecting_is_refused(how: Literal["refused", "unreachable"], message: str) -> None:
    """The client gets the error of the system, after the time that it takes, and each attempt is in the log."""

    async def chat(world: World) -> object:
        async with world.open_client() as client:
            return (await client.chat("Hi")).call.attempts

    report = run(chat, faults=[Refuse(how=how, after_s=2, times=1)])
    assert report.value == 1  # nothing was sent the first time
    assert len(report.events("connect")) == 2
    assert report.virtual_s >= 2
    assert report.events("fault")[0].fields == {"fault": "Refuse", "connection": 1, "how": how}
    lasting = run(chat, faults=[Refuse(how=how)])
    assert message in str(lasting.error)


def test_a_silent_host_runs_into_the_deadline() -> None:
    """Nothing answers a connect: the client gives up by itself."""

    async def chat(world: World) -> None:
        async with world.open_client() as client:
            await client.chat("Hi")

    report = run(chat, faults=[Refuse(how="silent")])
    assert "connect" in str(report.error)
    assert report.virtual_s >= 40


# --- the wall clock ---------------------------------------------------------------------------------------------------


def test_the_wall_clock_steps() -> None:
    """The clock jumps where it is told to, and virtual time does not mind."""

    async def look(world: World) -> list[float]:
        seen = []
        for _ in range(4):
            seen.append(world.wall())
            await world.sleep(10)
        return seen

    report = run(look, start=1_000, faults=[SkewClock(at_s=20, by_s=-500), SkewClock(at_s=5, by_s=100)])
    assert report.value == [1_000, 1_110, 620, 630]
    assert [event.fields["by_s"] for event in report.events("fault")] == [100, -500]
    assert report.virtual_s == 40


# --- the store --------------------------------------------------------------------------------------------------------


async def _append(store: FaultyStore, *, times: int) -> list[str]:
    """Append to one session, going on from the version that the store has; tells what became of each."""
    results = []
    for _ in range(times):
        version = (await store.inside.load("k")).version
        try:
            await store.append("k", [b"entry"], expected_version=version)
        except OSError:
            results.append("failed")
        else:
            results.append("stored")
    return results


def test_a_store_takes_faults_of_stores_only() -> None:
    """What could never strike a store that is used alone is refused."""
    with pytest.raises(ConfigError, match=r"a store has those of .*: FailOperation, FailStore, HangStore"):
        FaultyStore(MemoryStore(), [Cut()])


async def test_the_nth_operation_fails_once() -> None:
    """Only the nth, and without having written anything."""
    store = FaultyStore(MemoryStore(), [FailStore(operation="append", nth=2)])
    assert await _append(store, times=4) == ["stored", "failed", "stored", "stored"]
    assert len((await store.load("k")).entries) == 3


async def test_every_fault_counts_every_operation() -> None:
    """The nth of one fault is not put off by another fault that strikes before."""
    faults: list[Fault] = [FailStore(operation="append", nth=1), FailStore(operation="append", nth=2)]
    store = FaultyStore(MemoryStore(), faults)
    assert await _append(store, times=4) == ["failed", "failed", "stored", "stored"]
    swept = FaultyStore(MemoryStore(), [FailOperation(nth=1), FailStore(operation="append", nth=2)])
    assert await _append(swept, times=4) == ["failed", "failed", "stored", "stored"]


def test_operations_count_from_the_time_of_the_fault() -> None:
    """What comes before `since_s` matches nothing and is not counted."""

    async def append(world: World) -> list[str]:
        results = []
        for _ in range(4):
            results += await _append(world.store, times=1)
            await world.sleep(50)
        return results

    faults = [FailStore(operation="append", nth=1, since_s=60)]
    assert run(append, faults=faults).value == ["stored", "stored", "failed", "stored"]


def test_the_luck_of_a_refusal_is_its_own() -> None:
    """Chance is drawn for each fault and attempt, whether or not an earlier fault of the plan strikes."""

    def struck(*faults: Fault) -> list[str]:
        rngs = {f"faults/{len(faults)}": random.Random(5)}
        plan = FaultPlan(faults, rng=lambda name: rngs.get(name) or random.Random(7), log=EventLog(lambda: 0.0))
        refusals = [plan.on_connect(connection=number, host="h", now=0.0) for number in range(1, 30)]
        return ["-" if refusal is None else refusal.how for refusal in refusals]

    chance = Refuse(probability=0.5, how="unreachable")
    alone, after = struck(chance), struck(Refuse(times=3), chance)
    assert after == ["refused"] * 3 + alone[3:]


async def test_a_sticky_fault_fails_all_from_there_on() -> None:
    """A disk that is full stays full."""
    store = FaultyStore(MemoryStore(), [FailStore(operation="append", nth=2, sticky=True)])
    assert await _append(store, times=4) == ["stored", "failed", "failed", "failed"]
    assert len((await store.load("k")).entries) == 1


async def test_a_failure_after_the_write_has_written() -> None:
    """The caller learns of an error, and the entry is there all the same: the write that is in doubt."""
    store = FaultyStore(MemoryStore(), [FailStore(operation="append", nth=1, when="after")])
    assert await _append(store, times=1) == ["failed"]
    assert len((await store.load("k")).entries) == 1
    with pytest.raises(SessionConflictError):
        await store.append("k", [b"entry"], expected_version=0)


async def test_the_error_can_be_chosen() -> None:
    """A store raises what it is told to."""
    store = FaultyStore(MemoryStore(), [FailStore(error=lambda: SessionConflictError("somebody else wrote"))])
    with pytest.raises(SessionConflictError, match="somebody else"):
        await store.load("k")


async def test_faults_can_be_for_one_session_and_operation() -> None:
    """Other keys and operations go through, and do not count."""
    store = FaultyStore(MemoryStore(), [FailStore(operation="append", key="b", nth=1)])
    assert await _append(store, times=2) == ["stored", "stored"]
    with pytest.raises(OSError, match="simulated"):
        await store.append("b", [b"entry"], expected_version=0)
    assert (await store.load("b")).entries == ()


@pytest.mark.parametrize(("when", "entries"), [("before", 0), ("after", 1)])
async def test_a_store_hangs(autojump_clock: MockClock, when: Literal["before", "after"], entries: int) -> None:
    """An operation takes its time, or never ends; a cancel gets out of it."""
    store = FaultyStore(MemoryStore(), [HangStore(operation="append", nth=1, when=when)])
    with trio.move_on_after(1_000) as scope:
        await store.append("k", [b"entry"], expected_version=0)
    assert scope.cancelled_caught
    assert len((await store.load("k")).entries) == entries
    slow = FaultyStore(MemoryStore(), [HangStore(for_s=5, when=when)])
    started_at = trio.current_time()
    assert await slow.append("k", [b"entry"], expected_version=0) == 1
    assert trio.current_time() - started_at == 5


async def test_everything_else_goes_through() -> None:
    """A store without faults is the store inside."""
    store = FaultyStore(MemoryStore())
    assert await store.append("a", [b"1"], expected_version=0) == 1
    assert await store.rewrite("a", [b"2", b"3"], expected_version=1) == 2
    assert (await store.load("a")).entries == (b"2", b"3")
    assert await store.list_keys() == ["a"]
    assert await store.delete("a")
    assert not await store.delete("a")
    await store.aclose()
    operations = [event.fields["operation"] for event in store.log.events("store")]
    assert operations == ["append", "rewrite", "load", "list_keys", "delete", "delete", "aclose"]


# --- operations -------------------------------------------------------------------------------------------------------


def test_the_nth_operation_on_the_world_fails() -> None:
    """Connects, sends, receives and store operations are numbered together; the one that fails is in the log."""

    async def ask(world: World) -> int:
        async with world.open_client() as client:
            await client.session("s").ask("Hi")
            return world.plan.operations

    operations = run(ask, link=Link(latency_s=0.1)).value
    assert operations == 6
    failed = []
    for nth in range(1, operations + 1):
        events = run(ask, faults=[FailOperation(nth=nth)]).events("fault")
        assert [event.fields["number"] for event in events] == [nth]
        failed.append(events[0].fields["operation"])
    assert failed == ["load", "append", "connect", "send", "receive", "append"]


def test_a_receive_fails_that_would_have_found_something() -> None:
    """What has arrived by then is lost with the connection."""

    async def scenario(world: World) -> None:
        async with await world.network.connect("host", 80) as stream:
            await stream.send_all(b"GET /api/v1/providers HTTP/1.1\r\nHost: host\r\n\r\n")
            await trio.sleep(1)
            await stream.receive_some()

    assert run(scenario).error is None
    report = run(scenario, faults=[FailOperation(nth=3)])
    assert isinstance(report.error, trio.BrokenResourceError)
    assert [event.fields["operation"] for event in report.events("fault")] == ["receive"]


def test_a_second_drop_brings_nothing_back() -> None:
    """Where all the rest of a message is lost, a fault that loses some of it changes nothing."""

    async def scenario(world: World) -> int:
        size = 0
        async with await world.network.connect("host", 80) as stream:
            await stream.send_all(b"GET /api/v1/providers HTTP/1.1\r\nHost: host\r\n\r\n")
            with trio.move_on_after(5):
                while True:
                    size += len(await stream.receive_some())
        return size

    assert run(scenario, faults=[Drop(after_bytes=10), Drop(after_bytes=20, size=5)]).value == 10

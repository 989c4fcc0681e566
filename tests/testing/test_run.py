"""A run is a function of its seed: the same log in every process, and everything else as it was before."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio._core._run
from busy_world import digest, run_busy_world

from gorouter_trio import ConfigError, GorouterError
from gorouter_trio.testing import Link, Refuse, ScenarioNotFinishedError, StuckError, World, proxy, run, sweep

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = Path(__file__).parents[1] / "support" / "busy_world.py"


async def _chat(world: World) -> str:
    async with world.open_client() as client:
        return (await client.chat("Hello?")).text


# --- the same again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [10, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_runs_of_one_seed_are_identical(runs: int, seed: int, record_property: Callable[[str, object], None]) -> None:
    """Every run of one seed writes the same log to the byte, whatever lies around in memory."""
    first = run_busy_world(seed)
    assert first.error is None
    assert len(first.log) > 5_000
    litter: list[object] = []
    for number in range(1, runs):
        litter.append([object() for _ in range(number * 97 % 1_000)])
        again = run_busy_world(seed)
        assert again.log == first.log
        assert (again.steps, again.virtual_s) == (first.steps, first.virtual_s)
    record_property("figure", f"{runs} runs of seed {seed} are identical: {len(first.log)} bytes, {first.steps} steps")


def test_other_processes_with_other_hash_seeds_write_the_same_log(seed: int) -> None:
    """Neither the order of a set of strings nor the addresses of objects reach the log."""
    here = digest(run_busy_world(seed).log)
    for hash_seed in ("1", "4242"):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(seed)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=50,
        )
        assert done.stdout == here


@pytest.mark.parametrize("seeds", [20, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_seeds_differ_and_all_end_well(
    seeds: int, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """Whatever a seed brings, every history is one that a provider takes, and no slot is lost."""
    logs = set()
    struck = 0
    for seed in rng.sample(range(2**32), seeds):
        report = run_busy_world(seed)
        assert report.value == [], f"seed {seed}"
        logs.add(report.log)
        struck += len(report.events("fault"))
    assert len(logs) == seeds
    assert struck > seeds
    record_property("figure", f"{seeds} seeds are valid, with {struck} faults in them")


def test_the_order_of_tasks_follows_from_the_seed() -> None:
    """Tasks that may run at the same time run in an order of the seed's, which another seed changes."""

    async def race(world: World) -> list[int]:
        finished: list[int] = []

        async def runner(number: int) -> None:
            await trio.lowlevel.checkpoint()
            finished.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(runner, number)
        return finished

    orders = [tuple(run(race, seed=seed).value) for seed in (1, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


def test_streams_of_chance_are_independent() -> None:
    """A draw more from one stream changes no draw of another, and asking again goes on where the stream was."""

    async def draw(world: World, *, more: bool) -> list[float]:
        if more:
            world.rng("new part").random()
        first = world.rng("old part").random()
        return [first, world.rng("old part").random()]

    plain, shifted = (run(partial(draw, more=more), seed=5).value for more in (False, True))
    assert plain == shifted
    assert plain[0] != plain[1]


def test_the_module_random_is_seeded_and_restored() -> None:
    """Code that draws from the module itself repeats too, and finds its own state again afterwards."""

    async def draw(_world: World) -> float:
        return random.random()

    random.seed(1)
    expected = random.random()
    random.seed(1)
    drawn = {run(draw, seed=7).value for _ in range(3)}
    assert len(drawn) == 1
    assert random.random() == expected


def test_a_run_leaves_trio_and_the_collector_as_they_were() -> None:
    """The scheduler's flag, its random source and the garbage collector are restored, after an error too."""

    async def fail(_world: World) -> None:
        assert not gc.isenabled()
        assert trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING
        raise KeyboardInterrupt

    before = trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING, trio._core._run._r.getstate()
    with pytest.raises(KeyboardInterrupt):
        run(fail)
    assert (trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING, trio._core._run._r.getstate()) == before
    assert gc.isenabled()


def test_a_trio_without_the_seams_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of trio whose scheduler cannot be seeded is named instead of giving different logs."""
    monkeypatch.delattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING")
    with pytest.raises(RuntimeError, match=f"trio {trio.__version__} has no _ALLOW_DETERMINISTIC_SCHEDULING"):
        run(_chat)


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_year_takes_no_time() -> None:
    """Virtual time passes as it is slept, the wall clock with it, from the start that was given."""

    async def sleep(world: World) -> tuple[float, float]:
        await world.sleep(365 * 86_400)
        return world.now(), world.wall()

    report = run(sleep, start=datetime(2030, 1, 1, tzinfo=UTC))
    assert report.value == (365 * 86_400, datetime(2031, 1, 1, tzinfo=UTC).timestamp())
    assert report.virtual_s == 365 * 86_400
    assert report.real_s < 5
    assert run(sleep, start=1_000.0).value[1] == 1_000 + 365 * 86_400


def test_a_start_without_a_time_zone_is_refused() -> None:
    """A naive datetime would mean another time on every machine."""
    report = run(_chat, start=datetime(2030, 1, 1))  # noqa: DTZ001 - that is the point
    assert isinstance(report.error, ValueError)


@pytest.mark.parametrize("start", [run, partial(sweep, setup=lambda _world: nullcontext())], ids=["run", "sweep"])
def test_a_setting_that_there_is_not_is_refused(start: Callable[..., object]) -> None:
    """A name that is spelt wrongly is told at once, with those that there are: its faults would strike nobody."""

    async def scenario(_world: World) -> None:
        pytest.fail("it runs")

    with pytest.raises(TypeError, match="'fault' is no setting of a world; there are start, simulator, link, faults, "):
        start(scenario, fault=[Refuse()])
    with pytest.raises(ConfigError, match=r"faults: Cut\(.* of gorouter_trio.testing.proxy would never strike"):
        start(scenario, faults=[Refuse(), proxy.Cut()])


def test_until_cuts_a_scenario_short() -> None:
    """The scenario is cancelled at that virtual time, with its cleanup; it has no value then."""
    cleaned: list[float] = []

    async def go_on(world: World) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cleaned.append(world.now())

    report = run(go_on, until_s=100)
    assert cleaned == [100]
    assert (report.error, report.is_finished, report.virtual_s) == (None, False, 100)
    with pytest.raises(ScenarioNotFinishedError, match="100 virtual seconds"):
        report.value  # noqa: B018 - raises


def test_a_scenario_in_which_nothing_can_happen_is_told_apart() -> None:
    """Tasks that wait for each other end the run at once, with the places where they stand."""

    async def wait_for_godot() -> None:
        await trio.Event().wait()

    async def deadlock(_world: World) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_godot)

    report = run(deadlock)
    assert isinstance(report.error, StuckError)
    assert "wait_for_godot" in str(report.error)
    assert report.real_s < 5


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_the_value_comes_back() -> None:
    """A scenario's result is the report's, with a log of what it took."""
    report = run(_chat, seed=3, link=Link(latency_s=0.1))
    assert report.value
    assert report.is_finished
    assert report.seed == 3
    assert report.virtual_s == pytest.approx(0.4)
    kinds = [event.kind for event in report.events()]
    assert sorted(kinds) == ["client", "client", "connect", "reply", "request", "served"]
    assert kinds[:3] == ["client", "connect", "request"]
    assert report.events("served")[0].fields["outcome"] == "completed"


def test_an_error_comes_back_as_itself() -> None:
    """What the scenario raises is the report's error, in no group, and raised again with the value."""

    async def fail(world: World) -> None:
        async with world.open_client() as client:
            await client.chat("Hi", model="no/such-model")

    report = run(fail)
    assert isinstance(report.error, GorouterError)
    with pytest.raises(GorouterError, match="not a valid model"):
        report.value  # noqa: B018 - raises


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_exits_are_not_contained(kind: type[BaseException]) -> None:
    """What is no `Exception` ends the run and leaves as itself."""

    async def leave(world: World) -> None:
        async with world.open_client():
            raise kind

    with pytest.raises(kind):
        run(leave)


async def test_a_run_does_not_start_inside_another() -> None:
    """trio's own refusal is what comes out, and nothing is left changed."""
    before = trio._core._run._r.getstate()
    with pytest.raises(RuntimeError, match="inside"):
        run(_chat)
    assert trio._core._run._r.getstate() == before

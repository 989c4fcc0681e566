"""Sweeps: the same scenario again and again, each time struck at another step, and looked over afterwards.

Theory of operation. A world repeats itself exactly, so the steps of a scenario can be numbered: it is run once to count
them, and then once for each step, with a cancel, an exception or a failing operation at that step and nowhere before.
A trio instrument counts and strikes; nothing of what is tested is changed. Each run has three parts: `setup` opens what
the scenario needs (a client, by default), the scenario is struck, and the world is looked over while what `setup`
opened still stands, and again when it is closed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, cast, final

import trio
import trio.testing
from msgspec import Struct

from .._contain import contain
from ._scheduler import interrupt_task, was_cancelled
from .faults import FailOperation
from .history import check_history
from .run import run
from .world import World, WorldSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from types import TracebackType
    from typing import Unpack

    from .._inspect import ClientSnapshot
    from ..client import Client
    from ..pool.budget import AccountStatistics

__all__ = [
    "Check",
    "Setup",
    "Steps",
    "SweepFailure",
    "SweepReport",
    "check_sent_once",
    "sweep",
    "sweep_io",
]

Check: TypeAlias = Callable[[World], Awaitable[None] | None]
"""Looks a world over after a strike; raises what it finds, an `AssertionError` as a rule."""

Setup: TypeAlias = Callable[[World], AbstractAsyncContextManager[object]]
"""Opens what a scenario needs, as a context manager, `contextlib.nullcontext` for nothing."""

Steps: TypeAlias = Literal["all", "scenario"]
"""Which steps are struck at: those of every task while the scenario runs, or those of its own task only."""

_LOOKS: Final = 100
_SETTLE_S: Final = 5.0
# All lookups of the cost of a lost answer, by default, each as late and as long as it may be.
_SEARCH_S: Final = 900.0
# A server goes on with a whole reply that nobody waits for, as slow as its model is.
_FAR_S: Final = 86_400.0
_MOST_BUDGETS: Final = 10_000
# What a scenario may leave to the client that it was given: idle workers and sessions.
_LASTING: Final = ("_Worker.run", "SessionActor.run")
_UNTIL_S: Final = 7 * 86_400.0


class SweepFailure(Struct, frozen=True):
    """What was wrong after the strike at step `step` of the world with this seed; step 0 is the run without one."""

    step: int
    seed: int
    problem: str

    def __str__(self) -> str:
        return f"step {self.step} (seed {self.seed}): {self.problem}"


class SweepReport(Struct, frozen=True, kw_only=True):
    """What a sweep found: `steps` that there are, `runs` that were made, and the failures in the order of the steps."""

    seed: int
    steps: int
    runs: int
    failures: tuple[SweepFailure, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing was wrong after any strike."""
        return not self.failures

    def raise_failures(self) -> None:
        """Raise `AssertionError` with the failures, if there are any."""
        if self.failures:
            shown = "\n".join(str(failure) for failure in self.failures[:10])
            more = f"\nand {len(self.failures) - 10} more" if len(self.failures) > 10 else ""
            raise AssertionError(f"{len(self.failures)} failures in {self.steps} steps:\n{shown}{more}")


def sweep(
    scenario: Callable[[World], Awaitable[object]],
    *,
    check: Check | Sequence[Check] = (),
    seed: int = 0,
    error: Callable[[], BaseException] | None = None,
    sticky: bool = False,
    at: Steps = "all",
    setup: Setup | None = None,
    allow: tuple[type[Exception], ...] = (),
    **settings: Unpack[WorldSettings],
) -> SweepReport:
    """Cancel `scenario` at each of its steps, or raise `error()` there, and look the world over each time.

    `setup(world)` is entered before, and left after the first look; by default it opens `world.client`. `check` is
    called while it is open, after these checks: as many requests in flight as before, of each model and key too, none
    queued, no more money set aside in any budget, no connection open but the pool's idle ones, no tool call and no task
    left, what sessions would send next is valid, as was everything they sent. When it is closed: no connection, task,
    thread or file descriptor more than before. The far end of a connection has a virtual day to end what it does, and
    is not looked at where it cannot know of the close. Money is waited for while the cost of a lost answer is looked
    up: virtual minutes, at most.

    A cancelled scenario must end cancelled: returning, or raising anything but `allow`, is a failure. An `error` is
    raised where a cancel could arrive, in the scenario's own task, once, or with `sticky` each time from there on; what
    comes out must be that error, or `allow`.

    The report has the failures; nothing is raised for them, but `TypeError` for an `error` that makes no exception.
    Takes about as many runs as there are steps; `at` says which steps are struck at.
    """
    if error is not None:
        _check_error(error)
    inquiry = _Inquiry(scenario, setup=setup, check=check, allow=allow)
    first = inquiry.play(_Strike(at=at), seed=seed, settings=settings)
    failures = [SweepFailure(0, seed, problem) for problem in first.problems]
    steps = 0 if failures else first.strike.steps
    for step in range(1, steps + 1):
        played = inquiry.play(_Strike(at=at, step=step, error=error, sticky=sticky), seed=seed, settings=settings)
        failures += [SweepFailure(step, seed, problem) for problem in played.problems]
    return SweepReport(seed=seed, steps=steps, runs=steps + 1, failures=tuple(failures))


def sweep_io(
    scenario: Callable[[World], Awaitable[object]],
    *,
    check: Check | Sequence[Check] = (),
    seed: int = 0,
    sticky: bool = False,
    setup: Setup | None = None,
    allow: tuple[type[Exception], ...] = (),
    **settings: Unpack[WorldSettings],
) -> SweepReport:
    """Fail each operation on the outside world that `scenario` makes: connects, sends, receives, and the store's.

    One operation fails a run, or with `sticky` all from there on. `setup` and `check` are as in `sweep`. What the
    scenario raises is a failure unless it is one of `allow`; it may well return, after a retry.
    """
    inquiry = _Inquiry(scenario, setup=setup, check=check, allow=allow)
    first = inquiry.play(_Strike(), seed=seed, settings=settings)
    failures = [SweepFailure(0, seed, problem) for problem in first.problems]
    numbers = range(0) if failures else first.operations
    for step, number in enumerate(numbers, start=1):
        faults = (*settings.get("faults", ()), FailOperation(nth=number, sticky=sticky))
        struck = cast("WorldSettings", {**settings, "faults": faults})
        played = inquiry.play(_Strike(), seed=seed, settings=struck)
        failures += [SweepFailure(step, seed, problem) for problem in played.problems]
    return SweepReport(seed=seed, steps=len(numbers), runs=len(numbers) + 1, failures=tuple(failures))


def check_sent_once(world: World) -> None:
    """A check for scenarios without faults, in which no two requests are equal on purpose: none arrived twice."""
    bodies = world.requests()
    twice = len(bodies) - len(set(bodies))
    if twice:
        raise AssertionError(f"{twice} of {len(bodies)} chat requests were sent twice")


def _check_error(make: Callable[[], BaseException]) -> None:
    """Called once before the first run: trio passes over what an instrument raises."""
    made: object = make()
    if not isinstance(made, BaseException):
        raise TypeError(f"error: {make!r} makes no exception, but {made!r}")


@asynccontextmanager
async def _open_client(world: World) -> AsyncIterator[None]:
    async with world.open_client():
        yield


@final
class _Strike(trio.abc.Instrument):
    """Counts steps from `begin` to `end`, and strikes at one of them."""

    def __init__(
        self,
        *,
        at: Steps = "scenario",
        step: int | None = None,
        error: Callable[[], BaseException] | None = None,
        sticky: bool = False,
    ) -> None:
        self.steps = 0
        self.scope = trio.CancelScope()
        self.was_cancelled = False
        self.raised: list[BaseException] = []
        self._at = at
        self._step = step
        self._make_error = error
        self._sticky = sticky
        self._task: trio.lowlevel.Task | None = None

    @property
    def is_missed(self) -> bool:
        """Whether there is a step to strike at that was not reached."""
        return self._step is not None and self.steps < self._step

    def begin(self) -> None:
        """Count from now on; the current task is the scenario's, and what it does before its first wait is step 1."""
        self._task = trio.lowlevel.current_task()
        trio.lowlevel.add_instrument(self)
        self._count()

    def end(self) -> None:
        """Count and strike no more."""
        trio.lowlevel.remove_instrument(self)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Called by trio."""
        is_own = task is self._task
        if self._at == "all" or is_own:
            self._count()
        if is_own and self.scope.cancel_called and was_cancelled(task, within=self.scope):
            self.was_cancelled = True

    def after_task_step(self, _task: trio.lowlevel.Task) -> None:
        """Called by trio."""
        if self._make_error is None or self._step is None or self.is_missed or (self.raised and not self._sticky):
            return
        error = self._make_error()
        if self._task is not None and interrupt_task(self._task, error, within=self.scope):
            self.raised.append(error)

    def _count(self) -> None:
        self.steps += 1
        if self.steps == self._step and self._make_error is None:
            self.scope.cancel()

    def has_raised(self, error: BaseException) -> bool:
        """Whether this is what was raised here, alone or in groups."""
        if isinstance(error, BaseExceptionGroup):
            return all(self.has_raised(inner) for inner in error.exceptions)
        return any(error is raised for raised in self.raised)


@final
class _Landing:
    """Catches what a strike has raised, and nothing else."""

    def __init__(self, strike: _Strike) -> None:
        self._strike = strike
        self.has_caught = False

    def __enter__(self) -> _Landing:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: TracebackType | None) -> bool:
        self.has_caught = exc is not None and self._strike.has_raised(exc)
        return self.has_caught


@final
class _Inquiry:
    """A scenario and how it is looked over."""

    def __init__(
        self,
        scenario: Callable[[World], Awaitable[object]],
        *,
        setup: Setup | None,
        check: Check | Sequence[Check],
        allow: tuple[type[Exception], ...],
    ) -> None:
        self.scenario = scenario
        self.setup = setup or _open_client
        self.checks: Sequence[Check] = (check,) if callable(check) else tuple(check)
        self.allow = allow

    def play(self, strike: _Strike, *, seed: int, settings: WorldSettings) -> _Visit:
        """Run once and look over everything."""
        files, threads = _open_files(), _threads()
        visit = _Visit(self, strike)
        report = run(visit.play, seed=seed, until_s=_UNTIL_S, **settings)
        if report.error is not None:
            visit.problems.append(_shown(report.error))
        elif not report.is_finished:
            visit.problems.append("the world did not come to rest within a week of virtual time")
        visit.problems += [f"a file is left open: {what}" for what in _open_files() if what not in files]
        visit.problems += [f"a thread is left: {name}" for name in _threads() if name not in threads]
        return visit


@final
class _Visit:
    """One run of a scenario, from the inside."""

    def __init__(self, inquiry: _Inquiry, strike: _Strike) -> None:
        self.strike = strike
        self.problems: list[str] = []
        self.operations = range(0)
        self._inquiry = inquiry

    async def play(self, world: World) -> None:
        """Set up, strike, look, close, and look again."""
        tasks = _tasks(world)
        async with self._inquiry.setup(world):
            await self._play(world)
        await _settle(lambda: _left_over(world, tasks))
        await _settle(lambda: _served_on(world), within_s=_FAR_S)
        self.problems += _left_over(world, tasks)

    async def _play(self, world: World) -> None:
        await trio.testing.wait_all_tasks_blocked()
        before, operations = _Stand(world), world.plan.operations
        await self._run_scenario(world)
        self.operations = range(operations + 1, world.plan.operations + 1)
        world.plan.stop_failing()
        await _settle(lambda: _unrest(world, before))
        await _find_costs(world, before)
        self.problems += _unrest(world, before)
        self.problems += await _invalid(world)
        for check in self._inquiry.checks:
            await contain(partial(_call, check, world), report=self._report)

    async def _run_scenario(self, world: World) -> None:
        strike = self.strike
        endings: list[Exception] = []
        landing = _Landing(strike)
        returned = False
        strike.begin()
        try:
            with strike.scope, landing:
                returned = await contain(partial(self._scenario_returns, world), report=endings.append) is True
        finally:
            strike.end()
        self._judge(returned=returned, ending=endings[0] if endings else None)

    async def _scenario_returns(self, world: World) -> bool:
        await self._inquiry.scenario(world)
        return True

    def _judge(self, *, returned: bool, ending: Exception | None) -> None:
        strike = self.strike
        if strike.is_missed:
            self.problems.append("the step was not reached: the scenario does not repeat itself")
        if returned and strike.was_cancelled:
            self.problems.append("the scenario swallowed its cancel and returned")
        if returned and strike.raised:
            self.problems.append(f"the scenario swallowed {_shown(strike.raised[0])} and returned")
        if ending is not None and not (isinstance(ending, self._inquiry.allow) or strike.has_raised(ending)):
            self.problems.append(f"the scenario raised {_shown(ending)}")

    def _report(self, error: Exception) -> None:
        self.problems.append(_shown(error))


# Looking


async def _settle(find: Callable[[], list[str]], *, within_s: float = _SETTLE_S) -> None:
    """Give what ends by itself a little time for it."""
    for _ in range(_LOOKS):
        if not find():
            return
        await trio.sleep(within_s / _LOOKS)


async def _find_costs(world: World, before: _Stand) -> None:
    """What lost answers may have cost is set aside until that is known, or is given up."""
    await _settle(lambda: _more_held(world, before) if _is_searching(world) else [], within_s=_SEARCH_S)


def _is_searching(world: World) -> bool:
    return any(client.inspect(sessions=0).ledger.reconciling for client in world.clients)


@final
class _Stand:
    """How things stood before a scenario: what its clients had under way and had set aside, and the tasks."""

    def __init__(self, world: World) -> None:
        self.tasks = _tasks(world)
        self.under_way = {client: _under_way(client.inspect(sessions=0)) for client in world.clients}
        self.held = {client: _held(client) for client in world.clients}


def _unrest(world: World, before: _Stand) -> list[str]:
    """What is not as it was, while clients are open."""
    found = []
    idle = 0
    for client in world.clients:
        snapshot = client.inspect(sessions=0)
        pool = snapshot.pool
        idle += pool.connections
        found += _changes(_under_way(snapshot), before.under_way.get(client, {}))
        if queued := pool.queued + pool.waiting:
            found.append(f"{queued} requests are queued")
    found += _more_held(world, before)
    if (connections := world.network.statistics().open) != idle:
        found.append(f"{connections} connections are open, {idle} of them in a pool")
    lost = [task.name for task in _tasks(world) - before.tasks if not task.name.endswith(_LASTING)]
    return found + [f"a task is left: {name}" for name in sorted(lost)]


def _under_way(snapshot: ClientSnapshot) -> dict[str, int]:
    """How many of what has begun and not ended."""
    pool = snapshot.pool
    return {
        "pool slots are taken": pool.in_flight,
        **{f"requests of model {model.name!r} are in flight": model.in_flight for model in pool.models},
        **{f"requests of key {key.name!r} are in flight": key.in_flight for key in pool.keys},
        "tool calls are running": snapshot.tools.running,
    }


def _changes(now: Mapping[str, int], before: Mapping[str, int]) -> list[str]:
    counts = {what: (now.get(what, 0), before.get(what, 0)) for what in (*now, *before)}
    return [f"{count} {what}, {old} were before" for what, (count, old) in counts.items() if count != old]


def _held(client: Client) -> dict[str, Decimal]:
    """What is set aside for requests whose cost is not known yet."""
    budget = client.budget()
    accounts = (budget.client, *client.budgets(most=_MOST_BUDGETS))
    usd = {f"USD of the budget of {_owner(account)}": account.held_usd for account in accounts}
    return {"reservations": Decimal(budget.open_reservations), **usd}


def _owner(account: AccountStatistics) -> str:
    return f"{account.kind} {account.name!r}" if account.name else f"the {account.kind}"


def _more_held(world: World, before: _Stand) -> list[str]:
    """Less than before is as good: what was held then may have been settled since."""
    found = []
    for client in world.clients:
        old = before.held.get(client, {})
        more = [(what, count) for what, count in _held(client).items() if count > old.get(what, 0)]
        found += [f"{count} {what} are held, {old.get(what, 0)} were before" for what, count in more]
    return found


def _left_over(world: World, tasks: set[trio.lowlevel.Task]) -> list[str]:
    """What should have gone with what `setup` opened."""
    lost = sorted(task.name for task in _tasks(world) - tasks)
    found = [f"a task is left after the close: {name}" for name in lost]
    if connections := world.network.statistics().open:
        found.append(f"{connections} connections are left after the close")
    return found + _served_on(world)


def _served_on(world: World) -> list[str]:
    lingering = world.network.lingering
    return [f"{lingering} connections are served on, after the server has heard of their end"] if lingering else []


async def _invalid(world: World) -> list[str]:
    """Histories that a provider would refuse, and turns that have no end."""
    found = [f"a provider would refuse a request: {problem}" for problem in world.invalid_histories]
    for key, body in (await world.next_requests()).items():
        found += [f"session {key!r} would send what a provider refuses: {p}" for p in check_history(body)]
    if not world.store.struck:  # a turn whose end could not be written has none, and is found by the next load
        found += [f"session {key!r} has a turn without an end" for key in world.store.open_turns]
    return found


async def _call(check: Check, world: World) -> None:
    result = check(world)
    if result is not None:
        await result


def _tasks(world: World) -> set[trio.lowlevel.Task]:
    """All tasks, trio's own among them, but those of the far end of the world's connections."""
    found: set[trio.lowlevel.Task] = set()
    root = trio.lowlevel.current_root_task()
    waiting = [] if root is None else [root]
    while waiting:
        task = waiting.pop()
        found.add(task)
        near = [nursery for nursery in task.child_nurseries if not world.is_far(nursery)]
        waiting += [child for nursery in near for child in nursery.child_tasks]
    return found


def _threads() -> list[str]:
    """The threads but those that trio keeps for later."""
    return [thread.name for thread in threading.enumerate() if not thread.name.startswith("Trio thread")]


def _open_files() -> list[str]:
    """The open descriptors, as far as the system tells: each with its number and what it is."""
    directory = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    if not os.path.isdir(directory):
        return []
    found = []
    for name in sorted(os.listdir(directory)):
        with suppress(OSError):  # the descriptor of this very listing
            found.append(f"{name} {os.readlink(f'{directory}/{name}')}")
    return found


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

"""Running a scenario in virtual time: from a seed to a value and a log, the same ones every time."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final, Generic, TypeVar, cast, final

import trio
import trio.testing
from msgspec import Struct

from .._contain import contain
from ._scheduler import StepCounter, deterministic_run
from .log import LogEvent, read_log
from .world import World, check_settings, open_world, unwrapped

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from typing import Unpack

    from .world import WorldSettings

__all__ = ["RunReport", "ScenarioNotFinishedError", "StuckError", "run"]

T = TypeVar("T")

_HORIZON_S: Final = 10 * 365 * 86_400.0
_SHOWN_TASKS: Final = 20
_SHOWN_FRAMES: Final = 3


class StuckError(AssertionError):
    """Nothing can happen any more: every task waits for another. The message tells where each of them stands."""


class ScenarioNotFinishedError(AssertionError):
    """The value of a run was asked for that `until_s` has cut short."""


class RunReport(Struct, Generic[T], frozen=True, kw_only=True):
    """What became of a run.

    `error` is what the scenario raised, or a server of its world; None when it returned, or was cut short by `until_s`.
    `log` is the event log: equal bytes mean equal runs. `virtual_s` is the time that passed in the world, `real_s` the
    time that it took, `steps` the steps of all tasks.
    """

    seed: int
    error: Exception | None
    is_finished: bool
    """Whether the scenario returned."""
    log: bytes
    virtual_s: float
    real_s: float
    steps: int
    result: T | None
    """What the scenario returned; `value` is the same and raises where there is none."""

    @property
    def value(self) -> T:
        """What the scenario returned.

        Raises its error where it has raised one, `ScenarioNotFinishedError` where it was cut short.
        """
        if self.error is not None:
            raise self.error
        if not self.is_finished:
            raise ScenarioNotFinishedError(f"the scenario was cut short after {self.virtual_s:g} virtual seconds")
        return cast("T", self.result)

    def events(self, kind: str | None = None) -> list[LogEvent]:
        """The events of the log, or those of one kind."""
        return [event for event in read_log(self.log) if kind is None or event.kind == kind]


def run(
    scenario: Callable[[World], Awaitable[T]],
    *,
    seed: int = 0,
    until_s: float | None = None,
    **settings: Unpack[WorldSettings],
) -> RunReport[T]:
    """Run `async def scenario(world)` in virtual time, in a world made from `seed`; see `WorldSettings` for the rest.

    Time jumps to the next thing that is due whenever nothing else can run, so a day takes seconds. Everything that is
    left to chance follows from the seed: the order in which tasks run, the latency of the network, the replies, ids,
    jitter, and the module `random`. So the same seed and scenario give the same log to the byte, in another process and
    with another hash seed too; what is not in the hands of a world is not: threads, real sockets, the real clock,
    `uuid`, the order of a set.

    An `Exception` of the scenario is in the report; others, such as `KeyboardInterrupt`, are raised. After `until_s`
    virtual seconds the scenario is cancelled. Without it, one in which nothing can happen any more ends with
    `StuckError`, and so does one that takes longer than ten years.
    Not to be called inside a trio run, nor while another thread runs one. Raises `RuntimeError` for a version of trio
    whose scheduler cannot be seeded, `TypeError` for a setting that there is not, and `ConfigError` for a fault that
    would never strike.
    """
    check_settings(settings)
    steps = StepCounter()
    playing = _Run(scenario, seed=seed, until_s=until_s, settings=settings)
    started_at = time.perf_counter()
    with deterministic_run(str(seed)):
        trio.run(playing.play, clock=trio.testing.MockClock(autojump_threshold=0), instruments=[steps])
    return playing.report(real_s=time.perf_counter() - started_at, steps=steps.steps)


@final
class _Run(Generic[T]):
    """One run and what comes of it."""

    def __init__(
        self, scenario: Callable[[World], Awaitable[T]], *, seed: int, until_s: float | None, settings: WorldSettings
    ) -> None:
        self._scenario = scenario
        self._seed = seed
        self._until_s = until_s
        self._settings = settings
        self._errors: list[Exception] = []
        self._results: list[T] = []
        self._log = b""
        self._virtual_s = 0.0

    async def play(self) -> None:
        await contain(self._play, report=self._errors.append)

    async def _play(self) -> None:
        with unwrapped():
            async with open_world(seed=self._seed, **self._settings) as world:
                try:
                    await self._play_in(world)
                finally:
                    self._virtual_s = world.now()
                    self._log = world.log.data

    async def _play_in(self, world: World) -> None:
        with unwrapped():
            async with trio.open_nursery() as nursery:
                if self._until_s is None:
                    nursery.start_soon(_find_stuck, nursery)
                until_s = math.inf if self._until_s is None else self._until_s
                with trio.CancelScope(deadline=trio.current_time() + until_s):
                    self._results.append(await self._scenario(world))
                nursery.cancel_scope.cancel()

    def report(self, *, real_s: float, steps: int) -> RunReport[T]:
        return RunReport(
            seed=self._seed,
            error=self._errors[0] if self._errors else None,
            is_finished=bool(self._results) and not self._errors,
            log=self._log,
            virtual_s=self._virtual_s,
            real_s=real_s,
            steps=steps,
            result=self._results[0] if self._results else None,
        )


async def _find_stuck(nursery: trio.Nursery) -> None:
    """Time jumps to where something is due. Where nothing is, it comes to this, and the run fails."""
    await trio.sleep(_HORIZON_S)
    places = _whereabouts(nursery.parent_task)
    raise StuckError(f"still running after ten years: nothing can happen any more; where the tasks stand:\n{places}")


def _whereabouts(task: trio.lowlevel.Task) -> str:
    lines = [_standing(found) for found in _family(task)]
    more = len(lines) - _SHOWN_TASKS
    return "\n".join(lines[:_SHOWN_TASKS] + ([f"  and {more} more"] if more > 0 else []))


def _family(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    yield task
    for nursery in task.child_nurseries:
        for child in sorted(nursery.child_tasks, key=lambda child: child.name):
            yield from _family(child)


def _standing(task: trio.lowlevel.Task) -> str:
    """The name of a task and the last places of its stack that are not trio's."""
    frames = [(frame.f_code, line) for frame, line in task.iter_await_frames()]
    own = [place for place in frames if "/trio/" not in place[0].co_filename.replace("\\", "/")]
    return f"  {task.name}: {' > '.join(_places(own[-_SHOWN_FRAMES:])) or 'in trio'}"


def _places(frames: Sequence[tuple[object, int]]) -> list[str]:
    return [
        f"{getattr(code, 'co_qualname', '?')} ({str(getattr(code, 'co_filename', '?')).rpartition('/')[2]}:{line})"
        for code, line in frames
    ]

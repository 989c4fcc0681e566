"""The pytest plugin: tests that run inside a world, in virtual time.

An async test that takes `gorouter_world` runs in one, with or without pytest-trio; a plain test takes `gorouter_run`::

    async def test_greeting(gorouter_world):
        gorouter_world.serve(ScriptedModel(["Hello, Ada."]))
        async with gorouter_world.open_client() as client:
            assert await greet(client, "Ada") == "Hello, Ada."

    @pytest.mark.gorouter(link=Link(latency_s=0.2), faults=[Cut(probability=0.1)])
    def test_a_day(gorouter_run):
        assert gorouter_run(a_day, until_s=86_400).value == 0

The seed is `gorouter_seed`: 0, unless `--gorouter-seed` says another one, or `random`. `@pytest.mark.gorouter(...)`
gives the settings of `run`. When such a test fails, the end of the world's log is in the report.

The world is there while the test runs: a fixture that takes `gorouter_world` can hand it on, and not use it yet.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import TYPE_CHECKING, Protocol, TypeVar, cast, final

import pytest

from .run import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from typing import Unpack

    from .run import RunReport
    from .world import World, WorldSettings

__all__ = [
    "GorouterRun",
    "gorouter_run",
    "gorouter_seed",
    "gorouter_world",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_configure_node",
    "pytest_pyfunc_call",
    "pytest_report_header",
    "pytest_runtest_makereport",
]

T = TypeVar("T")

_SHOWN_LINES = 40
_SHOWN = pytest.StashKey[list[tuple[str, str]]]()
_SEED_OF_NODE = "gorouter_seed"


class GorouterRun(Protocol):
    """`run` with the test's seed, and with the settings of its marks."""

    def __call__(
        self,
        scenario: Callable[[World], Awaitable[T]],
        *,
        until_s: float | None = None,
        **settings: Unpack[WorldSettings],
    ) -> RunReport[T]: ...


class _HypothesisTest(Protocol):
    inner_test: Callable[..., object]


class _Node(Protocol):
    """A worker of pytest-xdist, as the process that starts it sees it."""

    config: pytest.Config
    workerinput: dict[str, object]


@final
class _StandIn:
    """What fixtures get for a world: nothing before the test, and while it runs, its world."""

    def __init__(self) -> None:
        self.world: World | None = None

    def __repr__(self) -> str:
        return f"<gorouter_world: {'there is none outside the test' if self.world is None else self.world}>"

    def __getattr__(self, name: str) -> object:
        if self.world is not None:
            return getattr(self.world, name)
        raise AttributeError(
            f"gorouter_world.{name}: the world is there while the test runs, not yet in its fixtures; set it up in the "
            "test, or with a function that the test calls"
        )


def _seed(text: str) -> int:
    return int.from_bytes(os.urandom(4)) if text == "random" else int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Called by pytest."""
    group = parser.getgroup("gorouter_trio")
    group.addoption(
        "--gorouter-seed",
        type=_seed,
        default=None,
        metavar="N",
        help="seed of the worlds that tests run in: a number, or 'random' for a new one (default: 0)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest."""
    config.addinivalue_line(
        "markers", "gorouter(**settings): settings of the world that the test runs in, as gorouter_trio.testing.run has"
    )
    workerinput = cast("dict[str, object]", getattr(config, "workerinput", {}))
    if _SEED_OF_NODE in workerinput:
        config.option.gorouter_seed = workerinput[_SEED_OF_NODE]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: _Node) -> None:
    """Called by pytest-xdist: its workers take the seed that was drawn here, and draw none of their own."""
    node.workerinput[_SEED_OF_NODE] = node.config.option.gorouter_seed


def pytest_report_header(config: pytest.Config) -> str | None:
    """Called by pytest: the seed, where one was asked for."""
    seed = config.option.gorouter_seed
    return None if seed is None else f"gorouter seed: {seed} (repeat this run with --gorouter-seed={seed})"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Called by pytest: async tests with a world are made plain ones that run it, before other plugins look at them."""
    for item in items:
        if isinstance(item, pytest.Function) and "gorouter_world" in item.fixturenames:
            inner = cast("_HypothesisTest | None", getattr(item.obj, "hypothesis", None))
            if inner is not None and inspect.iscoroutinefunction(inner.inner_test):
                inner.inner_test = _in_world(item, inner.inner_test)
            elif inspect.iscoroutinefunction(item.obj):
                item.obj = _in_world(item, item.obj)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Called by pytest: what hypothesis runs is one function for all parameters of a test, whose marks may differ."""
    inner = cast("_HypothesisTest | None", getattr(pyfuncitem.obj, "hypothesis", None))
    if inner is not None and getattr(inner.inner_test, "runs_in_world", False):
        inner.inner_test = _in_world(pyfuncitem, inspect.unwrap(inner.inner_test, stop=inspect.iscoroutinefunction))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> None:
    """Called by pytest: what is to be shown of worlds goes into the report."""
    shown = item.stash.get(_SHOWN, [])
    for title, text in shown:
        item.add_report_section("call", title, text)
    shown.clear()


@pytest.fixture
def gorouter_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this test's world."""
    return request.config.option.gorouter_seed or 0


@pytest.fixture
def gorouter_run(request: pytest.FixtureRequest, gorouter_seed: int) -> GorouterRun:
    """`gorouter_trio.testing.run` with the test's seed and the settings of its marks; for tests that are not async."""

    def run_here(
        scenario: Callable[[World], Awaitable[T]], *, until_s: float | None = None, **settings: Unpack[WorldSettings]
    ) -> RunReport[T]:
        arguments = {**_settings(request.node.iter_markers("gorouter")), **settings}
        if until_s is not None:
            arguments["until_s"] = until_s
        return _run(request.node, scenario, seed=gorouter_seed, settings=arguments)

    return run_here


@pytest.fixture
def gorouter_world(request: pytest.FixtureRequest, gorouter_seed: int) -> World:
    """The world that the async test runs in."""
    if not getattr(request.function, "runs_in_world", False) and not hasattr(request.function, "hypothesis"):
        pytest.fail("gorouter_world is for async tests; a test that is not takes gorouter_run", pytrace=False)
    return cast("World", _StandIn())


def _in_world(item: pytest.Function, test: Callable[..., Awaitable[object]]) -> Callable[..., None]:
    """`test` as a plain function, which runs it in a world of the seed that its fixtures have."""

    @functools.wraps(test)
    def run_test(*own: object, **arguments: object) -> None:
        async def scenario(world: World) -> None:
            stand_in = cast("_StandIn", item.funcargs["gorouter_world"])
            # A test that has it through a fixture only does not name it.
            named = {"gorouter_world": world} if "gorouter_world" in arguments else {}
            stand_in.world = world
            try:
                await test(*own, **{**arguments, **named})
            finally:
                stand_in.world = None

        settings = _settings(item.iter_markers("gorouter"))
        report = _run(item, scenario, seed=cast("int", item.funcargs["gorouter_seed"]), settings=settings)
        report.value  # noqa: B018 - raises what the test has raised

    run_test.runs_in_world = True  # type: ignore[attr-defined]  # a mark for the fixture
    return run_test


def _run(
    item: pytest.Item, scenario: Callable[[World], Awaitable[T]], *, seed: int, settings: dict[str, object]
) -> RunReport[T]:
    """Run, and show the end of the log where that does not end well."""
    ended: list[tuple[World, float]] = []

    async def watched(world: World) -> T:
        try:
            return await scenario(world)
        finally:
            ended.append((world, world.now()))

    try:
        report = run(watched, seed=seed, **settings)  # type: ignore[arg-type]  # checked by run
    except BaseException as exc:
        # So do pytest's own failures end a run, without a report.
        is_failure = not isinstance(exc, pytest.skip.Exception)
        for world, virtual_s in ended if is_failure else ():
            _show(item, world.log.data, seed=seed, virtual_s=virtual_s)
        raise
    if report.error is not None or not report.is_finished:
        _show(item, report.log, seed=seed, virtual_s=report.virtual_s)
    return report


def _settings(marks: Iterable[pytest.Mark]) -> dict[str, object]:
    """The settings of all marks, those closest to the test first."""
    found: dict[str, object] = {}
    for mark in marks:
        if mark.args:
            raise TypeError(f"@pytest.mark.gorouter takes settings by name, not {mark.args[0]!r}")
        found = {**mark.kwargs, **found}
    return found


def _show(item: pytest.Item, log: bytes, *, seed: int, virtual_s: float) -> None:
    lines = log.decode("utf-8").splitlines()[-_SHOWN_LINES:]
    repeat = f"(repeat with --gorouter-seed={seed})"
    title = f"gorouter world of seed {seed} {repeat}, after {virtual_s:g} virtual seconds"
    shown = item.stash.setdefault(_SHOWN, [])
    if hasattr(getattr(item, "obj", None), "hypothesis"):
        # Of all examples that fail, the last is the one that it reports.
        shown.clear()
    # pytest shows no section without a text.
    shown.append((title, "\n".join(lines) or "(nothing happened in it)"))

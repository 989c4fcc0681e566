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
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

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
    "pytest_report_header",
]

T = TypeVar("T")

_SHOWN_LINES = 40


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
        report = run(scenario, seed=gorouter_seed, **arguments)  # type: ignore[arg-type]  # the marks are checked by run
        _show(request.node, report)
        return report

    return run_here


@pytest.fixture
def gorouter_world(request: pytest.FixtureRequest, gorouter_seed: int) -> World:
    """The world that the async test runs in."""
    if not getattr(request.function, "runs_in_world", False) and not hasattr(request.function, "hypothesis"):
        pytest.fail("gorouter_world is for async tests; a test that is not takes gorouter_run", pytrace=False)
    # The test gets the world of its run in place of this.
    return cast("World", gorouter_seed)


def _in_world(item: pytest.Function, test: Callable[..., Awaitable[object]]) -> Callable[..., None]:
    """`test` as a plain function, which runs it in a world of the seed that it gets as its fixture."""

    @functools.wraps(test)
    def run_test(**arguments: object) -> None:
        seed = cast("int", arguments.pop("gorouter_world"))

        async def scenario(world: World) -> None:
            await test(**arguments, gorouter_world=world)

        report = run(scenario, seed=seed, **_settings(item.iter_markers("gorouter")))  # type: ignore[arg-type]  # the marks are checked by run
        _show(item, report)
        report.value  # noqa: B018 - raises what the test has raised

    run_test.runs_in_world = True  # type: ignore[attr-defined]  # a mark for the fixture
    return run_test


def _settings(marks: Iterable[pytest.Mark]) -> dict[str, object]:
    """The settings of all marks, those closest to the test first."""
    found: dict[str, object] = {}
    for mark in marks:
        if mark.args:
            raise TypeError(f"@pytest.mark.gorouter takes settings by name, not {mark.args[0]!r}")
        found = {**mark.kwargs, **found}
    return found


def _show(item: pytest.Item, report: RunReport[T]) -> None:
    if report.error is not None or not report.is_finished:
        lines = report.log.decode("utf-8").splitlines()[-_SHOWN_LINES:]
        repeat = f"(repeat with --gorouter-seed={report.seed})"
        title = f"gorouter world of seed {report.seed} {repeat}, after {report.virtual_s:g} virtual seconds"
        item.add_report_section("call", title, "\n".join(lines))

"""Containment: exceptions stop here and are reported, cancels and exits pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from gorouter_trio._contain import contain, contain_sync


async def _raise(error: BaseException) -> str:
    await trio.lowlevel.checkpoint()
    raise error


def _raise_now(error: BaseException) -> str:
    raise error


async def test_what_is_returned_is_returned() -> None:
    """Without an exception the value comes through and nothing is reported."""

    async def work() -> str:
        await trio.lowlevel.checkpoint()
        return "done"

    reported: list[Exception] = []
    assert await contain(work, report=reported.append) == "done"
    assert contain_sync(lambda: "done", report=reported.append) == "done"
    assert reported == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        ExceptionGroup("g", [ValueError("x"), ExceptionGroup("h", [OSError("y")])]),
        StopAsyncIteration(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_exceptions_are_reported_and_stop(error: Exception) -> None:
    """An exception, or a group of nothing but exceptions, goes to the report as itself, and None comes back."""
    reported: list[Exception] = []
    assert await contain(lambda: _raise(error), report=reported.append) is None
    assert contain_sync(lambda: _raise_now(error), report=reported.append) is None
    assert all(seen is error for seen in reported)
    assert len(reported) == 2


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
        BaseExceptionGroup("g", [ValueError("x"), KeyboardInterrupt()]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_exits_pass(error: BaseException) -> None:
    """What is no exception passes, also inside a group beside one, and is not reported."""
    reported: list[Exception] = []
    for call in (_contained(error, reported), _contained_sync(error, reported)):
        with pytest.raises(type(error)) as raised:
            await call()  # type: ignore[misc]  # one of two kinds of callables
        assert raised.value is error
    assert reported == []


def _contained(error: BaseException, reported: list[Exception]) -> Callable[[], object]:
    return lambda: contain(lambda: _raise(error), report=reported.append)


def _contained_sync(error: BaseException, reported: list[Exception]) -> Callable[[], object]:
    async def call() -> None:
        contain_sync(lambda: _raise_now(error), report=reported.append)

    return call


async def test_a_cancel_passes() -> None:
    """Cancelled reaches its scope: the work ends, nothing is reported, what stands after it does not run."""
    reported: list[Exception] = []
    went_on = False
    with trio.CancelScope() as scope:
        scope.cancel()
        await contain(trio.sleep_forever, report=reported.append)
        went_on = True
    assert scope.cancelled_caught
    assert (reported, went_on) == ([], False)


async def test_a_cancelled_nursery_with_a_failure_in_it_passes() -> None:
    """A group that holds a Cancelled beside an exception is not stopped: the cancel must arrive."""
    reported: list[Exception] = []

    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in cleanup")

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(fail_when_cancelled)

    with pytest.raises(BaseExceptionGroup) as raised, trio.CancelScope() as scope:
        scope.cancel()
        await contain(work, report=reported.append)
    assert reported == []
    assert raised.group_contains(ValueError, match="in cleanup")


async def test_a_report_that_raises_is_not_hidden() -> None:
    """A broken report is a mistake of the owner and shows."""

    def report(error: Exception) -> None:
        raise RuntimeError("broken report") from error

    with pytest.raises(RuntimeError, match="broken report"):
        await contain(lambda: _raise(ValueError("x")), report=report)

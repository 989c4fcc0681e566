"""The feed: what has happened comes in order, whole, and a moment later."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from gorouter_trio._feed import WAIT_S, Feed
from gorouter_trio.errors import ConfigError


def feed(errors: list[Exception] | None = None) -> Feed[int, str]:
    return Feed(lambda numbers: [str(n) for n in numbers], report=(errors if errors is not None else []).append)


async def test_many_at_a_time(autojump_clock, nursery):
    """The list goes out a moment after its first entry, or when it is full, and nothing is lost between."""
    batches: list[list[str]] = []
    mine = feed()
    mine.observe(lambda batch: batches.append(list(batch)))
    nursery.start_soon(mine.run)
    await trio.testing.wait_all_tasks_blocked()
    began = trio.current_time()
    for number in range(3):
        mine.add(number)
    assert batches == []
    await trio.sleep(WAIT_S)
    await trio.testing.wait_all_tasks_blocked()
    assert batches == [["0", "1", "2"]]
    assert trio.current_time() - began == pytest.approx(WAIT_S)
    for number in range(1_000):
        mine.add(number)
    await trio.sleep(2 * WAIT_S)
    assert [n for batch in batches[1:] for n in batch] == [str(n) for n in range(1_000)]
    assert max(map(len, batches)) <= 64
    mine.add(1_000)
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        await trio.testing.wait_all_tasks_blocked()
    assert batches[-1] == ["1000"]
    mine.add(1_001)
    assert batches[-1] == ["1001"]


def fail(_batch: Sequence[str]) -> None:
    raise ZeroDivisionError


def test_an_observer_that_raises():
    """Its error is reported, and the next one has the same list."""
    errors: list[Exception] = []
    seen: list[str] = []
    mine = feed(errors)
    mine.observe(fail)
    mine.observe(seen.extend)
    mine.add(1)
    mine.flush()
    assert seen == ["1"]
    assert [type(error) for error in errors] == [ZeroDivisionError]


def test_taking_an_observer_away():
    """It gets what there is, and nothing after that; one that comes later nothing from before."""
    first: list[str] = []
    second: list[str] = []
    mine = feed()
    mine.observe(first.extend)
    mine.add(1)
    mine.observe(second.extend)
    mine.add(2)
    assert mine.remove(first.extend)
    assert not mine.remove(first.extend)
    mine.add(3)
    mine.flush()
    assert (first, second) == (["1", "2"], ["2", "3"])


def test_no_observer():
    """What cannot be called is refused."""
    with pytest.raises(ConfigError, match="observer"):
        feed().observe(5)  # type: ignore[arg-type]  # on purpose

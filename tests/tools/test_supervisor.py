"""Rounds of calls: one outcome a call, in order, whatever tools, models, guards and listeners do."""

from __future__ import annotations

import gc
import math
import re
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from toolbox import WALL, Bench, LoggingGuard, call, open_bench, raw_call, told

import gorouter_trio as gr
from gorouter_trio.events import ToolFinished, ToolProgress, ToolStarted
from gorouter_trio.security.rules import Allow, Deny, Principal, ToolRules
from gorouter_trio.tools.turn import ToolTurn
from gorouter_trio.wire.messages import ToolCall

ADA = Principal(id="ada", tenant="t", scopes=frozenset({"x"}))


@gr.tool
async def echo(text: str = "", delay_s: float = 0.0) -> str:
    """Says it again."""
    await trio.sleep(delay_s)
    return text


@gr.tool
async def forever() -> None:
    """Does not end."""
    await trio.sleep_forever()


def turn(limits: gr.ToolLimits | None = None, **settings: Any) -> ToolTurn:
    return ToolTurn(limits=limits, **settings)


# Outcomes


async def test_success(autojump_clock: trio.testing.MockClock) -> None:
    """A result is one message and one row, with all there is to know."""
    async with open_bench(echo, include_results=True) as bench:
        (outcome,) = await bench.run(call("echo", "c1", text="hi", delay_s=2))
    assert (outcome.message.tool_call_id, outcome.message.content) == ("c1", "hi")
    row = outcome.report
    assert (row.call_id, row.name, row.status, row.text, row.result) == ("c1", "echo", "success", "hi", "hi")
    assert row.raw_arguments == '{"text": "hi", "delay_s": 2}'
    assert row.arguments == {"text": "hi", "delay_s": 2}
    assert row.is_success
    assert row.error is None
    assert row.duration_s == 2


async def test_results_are_kept_when_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    """Without `include_results` the report has no values."""
    async with open_bench(echo) as bench:
        assert (await bench.one(call("echo", text="hi"))).result is None


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        (call(""), "error_unknown", "names no tool"),
        (call("nope"), "error_not_found", "no tool called 'nope'"),
        (call("x" * 1_000_000), "error_not_found", "no tool called 'x"),
        (call("a\nb\x00"), "error_not_found", r"no tool called 'a\\nb\\x00'"),
        (raw_call("echo", "{"), "error_parsing", "not valid JSON"),
        (raw_call("echo", "[]"), "error_parsing", "must be a JSON object"),
        (raw_call("echo", '{"text":"a","text":"b"}'), "error_parsing", "name 'text' twice"),
        (raw_call("echo", '{"delay_s":NaN}'), "error_parsing", "NaN"),
        (raw_call("echo", '{"text":"\\ud800"}'), "error_parsing", "surrogate"),
        (raw_call("echo", "{" * 10_000), "error_parsing", "nested|not valid"),
        (call("echo", text=3), "error_validation", r"Expected `str`, got `int` - at `\$.text`"),
        (call("echo", other=3), "error_validation", "unknown field `other`"),
        (call("definition"), "error_not_found", "no tool called 'definition'"),
    ],
    ids=range(13),
)
async def test_bad_calls(autojump_clock: trio.testing.MockClock, asked: ToolCall, status: str, message: str) -> None:
    """What a model got wrong is told to it, and nothing is run (seed defects T5, T7, T8)."""
    definition = {"type": "function", "function": {"name": "definition"}}
    async with open_bench(echo, definition) as bench:
        row = await bench.one(asked)
    assert row.status == status
    assert len(row.text) < 1_000
    assert re.search(message, told(row))
    assert [type(event) for event in bench.events] == [ToolFinished]


@pytest.mark.parametrize("text", ["", "null", " "])
async def test_no_arguments(autojump_clock: trio.testing.MockClock, text: str) -> None:
    """Arguments that are missing or empty are none (openrouter API, tool calls)."""
    async with open_bench(echo) as bench:
        assert (await bench.one(raw_call("echo", text))).status == "success"


async def test_aliases(autojump_clock: trio.testing.MockClock) -> None:
    """A tool is found by its aliases; the report has the name that the model used."""
    async with open_bench(gr.Tool(echo.function, name="say", aliases=["speak"])) as bench:
        row = await bench.one(call("speak", text="x"))
    assert (row.name, row.status) == ("speak", "success")


async def test_ids_are_unique(autojump_clock: trio.testing.MockClock) -> None:
    """Empty ids and ids that come twice are replaced as in the messages, so that each call has its result (T7)."""
    async with open_bench(echo) as bench:
        outcomes = await bench.run(
            *(call("echo", given, text=str(n)) for n, given in enumerate(["a", "a", "", "b", ""]))
        )
    ids = [outcome.message.tool_call_id for outcome in outcomes]
    assert ids == ["a", "a_1", "call_2", "b", "call_4"]
    assert [outcome.report.text for outcome in outcomes] == list("01234")


async def test_no_calls(autojump_clock: trio.testing.MockClock) -> None:
    """A round of no calls is a checkpoint and no more."""
    async with open_bench(echo) as bench:
        with trio.testing.assert_checkpoints():
            assert await bench.run() == []


async def test_round_runs_once(autojump_clock: trio.testing.MockClock) -> None:
    """A round cannot be run again, which would run its tools again."""
    async with open_bench(echo) as bench:
        round_ = bench.round([call("echo")])
        await round_.run()
        with pytest.raises(RuntimeError, match="runs once"):
            await round_.run()


# What tools raise


class OddError(BaseException):
    def __str__(self) -> str:
        raise SystemExit("no text")


def _raise(error: BaseException) -> Callable[[], Awaitable[None]]:
    async def tool() -> None:
        raise error

    return tool


ERRORS = [
    RuntimeError("/etc/secret"),
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    StopIteration(1),
    StopAsyncIteration(),
    OddError(),
    BaseException("base"),
    MemoryError(),
    RecursionError(),
    ExceptionGroup("group", [RuntimeError("a"), ValueError("b")]),
    BaseExceptionGroup("group", [SystemExit(1), ValueError("b")]),
    trio.TooSlowError(),
    trio.BrokenResourceError(),
    type("Newline", (Exception,), {"__str__": lambda _self: "x\nERROR forged line"})(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("in_thread", [False, True])
async def test_raising_tools(error: BaseException, in_thread: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a tool raises ends its call only: the model learns that, the log and the report why (T1, T6)."""

    def sync() -> None:
        raise error

    function: Any = sync if in_thread else _raise(error)
    async with open_bench(gr.Tool(function, name="bad"), echo) as bench:
        row, fine = await bench.run(call("bad", "a"), call("echo", "b", text="fine"))
    assert row.report.status == "error_execution"
    assert told(row.report) == "the tool failed"
    assert row.report.error is not None
    assert row.report.error.type in {type(error).__name__, "RuntimeError"}
    assert "secret" not in row.report.text
    assert fine.report.text == "fine"
    entries = [record.getMessage() for record in caplog.records]
    assert len(entries) == 1
    assert entries[0].startswith("tool bad failed: ")
    assert all(line.startswith("    ") for line in entries[0].splitlines()[1:] if line)


async def test_traceback_in_the_report(autojump_clock: trio.testing.MockClock) -> None:
    """The report has the traceback, without the values of variables."""

    async def bad() -> None:
        canary = "sk-canary-" + "1" * 5
        raise RuntimeError(f"code {len(canary)}")

    async with open_bench(bad) as bench:
        row = await bench.one(call("bad"))
    assert row.error is not None
    assert row.error.message == "code 15"
    assert "raise RuntimeError" in str(row.error.details["traceback"])
    assert "sk-canary-11111" not in repr(row)


async def test_types_that_fail(autojump_clock: trio.testing.MockClock) -> None:
    """A type of a parameter that cannot be made, for a reason of its own, is a failure of the tool."""

    class Odd(msgspec.Struct):
        x: int

        def __post_init__(self) -> None:
            raise KeyError("no value, and no message for a model")

    @gr.tool
    async def odd(value: Odd) -> None: ...

    async with open_bench(odd) as bench:
        row = await bench.one(call("odd", value={"x": 1}))
        assert (row.status, told(row), row.has_run) == ("error_execution", "the tool failed", False)


async def test_tool_error(autojump_clock: trio.testing.MockClock) -> None:
    """A ToolError is for the model, its details for the report; a nursery around it changes nothing."""

    async def plain() -> None:
        raise gr.ToolError("no such city", details={"code": 7, "odd": object()})

    async def nested() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(plain)

    async with open_bench(plain, nested) as bench:
        for outcome in await bench.run(call("plain", "a"), call("nested", "b")):
            row = outcome.report
            assert row.status == "error_execution"
            assert told(row) == "no such city"
            assert row.error is not None
            assert (row.error.type, row.error.details["code"], row.error.details["odd"]) == ("ToolError", 7, "object")


@pytest.mark.parametrize("error", [gr.ToolError("no \udce9", details={"\udce9": 1}), ValueError("no \udce9")])
async def test_errors_that_name_files_can_be_stored(error: Exception, autojump_clock: trio.testing.MockClock) -> None:
    """A name of a file that is not UTF-8 ends nothing where the report of the call is written."""
    async with open_bench(gr.Tool(_raise(error), name="bad")) as bench:
        row = await bench.one(call("bad"))
    assert row.error is not None
    assert row.error.message == "no ?"
    assert "no ?" in str(row.error.details["traceback"])
    assert isinstance(error, ValueError) or row.error.details["?"] == 1
    assert msgspec.json.encode(row)


async def test_long_tool_error_is_cut(autojump_clock: trio.testing.MockClock) -> None:
    """A message for the model has the size of a result at most, in whatever characters."""
    for text in ("x" * 1_000_000, "\x01" * 1_000_000, "€" * 1_000_000, '"' * 1_000_000):
        async with open_bench(gr.Tool(_raise(gr.ToolError(text)), name="bad"), max_result_bytes=2_000) as bench:
            row = await bench.one(call("bad"))
            assert len(row.text.encode()) <= 2_000
            assert told(row)


@pytest.mark.parametrize("size", [100, 200, 400, 700, 1000])
async def test_tool_errors_in_little_room(size: int, autojump_clock: trio.testing.MockClock) -> None:
    """As much of an error is told as there is room for, all of it where that is enough."""
    texts = ["no such city", "x" * size, "\x01" * size, "€" * size, '"' * size, "\n" * size, "\ud800"]
    for text in texts:
        async with open_bench(gr.Tool(_raise(gr.ToolError(text)), name="bad", max_result_bytes=size)) as bench:
            row = await bench.one(call("bad"))
            assert len(row.text.encode()) <= size
            assert told(row)
            if text == texts[0]:
                assert told(row) == text
            if text == texts[1] and size >= 200:
                assert told(row).startswith("x" * (size - 120))


async def test_large_results(autojump_clock: trio.testing.MockClock) -> None:
    """A result is cut at its tool's size, or at that of the limits, and marked (T4)."""

    async def large() -> str:
        return "é" * 1_000_000

    tools: list[Any] = [large, gr.Tool(large, name="small", max_result_bytes=100)]
    async with open_bench(*tools, include_results=True) as bench:
        first, second = await bench.run(call("large", "a"), call("small", "b"))
    assert (first.report.is_cut, second.report.is_cut) == (True, True)
    assert len(first.report.text.encode()) in {64 * 1024, 64 * 1024 - 1}
    assert len(second.report.text.encode()) <= 100
    assert second.report.text.endswith("[cut: longer than 100 bytes]")
    assert first.report.result is None
    assert first.report.status == "success"


async def test_results_that_are_none() -> None:
    """A result that is no data is an error which the model is told about."""

    async def bad() -> object:
        return object()

    def lazy() -> object:
        return (n for n in range(3))

    unawaited = gr.Tool(lambda: forever.function(), name="unawaited")
    expected = {
        "bad": "the result cannot be written as JSON",
        "lazy": "the tool returned a generator",
        "unawaited": "the tool returned a coroutine",
    }
    async with open_bench(bad, lazy, unawaited) as bench:
        for name, message in expected.items():
            row = await bench.one(call(name))
            assert row.status == "error_execution"
            assert told(row).startswith(message)


# Time


async def _swallow() -> None:
    while True:
        with suppress(BaseException):
            await trio.sleep_forever()


async def _swallow_and_shield() -> None:
    while True:
        with trio.CancelScope(shield=True), suppress(BaseException):
            await trio.sleep_forever()


async def _shield() -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


async def _shield_in_a_task() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_shield)
        nursery.start_soon(_shield)


async def _slow_cleanup() -> None:
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(3_600)


async def _spin() -> None:
    while True:
        await trio.lowlevel.checkpoint()


HANGING = [forever.function, _swallow, _swallow_and_shield, _shield, _shield_in_a_task, _slow_cleanup]


@pytest.mark.parametrize("function", HANGING, ids=lambda function: function.__name__)
async def test_hanging_tools(autojump_clock: trio.testing.MockClock, function: Any) -> None:
    """A tool that does not end, or not let itself be ended, has its outcome in time, and is gone afterwards (T2)."""
    async with open_bench(gr.Tool(function, name="hang"), echo, timeout_s=5) as bench:
        begin = trio.current_time()
        row, fine = await bench.run(call("hang", "a"), call("echo", "b", text="fine"))
        assert trio.current_time() - begin <= 6
        assert row.report.status == "error_timeout"
        assert told(row.report) == "the tool did not end in time"
        assert fine.report.text == "fine"
        await trio.testing.wait_all_tasks_blocked()
        assert bench.supervisor.statistics().running == 0
    gc.collect()


@pytest.mark.parametrize("function", HANGING, ids=lambda function: function.__name__)
async def test_hanging_tools_alone(autojump_clock: trio.testing.MockClock, function: Any) -> None:
    """Likewise where no other call of the round ends and wakes it."""
    async with open_bench(gr.Tool(function, name="hang"), timeout_s=5) as bench:
        begin = trio.current_time()
        with trio.fail_after(10):
            row = await bench.one(call("hang"))
        assert trio.current_time() - begin <= 6
        assert row.status == "error_timeout"
        await trio.testing.wait_all_tasks_blocked()
        assert bench.supervisor.statistics().running == 0
    gc.collect()


async def test_spinning_task() -> None:
    """A task that only ever checkpoints is cancelled like any other."""
    async with open_bench(gr.Tool(_spin, name="spin", timeout_s=0.05)) as bench:
        assert (await bench.one(call("spin"))).status == "error_timeout"


async def test_late_results_count(autojump_clock: trio.testing.MockClock) -> None:
    """A tool that cleans up at its deadline and has a result all the same within the grace has succeeded."""

    async def late() -> str:
        with trio.move_on_after(math.inf, shield=True):
            await trio.sleep(5.2)
        return "late"

    async with open_bench(late, timeout_s=5) as bench:
        row = await bench.one(call("late"))
    assert (row.status, row.text, row.duration_s) == ("success", "late", 5.2)


async def test_own_timeout(autojump_clock: trio.testing.MockClock) -> None:
    """A tool's own time stands instead of that of the limits; the context knows the deadline."""
    seen: list[tuple[float, float]] = []

    async def wait(ctx: gr.ToolContext) -> None:
        seen.append((ctx.deadline - trio.current_time(), ctx.remaining_s))
        await trio.sleep_forever()

    async with open_bench(gr.Tool(wait, timeout_s=2), timeout_s=50) as bench:
        row = await bench.one(call("wait"))
        assert (row.status, row.duration_s) == ("error_timeout", 2)
        with trio.move_on_after(1.5):
            await bench.one(call("wait"))
    assert seen == [(2, 2), (1.5, 1.5)]


async def test_inner_cancels_are_the_tools_own(autojump_clock: trio.testing.MockClock) -> None:
    """A tool may cancel itself as often as it likes."""

    async def poll() -> str:
        for _ in range(1_000):
            with trio.move_on_after(0.001):
                await trio.sleep_forever()
        return "done"

    async with open_bench(poll) as bench:
        assert (await bench.one(call("poll"))).text == "done"


async def test_stale_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """A Cancelled that a tool kept and raises later is an error of the tool, alone or in a group."""
    kept: list[BaseException] = []

    async def keep() -> None:
        with trio.move_on_after(1):
            try:
                await trio.sleep_forever()
            except trio.Cancelled as exc:
                kept.append(exc)
                raise

    async def stale() -> None:
        await keep()
        raise kept[0]

    async def group() -> None:
        await keep()
        raise BaseExceptionGroup("group", [kept[0], SystemExit(1)])

    async with open_bench(stale, group, echo) as bench:
        outcomes = await bench.run(call("stale", "a"), call("group", "b"), call("echo", "c", text="fine"))
    assert [outcome.report.status for outcome in outcomes] == ["cancelled", "error_execution", "success"]


async def test_tools_that_leave_things_open(autojump_clock: trio.testing.MockClock) -> None:
    """A scope or a nursery that a tool does not close, and a task that it leaves behind, break nothing."""
    left: list[object] = []

    async def scope() -> str:
        opened = trio.CancelScope(shield=True)
        opened.__enter__()
        left.append(opened)
        return "scope"

    async def nursery() -> str:
        manager = trio.open_nursery()
        opened = await manager.__aenter__()
        opened.start_soon(trio.sleep, 100)
        left.append(manager)
        return "nursery"

    async def system() -> str:
        trio.lowlevel.spawn_system_task(trio.sleep, 100)
        return "system"

    async def outer() -> str:
        trio.lowlevel.current_task().parent_nursery.cancel_scope.cancel()  # type: ignore[union-attr]  # it has one
        await trio.sleep(1)
        return "outer"

    async with open_bench(scope, nursery, system, outer, echo) as bench:
        for name in ("scope", "nursery", "system", "outer"):
            with trio.fail_after(200):
                assert (await bench.one(call(name))).text
        assert (await bench.one(call("echo", text="x"))).status == "success"
        await trio.sleep(200)
    left.clear()


# Order and limits


async def test_parallel_keeps_the_order(autojump_clock: trio.testing.MockClock) -> None:
    """Outcomes come in the order of the calls, however long each takes."""
    async with open_bench(echo, max_parallel=3) as bench:
        begin = trio.current_time()
        calls = [call("echo", str(n), text=str(n), delay_s=float(5 - n)) for n in range(5)]
        outcomes = await bench.run(*calls)
        assert [outcome.report.text for outcome in outcomes] == list("01234")
        # 5, 4 and 3 s at once; 2 s after the first that ended, 1 s after the second.
        assert trio.current_time() - begin == 5
    finished = [event.call_id for event in bench.events if isinstance(event, ToolFinished)]
    assert finished == ["2", "1", "3", "0", "4"] or sorted(finished) == list("01234")


async def test_sequential(autojump_clock: trio.testing.MockClock) -> None:
    """One after the other, when that is asked for; a cancel in between runs no more of them (T2)."""
    async with open_bench(echo, parallel=False) as bench:
        begin = trio.current_time()
        await bench.run(*(call("echo", str(n), text=str(n), delay_s=1.0) for n in range(4)))
        assert trio.current_time() - begin == 4
        names = [(type(event).__name__, event.call_id) for event in bench.events]
        assert names == [(kind, str(n)) for n in range(4) for kind in ("ToolStarted", "ToolFinished")]
        round_ = bench.round([call("echo", str(n), text=f"x{n}", delay_s=1.0) for n in range(4)])
        with trio.move_on_after(1.5):
            await round_.run()
    assert [outcome and outcome.report.status for outcome in round_.outcomes] == ["success"] + ["cancelled"] * 3


class Gauge:
    """Counts how many are inside at once."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def __enter__(self) -> None:
        self.now += 1
        self.peak = max(self.peak, self.now)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.now -= 1


@pytest.mark.parametrize(
    ("limits", "settings", "peak"),
    [
        ({}, {}, 24),
        ({"max_parallel": 3}, {}, 9),
        ({"max_running": 5}, {}, 5),
        ({}, {"max_parallel": 2}, 2),
        ({"parallel": False}, {}, 3),
    ],
    ids=range(5),
)
async def test_concurrency(
    autojump_clock: trio.testing.MockClock, limits: dict[str, Any], settings: dict[str, Any], peak: int
) -> None:
    """At most so many calls run at once: of a turn, of a tool, of the whole client (T3)."""
    gauge = Gauge()

    async def work(number: int) -> None:
        with gauge:
            await trio.sleep(1)

    async with open_bench(gr.Tool(work, **settings), max_calls=100, timeout_s=1_000, **limits) as bench:
        async with trio.open_nursery() as nursery:
            for who in range(3):
                nursery.start_soon(bench.run, *(call("work", str(n), number=100 * who + n) for n in range(20)))
        assert gauge.peak == peak
        assert bench.supervisor.statistics().calls == 60
        assert not bench.supervisor._tool_slots


async def test_waiting_for_a_place_ends(autojump_clock: trio.testing.MockClock) -> None:
    """A call that finds no place in time is told so: the wait is part of its time."""
    async with open_bench(forever, echo, max_running=1, timeout_s=5) as bench:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.run, call("forever"))
            await trio.sleep(1)
            with trio.move_on_after(3):
                await bench.one(call("echo"))
        assert bench.supervisor.statistics().running == 0

    async with (
        open_bench(gr.Tool(forever.function, name="long", timeout_s=100), echo, max_running=1, timeout_s=5) as bench,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(bench.run, call("long"))
        await trio.sleep(1)
        row = await bench.one(call("echo"))
        nursery.cancel_scope.cancel()
    assert (row.status, row.duration_s) == ("error_timeout", 5)
    assert told(row) == "there was no room to run the tool in time"
    assert not [event for event in bench.events if isinstance(event, ToolStarted) and event.name == "echo"]


async def test_calls_of_a_turn(autojump_clock: trio.testing.MockClock) -> None:
    """A turn has so many calls, over all its rounds; what is beyond is answered, so the history stays valid (T3)."""
    async with open_bench(echo) as bench:
        shared = turn(gr.ToolLimits(max_calls=5), calls_made=1)
        first = await bench.run(*(call("echo", str(n), text=str(n)) for n in range(3)), turn=shared)
        second = await bench.run(*(call("echo", str(n), text=f"x{n}") for n in range(3)), turn=shared)
    assert [outcome.report.status for outcome in first] == ["success"] * 3
    assert [outcome.report.status for outcome in second] == ["success", "error_limit", "error_limit"]
    assert "it has had 5" in told(second[1].report)
    assert shared.calls_made == 7


async def test_repeated_calls(autojump_clock: trio.testing.MockClock) -> None:
    """The same call again and again is refused, whatever its id, the order of its names and its white space are."""
    async with open_bench(echo) as bench:
        shared = turn(gr.ToolLimits(max_repeats=2))
        texts = [
            '{"text":"a","delay_s":0}',
            '{ "delay_s": 0, "text": "a" }',
            '{"text":"a","delay_s":0}',
            '{"text":"b"}',
        ]
        outcomes = await bench.run(*(raw_call("echo", text, str(n)) for n, text in enumerate(texts)), turn=shared)
    assert [outcome.report.status for outcome in outcomes] == ["success", "success", "error_limit", "success"]
    assert "the same call was made 2 times" in told(outcomes[2].report)


# The guard


async def test_guard_sees_every_call(autojump_clock: trio.testing.MockClock) -> None:
    """The guard is asked before each run, with the decoded arguments, and told of each end, of whatever kind."""
    guard = LoggingGuard()
    rules = ToolRules(role="admin")
    tool = gr.Tool(echo.function, name="echo", rules=rules)
    async with open_bench(tool, guard=guard) as bench:
        shared = turn(principal=ADA, session="s")
        await bench.run(call("echo", "a", text="x"), raw_call("echo", "{", "b"), call("nope", "c"), turn=shared)
    (check,) = guard.checks
    assert (check.tool, check.arguments, check.rules, check.call_id, check.session) == (
        "echo",
        {"text": "x"},
        rules,
        "a",
        "s",
    )
    assert guard.principals == [ADA]
    audits = {audit.call_id: audit for audit in guard.audits}
    assert {key: audit.status for key, audit in audits.items()} == {
        "a": "success",
        "b": "error_parsing",
        "c": "error_not_found",
    }
    assert audits["a"].principal == ADA
    assert audits["a"].arguments == {"text": "x"}
    assert audits["b"].arguments == "{"
    assert audits["b"].error is not None
    assert audits["a"].at_s >= WALL


@pytest.mark.parametrize(
    ("denial", "message"),
    [
        (Deny(reason="access", message="matched pattern rm -rf"), "this call is not allowed"),
        (Deny(reason="authentication", message="no user"), "this call needs a user who is signed in"),
        (
            Deny(reason="rate_limit", message="rule 7", retry_after_s=2.1),
            "this tool was called too often; try again in 3 s",
        ),
        (Deny(reason="rate_limit", message="rule 7", retry_after_s=math.inf), "this tool was called too often"),
        (Deny(reason="dangerous_argument", message="matched rm -rf"), "these arguments are not allowed"),
    ],
    ids=range(5),
)
async def test_denied(autojump_clock: trio.testing.MockClock, denial: Deny, message: str) -> None:
    """A denied call does not run; the model learns the reason, the report the rule (T6)."""
    guard = LoggingGuard(lambda _check: denial)
    async with open_bench(echo, guard=guard) as bench:
        row = await bench.one(call("echo", text="x"))
    assert (row.status, told(row)) == ("error_security", message)
    assert row.error is not None
    assert (row.error.type, row.error.message) == (denial.reason, denial.message)
    assert guard.audits[0].status == "error_security"
    assert guard.audits[0].error == denial.message


async def test_rules_without_a_guard(autojump_clock: trio.testing.MockClock) -> None:
    """A tool that declares rules does not run when nobody can hold it to them (seed defect A1)."""
    for rules in (ToolRules(), ToolRules(role="admin"), ToolRules(sensitive=True)):
        async with open_bench(gr.Tool(echo.function, name="echo", rules=rules)) as bench:
            row = await bench.one(call("echo"), turn(principal=ADA))
        assert row.status == "error_security"
        assert told(row) == "this call is not allowed"
        assert row.error is not None
        assert "no guard" in row.error.message


@pytest.mark.parametrize("given", [None, True, "allow", Allow], ids=repr)
async def test_broken_guard(
    autojump_clock: trio.testing.MockClock, given: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A guard that fails, or gives something else than a decision, lets nothing through."""
    async with open_bench(echo, guard=LoggingGuard(lambda _check: given)) as bench:
        assert (await bench.one(call("echo"))).status == "error_security"

    class Broken:
        def check(self, *_args: object, **_kwargs: object) -> Any:
            raise SystemExit("broken")

        def audit(self, _record: object) -> None:
            raise KeyboardInterrupt

    async with open_bench(echo, guard=Broken()) as bench:
        assert (await bench.one(call("echo"))).status == "error_security"
    assert "the guard failed on tool echo: SystemExit: broken" in caplog.text
    assert "audit failed: KeyboardInterrupt" in caplog.text


async def test_guard_cannot_change_arguments(autojump_clock: trio.testing.MockClock) -> None:
    """What the guard does to what it was shown does not reach the tool (T9)."""

    def spoil(check: Any) -> Any:
        check.arguments["text"] = "spoilt"
        return Allow()

    async with open_bench(echo, guard=LoggingGuard(spoil)) as bench:
        assert (await bench.one(call("echo", text="true"))).text == "true"


async def test_context_fields(autojump_clock: trio.testing.MockClock) -> None:
    """A tool learns who asks, where, and the token that was handed to the turn."""
    token = object()
    seen: list[gr.ToolContext] = []

    @gr.tool(idempotent=True)
    async def look(ctx: gr.ToolContext) -> None:
        seen.append(ctx)
        task = trio.lowlevel.current_task()
        assert bench.supervisor.call_of(task) is ctx

        async def inner() -> None:
            assert bench.supervisor.call_of(trio.lowlevel.current_task()) is ctx

        async with trio.open_nursery() as nursery:
            nursery.start_soon(inner)

    async with open_bench(look) as bench:
        await bench.one(call("look", "c9"), turn(principal=ADA, session="s", turn_id="t", token=token))
        assert bench.supervisor.call_of(trio.lowlevel.current_task()) is None
    (ctx,) = seen
    assert (ctx.tool, ctx.call_id, ctx.principal, ctx.session, ctx.turn_id) == ("look", "c9", ADA, "s", "t")
    assert ctx.token is token
    assert ctx.idempotent


# Approval


SENSITIVE = gr.Tool(echo.function, name="pay", rules=ToolRules(sensitive=True))


def approver(make: Callable[[gr.ApprovalRequest], Any]) -> tuple[list[gr.ApprovalRequest], Any]:
    asked: list[gr.ApprovalRequest] = []

    async def approve(request: gr.ApprovalRequest) -> Any:
        asked.append(request)
        await trio.sleep(40)
        return make(request)

    return asked, approve


async def test_approved(autojump_clock: trio.testing.MockClock) -> None:
    """A sensitive call waits for its approval, longer than the tool itself may take, and then runs."""
    asked, approve = approver(lambda request: gr.ApprovalDecision(request=request, approved=True, by="bob"))
    async with open_bench(SENSITIVE, guard=LoggingGuard()) as bench:
        row = await bench.one(call("pay", text="x"), turn(approve=approve, principal=ADA, session="s", turn_id="t"))
    assert (row.status, row.text, row.duration_s) == ("success", "x", 40)
    (request,) = asked
    assert (request.tool, request.arguments, request.call_id) == ("pay", '{"text":"x"}', "call_1")
    assert (request.principal, request.session, request.turn_id) == (ADA, "s", "t")
    assert request.expires_at_s == WALL + 300


async def test_approved_and_no_room(autojump_clock: trio.testing.MockClock) -> None:
    """An approved call that finds no place in time is told that, not that nobody has answered."""

    async def approve(request: gr.ApprovalRequest) -> gr.ApprovalDecision:
        return gr.ApprovalDecision(request=request, approved=True)

    long = gr.Tool(forever.function, name="long", timeout_s=100)
    async with (
        open_bench(SENSITIVE, long, guard=LoggingGuard(), max_running=1, timeout_s=5) as bench,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(bench.run, call("long"))
        await trio.sleep(1)
        nursery.start_soon(bench.one, call("pay"), turn(bench.limits, approve=approve))
        await trio.sleep(1)
        seen = bench.supervisor.inspect(trio.current_time())
        assert [each.phase for each in seen if each.tool == "pay"] == ["checks"]
        row = await bench.one(call("pay"), turn(bench.limits, approve=approve))
        nursery.cancel_scope.cancel()
    assert (row.status, told(row)) == ("error_timeout", "there was no room to run the tool in time")


def replaced(request: gr.ApprovalRequest, **fields: Any) -> gr.ApprovalDecision:
    return gr.ApprovalDecision(request=msgspec.structs.replace(request, **fields), approved=True)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda r: gr.ApprovalDecision(request=r, approved=False, reason="too dear"), "too dear"),
        (lambda r: gr.ApprovalDecision(request=r, approved=False), "it was not approved"),
        (lambda r: gr.ApprovalDecision(request=r, approved="yes"), "expired|not approved"),  # type: ignore[arg-type]  # the point
        (lambda r: replaced(r, arguments='{"text":"y"}'), "expired|not approved"),
        (lambda r: replaced(r, tool="other"), "expired|not approved"),
        (lambda r: replaced(r, call_id="other"), "expired|not approved"),
        (lambda r: replaced(r, principal=Principal(id="eve", tenant="t")), "expired|not approved"),
        (lambda r: replaced(r, principal=Principal(id="ada", tenant="u")), "expired|not approved"),
        (lambda r: replaced(r, session="other"), "expired|not approved"),
        (lambda r: replaced(r, turn_id="other"), "expired|not approved"),
        (lambda r: replaced(r, expires_at_s=WALL), "the approval has expired"),
        (lambda _r: True, "AttributeError"),
        (lambda _r: 1 / 0, "ZeroDivisionError"),
    ],
    ids=range(13),
)
async def test_not_approved(autojump_clock: trio.testing.MockClock, make: Any, why: str) -> None:
    """Anything but an approval of exactly this call, in time, is none."""
    _asked, approve = approver(make)
    async with open_bench(SENSITIVE, guard=LoggingGuard()) as bench:
        row = await bench.one(call("pay", text="x"), turn(approve=approve, principal=ADA))
    assert (row.status, told(row)) == ("error_security", "this call was not approved")
    assert row.error is not None
    assert row.error.type == "approval"
    assert re.search(why, row.error.message)
    assert not [event for event in bench.events if isinstance(event, ToolStarted)]


async def test_nobody_to_approve(autojump_clock: trio.testing.MockClock) -> None:
    """Without anybody to ask, and with somebody who never answers, a sensitive call does not run."""

    async def silent(_request: gr.ApprovalRequest) -> None:
        await trio.sleep_forever()

    async with open_bench(SENSITIVE, guard=LoggingGuard()) as bench:
        row = await bench.one(call("pay"))
        assert row.error is not None
        assert (row.status, row.error.message) == ("error_security", "nobody can be asked to approve it")
        row = await bench.one(call("pay"), turn(approve=silent))
        assert row.error is not None
        assert (row.status, row.error.message) == ("error_security", "nobody answered in time")
        assert row.duration_s == 300


async def test_an_approver_that_hides(autojump_clock: trio.testing.MockClock) -> None:
    """Who is asked, and lets no cancel through, is given up as a tool is, and so is the call."""

    async def approve(_request: gr.ApprovalRequest) -> None:
        await _shield()

    async with open_bench(SENSITIVE, guard=LoggingGuard()) as bench:
        with trio.fail_after(10):
            row = await bench.one(call("pay"), turn(gr.ToolLimits(approval_s=5), approve=approve))
        assert row.status == "error_security"
        assert "not approved" in told(row)


async def test_approval_that_comes_later(autojump_clock: trio.testing.MockClock) -> None:
    """A call can be left open: the others end, and it is run in a round of its own when the answer has come."""

    async def later(_request: gr.ApprovalRequest) -> None:
        await trio.sleep(1)

    async with open_bench(SENSITIVE, echo, guard=LoggingGuard()) as bench:
        calls = [call("pay", "a", text="x"), call("echo", "b", text="y"), call("pay", "c", text="z")]
        round_ = bench.round(calls, turn(approve=later, principal=ADA))
        outcomes = await round_.run()
        assert [outcome.report.call_id for outcome in outcomes] == ["b"]
        assert [outcome is None for outcome in round_.outcomes] == [True, False, True]
        requests = round_.open_requests
        assert [request.call_id for request in requests] == ["a", "c"]
        assert bench.supervisor.statistics().running == 0
        await trio.sleep(100)
        stored = msgspec.json.encode(requests)
        requests = msgspec.json.decode(stored, type=list[gr.ApprovalRequest])
        decisions = [
            gr.ApprovalDecision(request=requests[0], approved=True),
            gr.ApprovalDecision(request=requests[1], approved=False),
        ]
        resumed = turn(decisions=decisions, principal=ADA)
        first, second = await bench.run(calls[0], calls[2], turn=resumed)
        assert (first.report.status, first.report.text) == ("success", "x")
        assert second.report.status == "error_security"
        await trio.sleep(300)
        (expired,) = await bench.run(calls[0], turn=turn(decisions=decisions, principal=ADA))
        assert expired.report.error is not None
        assert expired.report.error.message == "the approval has expired"


# Events


async def test_progress(autojump_clock: trio.testing.MockClock) -> None:
    """What a tool says while it runs is told at once; long messages are cut, odd fractions left out."""

    async def work(ctx: gr.ToolContext) -> None:
        ctx.progress("one", fraction=0.5)
        ctx.progress("x" * 10_000, fraction=7)
        await trio.sleep(1)
        ctx.progress("three", fraction=math.nan)

    async with open_bench(work) as bench:
        await bench.one(call("work", "c"))
    kinds = [type(event).__name__ for event in bench.events]
    assert kinds == ["ToolStarted", "ToolProgress", "ToolProgress", "ToolProgress", "ToolFinished"]
    said = [(event.message[:6], event.fraction) for event in bench.events if isinstance(event, ToolProgress)]
    assert said == [("one", 0.5), ("xxxxxx", None), ("three", None)]
    assert max(len(event.message) for event in bench.events if isinstance(event, ToolProgress)) == 1_024


async def test_progress_can_be_sent_on(autojump_clock: trio.testing.MockClock) -> None:
    """A name of a file that is not UTF-8 in what a tool tells has question marks, as in a result."""

    async def work(ctx: gr.ToolContext) -> None:
        ctx.progress("reading \udce9")

    async with open_bench(work) as bench:
        await bench.one(call("work"))
    assert [event.message for event in bench.events if isinstance(event, ToolProgress)] == ["reading ?"]


async def test_progress_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """A tool that talks without end is listened to for a while."""

    async def chat(ctx: gr.ToolContext) -> None:
        for n in range(5_000):
            ctx.progress(str(n))

    async with open_bench(chat) as bench:
        await bench.one(call("chat"))
    assert len(bench.events) == 1_002


async def test_progress_from_a_thread() -> None:
    """A sync tool speaks from its thread; of many words the newest are heard."""
    spoken = threading.Event()

    def work(ctx: gr.ToolContext) -> str:
        for n in range(1_000):
            ctx.progress(str(n), fraction=n / 1_000)
        spoken.wait(10)
        return "done"

    async with open_bench(work, timeout_s=20) as bench, trio.open_nursery() as nursery:
        nursery.start_soon(bench.one, call("work"))
        while not any(isinstance(event, ToolProgress) and event.message == "999" for event in bench.events):
            await trio.sleep(0.001)
        spoken.set()
    assert isinstance(bench.events[-1], ToolFinished)


async def test_progress_from_a_trio_in_a_thread() -> None:
    """A sync tool that runs a trio of its own is heard where the others are, not in its thread."""
    heard: list[threading.Thread] = []

    def work(ctx: gr.ToolContext) -> str:
        async def inside() -> str:
            ctx.progress("half")
            return "done"

        return trio.run(inside)

    def hear(event: object) -> None:
        if isinstance(event, ToolProgress):
            heard.append(threading.current_thread())

    async with open_bench(work) as bench:
        round_ = bench.supervisor.round([call("work")], bench.tools, turn=turn(), on_event=hear)
        (done,) = await round_.run()
    assert (done.report.text, heard) == ("done", [threading.current_thread()])


async def test_progress_that_is_no_text() -> None:
    """What a tool in a thread tells is made a text there: one that cannot be is that tool's failure alone."""

    class Odd:
        def __str__(self) -> str:
            raise ValueError("not today")

    def work(ctx: gr.ToolContext) -> str:
        ctx.progress(Odd())  # type: ignore[arg-type]  # on purpose
        return "done"

    async with open_bench(work, echo) as bench:
        row = await bench.one(call("work"))
        assert (await bench.one(call("echo", text="on"))).text == "on"
    assert row.error is not None
    assert (row.status, row.error.message) == ("error_execution", "not today")


async def test_broken_listener(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """A listener that raises is logged and changes nothing."""

    def listen(_event: object) -> None:
        raise SystemExit("listener")

    async with open_bench(echo) as bench:
        outcomes = await bench.supervisor.run_round([call("echo", text="x")], bench.tools, turn=turn(), on_event=listen)
    assert outcomes[0].report.text == "x"
    assert caplog.text.count("failed: SystemExit: listener") == 2


# Cancelling and closing


async def test_cancelled_round_tells_what_ended(autojump_clock: trio.testing.MockClock) -> None:
    """After a cancel there is an outcome for every call: those that ended, those that ran, those that never began."""
    async with open_bench(echo, forever, max_parallel=2) as bench:
        round_ = bench.round(
            [call("echo", "a", text="x"), call("forever", "b"), call("forever", "c"), call("echo", "d")]
        )
        with trio.move_on_after(1) as scope:
            await round_.run()
        assert scope.cancelled_caught
        rows = [outcome.report for outcome in round_.outcomes if outcome is not None]
        assert [row.status for row in rows] == ["success", "cancelled", "cancelled", "cancelled"]
        assert [row.has_run for row in rows] == [True, True, True, False]
        assert "whether it had an effect is not known" in told(rows[1])
        assert "the call was not run" in told(rows[3])
        assert trio.current_time() == 1
        assert bench.supervisor.statistics().running == 0
    assert len([event for event in bench.events if isinstance(event, ToolFinished)]) == 4


@pytest.mark.parametrize("function", HANGING, ids=lambda function: function.__name__)
async def test_cancel_passes(autojump_clock: trio.testing.MockClock, function: Any) -> None:
    """A cancel of the caller passes after a bounded time, whatever the tool does."""
    async with open_bench(gr.Tool(function, name="hang")) as bench:
        round_ = bench.round([call("hang")])
        with trio.move_on_after(1):
            await round_.run()
        assert trio.current_time() <= 2
        assert [outcome and outcome.report.status for outcome in round_.outcomes] == ["cancelled"]
        await trio.testing.wait_all_tasks_blocked()
        assert bench.supervisor.statistics().running == 0
    gc.collect()


@pytest.mark.parametrize("function", HANGING, ids=lambda function: function.__name__)
async def test_closing_with_running_tools(autojump_clock: trio.testing.MockClock, function: Any) -> None:
    """Closing the supervisor ends what runs in a bounded time, and answers who waits; then it takes nothing."""
    outcomes: list[Any] = []

    async def ask(bench: Bench) -> None:
        outcomes.extend(await bench.run(call("hang")))

    async with trio.open_nursery() as nursery:
        async with open_bench(gr.Tool(function, name="hang"), timeout_s=3_000) as bench:
            nursery.start_soon(ask, bench)
            await trio.sleep(1)
            begin = trio.current_time()
            closing = bench
            await bench.supervisor.aclose()
            await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() - begin <= 2
    assert [outcome.report.status for outcome in outcomes] == ["cancelled"]
    with pytest.raises(gr.ActorGoneError):
        await closing.run(call("hang"))
    gc.collect()


def test_ctrl_c_is_not_a_tools_error() -> None:
    """Ctrl-C while a tool runs ends the program as always, and is not taken for something that the tool raised."""
    rows: list[Any] = []
    # A process in the background of a shell ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    async def press() -> str:
        signal.raise_signal(signal.SIGINT)
        return "pressed"

    async def program() -> None:
        async with open_bench(press) as bench:
            round_ = bench.round([call("press")])
            try:
                await round_.run()
            finally:
                rows.extend(round_.outcomes)

    try:
        with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)) as caught:
            trio.run(program)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.group_contains(KeyboardInterrupt) if isinstance(caught.value, BaseExceptionGroup) else True
    assert [row.report.status for row in rows] in (["success"], ["cancelled"])


async def test_writing_meanwhile(autojump_clock: trio.testing.MockClock) -> None:
    """Outcomes can be stored as they come, while others still run; what storing raises ends the round."""
    stored: list[list[str]] = []

    async def write(outcomes: list[gr.ToolOutcome]) -> None:
        await trio.sleep(0.5)
        stored.append([outcome.report.call_id for outcome in outcomes])

    async def fail(outcomes: list[gr.ToolOutcome]) -> None:
        await write(outcomes)
        raise OSError("disk full")

    calls = [call("echo", str(n), text=str(n), delay_s=float(n)) for n in range(4)]
    async with open_bench(echo) as bench:
        round_ = bench.round([calls[0], *calls[2:], call("nope", "x")])
        assert len(await round_.run(write=write)) == 4
        assert stored == [["x"], ["0"], ["2"], ["3"]]
        round_ = bench.round([*calls, call("forever", "f")])
        with pytest.raises(OSError, match="disk full"):
            await round_.run(write=fail)
        assert all(outcome is not None for outcome in round_.outcomes)
        assert bench.supervisor.statistics().running == 0


async def test_within(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever owns a turn is told in which task its calls are, from which the tool's own can be found."""
    owned: dict[trio.lowlevel.Task, str] = {}

    @contextmanager
    def within() -> Iterator[None]:
        owned[trio.lowlevel.current_task()] = "turn"
        yield
        del owned[trio.lowlevel.current_task()]

    async def look() -> str:
        task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        while task is not None and task not in owned:
            task = task.parent_nursery.parent_task if task.parent_nursery is not None else None
        return "found" if task is not None else "lost"

    @contextmanager
    def broken() -> Iterator[None]:
        raise RuntimeError("broken")
        yield

    async with open_bench(look) as bench:
        row = await bench.one(call("look"), turn(within=within))
        assert (row.text, row.has_run) == ("found", True)
        row = await bench.one(call("look"), turn(within=broken))
        assert (row.status, row.has_run) == ("error_execution", False)
    assert not owned


# Threads


async def test_hung_threads_are_counted_and_capped() -> None:
    """Threads that hang are counted, and when there are too many of them sync tools are refused; the rest goes on."""
    release = threading.Event()

    def hang(number: int) -> None:
        release.wait(30)

    def quick() -> str:
        return "quick"

    try:
        async with open_bench(hang, quick, echo, timeout_s=0.1, max_abandoned_threads=4, max_calls=100) as bench:
            outcomes = await bench.run(*(call("hang", str(n), number=n) for n in range(4)))
            assert [outcome.report.status for outcome in outcomes] == ["error_timeout"] * 4
            statistics = bench.supervisor.statistics()
            assert (statistics.abandoned_threads, statistics.threads, statistics.running) == (4, 4, 0)
            row = await bench.one(call("quick"))
            assert (row.status, told(row)) == ("error_limit", "this tool cannot be run now")
            assert row.error is not None
            assert "4 threads of tools hang" in row.error.message
            assert (await bench.one(call("echo", text="x"))).text == "x"
            release.set()
            while bench.supervisor.statistics().abandoned_threads:
                await trio.sleep(0.001)
            assert (await bench.one(call("quick"))).text == "quick"
    finally:
        release.set()


async def test_disk_and_names_are_not_starved(tmp_path: Any) -> None:
    """40 hung sync tools, as many as trio has threads by default, take nothing from files and names (finding 0.3)."""
    release = threading.Event()

    def hang(number: int) -> None:
        release.wait(30)

    file = tmp_path / "file"
    file.write_text("content")
    try:
        limits: dict[str, Any] = {"timeout_s": 0.2, "max_parallel": 40, "max_calls": 100, "max_abandoned_threads": 50}
        async with open_bench(hang, **limits) as bench:
            outcomes = await bench.run(*(call("hang", str(n), number=n) for n in range(40)))
            assert {outcome.report.status for outcome in outcomes} == {"error_timeout"}
            assert bench.supervisor.statistics().abandoned_threads == 40
            with trio.fail_after(5):
                assert await trio.Path(file).read_text() == "content"
                assert await trio.socket.getaddrinfo("localhost", 80)
    finally:
        release.set()

"""Tools in processes of their own: what they see, what may come back, and that they are gone afterwards."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import toolbox_functions
import trio
import trio.testing
from toolbox import Bench, call, open_bench, told

import gorouter_trio as gr
from gorouter_trio.events import ToolProgress
from gorouter_trio.security.rules import Principal
from gorouter_trio.tools import process
from gorouter_trio.tools.frames import ChildRequest
from gorouter_trio.tools.process import ProcessPool
from gorouter_trio.tools.turn import ToolTurn

pytestmark = pytest.mark.net  # real processes, real time

HOSTILE = toolbox_functions.hostile


def is_alive(pid: int) -> bool:
    """Whether a process runs, zombies aside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(pid: int) -> bool:
    """Whether a process ends within a second."""
    with trio.move_on_after(1):
        while is_alive(pid):
            await trio.sleep(0.01)
    return not is_alive(pid)


@asynccontextmanager
async def warm_bench(*tools: gr.AnyTool, **limits: Any) -> AsyncIterator[Bench]:
    """A bench whose tools' module has been imported in its process."""
    async with open_bench(*tools, toolbox_functions.remember, **limits) as bench:
        long = gr.ToolLimits(timeout_s=30)
        assert (await bench.one(call("remember"), ToolTurn(limits=long))).text == "1"
        yield bench


async def test_results(no_leaks: Any) -> None:
    """A tool in a process gets typed values and its context, and gives a result and its progress."""
    raw = gr.Tool(toolbox_functions.raw, parameters={"type": "object", "required": ["a"]}, isolation="process")
    tools: list[Any] = [toolbox_functions.add, toolbox_functions.add_later, raw]
    async with no_leaks(), open_bench(*tools, include_results=True) as bench:
        turn = ToolTurn(limits=bench.limits, principal=Principal(id="ada"), session="s")
        numbers = {"left": 2, "right": 3}
        first, second = await bench.run(
            call("add", "a", numbers=numbers), call("add_later", "b", numbers=numbers), turn=turn
        )
        assert first.report.result == {"sum": 5, "call": "a", "session": "s", "who": "ada"}
        assert second.report.text == "5"
        assert ToolProgress("a", "add", "adding", 0.5) in bench.events
        row = await bench.one(call("add", numbers={"left": 2, "right": "x"}))
        assert row.status == "error_validation"
        assert (await bench.one(call("raw", a=[1, None]))).text == '{"a":[1,null]}'
        assert (await bench.one(call("raw"))).status == "error_validation"


async def test_nothing_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has no secrets in its environment, no file of ours, a group of its own, and is new."""
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-canary")
    monkeypatch.setenv("AWS_SECRET", "canary")
    monkeypatch.setenv("WANTED", "yes")
    with open("/dev/null") as opened:  # noqa: ASYNC230 - there is nothing to wait for
        os.set_inheritable(opened.fileno(), True)
        async with warm_bench(toolbox_functions.environment, process_env=["WANTED"], include_results=True) as bench:
            rows = [await bench.one(call("environment")) for _ in range(2)]
            again = await bench.one(call("remember"))
    first, second = (row.result for row in rows)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert "WANTED" in first["names"]
    assert not {"OPENROUTER_API_KEY", "AWS_SECRET", "HOME"} & set(first["names"])
    assert len(first["files"]) <= 4, first["files"]
    assert first["pid"] == first["group"] != os.getpgrp()
    assert first["parent"] == second["parent"] != os.getpid()
    assert first["pid"] != second["pid"]
    assert first["random"] != second["random"]
    assert again.text == "1"
    assert await gone(first["parent"])


async def test_killed_in_time(tmp_path: Path) -> None:
    """A process that does not end is killed at its deadline, whatever it does, with all in its group."""
    hanging = ["hold the lock", "spin", "sleep", "spawn", "stop", "ignore signals"]
    kinds = [*hanging, "fork"]
    async with warm_bench(HOSTILE, timeout_s=1.5, max_processes=8) as bench:
        begin = time.monotonic()
        calls = [call("hostile", kind, kind=kind, mark=str(tmp_path / kind)) for kind in kinds]
        outcomes = await bench.run(*calls)
        assert time.monotonic() - begin < 3.0
        assert [outcome.report.status for outcome in outcomes] == ["error_timeout"] * len(hanging) + ["success"]
        with trio.fail_after(5):
            while bench.supervisor.statistics().processes:
                await trio.sleep(0.01)  # until the system has ended them
        for kind in ("spawn", "fork"):
            assert await gone(int((tmp_path / kind).read_text()))
        assert (await bench.one(call("remember"))).text == "1"


FAILING = {
    "crash": ("the tool failed", "ProcessError"),
    "exit": ("the tool failed", "SystemExit"),
    "interrupt": ("the tool failed", "KeyboardInterrupt"),
    "hard exit": ("the tool failed", "ProcessError"),
    "kill": ("the tool failed", "ProcessError"),
    "secret": ("the tool failed", "RuntimeError"),
    "forge": ("the tool failed", "ProcessError"),
    "forge frame": ("the tool failed", "ProcessError"),
    "close": ("the tool failed", "ProcessError"),
    "tool error": ("tell the model", "ToolError"),
    "cycle": ("the result contains itself, or is nested too deeply", "ResultError"),
    "object": ("the result cannot be written as JSON", "ResultError"),
}


async def test_failing() -> None:
    """What fails in a process fails that call only, with the reason in the report."""
    async with warm_bench(HOSTILE, timeout_s=20) as bench:
        outcomes = await bench.run(*(call("hostile", kind, kind=kind) for kind in FAILING))
        assert (await bench.one(call("hostile", kind="fine"))).text == "fine"
        row = await bench.one(call("hostile", kind="large"))
        assert (row.status, row.is_cut, len(row.text)) == ("success", True, 65_536)
        assert (await bench.one(call("hostile", kind="nan"))).text == '["nan"]'
    rows = {outcome.report.call_id: outcome.report for outcome in outcomes}
    for kind, (message, type_) in FAILING.items():
        row = rows[kind]
        assert row.error is not None
        assert (row.status, row.error.type) == ("error_execution", type_), kind
        assert told(row).startswith(message), kind
    error = rows["tool error"].error
    assert error is not None
    assert (error.details["code"], error.details["odd"]) == (7, "object")


async def test_fractions_that_are_none() -> None:
    """They are left out, as of tools in tasks and threads, and are not the failure of the tool."""
    async with warm_bench(toolbox_functions.odd_progress, timeout_s=20) as bench:
        assert (await bench.one(call("odd_progress"))).text == "done"
    told_fractions = [event.fraction for event in bench.events if isinstance(event, ToolProgress)]
    assert told_fractions == [None, None, None, None, None, 1]


async def test_results_that_escapes_make_longer() -> None:
    """A result that has the size that it may have arrives, whatever JSON makes of it on the way."""
    tools: list[Any] = [toolbox_functions.control_characters]
    async with warm_bench(*tools, timeout_s=20, max_result_bytes=100_000, include_results=True) as bench:
        row = await bench.one(call("control_characters", count=100_000))
    assert (row.status, row.is_cut, row.text, row.result) == ("success", False, "\x1b" * 100_000, "\x1b" * 100_000)


async def test_names_of_files_in_errors_and_progress() -> None:
    """A name of a file that is not UTF-8 keeps neither an error nor a word on the way from the model."""
    async with warm_bench(HOSTILE, toolbox_functions.read_odd_name, timeout_s=20) as bench:
        row = await bench.one(call("read_odd_name"))
        assert told(row) == "there is no ?"
        assert row.error is not None
        assert (row.error.type, row.error.details["?"]) == ("ToolError", 1)
        assert any(isinstance(event, ToolProgress) and event.message == "reading ?" for event in bench.events)


async def test_memory_is_bounded() -> None:
    """With a bound, a process that takes more memory fails by itself."""
    async with warm_bench(HOSTILE, timeout_s=20, max_process_bytes=512 * 1024 * 1024) as bench:
        row = await bench.one(call("hostile", kind="huge"))
        assert row.status == "error_execution"
        assert row.error is not None
        assert row.error.type == "MemoryError"


async def test_cancel_kills() -> None:
    """A cancel of the caller kills the process and passes at once."""
    async with warm_bench(HOSTILE, timeout_s=60) as bench:
        round_ = bench.round([call("hostile", kind="hold the lock")])
        begin = time.monotonic()
        with trio.move_on_after(0.2):
            await round_.run()
        assert time.monotonic() - begin < 1
        assert [outcome and outcome.report.status for outcome in round_.outcomes] == ["cancelled"]
        assert bench.supervisor.statistics().running == 0


async def test_the_program_goes_on_meanwhile() -> None:
    """While a process holds its interpreter's lock, this one runs on."""
    async with warm_bench(HOSTILE, timeout_s=0.4, max_parallel=4) as bench:
        gaps: list[float] = []

        async def tick() -> None:
            while True:
                begin = time.monotonic()
                await trio.sleep(0.005)
                gaps.append(time.monotonic() - begin)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            kinds = ["hold the lock", "spin", "sleep", "ignore signals"]
            await bench.run(*(call("hostile", str(n), kind=kind) for n, kind in enumerate(kinds)))
            nursery.cancel_scope.cancel()
    assert len(gaps) > 10
    assert max(gaps) < 1


async def test_so_many_at_once() -> None:
    """At most `max_processes` calls have a process; the others wait for one."""
    async with warm_bench(HOSTILE, timeout_s=20, max_processes=2, max_repeats=9) as bench:
        peak = 0

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, bench.supervisor.statistics().processes)
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            outcomes = await bench.run(*(call("hostile", str(n), kind="fine") for n in range(8)))
            nursery.cancel_scope.cancel()
    assert {outcome.report.text for outcome in outcomes} == {"fine"}
    assert peak == 2


async def test_modules_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that a process cannot import is an error of the call, every time."""
    monkeypatch.setattr("sys.path", [path for path in sys.path if "support" not in path])
    async with open_bench(toolbox_functions.add) as bench:
        for _ in range(2):
            row = await bench.one(call("add", numbers={"left": 1, "right": 2}))
            assert row.error is not None
            assert row.error.type == "ProcessError"
            assert "toolbox_functions cannot be imported in a process: ModuleNotFoundError" in row.error.message


async def test_slow_start_is_part_of_the_time() -> None:
    """Starting the process that imports the module is cancelled like the call itself, and begun anew by the next."""
    async with open_bench(toolbox_functions.remember, timeout_s=0.01) as bench:
        row = await bench.one(call("remember"))
        assert row.status == "error_timeout"
        assert (await bench.one(call("remember"), ToolTurn(limits=gr.ToolLimits(timeout_s=30)))).text == "1"


async def test_leaving_a_slow_start_to_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A call whose process was being started by one that was cancelled is not ended with what that left behind."""
    monkeypatch.syspath_prepend(tmp_path)
    wait = "def wait(name: str) -> None:\n    while not pathlib.Path(name).exists(): time.sleep(0.01)\n"
    (tmp_path / "slow_start.py").write_text(f"import pathlib, time\n{wait}wait({str(tmp_path / 'go')!r})\n")
    pool, ends = ProcessPool(gr.ToolLimits()), {}

    async def run(call_id: str) -> None:
        request = ChildRequest(
            module="slow_start",
            qualname="wait",
            tool="wait",
            arguments={"name": str(tmp_path / call_id)},
            call_id=call_id,
            principal=None,
            session=None,
            turn_id=None,
            remaining_s=30.0,
            idempotent=False,
            raw_schema=False,
            max_result_bytes=1024,
            keep_value=False,
            max_process_bytes=None,
        )
        ends[call_id] = await pool.run(request, on_progress=lambda *_: None)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as first:
                    first.start_soon(run, "a")
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    nursery.start_soon(run, "b")
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    scope.cancel()
            (tmp_path / "go").touch()
            (tmp_path / "c").touch()
            await run("c")
            assert "b" not in ends
            (tmp_path / "b").touch()
        assert {call_id: getattr(end, "text", end) for call_id, end in ends.items()} == {"b": "null", "c": "null"}
        await pool.aclose()


async def test_one_that_does_not_answer_is_waited_for_once(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many children are to be buried, a process that hangs holds up the end of their calls once."""

    async def hang(*_args: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(process._Zygote, "_exchange", hang)
    zygote = process._Zygote("nowhere", {})
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(zygote.bury, cast("process._Child", SimpleNamespace(id=number + 1)))
    assert trio.current_time() == process._HANDSHAKE_S


async def test_a_dead_zygote_is_replaced() -> None:
    """When the process that forks has been killed, the next call starts another."""
    async with warm_bench(toolbox_functions.environment, timeout_s=20, include_results=True) as bench:
        row = await bench.one(call("environment"))
        assert isinstance(row.result, dict)
        os.kill(row.result["parent"], 9)
        assert await gone(row.result["parent"])
        assert (await bench.one(call("remember"))).text == "1"


async def test_cost(record_property: Any) -> None:
    """A call in a process of its own takes milliseconds, not a start of Python."""
    async with warm_bench(HOSTILE, timeout_s=20) as bench:
        begin = time.monotonic()
        for n in range(20):
            await bench.one(call("hostile", str(n), kind="fine"))
        each = (time.monotonic() - begin) / 20
    record_property("figure", f"a call in a process of its own takes {1_000 * each:.1f} ms")
    assert each < 0.5

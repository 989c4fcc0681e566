"""The crash harness: it kills when it says, loses no acknowledgement, and catches logs that promise too much."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import crash_targets
import pytest
import trio

from gorouter_trio.client import open_client
from gorouter_trio.simulator import Simulator, open_simulated_network
from gorouter_trio.stores.memory import MemoryStore
from gorouter_trio.testing.crash import (
    Crash,
    CrashError,
    CrashHarness,
    Kill,
    check_crashes,
    compare_log,
    draw_kill,
    kill_at_every_call,
    open_crash_harness,
    run_and_kill,
    run_command_and_kill,
)

HERE = Path(crash_targets.__file__).parent

pytestmark = [
    pytest.mark.net,  # processes, and real time
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


# --- one run ----------------------------------------------------------------------------------------------------------


async def test_a_run_to_its_end() -> None:
    """Without a kill the target ends by itself, and every acknowledgement arrives in order."""
    async with open_crash_harness("crash_targets:say", path=[HERE]) as harness:
        for words in (["one", "two"], [], ["Ünïcode\n", '"quoted"'] * 50):
            crash = await harness.run(*words)
            assert crash == Crash(acks=tuple(words), status=0)
            assert not crash.killed


async def test_a_kill_after_acknowledgements() -> None:
    """The process dies no earlier than after the acknowledgement named, and what it wrote before is not lost."""
    async with open_crash_harness("crash_targets:say_and_wait", path=[HERE]) as harness:
        for after in (0, 1, 3):
            crash = await harness.run("a", "b", "c", kill=Kill(after_acks=after, delay_s=0.1))
            assert crash.killed
            assert crash.acks == ("a", "b", "c")


async def test_a_kill_before_anything_is_done() -> None:
    """A process may be killed before it has begun."""
    async with open_crash_harness("crash_targets:say_and_wait", path=[HERE]) as harness:
        for _ in range(50):
            crash = await harness.run("a", kill=Kill())
            assert crash.killed
            assert crash.acks in {(), ("a",)}


async def test_a_kill_that_comes_too_late() -> None:
    """A process that has ended by then is not killed, and nobody else either."""
    async with open_crash_harness("crash_targets:say", path=[HERE]) as harness:
        for kill in (Kill(after_acks=1, delay_s=0.05), Kill(after_acks=2)):
            assert await harness.run("a", kill=kill) == Crash(acks=("a",), status=0)


async def test_a_target_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    """A target that raises is no crash; its traceback is shown, and the harness goes on."""
    async with open_crash_harness("crash_targets:fail", path=[HERE]) as harness:
        for _ in range(2):
            with pytest.raises(CrashError, match="status 1"):
                await harness.run()
    assert "LookupError: on purpose" in capfd.readouterr().err


@pytest.mark.parametrize("target", ["crash_targets:nothing", "no_such_module:say"])
async def test_a_target_that_is_not_there(target: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong name is an error of the run and does not hang."""
    with pytest.raises(CrashError, match="gone"):
        await run_and_kill(target, kill=None, path=[HERE])
    assert "Error" in capfd.readouterr().err


def children() -> set[str]:
    """The processes that descend from this one."""
    parents: dict[str, str] = {}
    for entry in Path("/proc").iterdir():
        try:
            parents[entry.name] = (entry / "stat").read_text().rpartition(")")[2].split()[1]
        except (OSError, IndexError):
            continue
    found = {str(os.getpid())}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {str(os.getpid())}


async def test_an_argument_that_is_no_text_is_refused() -> None:
    """Such as a path; the harness can be used after it."""
    async with open_crash_harness("crash_targets:say_and_wait", path=[HERE]) as harness:
        with pytest.raises(TypeError, match=r"texts, not with .*Path"):
            await harness.run(Path("a"))  # type: ignore[arg-type]
        crash = await harness.run("a", kill=Kill(after_acks=1))
    assert (crash.killed, crash.acks) == (True, ("a",))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_cancelling_a_run_kills_its_process() -> None:
    """Nothing is left of a run that its caller gave up, and the harness says that it cannot go on."""
    before = children()
    async with open_crash_harness("crash_targets:say_and_wait", path=[HERE]) as harness:
        with trio.move_on_after(0.2) as scope:
            await harness.run("a")
        assert scope.cancelled_caught
        with pytest.raises(trio.BusyResourceError):
            await harness.run("a")
    assert children() - before == set()


# --- logs -------------------------------------------------------------------------------------------------------------


async def check_log(
    harness: CrashHarness, directory: Path, *, kills: Sequence[Kill], mend: CrashHarness | None = None
) -> str:
    """Kill a writer of one log again and again; with `mend`, kill the mending after each kill too."""
    acked: list[str] = []

    async def reopen(number: int) -> list[str]:
        if mend is not None:
            await mend.run(str(directory / "log"), kill=kills[-1 - number])
        return crash_targets.read_log(str(directory / "log"))

    def compare(crash: Crash, found: list[str]) -> list[str]:
        problems = compare_log([*acked, *crash.acks], found)
        acked[:] = found
        return problems

    summary = await check_crashes(
        harness, kills=kills, args=lambda _number: [str(directory / "log")], reopen=reopen, compare=compare
    )
    return f"{summary.runs} runs, {summary.killed} killed, {summary.acks:,} acknowledged lines, 0 lost"


async def kill_a_good_log(
    tmp_path: Path, rng: random.Random, *, count: int, record: Callable[[str, object], None]
) -> None:
    async with (
        open_crash_harness("crash_targets:write_log", path=[HERE]) as harness,
        open_crash_harness("crash_targets:mend_log", path=[HERE]) as mend,
    ):
        kills = [draw_kill(rng, max_acks=20, max_delay_s=0.005) for _ in range(count)]
        record("figure", await check_log(harness, tmp_path, kills=kills, mend=mend))


async def test_a_good_log_keeps_every_line(
    tmp_path: Path, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """100 kills of a log that syncs before it promises, and of its mending: nothing is lost."""
    await kill_a_good_log(tmp_path, rng, count=100, record=record_property)


@pytest.mark.long
async def test_a_good_log_keeps_every_line_for_long(
    tmp_path: Path, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """The same with 20,000 kills."""
    await kill_a_good_log(tmp_path, rng, count=20_000, record=record_property)


async def test_a_log_that_promises_too_early_is_caught(tmp_path: Path, rng: random.Random) -> None:
    """What was acknowledged out of a buffer is found lost, with what it takes to repeat it."""
    async with open_crash_harness("crash_targets:promise_too_early", path=[HERE]) as harness:
        kills = [draw_kill(rng, max_acks=20, max_delay_s=0.001) for _ in range(20)]
        with pytest.raises(CrashError, match=r"(?s)run \d+, Kill\(.*acknowledged as 'line .*' and lost"):
            await check_log(harness, tmp_path, kills=kills)


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("syscall", ["write", "fsync", "openat", "ftruncate"])
async def test_a_good_log_at_every_call(
    syscall: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Killed at each call in turn, over a torn line of an earlier life, the log keeps what it promised."""
    async with open_crash_harness("crash_targets:write_log", path=[HERE]) as harness:

        def args(number: int) -> list[str]:
            path = tmp_path / str(number)
            path.write_text("line 0\nli")
            return [str(path), "3"]

        async def check(number: int, crash: Crash) -> None:
            found = crash_targets.read_log(str(tmp_path / str(number)))
            assert compare_log(["line 0", *crash.acks], found) == []
            assert crash.killed or crash.acks == ("line 1", "line 2", "line 3")

        points = await kill_at_every_call(harness, syscall=syscall, args=args, check=check)
        assert points == {"write": 6, "fsync": 4, "openat": points, "ftruncate": 1}[syscall]
        assert points >= 1
        record_property("figure", f"{points} points of {syscall}")


@pytest.mark.usefixtures("tracing")
async def test_a_log_rewritten_in_place_is_caught_at_some_call(tmp_path: Path) -> None:
    """A log that is correct between its writes only is found out by a kill in the middle."""
    async with open_crash_harness("crash_targets:rewrite_in_place", path=[HERE]) as harness:

        async def check(number: int, crash: Crash) -> None:
            found = crash_targets.read_log(str(tmp_path / str(number)))
            assert compare_log(crash.acks, found) == []

        with pytest.raises(AssertionError, match="was acknowledged as 'line 0' and lost"):
            await kill_at_every_call(
                harness, syscall="write", args=lambda number: [str(tmp_path / str(number))], check=check
            )


def test_compare_log() -> None:
    """Lost, changed, reordered and additional items are named; one under way is allowed."""
    assert compare_log([], []) == []
    assert compare_log(["a"], ["a"]) == compare_log(["a"], ["a", "b"]) == []
    assert compare_log(["a", "b"], ["a"]) == ["item 1 was acknowledged as 'b' and lost"]
    assert compare_log(["a", "b"], ["b", "a"]) == [
        "item 0 was acknowledged as 'a' and is 'b'",
        "item 1 was acknowledged as 'b' and is 'a'",
    ]
    assert len(compare_log(["a"], ["a", "b", "c"])) == 1
    assert compare_log(["a"], ["a", "b", "c"], in_flight=2) == []


# --- the memory store -------------------------------------------------------------------------------------------------


async def test_the_memory_store_promises_nothing_beyond_its_process() -> None:
    """A killed process takes its answered turns with it, and the same key starts empty."""
    async with open_crash_harness("crash_targets:chat_in_memory", path=[HERE]) as harness:
        with trio.fail_after(30):
            crash = await harness.run("user:42", kill=Kill(after_acks=3))
    assert crash.killed
    assert len(crash.acks) >= 3
    store = MemoryStore()
    async with (
        open_simulated_network(Simulator()) as network,
        open_client(
            api_key="sk-test", base_url=network.base_url, insecure_http=True, transport=network, store=store
        ) as client,
    ):
        assert await client.session("user:42").history() == []
        await client.session("user:42").ask("hello")
        # Whoever reads what a store promises is told that this one lives as long as its process.
        assert getattr(store, "durability", "process") == "process"


# --- commands, and the output of a batch ------------------------------------------------------------------------------


async def test_a_command_is_killed_when_told() -> None:
    """What a command had printed by then is there, nothing later is."""
    script = "import time; print('begun', flush=True); time.sleep(60); print('ended')"
    asked: list[float] = []

    def when() -> bool:
        asked.append(trio.current_time())
        return asked[-1] - asked[0] > 0.3

    crash = await run_command_and_kill([sys.executable, "-c", script], when=when)
    assert crash.killed
    assert crash.stdout == b"begun\n"


async def test_a_command_that_ends_first() -> None:
    """A command that ends by itself is waited for, whatever the kill was to wait for."""
    crash = await run_command_and_kill([sys.executable, "-c", "print(1); exit(3)"], when=lambda: False)
    assert (crash.status, crash.stdout, crash.killed) == (3, b"1\n", False)


def write_rows(path: Path, count: int) -> None:
    rows = [{"id": f"row {number}", "prompt": f"[[say answer {number}]]"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_output(before: bytes, after: bytes) -> int:
    """Whether what a killed batch left is whole but for its last line; returns the number of whole rows."""
    assert after.startswith(before), "rows that were there are gone"
    *lines, _torn = after.split(b"\n")
    rows = [json.loads(line) for line in lines]
    ids = [row["custom_id"] for row in rows]
    assert len(set(ids)) == len(ids), "a row stands there twice"
    for row in rows:
        number = row["custom_id"].removeprefix("row ")
        assert row["response"]["body"]["choices"][0]["message"]["content"] == f"answer {number}"
    return len(rows)


async def kill_batches(
    tmp_path: Path, rng: random.Random, *, count: int, record: Callable[[str, object], None]
) -> None:
    write_rows(tmp_path / "in.jsonl", 2_000)
    killed = rows = 0
    for number in range(count):
        out = tmp_path / f"out{number}.jsonl"
        seen = b""
        size = rng.choice((1, rng.randrange(1_000_000)))

        def when(out: Path = out, size: int = size) -> bool:
            nonlocal seen
            if out.exists() and out.stat().st_size >= size:
                seen = out.read_bytes()
            return bool(seen)

        command = [sys.executable, "-m", "gorouter_trio", "batch", tmp_path / "in.jsonl", "-o", out, "--simulate"]
        crash = await run_command_and_kill([str(word) for word in command], when=when, delay_s=rng.uniform(0, 0.01))
        assert crash.killed or crash.status == 0, crash.stderr.decode()
        rows += check_output(seen, out.read_bytes())
        killed += crash.killed
    record("figure", f"{killed} of {count} batches killed, {rows:,} whole rows left")
    assert killed


async def test_a_killed_batch_leaves_whole_rows(
    tmp_path: Path, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """After a kill at any moment the output is whole rows, each once, none of those seen lost, perhaps a torn last."""
    pytest.importorskip("cyclopts", reason="needs the extra cli")
    await kill_batches(tmp_path, rng, count=2, record=record_property)


@pytest.mark.long
async def test_many_killed_batches_leave_whole_rows(
    tmp_path: Path, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """The same for 1,000 kills."""
    pytest.importorskip("cyclopts", reason="needs the extra cli")
    await kill_batches(tmp_path, rng, count=1_000, record=record_property)

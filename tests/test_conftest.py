"""The shared fixtures themselves: leaks are found, and a seed repeats a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from source_tree import REPOSITORY


async def test_no_leaks_accepts_what_ends(no_leaks):
    """Tasks, sockets and threads that ended within the block are no leak."""
    async with no_leaks():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.checkpoint)
        with trio.socket.socket() as socket:
            await socket.bind(("127.0.0.1", 0))
        await trio.to_thread.run_sync(os.getpid)


async def test_no_leaks_waits_a_moment(no_leaks, autojump_clock):
    """A task and a file that end by themselves within the time to settle are no leak; no more time is spent."""
    read, write = os.pipe()
    os.close(write)

    async def close_later() -> None:
        await trio.sleep(0.5)
        os.close(read_again)

    async with trio.open_nursery() as nursery:
        start = trio.current_time()
        async with no_leaks(settle_s=1.0):
            read_again = os.dup(read)
            nursery.start_soon(close_later)
        assert trio.current_time() - start < 0.6
    os.close(read)


async def test_no_leaks_finds_a_task(no_leaks, autojump_clock):
    """A task that outlives the block is a leak."""
    async with trio.open_nursery() as nursery:
        with pytest.raises(AssertionError, match="1 trio tasks left over"):
            async with no_leaks():
                nursery.start_soon(trio.sleep_forever)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("number_again", [False, True])
async def test_no_leaks_finds_a_file(no_leaks, autojump_clock, number_again: bool):
    """An open descriptor is a leak, also when it has the number of one that was closed."""
    before = os.open(os.devnull, os.O_RDONLY)
    opened: list[int] = []
    try:
        with pytest.raises(AssertionError, match=r"open files left over: \{\d+: 'pipe:"):
            async with no_leaks():
                if number_again:
                    os.close(before)
                opened += os.pipe()
    finally:
        for number in {before, *opened} if not number_again else opened:
            os.close(number)
    assert (before in opened) == number_again


async def test_no_leaks_passes_errors_on(no_leaks):
    """An error of the block leaves as itself, leak or not."""
    with pytest.raises(KeyError):
        async with no_leaks():
            raise KeyError


RANDOM_TESTS = """
import pathlib
from hypothesis import given, strategies

log = pathlib.Path(__file__).with_name("log")

def write(text):
    with log.open("a") as file:
        file.write(f"{text}\\n")

def test_a(rng, seed):
    write(f"{rng.random()} {seed}")

def test_b(rng):
    write(rng.random())

@given(strategies.integers())
def test_c(number):
    write(number)

def test_figure(record_property):
    record_property("figure", "42 steps")

def test_fails():
    assert not log
"""


def _run(directory: Path, *arguments: str) -> tuple[str, str]:
    """Runs RANDOM_TESTS; what pytest printed and what the tests drew."""
    printed = _pytest(directory, RANDOM_TESTS, *arguments)
    assert "1 failed, 4 passed" in printed, printed
    return printed, (directory / "log").read_text()


def _pytest(directory: Path, tests: str, *arguments: str, ignored: str = "") -> str:
    """Runs the tests under this project's conftest and returns what pytest printed."""
    directory.mkdir()
    shutil.copy(REPOSITORY / "tests" / "conftest.py", directory)
    (directory / "test_inner.py").write_text(tests)
    (directory / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    command = ["sh", "-c", f"trap '' {ignored}; exec \"$@\"", "sh"] if ignored else []
    command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, str(directory)]
    environment = {**os.environ, "CI": "true"}  # where hypothesis would rather draw the same every time
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=50
    )
    return done.stdout + done.stderr


def test_a_seed_repeats_a_run(tmp_path: Path) -> None:
    """A run says which seed it had; that seed repeats it in every kind of random test, another one does not."""
    printed, drawn = _run(tmp_path / "a")
    seed = int(printed.partition("--seed=")[2].partition(")")[0])
    assert f"seed: {seed} (repeat this run with" in printed
    assert f"\nrepeat with --seed={seed}\n" in printed
    assert "test_figure: 42 steps" in printed
    assert _run(tmp_path / "b", f"--seed={seed}")[1] == drawn

    lines = drawn.splitlines()
    others = _run(tmp_path / "c", f"--seed={seed + 1}")[1].splitlines()
    assert not set(lines[:2]) & set(others[:2])
    assert lines[2:] != others[2:]
    assert lines[0].split()[0] != lines[1]


HANGING_TESTS = """
import pytest
import trio

async def test_waits():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever, name="the sleeper")

@pytest.fixture
async def held():
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()

async def test_waits_with_a_fixture(held):
    await trio.sleep_forever()

async def test_spins():
    while True:
        pass

def test_spins_without_trio():
    while True:
        pass

async def test_after(autojump_clock):
    await trio.sleep(100)
"""


@pytest.mark.parametrize("ignored", ["", "INT"])
def test_a_hung_test_fails_alone(tmp_path: Path, ignored: str) -> None:
    """A test that hangs fails by its timeout, names trio's tasks, and leaves the tests after it alone.

    So it does in the background of a shell, which has SIGINT ignored there.
    """
    # Python 3.11 can fail to parse a source while what a hung run has left is collected: no sources here.
    printed = _pytest(tmp_path / "a", HANGING_TESTS, "--timeout=0.3", "-rfp", "--tb=native", ignored=ignored)
    assert "4 failed, 1 passed" in printed, printed
    assert "PASSED test_inner.py::test_after" in printed
    assert "Timeout (>0.3 s); the tasks of trio:" in printed
    assert "<test 'test_waits'> at test_inner.py:6" in printed
    assert "  the sleeper at " in printed
    # Of the one without trio alone, in its traceback and in the summary.
    assert printed.count("from pytest-timeout") == 2, printed

"""What every test shares: one printed seed, leak checks, figures in the summary, optional reference material."""

from __future__ import annotations

import inspect
import os
import random
import signal
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import hypothesis
import pytest
import pytest_timeout
import trio

from gorouter_trio.testing.crash import can_trace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator
    from contextlib import AbstractAsyncContextManager

# No deadline and no complaint about slow data: the machine may be shared, and a time is not what these tests claim. Not
# derandomised, as hypothesis would choose by itself where CI is set: each run tries something new and says its seed.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("long", hypothesis.settings.get_profile("default"), max_examples=5_000)
hypothesis.settings.load_profile("default")


# --- the seed ---------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=None,
        help="seed of every randomised test, hypothesis included (default: a new one each run, printed)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Chooses the seed before hypothesis reads its own; workers of a parallel run inherit both."""
    if config.option.seed is None:
        config.option.seed = int.from_bytes(os.urandom(4))
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(config.option.seed)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed} (repeat this run with --seed={config.option.seed})"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A random source of the test's own: the same for the same run seed and test, whatever else ran before."""
    return random.Random(f"{request.config.option.seed}:{request.node.nodeid}")


@pytest.fixture
def seed(rng: random.Random) -> int:
    """A seed to hand on, 0 to 2**32 - 1."""
    return rng.getrandbits(32)


# --- the summary ------------------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints what tests recorded with `record_property("figure", text)`, and how to repeat a failed run."""
    figures = list(_figures(terminalreporter))
    if figures:
        terminalreporter.section("figures")
        for nodeid, text in figures:
            terminalreporter.write_line(f"{nodeid.rpartition('::')[2]}: {text}")
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"repeat with --seed={config.option.seed}")


def _figures(reporter: pytest.TerminalReporter) -> Iterator[tuple[str, object]]:
    for outcome in ("passed", "failed"):
        for report in reporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "figure" and report.when == "call":
                    yield report.nodeid, value


# --- leaks ------------------------------------------------------------------------------------------------------------


class LeakCheck(Protocol):
    """Makes a block that has to leave as many tasks and open files behind as it found."""

    def __call__(self, *, settle_s: float = 1.0) -> AbstractAsyncContextManager[None]: ...


@pytest.fixture
def no_leaks() -> LeakCheck:
    """`async with no_leaks(): ...` fails when trio tasks or file descriptors (sockets, pipes, files) are left over.

    What ends by itself within `settle_s` of the trio clock, such as the far end of a connection just closed, is no
    leak. An exception from the block passes unchanged.
    """
    return _no_leaks


@asynccontextmanager
async def _no_leaks(*, settle_s: float = 1.0) -> AsyncIterator[None]:
    # The first waiting on a thread or a name makes trio open descriptors that it keeps: have them before counting.
    await trio.to_thread.run_sync(int)
    tasks, files = _living_tasks(), open_files()
    yield
    with trio.move_on_after(settle_s):
        while _living_tasks() > tasks or _opened_since(files):
            await trio.sleep(settle_s / 50)
    assert _living_tasks() <= tasks, f"{_living_tasks() - tasks} trio tasks left over"
    assert not _opened_since(files), f"open files left over: {_opened_since(files)}"


def _living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def _opened_since(files: dict[int, str]) -> dict[int, str]:
    """What is open now and was not: a number used again for something else counts."""
    return {number: what for number, what in open_files().items() if files.get(number) != what}


def open_files() -> dict[int, str]:
    """The process's open descriptors with what each is, as far as the system tells."""
    directory = "/proc/self/fd" if Path("/proc/self/fd").is_dir() else "/dev/fd"
    found: dict[int, str] = {}
    for name in os.listdir(directory):
        try:
            found[int(name)] = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue  # the descriptor of this very listing
        except OSError:
            found[int(name)] = "?"
    return found


# --- reference material -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The shared reference material (API description, captured replies): GOROUTER_SHARED, else a folder named `shared`
    beside the repository. Skips the test where there is none, as on a clone by itself; a variable that points nowhere
    is an error.
    """
    named = os.environ.get("GOROUTER_SHARED")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if (path / "openrouter" / "examples").is_dir():
        return path
    if named:
        pytest.fail(f"GOROUTER_SHARED={named} has no openrouter/examples")
    pytest.skip("no reference material: set GOROUTER_SHARED to its directory")


@pytest.fixture(scope="session")
def _may_trace() -> bool:
    return trio.run(can_trace)


@pytest.fixture
def tracing(_may_trace: bool) -> None:
    """Skips where calls cannot be traced. Not async: a test that only says `usefixtures` would not wait for it."""
    if not _may_trace:
        pytest.skip("strace is not installed, or may not trace here")


# --- hung tests -------------------------------------------------------------------------------------------------------

HUNG = pytest.StashKey[str]()
GRACE_S = 5.0


@pytest.hookimpl
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool | None:
    """Ends a hung async test the way Ctrl-C ends a trio program; returns None for what pytest-timeout can do itself.

    Its alarm would raise in the midst of trio's loop, and every test after it would fail. A test that hangs on, because
    it is shielded, is ended in that way nevertheless, `GRACE_S` later.
    """
    if settings.method != "signal" or not inspect.iscoroutinefunction(getattr(item, "function", None)):
        return None

    def on_alarm(*_: object) -> None:
        if not settings.disable_debugger_detection and pytest_timeout.is_debugging():
            return
        if HUNG in item.stash or not trio.lowlevel.in_trio_run():
            pytest_timeout.timeout_sigalrm(item, settings)
        item.stash[HUNG] = f"Timeout (>{settings.timeout} s); the tasks of trio:\n{_describe_tasks()}"
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        signal.raise_signal(signal.SIGINT)

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in the background of a shell. Trio would leave it at that, and the alarm raise in the midst of its loop.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    item.cancel_timeout = cancel  # type: ignore[attr-defined]  # where pytest-timeout looks for it
    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout)
    return True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Makes what a hung test was ended with a failure of that test, not an interrupt of the whole run."""
    try:
        result = yield
    except BaseException:
        if HUNG in pyfuncitem.stash:
            pytest.fail(pyfuncitem.stash[HUNG], pytrace=False)
        raise
    if HUNG in pyfuncitem.stash:
        pytest.fail(pyfuncitem.stash[HUNG], pytrace=False)
    return result


def _describe_tasks() -> str:
    """One line a task of the running trio program: its name, and the innermost line of ours or the test's it is at."""
    lines: list[str] = []
    todo = [trio.lowlevel.current_root_task()]
    while todo:
        task = todo.pop()
        if task is None:
            continue
        frames = [
            f"{Path(frame.f_code.co_filename).name}:{line}"
            for frame, line in task.iter_await_frames()
            if "site-packages" not in frame.f_code.co_filename
        ]
        lines.append(f"  {task.name} at {frames[-1] if frames else 'trio'}")
        todo.extend(child for nursery in task.child_nurseries for child in nursery.child_tasks)
    return "\n".join(lines)

"""The other commands: demo, simulate, models, key, credits, and what holds for all."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
from functools import partial
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
KEY = "sk-or-v1-0123456789abcdef-secret"


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env=variables,
        timeout=50,
    )


def test_demo(gorouter) -> None:
    """A batch, a conversation that remembers, and a table of what ran."""
    done = gorouter("demo", "--rows", "30", "--max-in-flight", "20")
    assert done.code == 0, done.err
    assert "Your name is Ada." in done.out
    table = dict(line.split(None, 1) for line in done.out.partition("What ran\n")[2].splitlines())
    assert table["rows"] == "30"
    assert table["failed"] == "0"
    assert list(table) == [
        *("rows", "failed", "rate", "latency", "retries", "conversation", "first", "tokens", "cost", "connections")
    ]


def test_demo_as_json(inside) -> None:
    """The sums, and nothing else."""
    done = inside("demo", "--rows", "5", "--seed", "4", "--json")
    report = json.loads(done.out)
    assert (done.code, report["rows"], report["turns"], report["remembered"]) == (0, 5, 3, True)


def test_simulate(gorouter, simulator) -> None:
    """It prints its base URL, serves with the faults asked for, and ends with its counters."""
    running = simulator("--seed", "3", "--fault", "503=1", "--retry-after", "300")
    assert running.base_url.startswith("http://127.0.0.1:")
    done = gorouter("chat", "-p", "hi", "--base-url", running.base_url, OPENROUTER_API_KEY=KEY)
    assert done.code == 1
    assert "the server asks to wait 300 s" in done.message
    ended = running.stop()
    assert (ended.code, ended.err) == (0, "")
    assert "requests   1\n" in ended.out
    assert "refused    1\n" in ended.out


def test_simulate_recordings(gorouter, simulator, tmp_path) -> None:
    """What was recorded is answered so, anything else is refused, and a file that is none is one line."""
    path = tmp_path / "recorded.jsonl"
    line = {"method": "GET", "path": "/credits", "json": {"data": {"total_credits": 7, "total_usage": 2}}}
    path.write_text(json.dumps(line) + "\n")
    running = simulator("--recordings", str(path), "--only-recordings")
    ask = partial(gorouter, OPENROUTER_API_KEY=KEY)
    assert "left    $5.00\n" in ask("credits", "--base-url", running.base_url).out
    assert "No recording" in ask("key", "--base-url", running.base_url).message
    running.stop()
    path.write_text("no JSON\n")
    for wrong, said in ((path, f"{path}:1: "), (tmp_path / "none", "No such file")):
        done = gorouter("simulate", "--recordings", str(wrong))
        assert done.code == 2
        assert said in done.message


def test_simulate_json(simulator) -> None:
    """The base URL and the counters as an object each."""
    running = simulator("--json", "--listen", "localhost:0")
    assert json.loads(running.base_url)["base_url"].startswith("http://")
    assert json.loads(running.stop().out)["received"] == 0


def test_models(inside) -> None:
    """A table of at most 80 columns, all words of a search counting, or JSON."""
    done = inside("models", "--simulate")
    lines = done.out.splitlines()
    assert lines[0].split() == ["model", "context", "in,", "$/M", "out,", "$/M"]
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["openai/gpt-4o-mini", "128,000", "0.15", "0.60"] for line in lines)
    found = json.loads(inside("models", "gpt mini", "--simulate", "--json").out)
    assert {"gpt" in model["id"] and "mini" in model["id"] for model in found} == {True}
    done = inside("models", "no such thing", "--simulate")
    assert (done.code, done.out, done.message) == (1, "", "no model has 'no such thing' in its name")


def test_account(inside) -> None:
    """Key and credits, for people and as JSON."""
    assert "free tier      no\n" in inside("key", "--simulate").out
    assert json.loads(inside("key", "--simulate", "--json").out)["limit"] is None
    assert "left    $10,000.00\n" in inside("credits", "--simulate").out
    assert json.loads(inside("credits", "--simulate", "--json").out) == {"total_credits": 10_000, "total_usage": 0}


def test_help_and_version(inside) -> None:
    """Both succeed, and the help of a command names its options."""
    assert "simulate" in inside().out
    done = inside("batch", "--help")
    assert done.code == 0
    assert "--max-in-flight" in done.out
    assert inside("--version").code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", ["models --simulate", "chat -p hi --simulate", "--help"])
def test_full_stdout(arguments: str) -> None:
    """One line and exit code 1."""
    command = f"exec {sys.executable} -m gorouter_trio {arguments} > /dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=REPOSITORY, stderr=subprocess.PIPE, check=False, timeout=50)
    assert (done.returncode, done.stderr) == (1, b"gorouter-trio: standard output: No space left on device\n")


@pytest.mark.parametrize("library", ["rich", "cyclopts"])
def test_without_the_extra(library: str) -> None:
    """One line that says what to install; the package itself needs neither."""
    code = "import sys; sys.modules[{!r}] = None; from gorouter_trio.cli import main; sys.exit(main([]))"
    done = python(code.format(library))
    assert done.returncode == 2
    assert done.stderr == f"gorouter-trio: {library} is missing; install the command line: gorouter-trio[cli]\n"


def test_traceback_of_a_bug_shows_no_key() -> None:
    """Not even when the key is in the text of the exception."""
    code = (
        "from gorouter_trio.cli.failures import hide_keys_in_tracebacks; import os; hide_keys_in_tracebacks()\n"
        "raise RuntimeError('the header was Bearer ' + os.environ['OPENROUTER_API_KEY'])"
    )
    done = python(code, OPENROUTER_API_KEY=KEY)
    assert done.returncode == 1
    assert KEY not in done.stderr
    assert done.stderr.endswith("RuntimeError: the header was Bearer …\n")


@pytest.mark.parametrize("arguments", [["chat", "--simulate"], ["history", "import", "-", "--store", "bot.db"]])
def test_interrupt_while_waiting_for_input(arguments: list[str], tmp_path: Path) -> None:
    """Ctrl-C ends a command that waits for a pipe to which nobody writes, with its own exit code."""
    # Tests that run in the background of a shell ignore the signal, and so would what they start.
    start = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, '-m', 'gorouter_trio', *sys.argv[1:]])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start, *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    with process:
        try:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            while int.from_bytes(fcntl.ioctl(process.stdin, termios.FIONREAD, b"\0" * 4), sys.byteorder):
                threading.Event().wait(0.01)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 130
            assert process.stderr is not None
            assert process.stderr.read() == b"gorouter-trio: interrupted\n"
        finally:
            process.kill()

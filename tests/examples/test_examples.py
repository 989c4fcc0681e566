"""The example programs run as a user runs them, against the simulator inside their own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"

# What the output of each has to hold, in this order, besides ending well.
EXPECTED: dict[str, list[str]] = {
    "basic.py": [
        r"said 'stop' after \d+\.\d\d s, cost \$0\.\d+",
        r"refused with 400: .*no-such-model.*BadRequestError",
    ],
    "batch.py": [r"wrong: BadRequestError", r"200 answers for \$0\.\d+; crate-21: .*63"],
    "sessions.py": [
        r"(Ada|Grace): .*\1",
        r"(Ada|Grace): .*\1",
        r"interrupted after [1-9]\d* words",
        r"user:Ada: 6 messages, the last from the AssistantMessage",
        r"user:Ada/b: 8 messages",
    ],
    "streaming.py": [
        r"-- \d+ tokens, first one after 0\.\d\d s",
        r"-- \d\d+ pieces, then 'stop'",
        r"-- left after '.{61,}'",
    ],
}


def run_example(name: str) -> subprocess.CompletedProcess[str]:
    """The finished process of `python examples/NAME --simulate`, without a key in its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENROUTER_")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(EXAMPLES / name), "--simulate"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=50)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_runs_against_the_simulator(name: str) -> None:
    """Each example ends well, says nothing on stderr, and prints what it is there to show."""
    done = run_example(name)
    assert (done.returncode, done.stderr) == (0, "")
    at = 0
    for pattern in EXPECTED[name]:
        found = re.compile(pattern).search(done.stdout, at)
        assert found is not None, f"{pattern!r} not found in order in:\n{done.stdout}"
        at = found.end()


def test_no_example_is_left_out() -> None:
    """Every program in examples/ is run by the test above."""
    assert {path.name for path in EXAMPLES.glob("[!_]*.py")} == set(EXPECTED)


def test_an_example_without_a_key_names_the_variable() -> None:
    """Without --simulate and without a key an example ends with the error that says which variable to set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENROUTER_")}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(EXAMPLES / "basic.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=50)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("no key given; pass api_key=... or set OPENROUTER_API_KEY")

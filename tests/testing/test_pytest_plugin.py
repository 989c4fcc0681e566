"""The pytest plugin runs tests in worlds, beside pytest-trio and without it, and tells how to repeat a failure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PLUGIN = "gorouter_trio.testing.pytest_plugin"
REPOSITORY = Path(__file__).parents[2]

Pytest = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_pytest(tmp_path: Path) -> Pytest:
    """Runs pytest on a module, with the plugin alone, in a process and a directory of its own."""

    def run(source: str, *options: str, plugins: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
        (tmp_path / "test_it.py").write_text(source)
        chosen = [argument for plugin in (PLUGIN, *plugins) for argument in ("-p", plugin)]
        return subprocess.run(
            [sys.executable, "-m", "pytest", "--strict-markers", "-p", "no:cacheprovider", *chosen, *options],
            cwd=tmp_path,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )

    return run


TESTS = """
import pytest
import trio
from gorouter_trio.testing import Link, ScriptedModel, World


@pytest.fixture
def name() -> str:
    return "Ada"


async def test_in_a_world(gorouter_world, gorouter_seed, name):
    gorouter_world.serve(ScriptedModel([f"Hello, {name}."]))
    async with gorouter_world.open_client() as client:
        assert (await client.chat("Hi")).text == "Hello, Ada."
    await trio.sleep(86_400)
    assert gorouter_world.seed == gorouter_seed == SEED


@pytest.mark.gorouter(link=Link(latency_s=2))
class TestSlow:
    @pytest.mark.parametrize("times", [1, 2])
    async def test_in_a_class(self, gorouter_world, times):
        async with gorouter_world.open_client() as client:
            await client.chat("Hi")
        assert gorouter_world.now() == 8

    @pytest.mark.gorouter(link=Link(latency_s=1))
    async def test_the_closest_mark_counts(self, gorouter_world):
        async with gorouter_world.open_client() as client:
            await client.chat("Hi")
        assert gorouter_world.now() == 4


@pytest.mark.gorouter(until_s=100)
def test_by_hand(gorouter_run):
    async def scenario(world: World) -> None:
        await trio.sleep_forever()

    assert gorouter_run(scenario).virtual_s == 100
    assert gorouter_run(scenario, until_s=7).virtual_s == 7


async def test_skips(gorouter_world):
    pytest.skip("not today")
"""


@pytest.mark.parametrize("with_trio", [False, True])
def test_tests_run_in_worlds(run_pytest: Pytest, with_trio: bool) -> None:
    """Functions, methods, parameters, fixtures, marks and skips work, also where pytest-trio takes all async tests."""
    source = TESTS.replace("SEED", "0")
    if with_trio:
        source += "\n\nasync def test_of_pytest_trio(autojump_clock):\n    await trio.sleep(1_000)\n"
        done = run_pytest(source, "-o", "trio_mode=true", plugins=("pytest_trio.plugin",))
    else:
        done = run_pytest(source)
    assert f"{6 if with_trio else 5} passed, 1 skipped" in done.stdout, done.stdout + done.stderr


def test_the_seed_can_be_chosen(run_pytest: Pytest) -> None:
    """A number is every test's seed, and `random` draws one and says which."""
    done = run_pytest(TESTS.replace("SEED", "77"), "--gorouter-seed=77")
    assert "5 passed" in done.stdout, done.stdout
    assert "repeat this run with --gorouter-seed=77" in done.stdout
    drawn = run_pytest("def test_it(gorouter_seed):\n    assert gorouter_seed != 0\n", "--gorouter-seed=random")
    assert "repeat this run with --gorouter-seed=" in drawn.stdout
    assert "1 passed" in drawn.stdout


def test_a_failure_is_shown_with_its_log(run_pytest: Pytest) -> None:
    """The report has the error as itself, the seed, and what happened last in the world."""
    done = run_pytest(
        "async def test_it(gorouter_world):\n"
        "    async with gorouter_world.open_client() as client:\n"
        "        reply = await client.chat('Hi')\n"
        "    gorouter_world.record('mine', answer=42)\n"
        "    assert reply.text == 'no'\n",
        "--gorouter-seed=5",
    )
    assert "1 failed" in done.stdout
    assert "assert reply.text == 'no'" in done.stdout
    assert "gorouter world of seed 5 (repeat with --gorouter-seed=5)" in done.stdout
    assert '"kind":"mine","answer":42}' in done.stdout


@pytest.mark.parametrize(
    ("mark", "told"),
    [
        ("fault=[Refuse()]", "'fault' is no setting of a world; there are start"),
        ("Link()", "@pytest.mark.gorouter takes settings by name, not Link("),
    ],
)
def test_a_mark_with_a_mistake_is_told(run_pytest: Pytest, mark: str, told: str) -> None:
    """A test whose faults would strike nobody does not pass."""
    done = run_pytest(
        "import pytest\nfrom gorouter_trio.testing import Link, Refuse\n"
        f"@pytest.mark.gorouter({mark})\nasync def test_async(gorouter_world):\n    pass\n"
        f"@pytest.mark.gorouter({mark})\ndef test_plain(gorouter_run):\n"
        "    async def scenario(world):\n        pass\n    gorouter_run(scenario)\n"
    )
    assert "2 failed" in done.stdout, done.stdout
    assert len(re.findall(rf"^E +TypeError: {re.escape(told)}", done.stdout, re.MULTILINE)) == 2, done.stdout


def test_a_world_is_for_async_tests(run_pytest: Pytest) -> None:
    """A plain test that asks for a world is told what to take."""
    done = run_pytest("def test_it(gorouter_world):\n    pass\n")
    assert "a test that is not takes gorouter_run" in done.stdout


def test_hypothesis_tests_run_in_worlds(run_pytest: Pytest) -> None:
    """Each example runs in a world of its own."""
    done = run_pytest(
        "import hypothesis\nfrom hypothesis import strategies as st\n"
        "@hypothesis.settings(max_examples=5, suppress_health_check=list(hypothesis.HealthCheck), deadline=None,"
        " database=None)\n"
        "@hypothesis.given(text=st.text('ab', min_size=1))\n"
        "async def test_it(gorouter_world, text):\n"
        "    assert gorouter_world.now() == 0\n"
        "    async with gorouter_world.open_client() as client:\n"
        "        assert (await client.chat(f'[[say {text}]]')).text == text\n"
    )
    assert "1 passed" in done.stdout, done.stdout


def test_the_package_does_not_need_pytest() -> None:
    """Everything but the plugin is imported without it."""
    code = (
        "import sys; sys.modules['pytest'] = None; import gorouter_trio.testing, gorouter_trio.testing.sweep;"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in {'pytest', 'hypothesis', '_pytest'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "['pytest']"

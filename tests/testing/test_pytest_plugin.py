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


FIXTURES = """
import pytest
from gorouter_trio.testing import ScriptedModel


@pytest.fixture
def served(gorouter_world):
    def serve(*replies):
        gorouter_world.serve(ScriptedModel(replies))
        return gorouter_world

    return serve


async def test_hands_on(served, gorouter_seed):
    world = served("Hello.")
    assert world.seed == gorouter_seed == 3
    async with world.open_client() as client:
        assert (await client.chat("Hi")).text == "Hello."


@pytest.fixture
def name(gorouter_world):
    return "Ada"


@pytest.mark.gorouter(start=1_000)
async def test_takes_it_through_a_fixture(name, served):
    assert served().wall() == 1_000


@pytest.fixture
def too_early(gorouter_world):
    return gorouter_world.open_client()


async def test_too_early(too_early):
    pass
"""


def test_fixtures_hand_a_world_on(run_pytest: Pytest) -> None:
    """A fixture passes the world to the test that runs in it; one that uses it before is told so."""
    done = run_pytest(FIXTURES, "--gorouter-seed=3")
    assert "2 passed, 1 error" in done.stdout, done.stdout
    assert "gorouter_world.open_client: the world is there while the test runs, not yet in its fixtures" in done.stdout


@pytest.mark.parametrize(
    "body",
    ["    pytest.fail('no')", "    with pytest.raises(ValueError):\n        pass", "    pytest.skip('today')"],
    ids=["fail", "raises", "skip"],
)
@pytest.mark.parametrize("takes", ["gorouter_world", "gorouter_run"])
def test_pytests_own_failures_are_shown_too(run_pytest: Pytest, body: str, takes: str) -> None:
    """What is no `Exception` comes with the seed and the log as well; a skip comes without."""
    scenario = f"async def scenario(world):\n    world.record('mine', answer=42)\n{body}\n"
    test = {
        "gorouter_world": "async def test_it(gorouter_world):\n    await scenario(gorouter_world)\n",
        "gorouter_run": "def test_it(gorouter_run):\n    gorouter_run(scenario)\n",
    }[takes]
    done = run_pytest(f"import pytest\n{scenario}{test}", "--gorouter-seed=5", "-rs")
    is_skip = "skip" in body
    assert ("1 skipped" if is_skip else "1 failed") in done.stdout, done.stdout
    assert ("(repeat with --gorouter-seed=5)" in done.stdout) is not is_skip
    assert ('"kind":"mine","answer":42}' in done.stdout) is not is_skip


def test_a_world_in_which_nothing_happened_is_told(run_pytest: Pytest) -> None:
    """The seed is there for a test that fails before it does anything."""
    done = run_pytest("async def test_it(gorouter_world):\n    assert 1 == 2\n", "--gorouter-seed=5")
    assert "gorouter world of seed 5 (repeat with --gorouter-seed=5)" in done.stdout
    assert "(nothing happened in it)" in done.stdout


def test_workers_share_a_seed_that_is_drawn(run_pytest: Pytest) -> None:
    """With pytest-xdist, the seed in the header is that of every test."""
    pytest.importorskip("xdist")
    source = (
        "import pytest\n@pytest.mark.parametrize('number', range(4))\n"
        "async def test_it(gorouter_world, number):\n    pytest.fail(f'seed is {gorouter_world.seed}.')\n"
    )
    done = run_pytest(source, "-n2", "--gorouter-seed=random", plugins=("xdist.plugin",))
    assert "4 failed" in done.stdout, done.stdout + done.stderr
    header = re.search(r"repeat this run with --gorouter-seed=(\d+)", done.stdout)
    assert header is not None
    assert set(re.findall(r"^E +Failed: seed is (\d+)\.", done.stdout, re.MULTILINE)) == {header[1]}


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


def test_parameters_of_hypothesis_tests_have_their_marks(run_pytest: Pytest) -> None:
    """The settings are those of the parameters that run, in classes too, and one log is shown of all that failed."""
    done = run_pytest(
        "import hypothesis, pytest\nfrom hypothesis import strategies as st\nfrom gorouter_trio.testing import Link\n"
        "slow = pytest.mark.gorouter(link=Link(latency_s=7))\n"
        "fast = hypothesis.settings(max_examples=20, suppress_health_check=list(hypothesis.HealthCheck),"
        " deadline=None, database=None)\n"
        "class TestIt:\n"
        "    @fast\n"
        "    @pytest.mark.parametrize('wanted_s', [0, pytest.param(7, marks=slow), 0])\n"
        "    @hypothesis.given(number=st.integers(0, 10))\n"
        "    async def test_passes(self, gorouter_world, wanted_s, number):\n"
        "        assert gorouter_world.network.link.latency_s == wanted_s\n"
        "@fast\n"
        "@hypothesis.given(number=st.integers(0, 10_000))\n"
        "async def test_fails(gorouter_world, number):\n"
        "    gorouter_world.record('mine', number=number)\n"
        "    assert number < 500\n"
    )
    assert "1 failed, 3 passed" in done.stdout, done.stdout
    assert done.stdout.count("(repeat with --gorouter-seed=0)") == 1
    assert '"kind":"mine","number":500}' in done.stdout


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

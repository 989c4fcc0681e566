"""The example programs run as a user runs them, against the simulator inside their own process."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gorouter_trio.security import Principal
from gorouter_trio.testing import ScriptedModel, World, use_tool
from gorouter_trio.testing import run as start

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"

# What the output of each has to hold, in this order, besides ending well.
EXPECTED: dict[str, list[str]] = {
    "asyncio_app.py": [
        r"3 of 4 in time",
        r"-- \d+ pieces",
        r"the loop went on: True",
        r"4 messages kept; \$0\.\d+",
    ],
    "basic.py": [
        r"said 'stop' after \d+\.\d\d s, cost \$0\.\d+",
        r"refused with 400: .*no-such-model.*BadRequestError",
    ],
    "batch.py": [r"wrong: BadRequestError", r"200 answers for \$0\.\d+; crate-21: .*63"],
    "kit_01_basic_chat.py": [r"\w+.*\.\n", r"4 messages; the last from openai/gpt-4o-mini"],
    "kit_02_ask.py": [r"\w+.*\n", r"group:team-a/user:u-42: 2 messages"],
    "kit_03_streaming.py": [r"\w+ \w+.*\n", r"model=openai/gpt-4o-mini\S* finish=stop duration_ms=\d+"],
    "kit_04_json_object.py": [r"dict \{'\w+': "],
    "kit_05_json_schema.py": [r"'\w+' \d+ '\w+'", r"\['age', 'city', 'name'\]"],
    "kit_06_tools.py": [r"tool=sum status=success result=\{'value': 12\.0\} duration_ms=\d+", r"12"],
    "kit_07_services.py": [r"\d\d+ models; key: \S+.* limit: None", r"credits: \d+ used: \d+"],
    "kit_08_prices.py": [r"\d\d+ prices; total 0\.0*[1-9]\d* USD, [1-9]\d* tokens", r"1\.5E-7 USD a prompt token"],
    # Which of the plugins says something first is nobody's promise.
    "kit_09_plugins.py": [
        r"(?=(.*\n)*model=openai/gpt-4o-mini-\S+ tokens=\d+ cost=0\.\d+\n)",
        r"(?=(.*\n)*INFO chat=1 model=openai/gpt-4o-mini messages=1 .*finish_reason=stop .*cost_usd=0\.\d+\n)",
        r"requests=1 succeeded=1 failed=0",
    ],
    "kit_10_history.py": [r"2 messages on disk", r"calls=1 cost=0\.\d+"],
    "kit_11_security.py": [r"with the token: success", r"without: AuthenticationRequiredError"],
    "kit_basic.py": [r"\w+", r"bad request: messages: ", r"api error: status=400 message=nobody/no-such-model"],
    "kit_history.py": [
        r"Ada",
        r"UserMessage: \nAssistantMessage: openai/gpt-4o-mini\S*\nUserMessage: \nAssistantMessage: openai",
        r"2 calls, cost 0\.\d+ USD",
    ],
    "kit_plugins.py": [
        r"chat 1 of openai/gpt-4o-mini ended",
        r"tools: \['clock'\]",
        r"refused: no secrets, please",
        r"event: BadRequestError",
        r"announcer ends",
        r"requests=2 failed=1 tools=1",
    ],
    "sessions.py": [
        r"(Ada|Grace): .*\1",
        r"(Ada|Grace): .*\1",
        r"interrupted after [1-9]\d* words",
        r"user:Ada: 6 messages, the last from the AssistantMessage",
        r"user:Ada/b: 8 messages",
    ],
    "taxi.py": [
        r"(ada: price success: \{\"price_eur\":\"45.30\"\}|grace: price success: \{\"price_eur\":\"38.10\"\})",
        r"(grace: send_car error_security: .*not approved|ada: send_car success: car \d+ is on its way to harbour)",
        r"ada: order harbour -> airport, 45\.30 EUR, car (7|12)",
        r"ada: 10 messages kept, the last from the AssistantMessage",
        r"cars out: 1",
    ],
    "threads.py": [
        r"8 threads, 40 answers, \$0\.\d+",
        r"-- \d+ pieces, 'stop'",
        r"Ada was looked up in ",
        r"200 rows, 0 failed",
    ],
    "streaming.py": [
        r"-- \d+ tokens, first one after 0\.\d\d s",
        r"-- \d\d+ pieces, then 'stop'",
        r"-- left after '.{61,}'",
    ],
}


# The small ones run one after the other in one process, as each would by itself.
ALL_IN_ONE = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[2]))
for path in sys.argv[2:]:
    print("\\n== " + os.path.basename(path), flush=True)
    runpy.run_path(path, run_name="__main__")
"""
SMALL = sorted(name for name in EXPECTED if name.startswith("kit_"))


def environment() -> dict[str, str]:
    """That of a user without a key, whose warnings are errors."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENROUTER_")}
    return kept | {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error"}


def run(command: list[str]) -> str:
    """What a program prints, which ends well and says nothing on stderr."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment(), timeout=50
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def small() -> dict[str, str]:
    """The outputs of the small examples."""
    output = run(["-c", ALL_IN_ONE, "--simulate", *(str(EXAMPLES / name) for name in SMALL)])
    return dict(re.findall(r"^== (\S+)\n(.*?)(?=^== |\Z)", output, re.DOTALL | re.MULTILINE))


def check(name: str, output: str) -> None:
    """Everything that is expected of an example is there, in order."""
    at = 0
    for pattern in EXPECTED[name]:
        found = re.compile(pattern).search(output, at)
        assert found is not None, f"{pattern!r} not found in order in:\n{output}"
        at = found.end()


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - set(SMALL)))
def test_an_example_runs_against_the_simulator(name: str) -> None:
    """Each example ends well, says nothing on stderr, and prints what it is there to show."""
    check(name, run([str(EXAMPLES / name), "--simulate"]))


@pytest.mark.parametrize("name", SMALL)
def test_a_twin_of_a_kit_example(name: str, small: dict[str, str]) -> None:
    """Each example and each program of GoRouter Kit's documentation has a twin here that prints what it shows."""
    check(name, small[name])


@pytest.mark.parametrize(
    ("calls", "sent"),
    [([], {}), (["price", "send_car"], {"caller:ada": "7"})],
    ids=["none", "two"],
)
def test_the_taxi_takes_what_a_model_calls(monkeypatch: pytest.MonkeyPatch, calls: list[str], sent: object) -> None:
    """A real model calls no tool, or more than it was expected to, and the example goes on."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    taxi = importlib.import_module("taxi")
    arguments = {"price": {"pickup": "harbour", "destination": "airport"}, "send_car": {"pickup": "harbour"}}
    used = [use_tool(name, **arguments[name]) for name in calls]
    order = '{"pickup": "harbour", "destination": "airport", "price_eur": "45.30", "car": "standard"}'
    fleet = taxi.Fleet(["7"])

    async def scenario(world: World) -> None:
        world.serve(ScriptedModel(["45 euros.", *([used, "It comes.", order] if used else ["I cannot."])]))
        async with world.open_client() as client:
            await taxi.call(client, fleet, Principal(id="ada"), "harbour")

    assert start(scenario).error is None
    assert fleet.sent == sent


def test_no_prompt_for_a_model_has_a_directive() -> None:
    """What the simulator is told is for it alone."""
    for path in EXAMPLES.glob("[!_]*.py"):
        for line in path.read_text("utf-8").splitlines():
            assert "[[" not in line or "staged(" in line or line.lstrip().startswith("f'[["), f"{path.name}: {line}"


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

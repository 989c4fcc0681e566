"""What README.md shows is true: its programs and commands run as they stand, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from gorouter_trio.simulator import Simulator, SimulatorConfig, serve_simulator

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "benchmarks/README.md",
    "docs/design.md",
    "docs/from-gorouter-kit.md",
    "docs/plugins.md",
    "docs/reliability.md",
    "docs/telemetry.md",
    "CONTRIBUTING.md",
)

# What the program under each heading prints, besides ending well; a new program needs a line here.
EXPECTED: dict[str, str] = {
    "Chat": r"stop \d+ tokens, cost in USD: 0\.\d+",
    "Stream": r"cost in USD: 0\.\d+\n(.*\n)*TextDelta '",
    "Answers with a form": r"km; calls: 1 cost: 0\.\d+",
    "Tools": r"population \{'city': '\w+'\} success \d+\nstop after 1 round of tools; cost of all: 0\.\d+",
    "Money": r"not sent: .*\n1 attempt, 0\.\d+ USD, nothing else: True",
    "Around a chat": r"1 \d+ tokens\nstop\n(refused: not that\nfailed: not that|failed: not that\nrefused: not that)",
    "Sessions": r"Ada(.*\n)+8 8 4\n",
    "Batch": r"n25 .*625(.*\n)*.*succeeded=100, failed=0",
    "Errors": r"400 400 nobody/no-such-model is not a valid model ID",
}

# Commands of the README that set up the very environment that runs this test.
SETUP = re.compile(r"make (?P<target>\w+)|pip install '\.\[(?P<extra>\w+)\]'")


class Block(NamedTuple):
    """A block of code: the heading above it, its language, its text."""

    heading: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    heading, language, lines = "", None, []
    for line in (REPOSITORY / page).read_text("utf-8").splitlines():
        if line.startswith("```"):
            if language is not None:
                found.append(Block(heading, language, "\n".join(lines) + "\n"))
            language, lines = (line[3:], []) if language is None else (None, [])
        elif language is not None:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def programs() -> dict[str, str]:
    """The Python programs of the README by heading."""
    return {block.heading: block.text for block in blocks("README.md") if block.language == "python"}


@pytest.mark.net
@pytest.mark.parametrize("heading", sorted(EXPECTED))
async def test_a_program_of_the_readme_runs(heading: str) -> None:
    """Each Python block ends well and says nothing on stderr, with nothing set but a key and a base URL."""
    simulator = Simulator(SimulatorConfig(api_keys=("sk-readme",)))
    async with trio.open_nursery() as nursery:
        base_url = await nursery.start(serve_simulator, simulator)
        environment = os.environ | {
            "OPENROUTER_API_KEY": "sk-readme",
            "OPENROUTER_BASE_URL": base_url,
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONWARNINGS": "error",
        }
        done = await trio.run_process(
            [sys.executable, "-"],
            stdin=programs()[heading].encode(),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=environment,
        )
        nursery.cancel_scope.cancel()
    assert (done.returncode, done.stderr.decode()) == (0, "")
    assert re.search(EXPECTED[heading], done.stdout.decode()), done.stdout.decode()
    assert simulator.statistics().received > 0


def test_every_program_of_the_readme_is_run_and_short() -> None:
    """No Python block is left out of the test above, and none is over 32 lines."""
    assert set(programs()) == set(EXPECTED)
    assert len([b for b in blocks("README.md") if b.language == "python"]) == len(EXPECTED)
    for heading, text in programs().items():
        assert text.count("\n") <= 32, f"the program under {heading} is too long"


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    """The shell blocks run in an empty directory with no key; those that set up name targets and extras that exist."""
    commands = tmp_path / "bin"
    commands.mkdir()
    shim = commands / "gorouter-trio"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m gorouter_trio "$@"\n', "utf-8")
    shim.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENROUTER_")}
    environment |= {"PATH": f"{commands}:{environment['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    ran = 0
    for block in blocks("README.md"):
        if block.language != "sh" or _is_setup(block.text):
            continue
        done = subprocess.run(
            ["sh", "-eu", "-c", block.text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == 2


def _is_setup(text: str) -> bool:
    """Whether a block is made of set-up commands, which have to be right at least in their names."""
    found = [SETUP.fullmatch(line.strip()) for line in text.splitlines()]
    if not any(found):
        return False
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text("utf-8"), re.MULTILINE)
    for match in found:
        assert match is not None, f"set-up and other commands are mixed in:\n{text}"
        assert match["target"] in targets if match["target"] else match["extra"] in extras
    return True


def test_the_error_tree_of_the_readme_is_the_real_one() -> None:
    """Every class of the tree is named on the page, and every error named there exists."""
    import gorouter_trio as gr

    real = {
        name for name in gr.__all__ if isinstance(getattr(gr, name), type) and issubclass(getattr(gr, name), Exception)
    }
    (tree,) = [block.text for block in blocks("README.md") if block.heading == "Errors" and block.language == ""]
    named = set(re.findall(r"\b[A-Z]\w+Error\b|\bHistoryNotSaved\b", tree))
    assert named == real


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    """Relative links name files of the repository, and anchors name headings."""
    text = (REPOSITORY / page).read_text("utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    headings = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{page} links to {target}"
        elif "://" not in target:
            assert (REPOSITORY / page).parent.joinpath(target.partition("#")[0]).exists(), f"{page} links to {target}"


def test_the_tests_that_the_pages_name_exist() -> None:
    """Each `tests/...` of a page is a file, and each `::test_...` after it a test in that file."""
    named = 0
    for page in PAGES:
        for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (REPOSITORY / page).read_text("utf-8")):
            source = (REPOSITORY / path).read_text("utf-8")
            assert not test or re.search(rf"def {test}\b", source), f"{page} names {path}::{test}"
            named += 1
    assert named > 20


def test_the_tests_that_are_named_exist() -> None:
    """docs/reliability.md names no test that is gone."""
    text = (REPOSITORY / "docs" / "reliability.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", text)
    assert len(named) > 50
    for path, name in named:
        place = REPOSITORY / path
        assert place.exists(), path
        assert not name or re.search(rf"def {name}\b", place.read_text("utf-8")), f"{path}::{name}"

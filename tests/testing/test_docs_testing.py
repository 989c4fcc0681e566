"""The examples of docs/testing.md are tests, and pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gorouter_trio.testing

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "testing.md").read_text("utf-8")


def test_the_examples_run(tmp_path: Path) -> None:
    """All Python blocks of the page, put together into one module, are what pytest runs with the plugin."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    module = "\n\n".join(blocks)
    (tmp_path / "test_page.py").write_text(module)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "gorouter_trio.testing.pytest_plugin"],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert f"{len(re.findall(r'^(?:async )?def test_', module, re.MULTILINE))} passed" in done.stdout, done.stdout


def test_the_names_on_the_page_exist() -> None:
    """What the page calls by name in its text is there to be imported."""
    text = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    called = set(re.findall(r"`(?:await )?([A-Za-z_]+)\(", text)) - {"gorouter_run"}
    known = set(gorouter_trio.testing.__all__) | {"pytest"}
    assert called - known == set()
    assert len(called) >= 8


def test_every_public_name_is_worth_a_word() -> None:
    """The page mentions what users build with: no fault, reply or check is left out."""
    building = {name for name in gorouter_trio.testing.__all__ if name[0].isupper() or name.startswith("check")}
    types = {
        "EventLog", "Fault", "FailOperation", "InvalidHistoryError", "LogEvent", "NetworkStatistics", "Reply",
        "RunReport", "ScenarioNotFinishedError", "ScriptEndedError", "ScriptedRequest", "SweepFailure", "SweepReport",
        "ToolUse", "VirtualNetwork", "WorldSettings",
    }  # fmt: skip
    assert {name for name in building - types if not re.search(rf"\b{name}\b", PAGE)} == set()

"""The example of docs/security.md runs and prints what the page says, and the names on the page exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gorouter_trio as gr
from gorouter_trio import security

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "security.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_example_runs() -> None:
    """Its output is the page's."""
    (example,), (output,) = blocks("python"), blocks("text")
    command = [sys.executable, "-W", "error", "-c", example]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=50)
    assert (done.stderr, done.stdout) == ("", output)


def test_the_names_on_the_page_exist() -> None:
    """What begins with a capital in the text is exported here or at the root; what is called is there too."""
    text = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`([A-Z][a-z]+[A-Z]\w+)", text)) | set(re.findall(r"`([a-z]+_[a-z_]+)\(", text))
    methods = set(dir(security.SecurityManager))
    assert len(named) > 25
    assert {name for name in named if not hasattr(security, name) and not hasattr(gr, name)} - methods == set()

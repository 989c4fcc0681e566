"""What docs/stores.md shows exists: its code compiles, its names are there, its commands are understood."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import gorouter_trio as gr
from gorouter_trio.cli.app import _make_app

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "stores.md").read_text("utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^gorouter-trio (.*)$", TEXT, re.MULTILINE)


def test_the_page_has_examples() -> None:
    """There is something to check."""
    assert len(PYTHON) >= 4
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("code", PYTHON)
def test_the_code(code: str) -> None:
    """It compiles, and what it takes from the package is there."""
    compile(code, "docs/stores.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for path in re.findall(r"\bgr\.([\w.]+)", code):
        found: object = gr
        for name in path.split("."):
            found = getattr(found, name)
    for names in re.findall(r"from gorouter_trio.stores import (.*)", code):
        for name in names.split(", "):
            assert hasattr(gr.stores, name)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands(command: str) -> None:
    """They are understood."""
    _make_app().parse_args(shlex.split(command), print_error=False, exit_on_error=False)

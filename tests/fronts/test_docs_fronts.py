"""What docs/fronts.md shows runs: its code compiles, and its names are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from fronted import staged

import gorouter_trio as gr

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "fronts.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.net
def test_the_first_snippet_runs() -> None:
    """Both functions, against a server."""
    import asyncio

    names: dict[str, object] = {}
    exec(compile(SNIPPETS[0], "docs/fronts.md", "exec"), names)
    with staged() as stage, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENROUTER_API_KEY", "sk-docs")
        patch.setenv("OPENROUTER_BASE_URL", stage.base_url)
        asyncio.run(names["on_asyncio"]())  # type: ignore[operator]  # a function of the page
        names["in_threads"]()  # type: ignore[operator]  # as above
        assert stage.prompts.count("My name is Ada.") == 2


def test_the_network_in_memory_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a socket."""
    exec(compile(SNIPPETS[1], "docs/fronts.md", "exec"), {"gr": gr})
    assert capsys.readouterr().out.strip()


def test_the_names_are_there() -> None:
    """Every `gr.` name of the page."""
    for name in set(re.findall(r"\bgr\.([a-zA-Z_.]+[a-zA-Z_])", PAGE)):
        found: object = gr
        for part in name.split("."):
            found = getattr(found, part)
    assert all(ast.parse(snippet) for snippet in SNIPPETS)

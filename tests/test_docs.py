"""What pages and docstrings enumerate is what there is."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import gorouter_trio as gr

REPOSITORY = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    return (REPOSITORY / "docs" / name).read_text("utf-8")


def test_the_events_of_a_stream() -> None:
    """docs/replies.md names every event of the closed union, and no other."""
    found = re.search(r"^Iterating a stream gives .*?^The `index`", page("replies.md"), re.DOTALL | re.MULTILINE)
    assert found is not None
    named = set(re.findall(r"`([A-Z]\w+)`", found.group(0)))
    assert named - {"StreamEvent"} == {kind.__name__ for kind in typing.get_args(gr.StreamEvent)}

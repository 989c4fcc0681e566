"""What pages and docstrings enumerate is what there is."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from statistics import median

import pytest

import gorouter_trio as gr
from gorouter_trio import aio, blocking, errors

REPOSITORY = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    return (REPOSITORY / "docs" / name).read_text("utf-8")


def test_the_events_of_a_stream() -> None:
    """docs/replies.md names every event of the closed union, and no other."""
    found = re.search(r"^Iterating a stream gives .*?^The `index`", page("replies.md"), re.DOTALL | re.MULTILINE)
    assert found is not None
    named = set(re.findall(r"`([A-Z]\w+)`", found.group(0)))
    assert named - {"StreamEvent"} == {kind.__name__ for kind in typing.get_args(gr.StreamEvent)}


def test_the_tree_of_errors() -> None:
    """Every error is drawn, below a class that it is derived from."""
    above: list[type] = [gr.GorouterError]
    drawn = {gr.GorouterError}
    for bars, name in re.findall(r"^ {4}((?:│   |    )*)[├└]── (\w+)", errors.__doc__ or "", re.MULTILINE):
        kind = getattr(errors, name)
        del above[len(bars) // 4 + 1 :]
        assert above[-1] in kind.__bases__, name
        above.append(kind)
        drawn.add(kind)
    assert drawn == {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}


def test_the_sums_of_costs() -> None:
    """What `cost_snapshot` says it adds up by are the sums that there are."""
    sums = {name.removeprefix("by_") for name in gr.CostSnapshot.__struct_fields__ if name.startswith("by_")}
    for client in (gr.Client, aio.Client, blocking.Client):
        found = re.search(r"in all, by ([a-z, ]+)\.", client.cost_snapshot.__doc__ or "")
        assert found is not None
        assert set(re.split(r", | and ", found.group(1))) == sums


def test_what_the_fronts_cost() -> None:
    """docs/fronts.md says what was measured, within a seventh."""
    table = json.loads((REPOSITORY / "benchmarks" / "results" / "fronts.json").read_text("utf-8"))["tables"][0]
    cost = {row["name"]: median(row["values"]) for row in table["rows"]}
    pattern = r"([\d.]+) times .*? on asyncio, and ([\d.]+) times in threads.*?: 1/(\d+) and 1/(\d+)"
    said = re.search(pattern, page("fronts.md"), re.DOTALL)
    assert said is not None
    ratios = [("aio", "chat"), ("blocking", "chat"), ("openai", "aio"), ("openai", "blocking")]
    assert list(map(float, said.groups())) == pytest.approx([cost[a] / cost[b] for a, b in ratios], rel=1 / 7)

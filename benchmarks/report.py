"""Writes the tables of benchmarks/README.md, and the summary in README.md, from the figures in benchmarks/results/.

python benchmarks/report.py             after a run with --json
python benchmarks/report.py --check     exit 1 when the pages do not show these figures
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import TYPE_CHECKING

import _harness
import failure_kinds

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

_ROOT = _harness.HERE.parent
_RESULTS = _harness.HERE / "results"
_BLOCK = re.compile(r"(?P<begin><!-- figures: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)

# The summary: one line a table, the contenders in columns; a name stands for the first of them that was measured.
_SUMMARY = (
    ("this library", ("chat", "stream")),
    ("aiohttp + msgspec", ("aiohttp",)),
    ("httpx2 on trio", ("httpx2",)),
    ("openai, aiohttp extra", ("openai-aiohttp",)),
    ("openai", ("openai",)),
    ("httpx on trio", ("httpx",)),
    ("litellm", ("litellm",)),
    ("pydantic-ai", ("pydantic-ai",)),
    ("official SDK", ("sdk",)),
)

# What is aimed at: text, where the row is, and what the goal was as a ratio to bare httptools and to aiohttp.
_GOALS = (
    ("`client.chat` ≤ 98 µs (48; 98), 64 in flight", "chat", 0, "chat", 98 / 48, 98 / 98),
    ("`session.ask` ≤ 140 µs (48; 98), 64 in flight, first turn", "chat", 0, "ask", 140 / 48, 140 / 98),
    ("the same, in conversations of 8 turns", "chat", 0, "ask8", 140 / 48, 140 / 98),
    ("`client.chat` ≤ 140 µs (53; 124), 512 in flight", "chat", 1, "chat", 140 / 53, 140 / 124),
    ("`client.stream` ≤ 450 µs (330; 490), 64 in flight", "stream", 0, "stream", 450 / 330, 450 / 490),
    ("`client.stream` ≤ 8,500 µs (7,400; 10,000), 20 ms apart", "stream", 2, "stream", 8_500 / 7_400, 8_500 / 10_000),
)
_MAX_IMPORT_RATIO = 1.3


def load(name: str) -> _harness.Report:
    """The figures of one benchmark."""
    return _harness.Report.load(_RESULTS / f"{name}.json")


def details(report: _harness.Report) -> str:
    """All tables of one benchmark, and how they were made."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    parts = [f"`{report.command}`, {report.date}: {report.machine}; {versions}."]
    for table in report.tables:
        base = next((row.label.replace("*", "") for row in table.rows if row.name == table.base), None)
        ratio = f" (ratio to {base})" if base else ""
        lines = [f"**{table.title[0].upper()}{table.title[1:]}**{ratio}", "", _line(_harness.header(table))]
        lines += ["| --- | ---: | ---: | ---: |", *(_line(_harness.cells(table, row)) for row in table.rows)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def summary() -> str:
    """One line a table of the chat and stream benchmarks."""
    tables = [table for name in ("chat", "stream") for table in load(name).tables]
    measured = {row.name for table in tables for row in table.rows}
    columns = [(title, names) for title, names in _SUMMARY if measured.intersection(names)]
    lines = [_line(("CPU µs a request", *(title for title, _ in columns))), _line(["---", *["---:"] * len(columns)])]
    for table in tables:
        found = {row.name: f"{row.median:,.0f}" for row in table.rows}
        cells = [next((found[name] for name in names if name in found), "") for _, names in columns]
        lines.append(_line((table.title, *cells)))
    return "\n".join(lines)


def goals() -> str:
    """The goals as ratios, beside those that were measured."""
    heads = ("goal", "to bare httptools", "here", "to aiohttp", "here")
    lines = [_line(heads), _line(["---", *["---:"] * 4])]
    for text, name, position, row, *wanted in _GOALS:
        table = load(name).tables[position]
        medians = {r.name: r.median for r in table.rows}
        cells = [text]
        for goal, base in zip(wanted, ("bare", "aiohttp"), strict=True):
            cells += [f"{goal:.2f}", _judged(medians[row] / medians[base], goal)]
        lines.append(_line(cells))
    cpu = load("import").tables[0]
    ratio = next(cpu.ratio(row) for row in cpu.rows if row.name == "gorouter_trio") or 0.0
    lines.append(
        _line((f"import ≤ {_MAX_IMPORT_RATIO} × trio, httpx, msgspec", "", "", "", _judged(ratio, _MAX_IMPORT_RATIO)))
    )
    return "\n".join(lines)


def failures() -> str:
    """What clients make of failures."""
    return "\n".join(failure_kinds.table(json.loads((_RESULTS / "failure_kinds.json").read_text("utf-8"))))


def differing_failures() -> str:
    """The same without the kinds that every client makes a typed error of."""
    head, rule, *rows = failures().split("\n")
    return "\n".join([head, rule, *(row for row in rows if "**" in row)])


def _judged(ratio: float, goal: float) -> str:
    return f"{ratio:.2f}" if ratio <= goal else f"**{ratio:.2f}**, missed"


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def render(text: str) -> str:
    """The page with its blocks made anew."""
    makers: dict[str, Callable[[], str]] = {
        "summary": summary,
        "goals": goals,
        "failures": failures,
        "differing-failures": differing_failures,
    }

    def block(found: re.Match[str]) -> str:
        name = found["name"]
        made = makers[name]() if name in makers else details(load(name))
        return f"{found['begin']}{made}\n{found['end']}"

    return _BLOCK.sub(block, text)


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is behind")
    args = parser.parse_args()
    pages = (_harness.HERE / "README.md", _ROOT / "README.md")
    stale = [str(page.relative_to(_ROOT)) for page in pages if _update(page, write=not args.check)]
    if stale:
        print(("behind its figures: " if args.check else "written: ") + ", ".join(stale))
    sys.exit(1 if stale and args.check else 0)


def _update(page: pathlib.Path, *, write: bool) -> bool:
    text = page.read_text("utf-8")
    made = render(text)
    if write and made != text:
        page.write_text(made, "utf-8")
    return made != text


if __name__ == "__main__":
    main()

"""Writes the tables of benchmarks/README.md, and the summary in README.md, from the figures in benchmarks/results/.

python benchmarks/report.py             after a run with --json
python benchmarks/report.py --check     exit 1 when the pages do not show these figures
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING

import _harness

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
)


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
    lines = [_line(("CPU µs a request", *(name for name, _ in _SUMMARY))), _line(["---", *["---:"] * len(_SUMMARY)])]
    for table in tables:
        found = {row.name: f"{row.median:,.0f}" for row in table.rows}
        cells = [next((found[name] for name in names if name in found), "") for _, names in _SUMMARY]
        lines.append(_line((table.title, *cells)))
    return "\n".join(lines)


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def render(text: str) -> str:
    """The page with its blocks made anew."""
    makers: dict[str, Callable[[], str]] = {"summary": summary}

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

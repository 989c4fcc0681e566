"""Rounds, processes, results: what the benchmark scripts share.

The contenders take turns (A B C A B C), each in a fresh process, against one server in a process of its own, so that
whatever else the machine does meets all of them. The result of a contender is the median of its rounds, with the
smallest and the largest; what counts is the ratio to the others of the same run.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from _contenders import Contender

HERE = pathlib.Path(__file__).resolve().parent
_LONGEST_S = 600.0
# Distributions that are not called after their module.
_OTHER_NAMES = {"pydantic-ai": "pydantic-ai-slim"}


@dataclass
class Row:
    """One contender: a number a round, and what the run adds."""

    name: str
    label: str
    values: list[float] = field(default_factory=list)
    requests: int = 0

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.values)


@dataclass
class Table:
    """One setting, all contenders; `unit` is that of the values, `base` the row of ratio 1."""

    title: str
    unit: str
    base: str
    rows: list[Row]
    subject: str = "client"

    def ratio(self, row: Row) -> float | None:
        """Against the base, in the same run."""
        base = next((r for r in self.rows if r.name == self.base and r.values), None)
        return row.median / base.median if base is not None and row.values else None


@dataclass
class Report:
    """What one script measured."""

    benchmark: str
    command: str
    date: str
    machine: str
    versions: dict[str, str]
    tables: list[Table]

    @classmethod
    def load(cls, path: pathlib.Path) -> Report:
        """Read what `save` has written."""
        stored = json.loads(path.read_text("utf-8"))
        tables = [Table(**(t | {"rows": [Row(**row) for row in t["rows"]]})) for t in stored.pop("tables")]
        return cls(**stored, tables=tables)

    def save(self, path: pathlib.Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")


def report(benchmark: str, tables: list[Table], *, distributions: Sequence[str]) -> Report:
    """A report of this run: the command without directories, the machine without names."""
    names = dict.fromkeys(name.replace("_", "-") for name in distributions)
    return Report(
        benchmark=benchmark,
        command=" ".join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *_shown(sys.argv[1:])]),
        date=datetime.now(UTC).date().isoformat(),
        machine=f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, "
        f"{platform.python_implementation()} {platform.python_version()}",
        versions={name: version for name in names if (version := _version(name))},
        tables=tables,
    )


def _shown(arguments: list[str]) -> list[str]:
    return [pathlib.Path(a).name if os.sep in a and pathlib.Path(a).is_absolute() else a for a in arguments]


def _version(distribution: str) -> str | None:
    if distribution == "gorouter-trio":
        import gorouter_trio

        return gorouter_trio.__version__
    try:
        return metadata.version(_OTHER_NAMES.get(distribution, distribution))
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def serving() -> Iterator[int]:
    """The server in a process of its own; yields its port."""
    command = [sys.executable, str(HERE / "_server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(timeout=10)


def chosen(field_: Sequence[Contender], names: str | None) -> list[Contender]:
    """The contenders to run: those named, or all; what is not installed is left out and said."""
    known = {contender.name: contender for contender in field_}
    wanted = names.split(",") if names else list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"no contender {unknown[0]!r}; there are {', '.join(known)}")
    found = [known[name] for name in wanted]
    for contender in found:
        if not contender.is_installed:
            print(f"{contender.name}: needs {' and '.join(contender.needs)}, left out", file=sys.stderr)
    return [contender for contender in found if contender.is_installed]


def compete(
    title: str, contenders: Sequence[Contender], arguments: Sequence[str], *, rounds: int, base: str = "aiohttp"
) -> Table:
    """Run the contenders in turn, the heavy ones once; `arguments` go to each of their processes after its name."""
    table = Table(title, "µs", base, [Row(c.name, c.label) for c in contenders])
    heavy = {c.name for c in contenders if c.is_heavy}
    with serving() as port:
        for number in range(rounds):
            for row in table.rows:
                if number and row.name in heavy:
                    continue
                result = _run_client([arguments[0], row.name, "--port", str(port), *arguments[1:]])
                row.values.append(round(float(result["cpu_us"]), 2))
                row.requests += int(result["requests"])
                line = f"{title}, round {number + 1}/{rounds}: {row.name} {row.values[-1]:.1f} µs"
                print(f"{line}, {result['rate']:.0f} a second", file=sys.stderr)
    return table


def _run_client(arguments: Sequence[str]) -> dict[str, float]:
    command = [sys.executable, str(HERE / "_client.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LONGEST_S)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


# --- showing ----------------------------------------------------------------------------------------------------------


def cells(table: Table, row: Row) -> tuple[str, str, str, str]:
    """Label, median, smallest to largest, ratio."""
    ratio = table.ratio(row)
    spread = f"{_number(min(row.values))} to {_number(max(row.values))}"
    return row.label, _number(row.median), spread, "" if ratio is None else f"{ratio:.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def header(table: Table) -> tuple[str, str, str, str]:
    """The heads of the columns."""
    return table.subject, f"{table.unit}, median", "min to max", "ratio"


def show(report_: Report) -> None:
    """Print the tables, with rich where it is installed."""
    print(f"{report_.machine}; " + ", ".join(f"{name} {version}" for name, version in report_.versions.items()))
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        _show_plain(report_)
        return
    for table in report_.tables:
        drawn = RichTable(title=table.title)
        for number, name in enumerate(header(table)):
            drawn.add_column(name, justify="right" if number else "left")
        for row in table.rows:
            label, *rest = cells(table, row)
            drawn.add_row(label.replace("*", ""), *rest, style="bold" if label.startswith("*") else None)
        Console().print(drawn)


def _show_plain(report_: Report) -> None:
    for table in report_.tables:
        print(f"\n{table.title}")
        for line in [header(table), *(cells(table, row) for row in table.rows)]:
            print(f"{line[0].replace('*', ''):34} {line[1]:>12} {line[2]:>20} {line[3]:>20}")

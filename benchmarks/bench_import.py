"""What importing costs: CPU and memory of a fresh process, beside the libraries that the package stands on.

    python benchmarks/bench_import.py --json benchmarks/results/import.json

The CPU is that of the whole process, an empty one subtracted; memory is the peak resident set, likewise. Every import
runs once unmeasured, so that the byte code is there, in a directory of this run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
from typing import NamedTuple

import _harness

_ROOT = _harness.HERE.parent
_FLOOR = "floor"


class Subject(NamedTuple):
    """What is imported."""

    name: str
    label: str
    modules: tuple[str, ...]


SUBJECTS = (
    Subject("empty", "nothing", ()),
    Subject(_FLOOR, "trio, httpx, msgspec", ("trio", "httpx", "msgspec")),
    Subject("gorouter_trio", "**gorouter_trio**", ("gorouter_trio",)),
    Subject("simulator", "**gorouter_trio.simulator** too", ("gorouter_trio", "gorouter_trio.simulator")),
    Subject("aiohttp", "aiohttp", ("aiohttp",)),
    Subject("openai", "openai", ("openai",)),
)


# The kernel's own high-water mark begins anew with the process; that of getrusage remembers its parent's.
_PEAK = """
import re, resource
try:
    status = open("/proc/self/status").read()
    print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]))
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def cost(subject: Subject, cache: str) -> tuple[float, float]:
    """CPU in ms and peak memory in MB of a process that imports it."""
    code = "".join(f"import {module}\n" for module in subject.modules) + _PEAK
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = cache
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=_ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1e3 * cpu_s, int(done.stdout) / 1024


def measure(subjects: list[Subject], rounds: int, cache: str) -> list[_harness.Table]:
    """The two tables, rounds interleaved."""
    cpu = _harness.Table("CPU of the import", "ms", _FLOOR, [], subject="import")
    memory = _harness.Table("memory of the import", "MB", _FLOOR, [], subject="import")
    for table in (cpu, memory):
        table.rows = [_harness.Row(s.name, s.label) for s in subjects if s.modules]
    for subject in subjects:
        cost(subject, cache)
    for _ in range(rounds):
        costs = {subject.name: cost(subject, cache) for subject in subjects}
        for table, position in ((cpu, 0), (memory, 1)):
            for row in table.rows:
                row.values.append(round(costs[row.name][position] - costs["empty"][position], 2))
                row.requests += 1
    return [cpu, memory]


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round, no peers")
    args = parser.parse_args()
    sys.path.insert(0, str(_ROOT))
    subjects = [s for s in SUBJECTS if all(importlib.util.find_spec(m.partition(".")[0]) for m in s.modules)]
    if args.quick:
        args.rounds, subjects = 1, [s for s in subjects if s.name in {"empty", _FLOOR, "gorouter_trio"}]
    with tempfile.TemporaryDirectory() as cache:
        tables = measure(subjects, args.rounds, cache)
    names = ["gorouter_trio", "trio", "httpx", "msgspec", "httptools", "aiohttp", "openai"]
    report = _harness.report("import", tables, distributions=names)
    _harness.show(report)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()

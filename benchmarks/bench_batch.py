"""What a row of a batch costs, with and without a journal, and what a million of them do to the memory.

    python benchmarks/bench_batch.py --json benchmarks/results/batch.json

The API is simulated in this process and answers at once, so that its work is in every figure: what counts is the ratio
of the rows, which are measured in turns. Input, output and journal are files beside this script.

The memory is the resident set of the process (`VmRSS`), client, simulator and interpreter together, at each tenth of
one long job with a journal, whose rows have no ids of their own; `--ids` gives every row one, which is kept in a
temporary file, since a second row with the same one has to be noticed. Client and simulator remember some ten thousands
of requests, so that the first tenth of a million is what the others are to be compared with. The allocator is left as
it is.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import _harness
import trio

sys.path.insert(0, str(_harness.HERE.parent))

from gorouter_trio.batch.input import open_rows
from gorouter_trio.batch.settings import BatchJob
from gorouter_trio.client import open_client
from gorouter_trio.config import PoolLimits
from gorouter_trio.simulator import Simulator, SimulatorConfig, open_simulated_network

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gorouter_trio.batch.job import RunningJob
    from gorouter_trio.client import Client

_WIDTH = 256
_PLAIN, _WITHOUT, _WITH, _ORDERED = "plain", "job", "journal", "ordered"
_LABELS = {
    _PLAIN: "`client.batch` over the same rows, results dropped",
    _WITHOUT: "a job without a journal",
    _WITH: "**a job with its journal**",
    _ORDERED: "a job with its journal, in the order of the input",
}


@asynccontextmanager
async def _open_client() -> AsyncIterator[Client]:
    simulator = Simulator(SimulatorConfig(log_size=0, ledger_size=0))
    pool = PoolLimits(max_connections=_WIDTH, adaptive_from=_WIDTH)
    async with (
        open_simulated_network(simulator) as network,
        open_client(
            api_key="sk-bench", base_url=network.base_url, insecure_http=True, transport=network, pool=pool
        ) as client,
    ):
        yield client


def _write_input(path: pathlib.Path, rows: int, *, has_ids: bool) -> None:
    with path.open("w") as file:
        for number in range(rows):
            name = {"id": f"row of {number}"} if has_ids else {}
            file.write(json.dumps({**name, "prompt": f"[[say {number}]]"}) + "\n")


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _resident_mib() -> float:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def _run(client: Client, name: str, source: pathlib.Path, output: pathlib.Path) -> None:
    if name == _PLAIN:
        async with open_rows(str(source)) as rows, client.batch(rows, max_in_flight=_WIDTH) as results:
            async for result in results:
                result.unwrap()
        return
    job = BatchJob(
        source=str(source),
        output=str(output),
        max_in_flight=_WIDTH,
        journal=name != _WITHOUT,
        ordered=name == _ORDERED,
        if_exists="overwrite",
    )
    async with client.batch_job(job) as running:
        await running.run()


async def measure_rows(args: argparse.Namespace) -> _harness.Table:
    """CPU µs a row, contenders in turn."""
    table = _harness.Table(
        f"CPU of a row, {_WIDTH} in flight, the simulated API included",
        "µs",
        _PLAIN,
        [_harness.Row(name, label) for name, label in _LABELS.items()],
        subject="way",
    )
    with tempfile.TemporaryDirectory(dir=_harness.HERE) as directory:
        source, output = pathlib.Path(directory) / "in.jsonl", pathlib.Path(directory) / "out.jsonl"
        _write_input(source, args.rows, has_ids=True)
        for _ in range(args.rounds):
            for row in table.rows:
                async with _open_client() as client:
                    began = _cpu_s()
                    await _run(client, row.name, source, output)
                    row.values.append(round(1e6 * (_cpu_s() - began) / args.rows, 1))
                    row.requests += args.rows
    return table


async def _watch(running: RunningJob, rows: int, tenths: list[float]) -> None:
    while len(tenths) < 10:
        while running.tally.rows < rows * (len(tenths) + 1) // 10:  # noqa: ASYNC110 - a sample, not an event
            await trio.sleep(0.02)
        tenths.append(round(_resident_mib(), 1))
        print(f"{running.tally.rows:,} rows: {tenths[-1]} MiB", file=sys.stderr)


async def measure_memory(args: argparse.Namespace) -> list[_harness.Table]:
    """One long job: memory at each tenth, rows a second, CPU a row."""
    tenths: list[float] = []
    with tempfile.TemporaryDirectory(dir=_harness.HERE) as directory:
        source, output = pathlib.Path(directory) / "in.jsonl", pathlib.Path(directory) / "out.jsonl"
        _write_input(source, args.long, has_ids=args.ids)
        job = BatchJob(source=str(source), output=str(output), max_in_flight=_WIDTH)
        async with _open_client() as client, client.batch_job(job) as running, trio.open_nursery() as nursery:
            nursery.start_soon(_watch, running, args.long, tenths)
            wall, cpu = time.perf_counter(), _cpu_s()
            await running.run()
            wall, cpu = time.perf_counter() - wall, _cpu_s() - cpu
    memory = _harness.Table(f"resident memory in a job of {args.long:,} rows", "MiB", "first", [], subject="after")
    for number, mib in enumerate(tenths, 1):
        name = "first" if number == 1 else f"tenth-{number}"
        label = f"{args.long * number // 10:,} rows"
        memory.rows.append(_harness.Row(name, label, [mib], args.long * number // 10))
    speed = _harness.Table(f"the same job of {args.long:,} rows", "", "", [], subject="measure")
    speed.rows.append(_harness.Row("rate", "rows a second, simulator included", [round(args.long / wall)], args.long))
    speed.rows.append(
        _harness.Row("cpu", "CPU µs a row, simulator included", [round(1e6 * cpu / args.long, 1)], args.long)
    )
    return [memory, speed]


async def measure(args: argparse.Namespace) -> list[_harness.Table]:
    """All tables."""
    return [await measure_rows(args), *await measure_memory(args)]


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of each round")
    parser.add_argument("--long", type=int, default=1_000_000, help="rows of the long job")
    parser.add_argument("--ids", action="store_true", help="give the rows of the long job ids of their own")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round, few rows")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.rows, args.long = 1, 300, 1_000
    report = _harness.report("batch", trio.run(measure, args), distributions=["gorouter_trio", "trio", "msgspec"])
    _harness.show(report)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()

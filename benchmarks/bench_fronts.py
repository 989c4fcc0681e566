"""CPU of the fronts for asyncio and threads, beside the client on trio and openai's client on asyncio.

python benchmarks/bench_fronts.py --json benchmarks/results/fronts.json
"""

from __future__ import annotations

import argparse
import pathlib

import _contenders
import _harness


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--only", metavar="A,B", help="these contenders: chat or stream, aio, blocking, openai")
    parser.add_argument("--in-flight", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-s", type=float, default=1.0, help="CPU seconds measured a contender and round")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few requests, figures of no meaning")
    args = parser.parse_args()
    if args.quick:
        args.in_flight, args.rounds, args.cpu_s = 4, 1, 0.02
    n = args.in_flight
    titles = {
        "chat": (f"plain reply, {n} in flight", _contenders.FRONT_CHAT),
        "stream": (f"streamed reply of 200 chunks, {n} in flight", _contenders.FRONT_STREAM),
    }
    tables = [
        _harness.compete(
            title,
            _harness.chosen(field, _named(args.only, kind)),
            [f"front-{kind}", f"--in-flight={n}", f"--cpu-s={args.cpu_s}"],
            rounds=args.rounds,
            base=kind,
        )
        for kind, (title, field) in titles.items()
    ]
    needs = [name for _, field in titles.values() for contender in field for name in contender.needs]
    report = _harness.report("fronts", tables, distributions=needs)
    _harness.show(report)
    if args.json:
        report.save(args.json)


def _named(only: str | None, kind: str) -> str | None:
    """The contenders of one table: the client on trio is called after what it does."""
    return None if only is None else ",".join(kind if name in {"chat", "stream"} else name for name in only.split(","))


if __name__ == "__main__":
    main()

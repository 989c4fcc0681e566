"""CPU of a plain chat with plugins around it, against the same chat without.

python benchmarks/bench_plugins.py --json benchmarks/results/plugins.json
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
    names = ", ".join(c.name for c in _contenders.PLUGINS)
    parser.add_argument("--only", metavar="A,B", help=f"these contenders: {names}")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64], metavar="N")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-s", type=float, default=1.0, help="CPU seconds measured a contender and round")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few requests, figures of no meaning")
    args = parser.parse_args()
    if args.quick:
        args.in_flight, args.rounds, args.cpu_s = [4], 1, 0.02
    contenders = _harness.chosen(_contenders.PLUGINS, args.only)
    tables = [
        _harness.compete(
            f"plain reply with plugins, {n} in flight",
            contenders,
            ["plugins", f"--in-flight={n}", f"--cpu-s={args.cpu_s}"],
            rounds=args.rounds,
            base="chat",
        )
        for n in args.in_flight
    ]
    needs = [name for contender in contenders for name in contender.needs]
    report = _harness.report("plugins", tables, distributions=needs)
    _harness.show(report)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()

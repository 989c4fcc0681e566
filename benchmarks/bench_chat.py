"""CPU of a plain chat: a reply of about 1 kB, through each client, at 64 and 512 requests in flight.

python benchmarks/bench_chat.py --json benchmarks/results/chat.json
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
    parser.add_argument(
        "--only", metavar="A,B", help="these contenders: " + ", ".join(c.name for c in _contenders.CHAT)
    )
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64, 512], metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-s", type=float, default=1.0, help="CPU seconds measured a contender and round")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few requests, figures of no meaning")
    args = parser.parse_args()
    if args.quick:
        args.in_flight, args.rounds, args.cpu_s = [4], 1, 0.02
    contenders = _harness.chosen(_contenders.CHAT, args.only)
    tables = [
        _harness.compete(
            f"plain reply, {n} in flight",
            contenders,
            ["chat", f"--in-flight={n}", f"--cpu-s={args.cpu_s}"],
            rounds=args.rounds,
        )
        for n in args.in_flight
    ]
    needs = [name for contender in contenders for name in contender.needs]
    report = _harness.report("chat", tables, distributions=needs)
    _harness.show(report)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()

"""CPU of a streamed chat: 200 chunks, fully parsed, through each client; as fast as they come, and 20 ms apart.

Without gaps the whole reply leaves the server in one write, so a read brings many events; with gaps each event is a
read of its own. What a provider does lies between the two.

    python benchmarks/bench_stream.py --json benchmarks/results/stream.json
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
    names = ", ".join(c.name for c in _contenders.STREAM)
    parser.add_argument("--only", metavar="A,B", help=f"these contenders: {names}")
    parser.add_argument("--in-flight", type=int, nargs="*", default=[64, 512], metavar="N")
    parser.add_argument(
        "--gap-in-flight", type=int, nargs="*", default=[64, 512], metavar="N", help="streams with gaps"
    )
    parser.add_argument("--gap-s", type=float, default=0.02)
    parser.add_argument("--gap-rounds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-s", type=float, default=1.0, help="CPU seconds measured a contender and round")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few requests, figures of no meaning")
    args = parser.parse_args()
    if args.quick:
        args.in_flight, args.gap_in_flight, args.gap_s = [4], [4], 0.0005
        args.rounds, args.gap_rounds, args.cpu_s = 1, 1, 0.02
    contenders = _harness.chosen(_contenders.STREAM, args.only)
    tables = [
        _harness.compete(
            f"stream of 200 chunks, {n} in flight",
            contenders,
            ["stream", f"--in-flight={n}", f"--cpu-s={args.cpu_s}"],
            rounds=args.rounds,
        )
        for n in args.in_flight
    ]
    tables += [
        _harness.compete(
            f"stream of 200 chunks {1000 * args.gap_s:g} ms apart, {n} in flight",
            contenders,
            ["stream", f"--in-flight={n}", f"--gap-s={args.gap_s}", "--cpu-s=0.1"],
            rounds=args.gap_rounds,
        )
        for n in args.gap_in_flight
    ]
    needs = [name for contender in contenders for name in contender.needs]
    report = _harness.report("stream", tables, distributions=needs)
    _harness.show(report)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()

"""Where the CPU of one contender goes: a sampling profile of its process, no instrumented calls.

    python benchmarks/profile_client.py chat chat
    python benchmarks/profile_client.py stream stream --gap-s 0.02

A timer on the process's CPU time interrupts it and counts the Python frame that runs then. Python looks for signals
when it enters a function or takes a step of a loop, so the time of a C function (the kernel's is in it) counts where
the next of these happens: for `feed_data` in the callbacks, for a peek at a socket in the call after it. Packages are
right to a few percent, lines are a hint.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import linecache
import pathlib
import signal
from typing import TYPE_CHECKING

import _client
import _contenders
import _harness
import _wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import CodeType, FrameType

_INTERVAL_S = 0.001
_HERE = pathlib.Path(__file__).resolve().parent


class Sampler:
    """Counts the code and the line that runs."""

    def __init__(self) -> None:
        self._counts: collections.Counter[tuple[CodeType, int]] = collections.Counter()

    @property
    def total(self) -> int:
        """How many samples there are."""
        return self._counts.total()

    def take(self, _signal: int, frame: FrameType | None) -> None:
        """The handler of the timer's signal; a frame between two lines has no number."""
        if frame is not None:
            self._counts[frame.f_code, frame.f_lineno or frame.f_code.co_firstlineno] += 1

    def start(self) -> None:
        """Begin to sample."""
        signal.signal(signal.SIGPROF, self.take)
        signal.setitimer(signal.ITIMER_PROF, _INTERVAL_S, _INTERVAL_S)

    def stop(self) -> None:
        """Sample no more."""
        signal.setitimer(signal.ITIMER_PROF, 0)

    def by(self, name_of: Callable[[CodeType, int], str]) -> collections.Counter[str]:
        """The samples under the names that `name_of` gives."""
        counter: collections.Counter[str] = collections.Counter()
        for (code, line), count in self._counts.items():
            counter[name_of(code, line)] += count
        return counter


def package_of(code: CodeType, _line: int) -> str:
    """The module of ours, or the library."""
    return _place(pathlib.Path(code.co_filename))


def function_of(code: CodeType, line: int) -> str:
    """The same with the function."""
    return f"{package_of(code, line)} {code.co_qualname}"


def line_of(code: CodeType, line: int) -> str:
    """The same with the line's text."""
    return f"{package_of(code, line)} {code.co_name}: {linecache.getline(code.co_filename, line).strip()[:70]}"


def _place(path: pathlib.Path) -> str:
    """The module for our own files, the library for others."""
    parts = path.parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    if "gorouter_trio" in parts:
        return "/".join(parts[len(parts) - parts[::-1].index("gorouter_trio") - 1 :])
    return "benchmarks" if path.parent == _HERE else f"python {path.stem}" if path.suffix else path.name


async def run(contender: _contenders.Contender, args: argparse.Namespace, port: int, sampler: Sampler) -> float:
    """Warm up, then sample; returns CPU µs a request while sampled."""
    streaming = args.kind == "stream"
    expected = (len(_wire.STREAM_TEXT if streaming else _wire.PLAIN_TEXT), _wire.FINISH)
    drive: Callable[..., Awaitable[None]] = _client.run_trio if contender.loop == "trio" else _client.run_asyncio
    async with contender.open(f"http://127.0.0.1:{port}{_wire.PATH}", args.in_flight) as calls_of:
        calls = [calls_of(worker) for worker in range(args.in_flight)]
        await drive(calls, 2 * args.in_flight, expected)
        _client.control(port, f"/gap?{args.gap_s}")
        before = _client.cpu_s()
        sampler.start()
        await drive(calls, args.requests, expected)
        sampler.stop()
        return 1e6 * (_client.cpu_s() - before) / args.requests


def show(sampler: Sampler, args: argparse.Namespace, cpu_us: float) -> None:
    """Print the shares."""
    print(f"{args.kind} {args.contender}: {cpu_us:.0f} µs a request while sampled, {sampler.total} samples")
    for title, name_of in (("package", package_of), ("function", function_of), ("line", line_of)):
        print(f"\n  share   µs  {title}")
        for name, count in sampler.by(name_of).most_common(args.top):
            share = count / sampler.total
            print(f"  {100 * share:4.1f}% {cpu_us * share:5.1f}  {name}")


def main() -> None:
    """Profile one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("chat", "stream", "plugins"))
    parser.add_argument("contender")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--gap-s", type=float, default=0.0)
    parser.add_argument("--top", type=int, default=20)
    args = parser.parse_args()
    field = {"chat": _contenders.CHAT, "stream": _contenders.STREAM, "plugins": _contenders.PLUGINS}[args.kind]
    contender = {contender.name: contender for contender in field}[args.contender]
    sampler = Sampler()
    with _harness.serving() as port:
        if contender.loop == "trio":
            import trio

            cpu_us = trio.run(run, contender, args, port, sampler)
        else:
            cpu_us = asyncio.run(run(contender, args, port, sampler))
    show(sampler, args, cpu_us)


if __name__ == "__main__":
    main()

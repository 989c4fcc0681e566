"""What it costs to unpack compressed replies, and what it saves: CPU against bytes, for every coding.

The server's side is made before; what is measured is the decoder alone, with the piece that each read brings. A stream
is flushed after each event, as a server must that compresses without holding events back.

    python benchmarks/bench_compression.py --json benchmarks/results/compression.json
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import random
import sys
import time
import zlib
from typing import TYPE_CHECKING, Any

import _harness
import _wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

sys.path.insert(0, str(_harness.HERE.parent))

_CODINGS = ("zstd", "br", "gzip", "deflate")
_ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


def encoder(coding: str) -> tuple[Callable[[bytes], bytes], Callable[[], bytes]]:
    """What compresses a piece and flushes it, and what ends the data; at the levels that servers use on the fly."""
    if coding == "br":
        made = importlib.import_module("brotli").Compressor(quality=4)
        return (lambda data: made.process(data) + made.flush()), made.finish
    if coding == "zstd":
        made = importlib.import_module(_ZSTD).ZstdCompressor(3)
        return (lambda data: made.compress(data, made.FLUSH_BLOCK)), made.flush
    flate = zlib.compressobj(6, wbits=31 if coding == "gzip" else 15)
    return (lambda data: flate.compress(data) + flate.flush(zlib.Z_SYNC_FLUSH)), flate.flush


def compressed(coding: str, pieces: Sequence[bytes]) -> list[bytes]:
    """The pieces as they go over the wire."""
    flush, finish = encoder(coding)
    made = [flush(piece) for piece in pieces]
    return [*made[:-1], made[-1] + finish()]


def text(words: int) -> str:
    """Words as unevenly distributed as those of a language, so that they compress as prose does."""
    rng = random.Random(0)
    letters = "eeeetttaaaooinnshrdlucmfwypvbgkqjxz"
    vocabulary = ["".join(rng.choice(letters) for _ in range(rng.randint(2, 9))) for _ in range(3_000)]
    return " ".join(vocabulary[min(int(rng.paretovariate(0.8)), 2_999)] for _ in range(words))


def replies() -> dict[str, list[bytes]]:
    """What is measured, each as the pieces that arrive together."""

    def whole(words: int) -> bytes:
        return _wire.plain_body().replace(_wire.PLAIN_TEXT.encode(), text(words).encode())

    pieces = text(_wire.TEXT_CHUNKS).split(" ")
    events = [
        event.replace(b'"content":"%b "' % old.strip().encode(), b'"content":"%b "' % new.encode())
        for event, old, new in zip(
            _wire.stream_events()[1 : 1 + _wire.TEXT_CHUNKS], _wire.pieces(_wire.TEXT_CHUNKS), pieces, strict=True
        )
    ]
    return {
        "plain reply, 80 words": [whole(80)],
        "plain reply, 4,000 words": [whole(4_000)],
        "stream of 200 events, each by itself": events,
        "stream of 200 events, all at once": [b"".join(events)],
    }


def measure(coding: str, pieces: Sequence[bytes], seconds: float) -> float:
    """CPU µs to decode one reply."""
    from gorouter_trio.transport.compression import make_decoder
    from gorouter_trio.transport.http import ConnectionLimits

    limits = ConnectionLimits()

    def decode() -> int:
        decoder: Any = make_decoder(coding, limits)
        length = 0
        for piece in pieces:
            length += len(decoder.decode(piece))
            while not decoder.needs_input:
                length += len(decoder.decode())
        decoder.finish()
        return length

    decode()
    count, began = 0, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        decode()
        count += 1
    return 1e6 * spent / max(count, 1)


def table(title: str, pieces: Sequence[bytes], *, rounds: int, seconds: float) -> _harness.Table:
    """One kind of reply in every coding, in turns; the sizes stand in the labels."""
    size = sum(map(len, pieces))
    wire = {coding: compressed(coding, pieces) for coding in _CODINGS}
    labels = {
        coding: f"{coding}, {sum(map(len, made)):,} bytes ({size / sum(map(len, made)):.1f} times fewer)"
        for coding, made in wire.items()
    }
    made = _harness.Table(
        f"decoding a {title}: {size:,} bytes", "µs", "gzip", [_harness.Row(c, labels[c]) for c in _CODINGS], "coding"
    )
    for _ in range(rounds):
        for row in made.rows:
            row.values.append(round(measure(row.name, wire[row.name], seconds), 2))
            row.requests += 1
    return made


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-s", type=float, default=0.3, help="CPU seconds measured a coding and round")
    parser.add_argument("--quick", action="store_true", help="a smoke run: figures of no meaning")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.cpu_s = 1, 0.005
    tables = [table(name, pieces, rounds=args.rounds, seconds=args.cpu_s) for name, pieces in replies().items()]
    report = _harness.report("compression", tables, distributions=["gorouter_trio", "brotli", "backports.zstd"])
    _harness.show(report)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()

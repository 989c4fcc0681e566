"""Fuzzes what proxies answer before a tunnel stands; see fuzzing.py."""

from __future__ import annotations

import trio
from fuzzing import fuzz, try_input


def TestOneInput(data: bytes) -> None:  # noqa: N802 - the name that fuzzers look for
    """Only declared errors may leave the parser, and what it makes of an input must be right."""
    try_input("tunnel", data)


async def main() -> None:
    """Starting trio for each input would take most of the time, so all of it runs inside once."""
    await trio.lowlevel.checkpoint()
    fuzz("tunnel", TestOneInput)


if __name__ == "__main__":
    trio.run(main)

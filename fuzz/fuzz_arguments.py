"""Fuzzes the parser of tool arguments; see fuzzing.py."""

from __future__ import annotations

from fuzzing import fuzz, try_input


def TestOneInput(data: bytes) -> None:  # noqa: N802 - the name that fuzzers look for
    """Only declared errors may leave the parser, and what it makes of an input must be right."""
    try_input("arguments", data)


if __name__ == "__main__":
    fuzz("arguments", TestOneInput)

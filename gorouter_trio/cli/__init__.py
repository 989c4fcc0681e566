"""The command line, `gorouter-trio`; needs the extra `cli`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_LIBRARIES = {"cyclopts", "rich"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, by default that of `sys.argv`, and return the exit code.

    0 is success, 1 that some rows or calls failed, 2 a mistake in how it was called, 130 an interrupt.
    """
    try:
        from .app import run
    except ModuleNotFoundError as exc:
        library = (exc.name or "").partition(".")[0]
        if library not in _LIBRARIES:
            raise
        sys.stderr.write(f"gorouter-trio: {library} is missing; install the command line: gorouter-trio[cli]\n")
        return 2
    return run(sys.argv[1:] if arguments is None else arguments)

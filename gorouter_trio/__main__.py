"""`python -m gorouter_trio` is `gorouter-trio`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

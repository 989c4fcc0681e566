"""Where session histories are kept."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .memory import MemoryStore as MemoryStore

if TYPE_CHECKING:
    from .sqlite import SqliteStore as SqliteStore

__all__ = ["MemoryStore", "SqliteStore"]


def __getattr__(name: str) -> object:
    """Load the SQLite store when it is first asked for: whoever keeps histories in memory does not pay for it."""
    if name == "SqliteStore":
        return importlib.import_module(".sqlite", __name__).SqliteStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

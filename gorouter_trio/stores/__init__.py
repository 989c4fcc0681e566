"""Where session histories are kept, and what can be asked of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .keys import SessionKey as SessionKey
from .memory import MemoryStore as MemoryStore

if TYPE_CHECKING:
    from .query import CostPoint as CostPoint
    from .query import HistoryAnalyzer as HistoryAnalyzer
    from .query import HistoryFilter as HistoryFilter
    from .query import HistoryStatistics as HistoryStatistics
    from .query import ModelUsage as ModelUsage
    from .sqlite import SqliteStore as SqliteStore

__all__ = [
    "CostPoint",
    "HistoryAnalyzer",
    "HistoryFilter",
    "HistoryStatistics",
    "MemoryStore",
    "ModelUsage",
    "SessionKey",
    "SqliteStore",
]


def __getattr__(name: str) -> object:
    """Load the SQLite store and the analyzer when they are first asked for: many programs never do."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "sqlite" if name == "SqliteStore" else "query"
    return getattr(importlib.import_module(f".{module}", __name__), name)

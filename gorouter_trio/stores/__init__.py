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
    from .redis import RedisStore as RedisStore
    from .redis import RedisStoreStatistics as RedisStoreStatistics
    from .sqlite import SqliteStore as SqliteStore

__all__ = [
    "CostPoint",
    "HistoryAnalyzer",
    "HistoryFilter",
    "HistoryStatistics",
    "MemoryStore",
    "ModelUsage",
    "RedisStore",
    "RedisStoreStatistics",
    "SessionKey",
    "SqliteStore",
]


_MODULES = {"SqliteStore": "sqlite", "RedisStore": "redis", "RedisStoreStatistics": "redis"}


def __getattr__(name: str) -> object:
    """Load what many programs never ask for when it is asked for: the SQLite and Redis stores, the analyzer."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "query")
    return getattr(importlib.import_module(f".{module}", __name__), name)

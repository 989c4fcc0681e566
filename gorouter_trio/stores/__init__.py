"""Where session histories are kept, and what can be asked of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .keys import SessionKey as SessionKey
from .memory import MemoryStore as MemoryStore

if TYPE_CHECKING:
    from ..transport.resp_client import RedisClient as RedisClient
    from .query import CostPoint as CostPoint
    from .query import HistoryAnalyzer as HistoryAnalyzer
    from .query import HistoryFilter as HistoryFilter
    from .query import HistoryStatistics as HistoryStatistics
    from .query import ModelUsage as ModelUsage
    from .redis import RedisStore as RedisStore
    from .redis import RedisStoreStatistics as RedisStoreStatistics
    from .redis_kit import KitImport as KitImport
    from .redis_kit import import_kit_redis as import_kit_redis
    from .sqlite import SqliteStore as SqliteStore

__all__ = [
    "CostPoint",
    "HistoryAnalyzer",
    "HistoryFilter",
    "HistoryStatistics",
    "KitImport",
    "MemoryStore",
    "ModelUsage",
    "RedisClient",
    "RedisStore",
    "RedisStoreStatistics",
    "SessionKey",
    "SqliteStore",
    "import_kit_redis",
]


_MODULES = {
    "KitImport": ".redis_kit",
    "RedisClient": "..transport.resp_client",
    "RedisStore": ".redis",
    "RedisStoreStatistics": ".redis",
    "SqliteStore": ".sqlite",
    "import_kit_redis": ".redis_kit",
}


def __getattr__(name: str) -> object:
    """Load what many programs never ask for when it is asked for: the SQLite and Redis stores, the analyzer."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, ".query"), __name__), name)

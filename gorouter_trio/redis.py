"""Everything that a Redis is used for: sessions, limits and budgets that several processes have together.

    from gorouter_trio.redis import RedisLimits, RedisStore

See `docs/redis.md`.
"""

from __future__ import annotations

from .pool.shared_redis import RedisLimits as RedisLimits
from .pool.shared_redis import SharedBudget as SharedBudget
from .stores.redis import RedisStore as RedisStore
from .stores.redis import RedisStoreStatistics as RedisStoreStatistics
from .stores.redis_kit import KitImport as KitImport
from .stores.redis_kit import import_kit_redis as import_kit_redis
from .transport.resp_client import Published as Published
from .transport.resp_client import RedisClient as RedisClient
from .transport.resp_client import RedisExecutor as RedisExecutor
from .transport.resp_client import RedisScript as RedisScript
from .transport.resp_client import RedisStatistics as RedisStatistics
from .transport.resp_client import Subscription as Subscription

__all__ = [
    "KitImport",
    "Published",
    "RedisClient",
    "RedisExecutor",
    "RedisLimits",
    "RedisScript",
    "RedisStatistics",
    "RedisStore",
    "RedisStoreStatistics",
    "SharedBudget",
    "Subscription",
    "import_kit_redis",
]

"""Plugins that come with the package: put them into `open_client(plugins=[...])` or `client.register`."""

from __future__ import annotations

from .base import ClientPlugin as ClientPlugin
from .billing import BillingErrorHandler as BillingErrorHandler
from .billing import BillingPlugin as BillingPlugin
from .billing import BillingReport as BillingReport
from .billing import BillingReporter as BillingReporter
from .billing import BillingStatistics as BillingStatistics
from .history import HistoryPlugin as HistoryPlugin
from .history import RedisHistoryPlugin as RedisHistoryPlugin
from .logging import LoggingPlugin as LoggingPlugin
from .metrics import Histogram as Histogram
from .metrics import Metrics as Metrics
from .metrics import MetricsPlugin as MetricsPlugin
from .security import ExternalSecurityPlugin as ExternalSecurityPlugin
from .security import GuardFactory as GuardFactory
from .tools import ToolProvider as ToolProvider
from .tools import ToolRegistryMode as ToolRegistryMode
from .tools import ToolRegistryPlugin as ToolRegistryPlugin

__all__ = [
    "BillingErrorHandler",
    "BillingPlugin",
    "BillingReport",
    "BillingReporter",
    "BillingStatistics",
    "ClientPlugin",
    "ExternalSecurityPlugin",
    "GuardFactory",
    "Histogram",
    "HistoryPlugin",
    "LoggingPlugin",
    "Metrics",
    "MetricsPlugin",
    "RedisHistoryPlugin",
    "ToolProvider",
    "ToolRegistryMode",
    "ToolRegistryPlugin",
]

"""Plugins that come with the package: put them into `open_client(plugins=[...])` or `client.register`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import ConfigError
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

if TYPE_CHECKING:
    from .otel import OpenTelemetryPlugin as OpenTelemetryPlugin

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
    "OpenTelemetryPlugin",
    "RedisHistoryPlugin",
    "ToolProvider",
    "ToolRegistryMode",
    "ToolRegistryPlugin",
]


def __getattr__(name: str) -> object:
    """Load the plugin that needs a library of others when it is asked for."""
    if name != "OpenTelemetryPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(".otel", __name__), name)
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] != "opentelemetry":
            raise
        raise ConfigError("opentelemetry: is not installed; pip install 'gorouter-trio[otel]'") from exc

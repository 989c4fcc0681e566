"""Plugins that come with the package: put them into `open_client(plugins=[...])` or `client.register`."""

from __future__ import annotations

from .billing import BillingErrorHandler as BillingErrorHandler
from .billing import BillingPlugin as BillingPlugin
from .billing import BillingReport as BillingReport
from .billing import BillingReporter as BillingReporter
from .billing import BillingStatistics as BillingStatistics
from .logging import LoggingPlugin as LoggingPlugin
from .metrics import Histogram as Histogram
from .metrics import Metrics as Metrics
from .metrics import MetricsPlugin as MetricsPlugin

__all__ = [
    "BillingErrorHandler",
    "BillingPlugin",
    "BillingReport",
    "BillingReporter",
    "BillingStatistics",
    "Histogram",
    "LoggingPlugin",
    "Metrics",
    "MetricsPlugin",
]

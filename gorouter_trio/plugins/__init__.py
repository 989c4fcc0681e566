"""Plugins that come with the package: put them into `open_client(plugins=[...])` or `client.register`."""

from __future__ import annotations

from .logging import LoggingPlugin as LoggingPlugin
from .metrics import Histogram as Histogram
from .metrics import Metrics as Metrics
from .metrics import MetricsPlugin as MetricsPlugin

__all__ = ["Histogram", "LoggingPlugin", "Metrics", "MetricsPlugin"]

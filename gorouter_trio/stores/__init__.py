"""Where session histories are kept."""

from __future__ import annotations

from .memory import MemoryStore as MemoryStore

__all__ = ["MemoryStore"]

"""What the gateway's tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Notes a figure for the summary."""
    return lambda text: record_property("figure", text)

"""A thousand sessions talk over a simulated day, with everything going wrong that can, and all of it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from busy_world import DAY_S, run_busy_world


@pytest.mark.parametrize(
    ("sessions", "turns", "limit_s"),
    [
        pytest.param(100, 2, 30.0, id="100 sessions"),
        pytest.param(1_000, 5, 60.0, id="1000 sessions", marks=[pytest.mark.long, pytest.mark.timeout(600)]),
    ],
)
def test_a_day(
    sessions: int, turns: int, limit_s: float, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """No history is lost or spoilt, no slot is leaked, every request is accounted for, and it takes a moment only."""
    report = run_busy_world(seed, sessions=sessions, turns=turns)
    assert report.value == []
    assert report.virtual_s > DAY_S * 0.9
    kinds = Counter(event.kind for event in report.events())
    outcomes = Counter(event.fields["state"] for event in report.events("turn"))
    faults = Counter(event.fields["fault"] for event in report.events("fault"))
    assert kinds["served"] >= sessions
    assert outcomes["started"] > sessions
    assert outcomes["answered"] > outcomes["abandoned"] + outcomes["interrupted"]
    assert len(faults) >= 4
    record_property(
        "figure",
        f"{sessions} sessions, {outcomes['started']} turns, {sum(faults.values())} faults, {report.virtual_s:,.0f} "
        f"virtual seconds, {report.steps:,} steps in {report.real_s:.1f} s (at most {limit_s:g})",
    )
    assert report.real_s < limit_s

"""The judgement of the soak run: growth and leftovers fail it, steady numbers do not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_soak() -> ModuleType:
    """The script, which lies beside the package."""
    path = Path(__file__).resolve().parents[2] / "fuzz" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    if spec is None or spec.loader is None or not path.exists():
        pytest.skip("no folder fuzz/ beside the tests", allow_module_level=True)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


soak = load_soak()


def samples(**grows: float) -> list[object]:
    """An hour, a sample each half minute, in which some numbers grow by so much a second."""
    base = {"resident_bytes": 50 * soak.MIB, "files": 40.0, "tasks": 150.0, "threads": 2.0}
    return [
        soak.Sample(
            at_s=30.0 * n,
            operations=n,
            **{name: int(value + 30.0 * n * grows.get(name, 0.0)) for name, value in base.items()},
        )
        for n in range(120)
    ]


def test_steady_numbers_pass() -> None:
    """What moves within the allowance passes."""
    soak.check_growth(samples())
    soak.check_growth(samples(resident_bytes=soak.SLOPE_BYTES_PER_S))


@pytest.mark.parametrize(
    ("name", "per_s"), [("resident_bytes", 5_000.0), ("files", 0.05), ("tasks", 0.5), ("threads", 0.01)]
)
def test_growth_fails(name: str, per_s: float) -> None:
    """Memory that rises by megabytes an hour fails, and so does anything else that keeps rising."""
    with pytest.raises(soak.SoakError, match="memory grows" if name == "resident_bytes" else f"{name} grow"):
        soak.check_growth(samples(**{name: per_s}))


def test_leftovers_fail() -> None:
    """A file or a task more than before fails; memory and threads may differ."""
    before, *_, later = samples(resident_bytes=10.0, threads=0.01)
    soak.check_left_over(before, later)
    for name in ("files", "tasks"):
        before, *_, later = samples(**{name: 0.001})
        with pytest.raises(soak.SoakError, match=f"{name} left over"):
            soak.check_left_over(before, later)


def test_a_run_of_seconds_tells_nothing() -> None:
    """Too few samples fail instead of passing by luck."""
    with pytest.raises(soak.SoakError, match="too short"):
        soak.check_growth(samples()[:5])

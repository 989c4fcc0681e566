"""The text format of Prometheus, version 0.0.4: families of samples, written and nothing else. Pure.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MetricFamily", "Sample", "render"]


class Sample(Struct, frozen=True):
    """One number, under the name of its family with `suffix`. `labels` are pairs of a name and any text."""

    value: float | int
    labels: tuple[tuple[str, str], ...] = ()
    suffix: str = ""


class MetricFamily(Struct, frozen=True):
    """What is measured: `name` in the form `gorouter_requests_queued`, of counters with `_total`; units in the name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: tuple[Sample, ...]


def render(families: Iterable[MetricFamily]) -> str:
    """The families as text. Of several with one name the first one counts; one without samples is left out."""
    known: set[str] = set()
    lines: list[str] = []
    for family in families:
        if family.name in known or not family.samples:
            continue
        known.add(family.name)
        lines.append(f"# HELP {family.name} {_escaped(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        lines += [f"{family.name}{each.suffix}{_labels(each.labels)} {_number(each.value)}" for each in family.samples]
    return "".join(f"{line}\n" for line in lines)


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value, quotes=True)}"' for name, value in labels) + "}"


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _number(value: float) -> str:
    if value != value:
        return "NaN"
    if value in {float("inf"), float("-inf")}:
        return "+Inf" if value > 0 else "-Inf"
    return str(value)

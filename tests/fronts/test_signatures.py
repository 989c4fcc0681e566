"""The three fronts have the same methods with the same parameters, but for what is written down here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import get_overloads

import pytest

import gorouter_trio as gr

# What does not wait needs no deadline, and says so the same on all fronts.
WITHOUT_DEADLINE = {
    "session", "use", "unuse", "add_hook", "remove_hook", "on", "off", "events", "cost_snapshot", "ledger_rows",
    "budget", "budgets", "price", "set_prices", "start_price_refresh", "stop_price_refresh", "session_statistics",
    "inspect", "observe", "unobserve", "observe_ledger", "unobserve_ledger", "flush_observers", "add_tracer",
    "remove_tracer", "metrics_text", "add_metrics", "remove_metrics", "set_model", "set_api_key", "set_store",
    "set_security", "push_security", "push_store", "set_cost_tracker", "batch_job",
}  # fmt: skip
SNAPSHOT = {(gr.Client, "statistics")}
# A loop of tool rounds is an async function of the runtime's inside.
ONLY_TRIO = {"rounds"}
# For parts of the package; the fronts have what they need of it.
INSIDE = {"of_result", "runtime"}
# Handlers of the front for threads always have one.
ONLY_THERE = {("on", "in_thread")}
# The name of a blocking method says nothing of awaiting.
RENAMED = {"aclose": "close"}

PAIRS = [
    (gr.Client, gr.aio.Client, "aio"),
    (gr.SessionRef, gr.aio.SessionRef, "aio"),
    (gr.ChatStream, gr.aio.ChatStream, "aio"),
    (gr.Batch, gr.aio.Batch, "aio"),
    (gr.EventFeed, gr.aio.EventFeed, "aio"),
    (gr.Client, gr.blocking.Client, "blocking"),
    (gr.SessionRef, gr.blocking.SessionRef, "blocking"),
    (gr.ChatStream, gr.blocking.ChatStream, "blocking"),
    (gr.Batch, gr.blocking.Batch, "blocking"),
    (gr.EventFeed, gr.blocking.EventFeed, "blocking"),
]
NAMES = [f"{front}.{theirs.__name__}" for _, theirs, front in PAIRS]


def public(kind: type) -> set[str]:
    """The public names of a class, those that make it an iterator among them."""
    own = {"__aiter__", "__anext__", "__iter__", "__next__"}
    return {name for name in dir(kind) if not name.startswith("_") or name in own}


def parameters(function: Callable[..., object]) -> dict[str, tuple[object, object]]:
    """Kind and default by name."""
    return {name: (p.kind, p.default) for name, p in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize(("trio_class", "front_class", "front"), PAIRS, ids=NAMES)
def test_the_names_are_the_same(trio_class: type, front_class: type, front: str) -> None:
    """No method is missing, and none is there that trio programs do not have."""
    wanted = public(trio_class) - INSIDE
    if front == "blocking":
        plain = {"__aiter__": "__iter__", "__anext__": "__next__", **RENAMED}
        wanted = {plain.get(name, name) for name in wanted}
    assert public(front_class) - INSIDE == wanted


@pytest.mark.parametrize(("trio_class", "front_class", "front"), PAIRS, ids=NAMES)
def test_the_parameters_are_the_same(trio_class: type, front_class: type, front: str) -> None:
    """Names, kinds and defaults of all parameters, with `deadline_s` where there is something to wait for."""
    streams = trio_class not in {gr.Client, gr.SessionRef}
    for name in sorted(public(trio_class) - INSIDE):
        ours = getattr(trio_class, name)
        if not inspect.isfunction(ours) or name.startswith("__"):
            continue
        theirs = getattr(front_class, RENAMED.get(name, name) if front == "blocking" else name)
        wanted = {key: value for key, value in parameters(ours).items() if key not in ONLY_TRIO}
        if front == "blocking":
            wanted = {key: value for key, value in wanted.items() if (name, key) not in ONLY_THERE}
        found = parameters(theirs)
        if not (streams or name in WITHOUT_DEADLINE or (trio_class, name) in SNAPSHOT):
            assert found.pop("deadline_s", None) == (inspect.Parameter.KEYWORD_ONLY, None), name
        assert found == wanted, name


@pytest.mark.parametrize(("trio_class", "front_class", "front"), PAIRS, ids=NAMES)
def test_what_waits_is_the_same(trio_class: type, front_class: type, front: str) -> None:
    """On asyncio the same methods are async; for threads none is."""
    for name in sorted(public(front_class) - INSIDE):
        theirs = inspect.unwrap(getattr(front_class, name))
        is_async = inspect.iscoroutinefunction(theirs)
        ours = getattr(trio_class, name, None)
        assert is_async == (front == "aio" and inspect.iscoroutinefunction(ours)), name


@pytest.mark.parametrize(("trio_class", "front_class"), [pair[:2] for pair in PAIRS], ids=NAMES)
def test_the_overloads_are_the_same(trio_class: type, front_class: type) -> None:
    """Whatever has an overload for a response type on trio has it on the fronts."""
    for name in public(trio_class):
        count = len(get_overloads(getattr(trio_class, name))) if inspect.isfunction(getattr(trio_class, name)) else 0
        if count:
            theirs = get_overloads(getattr(front_class, name))
            assert len(theirs) == count, name
            assert all("deadline_s" in inspect.signature(overload).parameters for overload in theirs), name


def test_open_client_takes_the_same() -> None:
    """A config, or its fields by name."""
    assert parameters(gr.aio.open_client) == parameters(gr.open_client) == parameters(gr.blocking.open_client)


def test_stream_handlers_are_the_same() -> None:
    """`run` takes the same handlers for all."""
    assert parameters(gr.blocking.ChatStream.run) == parameters(gr.ChatStream.run)

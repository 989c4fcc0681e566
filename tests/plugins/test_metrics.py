"""The metrics plugin: counts, distributions, and the text for Prometheus."""

from __future__ import annotations

import bisect
import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from worlds import completion, errors, open_world, replies

import gorouter_trio as gr
from gorouter_trio.plugins import MetricsPlugin
from gorouter_trio.plugins.metrics import _Distribution


async def test_what_is_counted(autojump_clock):
    """Answers and errors, tokens, tool calls, durations."""
    metrics = MetricsPlugin()
    async with open_world(answer=replies(completion("Yes.", tool_calls=[("1", "f"), ("2", "g")]))) as world:
        await world.client.register(metrics)
        for _ in range(3):
            await world.client.chat("Well?")
        world.api.answer = errors(400)
        with pytest.raises(gr.BadRequestError):
            await world.client.chat("Well?")
    snapshot = metrics.snapshot()
    assert (snapshot.requests, snapshot.succeeded, snapshot.failed, snapshot.tool_calls) == (4, 3, 1, 6)
    assert (snapshot.prompt_tokens, snapshot.completion_tokens) == (9, 15)
    assert snapshot.last_duration_s is not None
    assert (snapshot.duration.count, snapshot.queue_wait.count, snapshot.first_token.count) == (3, 3, 0)


async def test_the_text(autojump_clock):
    """Every line of the text is one that Prometheus takes, and buckets add up."""
    metrics = MetricsPlugin()
    async with open_world(answer=replies(completion("Yes.")), plugins=[metrics]) as world:
        await world.client.chat("Well?")
    lines = metrics.text().splitlines()
    sample = re.compile(r'gorouter_\w+(\{le="([0-9.e+-]+|\+Inf)"\})? [0-9.]+')
    assert all(line.startswith(("# HELP gorouter_", "# TYPE gorouter_")) or sample.fullmatch(line) for line in lines)
    assert "gorouter_chats_succeeded_total 1" in lines
    assert 'gorouter_chat_seconds_bucket{le="+Inf"} 1' in lines


@given(values=st.lists(st.floats(0, 599), min_size=1, max_size=50), q=st.floats(0, 1))
@example(values=[1.0, 1.0, 0.001953125, 0.001953125, 0.001953125], q=0.5)
def test_a_distribution(values: list[float], q: float) -> None:
    """Counts include those before them, and a quantile is right to the width of its bucket."""
    distribution = _Distribution()
    for value in values:
        distribution.add(value)
    histogram = distribution.snapshot()
    assert list(histogram.counts) == [sum(v <= bound for v in values) for bound in histogram.bounds]
    assert histogram.count == len(values)
    quantile = histogram.quantile(q)
    assert quantile is not None
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    place = bisect.bisect_left(histogram.bounds, exact)
    edges = (0.0, *histogram.bounds)
    assert edges[place] <= quantile <= edges[place + 1]


def test_no_values() -> None:
    """Of nothing there is no quantile."""
    assert _Distribution().snapshot().quantile(0.5) is None

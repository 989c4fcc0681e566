"""What a client does now, as a value; and its numbers for Prometheus, as a real parser reads them."""

from __future__ import annotations

import re
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio._prometheus import MetricFamily, Sample, render
from gorouter_trio.plugins import MetricsPlugin
from gorouter_trio.transport.http_server import ServerReply, ServerRequest

YES = completion("Yes.")


async def test_the_tree_of_tasks(autojump_clock):
    """Sessions with what they wait for and since when, workers with their requests, tools that run; written as JSON."""
    opened = trio.Event()

    @gr.tool
    async def wait_long() -> str:
        """Wait."""
        await trio.sleep_forever()
        return ""

    async def answer(request: ServerRequest, reply: ServerReply) -> None:
        if b"slow" in request.body:
            await opened.wait()
        calls = [("1", "wait_long")] if b'"tools"' in request.body else []
        await replies(completion("", tool_calls=calls) if calls else YES)(request, reply)

    async with open_world(answer=answer, plugins=[MetricsPlugin()]) as world:
        client = world.client
        await client.session("idle").ask("1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.session("slow").ask, "slow")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(client.session("slow").ask, "behind")
            nursery.start_soon(client.session("tool", tools=[wait_long]).ask, "go")
            await trio.sleep(5)
            seen = client.inspect()
            nursery.cancel_scope.cancel()
    by_key = {each.key: each.statistics for each in seen.sessions}
    assert [each.key for each in seen.sessions][-1] == "idle"
    assert (by_key["slow"].state, by_key["slow"].waits_for, by_key["slow"].queued) == ("running", "model", 1)
    assert by_key["slow"].since_s == pytest.approx(5, abs=0.1)
    assert (by_key["tool"].waits_for, by_key["idle"].waits_for) == ("tools", "mail")
    assert sorted(worker.state for worker in seen.workers) == ["idle", "waiting"]
    (busy,) = (worker for worker in seen.workers if worker.state == "waiting")
    assert (busy.flow, busy.lane, busy.key) == ("slow", "interactive", "0")
    assert busy.since_s == pytest.approx(5, abs=0.1)
    (call,) = seen.tool_calls
    assert (call.tool, call.phase, call.session) == ("wait_long", "running", "tool")
    assert call.since_s == pytest.approx(5, abs=0.1)
    assert (seen.plugins, seen.active_sessions, seen.pool.in_flight) == (("metrics",), 3, 1)
    written = msgspec.json.decode(msgspec.json.encode(seen))
    assert written["sessions"][0]["statistics"]["waits_for"] in {"model", "tools"}


async def test_not_more_sessions_than_asked_for(autojump_clock):
    """The list is bounded, the count is not."""
    async with open_world(answer=replies(YES)) as world:
        for number in range(5):
            await world.client.session(f"s{number}").ask("1")
        seen = world.client.inspect(sessions=2)
        assert (len(seen.sessions), seen.active_sessions) == (2, 5)
        with pytest.raises(gr.ConfigError, match="sessions"):
            world.client.inspect(sessions=-1)


async def test_a_lent_worker(autojump_clock):
    """A stream that is being read holds its worker."""
    async with open_world() as world, world.client.stream("Tell me more. [[tokens 200]]") as stream:
        await anext(aiter(stream))
        assert [worker.state for worker in world.client.inspect().workers] == ["lent"]


async def test_metrics_text(autojump_clock):
    """Everything is there with and without the plugin, and a parser of others reads it to the end."""
    async with open_world(answer=replies((503, b"{}"), YES)) as world:
        client = world.client
        await client.chat("Well?", model='odd "model"\\')
        bare = read(client.metrics_text())
        assert "gorouter_chat_seconds" not in bare
        assert bare["gorouter_retries"].samples[0].value == 1
        costs = {sample.labels["model"]: sample.value for sample in bare["gorouter_cost_usd"].samples}
        assert costs == {'odd "model"\\': 0.25}
        await client.register(MetricsPlugin())
        await client.chat("Well?")
        more = read(client.metrics_text())
        assert more["gorouter_chats_succeeded"].samples[0].value == 1
        buckets = [s for s in more["gorouter_chat_seconds"].samples if s.name.endswith("_bucket")]
        assert buckets[-1].labels == {"le": "+Inf"}
        await client.unregister("metrics")
        assert "gorouter_chat_seconds" not in read(client.metrics_text())


async def test_sources_of_ones_own(autojump_clock):
    """A source adds families; one that fails is left out, with an event; a name that is taken is the first one's."""
    mine = MetricFamily("mine_total", "counter", "Mine.", (Sample(3),))
    theirs = MetricFamily("gorouter_sessions_active", "gauge", "Not mine.", (Sample(77),))
    async with open_world(answer=replies(YES)) as world:
        client = world.client

        def fail() -> list[MetricFamily]:
            raise ValueError("no numbers")

        client.add_metrics(lambda: [mine, theirs])
        client.add_metrics(fail)
        with client.events(gr.HookFailed) as feed:
            found = read(client.metrics_text())
            assert (await anext(feed)).phase == "metrics"
        assert found["mine"].samples[0].value == 3
        assert found["gorouter_sessions_active"].samples[0].value == 0
        assert client.remove_metrics(fail)
        assert not client.remove_metrics(fail)
        odd: Any = (Sample(1, cast("Any", "labels")),)
        wrong: list[Any] = [lambda: [mine, 5], lambda: [MetricFamily("x", "gauge", "X.", odd)], lambda: None]
        for source in wrong:
            client.add_metrics(source)
        with client.events(gr.HookFailed) as feed:
            assert "mine_total 3" in client.metrics_text()
            for _ in wrong:
                assert (await anext(feed)).hook == "metrics source"
        with pytest.raises(gr.ConfigError, match="source"):
            client.add_metrics(5)  # type: ignore[arg-type]  # on purpose


def read(text: str) -> dict[str, Any]:
    """The families by name, as the parser of Prometheus's own client gives them."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(re.fullmatch(r"[a-z_]+", name) for name in families)
    return families


@given(label=st.text(), meaning=st.text(st.characters(codec="utf-8", exclude_characters="\r\x85\u2028\u2029\x0b\x0c")))
def test_any_text_is_written(label: str, meaning: str) -> None:
    """Labels and meanings of any text come back as they were."""
    text = render([MetricFamily("a_b", "gauge", meaning, (Sample(1.5, (("x", label),)), Sample(float("inf"))))])
    (family,) = text_string_to_metric_families(text)
    assert [sample.value for sample in family.samples] == [1.5, float("inf")]
    assert family.samples[0].labels == {"x": label}


def test_nothing_to_show() -> None:
    """A family without samples is left out; a value that is no number is written as such."""
    assert render([MetricFamily("a", "gauge", "x", ())]) == ""
    assert (
        render([MetricFamily("a", "gauge", "x", (Sample(float("nan")), Sample(float("-inf"))))]).split()[-1] == "-Inf"
    )

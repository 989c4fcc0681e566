"""Statistics of stored histories, against sums made by hand and by an independent reference."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from worlds import open_world

import gorouter_trio as gr
from gorouter_trio.stores import HistoryAnalyzer, HistoryFilter, MemoryStore, SqliteStore
from gorouter_trio.wire.codec import encode_json
from gorouter_trio.wire.journal import (
    HistoryCompacted,
    ToolsAnswered,
    TurnAbandoned,
    TurnAnswered,
    TurnCalled,
    TurnParked,
    TurnStarted,
)
from gorouter_trio.wire.responses import Usage
from gorouter_trio.wire.result import CallRecord

DAY_S = 86_400


def turn(turn_id, at_s, *, model="m", cost="0.001", reason="stop", tokens=(10, 5), role="user", interrupted=False):
    """The two entries of an answered turn, encoded."""
    usage = Usage(
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        total_tokens=sum(tokens),
        cost=None if cost is None else Decimal(cost),
    )
    call = CallRecord(model=model, finish_reason=reason, usage=usage, finished_at_s=at_s + 1, interrupted=interrupted)
    asked = msgspec.Raw(json.dumps([{"role": role, "content": "q"}]).encode())
    answer = msgspec.Raw(b'{"role":"assistant","content":"a"}')
    return [encode_json(TurnStarted(turn_id, asked, at_s)), encode_json(TurnAnswered(turn_id, answer, call))]


async def fill(store, logs):
    """Write the logs, each a list of encoded entries."""
    for key, entries in logs.items():
        await store.append(key, entries, expected_version=0)
    return HistoryAnalyzer(store)


async def test_an_empty_store():
    """Nothing adds up to nothing, and a session that is not there is none."""
    analyzer = HistoryAnalyzer(MemoryStore())
    empty = await analyzer.statistics()
    assert (empty.sessions, empty.calls, empty.cost_usd, empty.first_at_s) == (0, 0, 0, None)
    assert await analyzer.statistics(key="nobody") == empty
    assert await analyzer.cost_over_time() == []


async def test_statistics():
    """Calls, tokens, cost by model, reasons, times; unknown cost is counted apart and never zero."""
    analyzer = await fill(
        MemoryStore(),
        {
            "u:1": turn("1", 100) + turn("2", 200, model="n", cost="0.5", reason="length"),
            "u:2": turn("1", 50, cost=None) + turn("2", 300, interrupted=True, reason=None),
            "v": turn("1", 10),
        },
    )
    found = await analyzer.statistics(prefix="u:")
    assert (found.sessions, found.calls, found.entries, found.total_entries) == (2, 4, 8, 8)
    assert (found.prompt_tokens, found.completion_tokens, found.total_tokens) == (40, 20, 60)
    assert (found.cost_usd, found.unpriced) == (Decimal("0.502"), 1)
    assert list(found.by_model) == ["n", "m"]
    assert (found.by_model["m"].calls, found.by_model["m"].cost_usd) == (3, Decimal("0.002"))
    assert found.finish_reasons == {"stop": 2, "length": 1, "interrupted": 1}
    assert (found.first_at_s, found.last_at_s) == (50, 301)
    assert (await analyzer.statistics(key="v")).calls == 1
    assert (await analyzer.statistics()).sessions == 3
    assert await analyzer.usage_by_model(key="u:1") == {
        "n": gr.stores.ModelUsage(
            calls=1, prompt_tokens=10, completion_tokens=5, total_tokens=15, cost_usd=Decimal("0.5")
        ),
        "m": gr.stores.ModelUsage(
            calls=1, prompt_tokens=10, completion_tokens=5, total_tokens=15, cost_usd=Decimal("0.001")
        ),
    }


async def test_turns_without_an_answer():
    """Abandoned turns, those in doubt and those without an end are counted; entries that are no JSON too."""
    log = [
        *turn("1", 1),
        *turn("2", 2)[:1],
        encode_json(TurnAbandoned("2", "BadRequestError")),
        *turn("3", 3)[:1],
        encode_json(TurnAbandoned("3", "in doubt", maybe_billed=True)),
        b'{"type":"from the future"}',
        b"\xff",
        *turn("4", 4)[:1],
    ]
    analyzer = await fill(MemoryStore(), {"k": log})
    found = await analyzer.statistics()
    assert (found.calls, found.entries, found.abandoned, found.in_doubt, found.unreadable) == (1, 2, 1, 2, 1)


async def test_turns_without_an_end_in_the_midst():
    """A turn without an end is in doubt wherever it stands: another one follows, or the end of another."""
    log = [
        *turn("1", 1)[:1],
        *turn("2", 2),
        *turn("3", 3)[:1],
        encode_json(TurnAbandoned("4", "BadRequestError")),
        *turn("5", 5)[:1],
        b'{"type":"from the future"}',
        *turn("5", 6),
        *turn("6", 6)[:1],
        *turn("7", 7)[1:],
    ]
    found = await (await fill(MemoryStore(), {"k": log})).statistics()
    assert (found.in_doubt, found.abandoned, found.calls) == (4, 1, 3)


async def test_cost_over_time():
    """Calls fall into minutes, hours and days of UTC."""
    times = [1, 59, 60, 3_599, 3_600, DAY_S - 2, DAY_S, 2 * DAY_S]
    entries = [entry for number, at in enumerate(times) for entry in turn(str(number), at - 1, cost="1")]
    analyzer = await fill(MemoryStore(), {"k": entries})
    for bucket, width in (("minute", 60), ("hour", 3_600), ("day", DAY_S)):
        points = await analyzer.cost_over_time(bucket)
        expected = defaultdict(int)
        for at in times:
            expected[at // width * width] += 1
        assert {point.at_s: point.calls for point in points} == dict(expected)
        assert [point.at_s for point in points] == sorted(expected)
        assert sum(point.cost_usd for point in points) == len(times)
    with pytest.raises(gr.ConfigError, match="bucket"):
        await analyzer.cost_over_time("week")


async def test_any_filter_gives_what_a_loop_gives(seed):
    """Random histories under random filters agree with a plain loop."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = [
        {
            "key": f"k{rng.randrange(4)}",
            "at_s": float(rng.randrange(1000)),
            "model": rng.choice("abc"),
            "cost": rng.choice([None, "0.1", "0.25", "3"]),
            "reason": rng.choice(["stop", "length"]),
        }
        for _ in range(120)
    ]
    logs = defaultdict(list)
    for number, row in enumerate(rows):
        logs[row["key"]] += turn(str(number), row["at_s"], model=row["model"], cost=row["cost"], reason=row["reason"])
    analyzer = await fill(MemoryStore(), logs)
    for _ in range(60):
        only = HistoryFilter(
            start_s=rng.choice([None, float(rng.randrange(500))]),
            end_s=rng.choice([None, float(rng.randrange(501, 1100))]),
            models=rng.choice([(), {"a"}, {"a", "c"}]),
            finish_reasons=rng.choice([(), {"stop"}]),
            min_cost_usd=rng.choice([None, Decimal("0.2")]),
            roles=rng.choice([(), {"assistant"}]),
        )
        wanted = [
            row
            for row in rows
            if (only.start_s is None or row["at_s"] + 1 >= only.start_s)
            and (only.end_s is None or row["at_s"] + 1 < only.end_s)
            and (not only.models or row["model"] in only.models)
            and (not only.finish_reasons or row["reason"] in only.finish_reasons)
            and (only.min_cost_usd is None or (row["cost"] and Decimal(row["cost"]) >= only.min_cost_usd))
        ]
        found = await analyzer.statistics(only=only)
        assert found.calls == len(wanted)
        assert found.cost_usd == sum((Decimal(row["cost"]) for row in wanted if row["cost"]), Decimal(0))
        assert found.unpriced == sum(row["cost"] is None for row in wanted)
        assert sum(point.calls for point in await analyzer.cost_over_time("minute", only=only)) == len(wanted)


async def test_what_has_no_time():
    """Imported entries have none: they count, but in no stretch of time, and are neither first nor last."""
    log = [*turn("1", -1.0), *turn("2", 500)]
    analyzer = await fill(MemoryStore(), {"k": [log[0].replace(b"-1.0", b"0.0"), *log[1:]]})
    everything = await analyzer.statistics()
    assert (everything.calls, everything.first_at_s, everything.last_at_s) == (2, 500, 501)
    for only in (HistoryFilter(start_s=-5), HistoryFilter(end_s=1e9)):
        assert (await analyzer.statistics(only=only)).calls == 1
    assert [(point.at_s, point.calls) for point in await analyzer.cost_over_time("minute")] == [(0, 1), (480, 1)]


async def test_rounds_of_tools():
    """Each round of a turn was a call and is counted as one, and what the tools returned as messages."""
    usage = Usage(prompt_tokens=7, cost=Decimal("0.25"))
    call = CallRecord(model="m", finish_reason="tool_calls", usage=usage, finished_at_s=5)
    started, answered = turn("1", 1)
    results = msgspec.Raw(
        b'[{"role":"tool","tool_call_id":"a","content":""},{"role":"tool","tool_call_id":"b","content":""}]'
    )
    log = [
        started,
        encode_json(TurnCalled("1", msgspec.Raw(b'{"role":"assistant","content":null}'), call)),
        encode_json(TurnParked("1", "q", "a")),
        encode_json(ToolsAnswered("1", results)),
        answered,
    ]
    analyzer = await fill(MemoryStore(), {"k": log, "open": log[:4]})
    found = await analyzer.statistics()
    assert (found.calls, found.entries, found.in_doubt, found.abandoned) == (3, 8, 1, 0)
    assert (found.cost_usd, found.finish_reasons) == (Decimal("0.501"), {"tool_calls": 2, "stop": 1})
    assert (await analyzer.statistics(only=HistoryFilter(roles={"tool"}))).entries == 4


async def test_compacted_logs():
    """What they have left out still counts, where nothing is filtered: number and cost are all that is known of it."""
    compacted = HistoryCompacted(turn_ids=("a", "b"), calls=5, cost_usd=Decimal("1.5"), unpriced=2)
    analyzer = await fill(MemoryStore(), {"k": [encode_json(compacted), *turn("c", 100)]})
    found = await analyzer.statistics()
    assert (found.calls, found.cost_usd, found.unpriced) == (6, Decimal("1.501"), 2)
    assert found.by_model["compacted"].calls == 5
    assert [(point.at_s, point.calls) for point in await analyzer.cost_over_time("minute")] == [(0, 5), (60, 1)]
    only = HistoryFilter(models={"m"})
    assert (await analyzer.statistics(only=only)).calls == 1
    assert len(await analyzer.cost_over_time(only=only)) == 1


async def test_entries_of_later_tags():
    """A tag that this version does not know is counted by what it has: its call was paid for, whatever it is called."""
    usage = Usage(prompt_tokens=7, cost=Decimal("0.25"))
    call = encode_json(CallRecord(model="m", finish_reason="tool_calls", usage=usage, finished_at_s=5)).decode()
    log = [
        *turn("1", 1)[:1],
        b'{"type":"round","turn_id":"1","message":{"role":"assistant","content":null},"call":%b}' % call.encode(),
        b'{"type":"results","turn_id":"1","at_s":6.5,"messages":[{"role":"tool"},{"role":"tool"}]}',
        b'{"type":"parked","turn_id":"1"}',
        *turn("1", 1)[1:],
    ]
    analyzer = await fill(MemoryStore(), {"k": log})
    found = await analyzer.statistics()
    assert (found.calls, found.entries, found.unreadable, found.in_doubt) == (2, 5, 0, 0)
    assert (found.cost_usd, found.finish_reasons) == (Decimal("0.251"), {"stop": 1, "tool_calls": 1})
    assert (await analyzer.statistics(only=HistoryFilter(roles={"tool"}))).entries == 2


def test_filters_are_checked():
    """A filter that admits nothing by mistake is refused."""
    with pytest.raises(gr.ConfigError, match="end_s"):
        HistoryFilter(start_s=5, end_s=5)
    with pytest.raises(gr.ConfigError, match="models"):
        HistoryFilter(models="openai/gpt-4o-mini")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("start_s", value) for value in (math.nan, "2026-03-08")),
        pytest.param("start_s", 10**400, id="start_s-huge"),
        *(("end_s", value) for value in (math.nan, Decimal(1))),
        *(("min_cost_usd", value) for value in (Decimal("NaN"), math.inf, "much", b"1")),
        *(("roles", value) for value in (None, 5, {"a\ud800"}, {5}, [[]])),
    ],
)
def test_filters_of_the_wrong_kind(name: str, value: object) -> None:
    """What no store can compare is refused by name: SQLite took a time that is no number for none at all."""
    fields: dict[str, Any] = {name: value}
    with pytest.raises(gr.ConfigError, match=f"{name}: must be"):
        HistoryFilter(**fields)


async def test_a_session_that_goes_meanwhile():
    """One that was deleted behind its listing counts no more than one that was deleted before it."""

    class Store(MemoryStore):
        async def load(self, key):
            await self.delete("b")
            return await super().load(key)

    analyzer = await fill(Store(), {key: turn("1", 100) for key in "abc"})
    assert (await analyzer.statistics()).sessions == 2


async def test_counts_that_no_request_has(tmp_path: Path) -> None:
    """Earlier versions have stored whatever a provider said: it counts for nothing, and the others are added up."""
    odd = [(2**63 - 1, 10), (2**63 - 1, 10), (-5, 10), (10**30, 10)]
    log = [entry for at, tokens in enumerate([*odd, (3, 4)], 1) for entry in turn(str(at), at, tokens=tokens)]
    async with SqliteStore(tmp_path / "h.db") as kept:
        for store in (MemoryStore(), kept):
            found = await (await fill(store, {"k": log})).statistics()
            assert (found.calls, found.prompt_tokens, found.completion_tokens) == (5, 3, 44)


async def test_amounts_and_times_however_they_are_written(tmp_path: Path) -> None:
    """They count the same in every store."""
    only = HistoryFilter(start_s=-(2**70), end_s=2**70, min_cost_usd=0.1)  # type: ignore[arg-type]
    async with SqliteStore(tmp_path / "h.db") as kept:
        for store in (MemoryStore(), kept):
            analyzer = await fill(store, {"k": turn("1", 100, cost="0.5") + turn("2", 200, cost="0.05")})
            assert (await analyzer.statistics(only=only)).calls == 1


async def test_real_sessions(autojump_clock):
    """What sessions have written adds up to what their results said."""
    store = MemoryStore()
    async with open_world(store=store) as world:
        results = [await world.client.session(f"s{n % 3}").ask(f"q{n}") for n in range(9)]
    found = await HistoryAnalyzer(store).statistics()
    assert (found.sessions, found.calls, found.entries) == (3, 9, 18)
    assert found.cost_usd == sum((result.cost or Decimal(0) for result in results), Decimal(0))
    assert found.total_tokens == sum(result.usage.total_tokens or 0 for result in results if result.usage is not None)

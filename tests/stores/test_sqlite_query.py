"""What SQLite adds up by itself is what the entries add up to one by one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing
from hypothesis import example, given
from hypothesis import strategies as st

import gorouter_trio as gr
from gorouter_trio.abc import HistoryStore, StoredHistory
from gorouter_trio.stores import HistoryAnalyzer, HistoryFilter, SqliteStore
from gorouter_trio.stores.query import BUCKETS
from gorouter_trio.wire.codec import encode_json
from gorouter_trio.wire.responses import Usage
from gorouter_trio.wire.result import CallRecord

# Few enough to meet again, odd enough to go wrong; seconds with digits that no short decimal has.
NAMES = ["m", "openai/gpt-4o-mini", "Иван", 'a"b\\\\', "", "unknown"]
ROLES = ["user", "assistant", "tool", "system"]
TURNS = ["1", "2", ""]
times = st.floats(0, 2e5, allow_nan=False) | st.sampled_from([0.0, 59.999999999999996, 60.0, 1_764_104_000.1234567])
counts = st.none() | st.integers(0, 2**40)
costs = st.none() | st.decimals(0, 10**6, places=12) | st.sampled_from([Decimal("1E-7"), Decimal(0), Decimal("0.2")])
usages = st.none() | st.builds(Usage, prompt_tokens=counts, completion_tokens=counts, total_tokens=counts, cost=costs)
calls = st.builds(
    CallRecord,
    model=st.none() | st.sampled_from(NAMES),
    finish_reason=st.sampled_from([None, "stop", "length", ""]),
    usage=usages,
    interrupted=st.booleans(),
    attempts=st.integers(0, 2),
    finished_at_s=times,
)
messages = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": st.text(max_size=5)})
fields = {
    "turn_id": st.sampled_from(TURNS),
    "message": messages,
    "messages": st.lists(messages, max_size=3),
    "call": calls,
    "at_s": times,
    "maybe_billed": st.booleans(),
    "calls": st.integers(0, 9),
    "cost_usd": st.decimals(0, 10**6, places=12),
    "unpriced": st.integers(0, 9),
    "later": st.just([1, {"type": "started"}]),
}


def tagged(tag: str, needed: Sequence[str], optional: Sequence[str] = ()) -> st.SearchStrategy[bytes]:
    """Entries of one tag with these fields."""
    return st.fixed_dictionaries(
        {"type": st.just(tag), **{name: fields[name] for name in needed}},
        optional={name: fields[name] for name in optional},
    ).map(encode_json)


entries = st.one_of(
    tagged("started", ["turn_id", "messages"], ["at_s", "later"]),
    tagged("answered", ["turn_id", "message", "call"], ["later"]),
    tagged("abandoned", ["turn_id"], ["maybe_billed", "call", "later"]),
    tagged("compacted", [], ["calls", "cost_usd", "unpriced"]),
    tagged("of a later version", [], ["turn_id", "message", "messages", "call", "at_s", "maybe_billed", "later"]),
    tagged("answered", ["turn_id", "message", "call"]).map(lambda entry: entry[: len(entry) // 2]),
    st.sampled_from([b"", b"\\xff", b"null", b"7", b"[]", b"{}", b'{"type":7}', b'"started"', b"\\0" * 40]),
)
histories = st.dictionaries(st.sampled_from(["a", "ab", "b"]), st.lists(entries, max_size=8), max_size=3)
filters = st.builds(
    HistoryFilter,
    start_s=st.none() | st.floats(0, 100),
    end_s=st.none() | st.floats(101, 2e5),
    models=st.sets(st.sampled_from(NAMES), max_size=2),
    roles=st.sets(st.sampled_from(ROLES), max_size=2),
    finish_reasons=st.sets(st.sampled_from(["stop", "length", ""]), max_size=2),
    min_cost_usd=st.none() | st.sampled_from([Decimal("0.2"), Decimal("1E-7"), Decimal("5000.000000000001")]),
)


class OneByOne:
    """A store that is only asked for its entries."""

    def __init__(self, store: HistoryStore) -> None:
        self._store = store

    async def load(self, key: str) -> StoredHistory:
        return await self._store.load(key)

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        return await self._store.list_keys(prefix, after=after, limit=limit)


@example(
    logs={"a": [b'{"type":"compacted","calls":1}'], "b": [b'{"type":"compacted","cost_usd":1E-12}']},
    only=HistoryFilter(),
    prefix="",
    key=None,
)
@given(logs=histories, only=filters, prefix=st.sampled_from(["", "a", "c"]), key=st.sampled_from([None, "a", "c"]))
def test_both_ways_give_the_same(logs, only, prefix, key):
    """Whatever is in the logs and in the filter, to the last digit."""

    async def compare(store):
        for name, log in logs.items():
            await store.append(name, log, expected_version=0)
        ours, theirs = HistoryAnalyzer(store), HistoryAnalyzer(cast(HistoryStore, OneByOne(store)))
        assert ours._summing() is store
        assert theirs._summing() is None
        assert await ours.statistics(key=key, prefix=prefix, only=only) == await theirs.statistics(
            key=key, prefix=prefix, only=only
        )
        for bucket in BUCKETS:
            points = await ours.cost_over_time(bucket, key=key, prefix=prefix, only=only)
            assert points == await theirs.cost_over_time(bucket, key=key, prefix=prefix, only=only)

    run_with_store(compare)


def run_with_store(work: Callable[[SqliteStore], Awaitable[None]]) -> None:
    """Run `work` on a new store."""

    async def run():
        with tempfile.TemporaryDirectory() as directory:
            async with SqliteStore(Path(directory) / "h.db") as store:
                await work(store)

    trio.run(run)


@pytest.fixture
async def store(tmp_path):
    """A store in a file of its own."""
    async with SqliteStore(tmp_path / "h.db") as made:
        yield made


async def test_a_long_question_keeps_nobody_waiting(store):
    """While one task adds up, others write and read; a question that nobody waits for any more ends."""
    entry = json.dumps({"type": "answered", "turn_id": "1", "message": {"role": "assistant"}, "call": {}}).encode()
    await store.append("big", [entry] * 60_000, expected_version=0)
    analyzer = HistoryAnalyzer(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(analyzer.statistics)
        version = meanwhile = 0
        while nursery.child_tasks:
            version = await store.append("small", [b"{}"], expected_version=version)
            assert (await store.load("small")).version == version
            meanwhile += bool(nursery.child_tasks)
        assert meanwhile >= 1
    with trio.move_on_after(0.005) as scope:
        await analyzer.statistics()
    assert scope.cancelled_caught
    assert (await analyzer.statistics(key="big")).calls == 60_000


async def test_closing_ends_a_question(store):
    """A store that is closed meanwhile says so, or has answered."""
    entry = json.dumps({"type": "answered", "turn_id": "1", "message": {"role": "assistant"}, "call": {}}).encode()
    await store.append("big", [entry] * 20_000, expected_version=0)
    outcomes: list[int | str] = []

    async def ask():
        try:
            outcomes.append((await HistoryAnalyzer(store).statistics()).calls)
        except gr.StoreError as exc:
            outcomes.append(exc.kind)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        await store.aclose()
    assert outcomes in ([20_000], ["closed"])

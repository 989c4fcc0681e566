"""Equal requests asked once, and answers kept for later batches."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from gorouter_trio.batch.cache import AnswerCache, FileAnswers, MemoryAnswers
from gorouter_trio.batch.settings import BatchJob
from gorouter_trio.client import Client, open_client
from gorouter_trio.errors import ConfigError, StoreError, StreamBrokenError
from gorouter_trio.simulator import Simulator, SimulatorConfig, open_simulated_network
from gorouter_trio.wire.mail import CallSettings, HttpCall


async def run(client: Client, tmp_path: Path, prompts: list[str], **fields: Any) -> dict[str, dict[str, Any]]:
    options = {name: fields.pop(name) for name in ("temperature", "extra_headers") if name in fields}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": p, "id": f"id-{n}"}) + "\n" for n, p in enumerate(prompts)))
    job = BatchJob(source=str(source), output=str(output), max_in_flight=8, if_exists="overwrite", **fields)
    async with client.batch_job(job, **options) as running:
        await running.run()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return {row["custom_id"]: row for row in rows}


async def test_dedup(tmp_path: Path) -> None:
    """Equal requests are sent once, also those in flight together; the others have the same answer and cost nothing."""
    simulator = Simulator(SimulatorConfig(latency_s=0.01))
    async with (
        open_simulated_network(simulator) as network,
        open_client(api_key="sk-t", base_url=network.base_url, transport=network, insecure_http=True) as client,
    ):
        rows = await run(client, tmp_path, ["[[say a]]", "[[say b]]"] * 10, dedup=True)
        assert simulator.statistics().received == 2
        assert sum(not row["cached"] for row in rows.values()) == 2
        bodies = {json.dumps(row["response"]["body"]) for row in rows.values()}
        assert len(bodies) == 2
        requests = [{"messages": [{"role": "user", "content": "[[say c]]"}]}] * 5
        async with client.batch(requests, dedup=True) as batch:
            results = [result async for result in batch]
        assert simulator.statistics().received == 3
        assert sorted(result.cached for result in results) == [False, True, True, True, True]
        assert sum(result.unwrap().cost or 0 for result in results if result.cached) == Decimal(0)


async def test_cache_file(tmp_path: Path) -> None:
    """A later job asks only what is not in the file: other bodies and other headers are other requests."""
    cache = str(tmp_path / "answers.db")
    simulator = Simulator()
    async with (
        open_simulated_network(simulator) as network,
        open_client(api_key="sk-t", base_url=network.base_url, transport=network, insecure_http=True) as client,
    ):
        prompts = ["[[say a]]", "[[say b]]", "[[fault 403_moderation]]"]
        await run(client, tmp_path, prompts, cache=cache)
        rows = await run(client, tmp_path, prompts, cache=cache)
        assert simulator.statistics().received == 4
        assert [row["cached"] for _id, row in sorted(rows.items())] == [True, True, False]
        await run(client, tmp_path, ["[[say a]]"], cache=cache, temperature=0.5)
        await run(client, tmp_path, ["[[say a]]"], cache=cache, extra_headers={"X-Other": "1"})
        assert simulator.statistics().received == 6
        with pytest.raises(ConfigError, match="asks nobody before"):
            await run(client, tmp_path, prompts, cache=cache, via="api")


async def test_answer_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file of answers is full, an answer that was paid for is in the output, with its cost."""

    async def put(_self: FileAnswers, _name: bytes, _body: bytes) -> None:
        raise StoreError("the disk is full", kind="full")

    monkeypatch.setattr(FileAnswers, "put", put)
    simulator = Simulator()
    async with (
        open_simulated_network(simulator) as network,
        open_client(api_key="sk-t", base_url=network.base_url, transport=network, insecure_http=True) as client,
    ):
        rows = await run(client, tmp_path, ["[[say a]]", "[[say b]]"], cache=str(tmp_path / "answers.db"))
    assert [row["error"] for row in rows.values()] == [None, None]
    costs = [Decimal(str(row["response"]["body"]["usage"]["cost"])) for row in rows.values()]
    assert sum(costs) == Decimal(simulator.statistics().charged_nanousd) / 10**9


async def test_cache_that_is_none(tmp_path: Path) -> None:
    """Another file in its place is said at once, with the output as it was; no row fails for it."""
    (tmp_path / "notes.txt").write_text("some notes of mine\n" * 100)
    (tmp_path / "out.jsonl").write_text("answers of before\n")
    simulator = Simulator()
    async with (
        open_simulated_network(simulator) as network,
        open_client(api_key="sk-t", base_url=network.base_url, transport=network, insecure_http=True) as client,
    ):
        with pytest.raises(StoreError, match="no SQLite database"):
            await run(client, tmp_path, ["[[say a]]"], cache=str(tmp_path / "notes.txt"))
    assert (tmp_path / "out.jsonl").read_text() == "answers of before\n"


async def test_failure_is_not_shared(autojump_clock: trio.testing.MockClock) -> None:
    """Where the one who asks fails, the next one asks; a cancelled one leaves nobody waiting."""
    cache, asked = AnswerCache(MemoryAnswers()), 0
    call = HttpCall(body=b"{}", settings=CallSettings())

    async def fail(_call: HttpCall) -> Any:
        nonlocal asked
        asked += 1
        await trio.sleep(1)
        raise StreamBrokenError("cut")

    async def ask() -> None:
        with pytest.raises(StreamBrokenError):
            await cache.ask(call, fail)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
    assert asked == 3
    with trio.move_on_after(0.5):
        await cache.ask(call, fail)
    await ask()


async def test_bounded_memory() -> None:
    """The oldest answers go."""
    store = MemoryAnswers(most=3)
    for n in range(5):
        await store.put(b"%d" % n, b"x")
    assert [await store.get(b"%d" % n) for n in range(5)] == [None, None, b"x", b"x", b"x"]

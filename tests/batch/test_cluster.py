"""Jobs of several workers on one Redis: a real server, workers that die, limits and a budget that they share."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
from batch_worker import PRICES
from redis_server import free_port, fresh_prefix, running_redis, shared_redis

from gorouter_trio.batch.cluster import ClusterJob, ClusterStatus, Worker
from gorouter_trio.batch.cluster_wiring import make_worker
from gorouter_trio.batch.input import open_rows
from gorouter_trio.batch.wiring import job_services
from gorouter_trio.client import Client, open_client
from gorouter_trio.errors import ConfigError, StoreError
from gorouter_trio.pool.shared import MoneyGrant
from gorouter_trio.simulator import Simulator, SimulatorConfig, open_simulated_network, serve_simulator
from gorouter_trio.testing.crash import CrashHarness, Kill, open_crash_harness
from gorouter_trio.transport.resp_client import RedisClient

pytestmark = pytest.mark.net
SUPPORT = Path(__file__).resolve().parents[1] / "support"
# About what a row of `write_priced_rows` costs, and a little more than it can.
ROW_USD, WORST_USD = Decimal("0.000245"), Decimal("0.0003")


@asynccontextmanager
async def open_parts(
    config: SimulatorConfig | None = None, *, lease_s: float = 30.0
) -> AsyncIterator[tuple[Client, Simulator, ClusterJob]]:
    simulator = Simulator(config)
    async with (
        RedisClient(shared_redis().url) as redis,
        open_simulated_network(simulator) as network,
        open_client(api_key="sk-t", base_url=network.base_url, transport=network, insecure_http=True) as client,
    ):
        job = ClusterJob(redis, fresh_prefix(), lease_s=lease_s)
        yield client, simulator, job
        await job.delete()


def write_rows(tmp_path: Path, count: int, prompt: str = "[[say {n}]]") -> str:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt.format(n=n), "id": f"id-{n}"}) + "\n" for n in range(count)))
    return str(path)


def write_priced_rows(tmp_path: Path, count: int) -> str:
    """Rows whose answers cost nearly as much as they can."""
    path = tmp_path / "in.jsonl"
    rows = [{"prompt": f"[[tokens 400]] {n}", "id": f"id-{n}", "max_tokens": 410} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


async def submit(job: ClusterJob, client: Client, source: str, **fields: Any) -> int:
    encode = job_services(client.runtime, {}).encode_for(job.name)
    async with open_rows(source) as rows:
        return await job.submit(aiter(rows), encode, **fields)


def worker(job: ClusterJob, client: Client, name: str, width: int = 8) -> Worker:
    services = job_services(client.runtime, {})
    return Worker(job, services.run_for(None), budget=services.budget, name=name, width=width)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_whole(tmp_path: Path) -> None:
    """Submitted twice it is the same job; three workers run each row once; collected twice it is the same file."""
    source, out = write_rows(tmp_path, 120), tmp_path / "out.jsonl"
    with Path(source).open("a") as file:  # noqa: ASYNC230 - a test's own file
        file.write('{"text":"no prompt"}\n')
    async with open_parts(SimulatorConfig(latency_s=0.005, jitter=1.0)) as (client, simulator, job):
        with pytest.raises(ConfigError, match="there is no job"):
            await job.status()
        assert await submit(job, client, source, settings={"a": 1}) == 121
        assert await submit(job, client, source, settings={"a": 1}) == 121
        with pytest.raises(ConfigError, match="begun with other settings"):
            await submit(job, client, source, settings={"a": 2})
        workers = [worker(job, client, f"w{n}") for n in range(3)]
        async with trio.open_nursery() as nursery:
            for one in workers:
                nursery.start_soon(one.run)
        status = await job.status()
        assert (status.total, status.done, status.failed, status.is_done, status.in_flight) == (121, 121, 1, True, 0)
        assert all(one.finished for one in workers)
        assert simulator.statistics().received == 120
        assert await job.collect(str(out), ordered=True) == (121, 121)
        assert await job.collect(str(out), ordered=True) == (0, 121)
    rows = read_rows(out)
    assert [row["custom_id"] for row in rows] == [*(f"id-{n}" for n in range(120)), "row-121"]
    assert [row["response"]["body"]["choices"][0]["message"]["content"] for row in rows[:-1]] == list(
        map(str, range(120))
    )
    assert not any(row["maybe_billed"] for row in rows)


async def test_a_server_that_is_away(tmp_path: Path, rng: random.Random) -> None:
    """A worker outlives a Redis that is killed and comes back: what it has paid for is kept, every row is sent once."""
    simulator = Simulator(SimulatorConfig(latency_s=0.05, jitter=1.0))
    with running_redis("--appendonly", "yes", "--appendfsync", "always", "--port", str(free_port())) as server:
        async with (
            RedisClient(server.url, timeout_s=10.0) as redis,
            open_simulated_network(simulator) as network,
            open_client(api_key="sk-t", base_url=network.base_url, transport=network, insecure_http=True) as client,
            trio.open_nursery() as nursery,
        ):
            job = ClusterJob(redis, "away", lease_s=1.0)
            await submit(job, client, write_rows(tmp_path, 400))
            one = worker(job, client, "w1")
            nursery.start_soon(one.run)
            for _ in range(4):
                await trio.sleep(rng.uniform(0.1, 0.3))
                server.kill()
                await trio.sleep(rng.uniform(0.0, 0.1))
                await trio.to_thread.run_sync(server.start)
        assert one.finished == 400
        async with RedisClient(server.url) as redis:
            assert await ClusterJob(redis, "away").collect(str(tmp_path / "out.jsonl"), follow=False) == (400, 400)
    assert simulator.statistics().received == 400


async def test_last_lines_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that come between a look for lines and one at the status are in the file when the job is over."""
    source, out = write_rows(tmp_path, 5), tmp_path / "out.jsonl"
    async with open_parts() as (client, _simulator, job):
        await submit(job, client, source)
        look = job.status

        async def work_and_look() -> ClusterStatus:
            if not (await look()).is_done:
                await worker(job, client, "late").run()
            return await look()

        monkeypatch.setattr(job, "status", work_and_look)
        assert await job.collect(str(out)) == (5, 5)
        monkeypatch.undo()
    assert len(read_rows(out)) == 5


async def test_file_of_something_else(tmp_path: Path) -> None:
    """A file of another job, or one that is no output, is refused and stays as it is."""
    source, out, notes = write_rows(tmp_path, 5), tmp_path / "out.jsonl", tmp_path / "notes.json"
    async with open_parts() as (client, _simulator, job):
        await submit(job, client, source)
        await worker(job, client, "w").run()
        await job.collect(str(out))
    before = out.read_bytes()
    notes.write_bytes(b'{"mine": 1}')
    async with open_parts() as (client, _simulator, job):
        await submit(job, client, write_rows(tmp_path, 9, "[[say other {n}]]"))
        await worker(job, client, "w").run()
        with pytest.raises(ConfigError, match="not those of the job"):
            await job.collect(str(out))
        with pytest.raises(ConfigError, match="no line of a batch's output"):
            await job.collect(str(notes))
    assert (out.read_bytes(), notes.read_bytes()) == (before, b'{"mine": 1}')


async def test_torn_file(tmp_path: Path) -> None:
    """A line that was cut off as it was written is written anew."""
    source, out = write_rows(tmp_path, 5), tmp_path / "out.jsonl"
    async with open_parts() as (client, _simulator, job):
        await submit(job, client, source)
        await worker(job, client, "w").run()
        await job.collect(str(out))
        whole = out.read_bytes()
        for size in (len(whole) - 2, 9):
            out.write_bytes(whole[:size])
            await job.collect(str(out))
            assert out.read_bytes() == whole


async def test_dead_worker(tmp_path: Path) -> None:
    """What a dead worker had is claimed after its lease and says so; a living one keeps what it has for longer."""
    source, out = write_rows(tmp_path, 40), tmp_path / "out.jsonl"
    async with open_parts(SimulatorConfig(latency_s=1.5), lease_s=1.0) as (client, simulator, job):
        await submit(job, client, source)
        dead = worker(job, client, "dead", width=6)
        with trio.move_on_after(0.6):
            await dead.run()
        alive = [worker(job, client, f"w{n}", width=20) for n in range(2)]
        async with trio.open_nursery() as nursery:
            for one in alive:
                nursery.start_soon(one.run)
        assert sum(one.claimed for one in alive) == 6
        await job.collect(str(out))
        # The simulator had seen what the dead one had sent; nothing else was sent twice.
        assert simulator.statistics().received <= 46
    rows = read_rows(out)
    assert Counter(row["custom_id"] for row in rows) == Counter(f"id-{n}" for n in range(40))
    assert sum(row["maybe_billed"] for row in rows) == 6


async def test_refused_key(tmp_path: Path) -> None:
    """A worker whose key is refused stops, sends nothing, and its rows go to others, unmarked."""
    source, out = write_rows(tmp_path, 10), tmp_path / "out.jsonl"
    async with open_parts(SimulatorConfig(api_keys=("sk-other",)), lease_s=0.3) as (client, _, job):
        await submit(job, client, source)
        refused = worker(job, client, "refused", width=4)
        await refused.run()
        assert refused.stopping == "key"
        assert (await job.status()).stopped == "key"
        async with (
            open_simulated_network(Simulator()) as network,
            open_client(api_key="sk-t", base_url=network.base_url, transport=network, insecure_http=True) as other,
        ):
            await worker(job, other, "good").run()
        await job.collect(str(out))
    rows = read_rows(out)
    assert len(rows) == 10
    assert not any(row["maybe_billed"] or row["error"] for row in rows)


# --- money ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_sharing(job: ClusterJob, simulator: Simulator) -> AsyncIterator[Client]:
    """A client of one more machine, whose money is that of the job."""
    async with (
        open_simulated_network(simulator) as network,
        open_client(
            api_key="sk-t",
            base_url=network.base_url,
            transport=network,
            insecure_http=True,
            shared=job.limits,
            prices=PRICES,
        ) as client,
    ):
        yield client


async def run_worker(job: ClusterJob, simulator: Simulator, name: str, width: int = 4) -> Worker:
    async with open_sharing(job, simulator) as client:
        settings = await job.settings()
        one = make_worker(client.runtime, job, settings=settings, turn={}, name=name, width=width)
        await one.run()
    return one


def charged_usd(simulator: Simulator) -> Decimal:
    """What the simulator says that it has charged."""
    return Decimal(simulator.statistics().charged_nanousd) / 10**9


async def test_budget_of_all(tmp_path: Path) -> None:
    """Three workers stop at the budget of the job; with a larger one they go on; nothing is lost or flagged."""
    source, out = write_priced_rows(tmp_path, 90), tmp_path / "out.jsonl"
    budget = ROW_USD * 40
    async with open_parts(SimulatorConfig(latency_s=0.002, jitter=1.0)) as (client, simulator, job):
        await submit(job, client, source, budget_usd=budget)
        workers: list[Worker] = []

        async def work(name: str) -> None:
            workers.append(await run_worker(job, simulator, name))

        async with trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(work, f"w{n}")
        assert [one.stopping for one in workers] == ["budget"] * 3
        status = await job.status()
        assert status.budget_usd == budget
        assert (status.stopped, status.workers, status.in_flight, status.is_over) == ("budget", 0, 0, True)
        assert status.spent_usd == status.cost_usd == charged_usd(simulator)
        assert status.reserved_usd == status.assumed_usd == 0
        assert status.left_usd == budget - charged_usd(simulator)
        # What is left does not cover one more.
        assert 0 <= status.left_usd < WORST_USD
        assert status.undone == 90 - status.done > 0
        assert (await job.collect(str(out))).new == status.done

        assert await submit(job, client, source, budget_usd=ROW_USD * 200) == 90
        assert not (await job.status()).stopped
        assert (await run_worker(job, simulator, "later")).stopping is None
        status = await job.status()
        assert (status.is_done, status.undone, status.stopped) == (True, 0, None)
        assert status.spent_usd == status.cost_usd == charged_usd(simulator)
        await job.collect(str(out))
        assert simulator.statistics().received == 90
    rows = read_rows(out)
    assert Counter(row["custom_id"] for row in rows) == Counter(f"id-{n}" for n in range(90))
    assert not any(row["maybe_billed"] or row["error"] for row in rows)


async def test_raised_while_running(tmp_path: Path) -> None:
    """A larger budget reaches a worker that runs; one of a client that would spend by itself is refused."""
    source = write_priced_rows(tmp_path, 60)
    async with open_parts(SimulatorConfig(latency_s=0.3), lease_s=0.6) as (client, simulator, job):
        await submit(job, client, source, budget_usd=ROW_USD * 50)
        with pytest.raises(ConfigError, match="shared: must be the `limits` of the job"):
            make_worker(client.runtime, job, settings={}, turn={}, name="alone")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_worker, job, simulator, "w", 10)
            await trio.sleep(0.4)
            await submit(job, client, source, budget_usd=ROW_USD * 100)
        assert (await job.status()).is_done


async def test_dead_workers_money(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker had at hand when it died counts as spent after the lease, and says so; the rest is still spent."""
    source = write_priced_rows(tmp_path, 60)
    budget = ROW_USD * 30
    async with open_parts(SimulatorConfig(latency_s=0.05), lease_s=2.0) as (client, simulator, job):
        await submit(job, client, source, budget_usd=budget)
        async with open_sharing(job, simulator) as other:
            # Nobody tells its client that it is to give back what it has.
            runtime = other.runtime
            dead = make_worker(runtime, job, settings={}, turn={}, name="dead", width=4)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(dead.run)
                with trio.fail_after(20):
                    while await held_usd(job) < WORST_USD:
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            held = await held_usd(job)
            assert held >= WORST_USD
            # From here on it is dead.
            monkeypatch.setattr(job.limits, "take_money", _unheard)
            alive = ClusterJob(job.redis, job.name, lease_s=2.0)
            assert (await run_worker(alive, simulator, "alive")).stopping == "budget"
            status = await alive.status()
        assert status.assumed_usd is not None
        assert status.spent_usd is not None
        assert 0 < status.assumed_usd <= held
        assert charged_usd(simulator) <= status.spent_usd <= budget
        assert budget - status.spent_usd < WORST_USD
        assert status.cost_usd < status.spent_usd <= status.cost_usd + status.assumed_usd


async def held_usd(job: ClusterJob) -> Decimal:
    money = await job.limits.read_budget("batch", job.name)
    return Decimal(0) if money is None else money.held_usd


async def _unheard(*_given: object) -> MoneyGrant:
    raise StoreError("nobody hears of it", kind="unreachable")


# --- processes --------------------------------------------------------------------------------------------------------


class Killed(NamedTuple):
    """The part of the budget that was charged, and what to say."""

    charged: Decimal
    figure: str


async def run_with_kills(
    tmp_path: Path, rng: random.Random, *, rows: int, kills: int, every_s: float, rpm: float, budget: Decimal
) -> Killed:
    """Three processes on one Redis, one of them killed again and again; check what the job promises.

    The budget is for less than the whole; after that it is raised, and the rest is done.
    """
    source, out, width = write_priced_rows(tmp_path, rows), tmp_path / "out.jsonl", 8
    sent: list[float] = []
    killed = 0
    async with open_parts(lease_s=2.0) as (client, _, job), trio.open_nursery() as nursery:
        simulator = Simulator(
            SimulatorConfig(latency_s=0.02, jitter=1.0), on_request=lambda record: sent.append(record.started_at_s)
        )
        base_url = await nursery.start(serve_simulator, simulator)
        await submit(job, client, source, budget_usd=budget)

        async def work(number: int, suffix: str) -> None:
            nonlocal killed
            async with open_crash_harness("batch_worker:share", path=[SUPPORT]) as harness:
                for life in range(1_000):
                    name = f"w{number}-{life}{suffix}"
                    args = (shared_redis().url, job.name, name, base_url, str(rpm), str(width))
                    # They die in turn, one in each stretch of time.
                    dies = killed < kills and (life > 0 or number < kills)
                    delay_s = every_s * ((number + 1 if life == 0 else 3) + rng.uniform(-0.3, 0.3))
                    kill = Kill(after_acks=1, delay_s=delay_s) if dies else None
                    crash = await _run(harness, args, kill)
                    killed += crash.killed
                    if not crash.killed:
                        assert crash.acks[-1] == ("done" if suffix else "budget")
                        return

        async def work_together(suffix: str = "") -> ClusterStatus:
            async with trio.open_nursery() as workers:
                for number in range(3):
                    workers.start_soon(work, number, suffix)
            return await job.status()

        bound = await work_together()
        charged, killed_before = charged_usd(simulator), killed
        assert (bound.stopped, bound.is_done) == ("budget", False)
        assert bound.spent_usd is not None
        assert bound.left_usd is not None
        assert bound.assumed_usd is not None
        assert charged <= bound.spent_usd <= budget
        assert bound.left_usd <= WORST_USD
        # What each of them may have had in flight, and a little at hand.
        assert bound.assumed_usd <= killed * (width + 4) * WORST_USD
        await submit(job, client, source, budget_usd=budget * 10)
        assert (await work_together("-again")).is_done
        assert (await job.collect(str(out))).new == rows
        nursery.cancel_scope.cancel()
    lines = read_rows(out)
    assert Counter(row["custom_id"] for row in lines) == Counter(f"id-{n}" for n in range(rows))
    flagged = sum(row["maybe_billed"] for row in lines)
    again = simulator.statistics().received - rows
    # How many come before the rows are done depends on how long a process takes to begin.
    assert killed_before >= max(1, kills // 2)
    assert 0 <= again <= killed * width
    assert flagged <= killed * width
    most = max((sum(start <= at < start + 60 for at in sent) for start in sent), default=0)
    assert most <= rpm * 1.02
    return Killed(
        charged / budget,
        f"{rows:,} rows, {killed} kills: each once, {again} sent again, {flagged} flagged, {most} a minute; "
        f"a budget for {bound.done:,} rows, {killed_before} kills: {charged / budget:.1%} charged, "
        f"{bound.assumed_usd / budget:.1%} assumed, {bound.left_usd / budget:.2%} left",
    )


async def _run(harness: CrashHarness, args: tuple[str, ...], kill: Kill | None) -> Any:
    return await harness.run(*args, kill=kill)


async def test_three_processes(tmp_path: Path, rng: random.Random, record_property) -> None:
    """Three workers share a job, one is killed; they keep to its budget, and go on with a larger one."""
    done = await run_with_kills(tmp_path, rng, rows=300, kills=1, every_s=0.4, rpm=30_000, budget=ROW_USD * 200)
    assert done.charged >= Decimal("0.9")
    record_property("figure", done.figure)


@pytest.mark.long
async def test_kills_every_ten_seconds(tmp_path: Path, rng: random.Random, record_property) -> None:
    """Three workers at a shared limit and a budget for a part, one of them killed every ten seconds for minutes."""
    done = await run_with_kills(tmp_path, rng, rows=6_000, kills=12, every_s=10, rpm=3_000, budget=ROW_USD * 4_500)
    assert done.charged >= Decimal("0.95")
    record_property("figure", done.figure)

"""Jobs: files in and out, their journals, and going on after a kill, a cancel, a full disk, a changed input."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from gorouter_trio.batch.job import RunningJob
from gorouter_trio.batch.order import OrderWindow
from gorouter_trio.batch.settings import BatchJob
from gorouter_trio.client import Client, open_client
from gorouter_trio.config import Budget, Deadlines, PoolLimits
from gorouter_trio.errors import AuthenticationError, ConfigError, GorouterError, InsufficientCreditsError, StoreError
from gorouter_trio.simulator import Simulator, SimulatorConfig, open_simulated_network, serve_simulator
from gorouter_trio.testing.crash import Kill, open_crash_harness
from gorouter_trio.transport.http import Network
from gorouter_trio.transport.http_server import ServerReply, ServerRequest
from gorouter_trio.wire.mail import CallSettings
from gorouter_trio.wire.result import ChatResult

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@asynccontextmanager
async def open_simulated(
    config: SimulatorConfig | None = None,
    *,
    connections: int = 64,
    network: Callable[[Network], Network] = lambda network: network,
    **settings: Any,
) -> AsyncIterator[tuple[Client, Simulator]]:
    simulator = Simulator(config)
    async with (
        open_simulated_network(simulator) as near,
        open_client(
            api_key="sk-test",
            base_url=near.base_url,
            transport=network(near),
            insecure_http=True,
            pool=PoolLimits(max_connections=connections, adaptive_from=connections),
            **settings,
        ) as client,
    ):
        yield client, simulator


def write_rows(path: Path, count: int, prompt: str = "[[say {n}]]") -> str:
    path.write_text("".join(json.dumps({"prompt": prompt.format(n=n), "id": f"id-{n}"}) + "\n" for n in range(count)))
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(row: dict[str, Any]) -> str:
    return str(row["response"]["body"]["choices"][0]["message"]["content"])


async def run(client: Client, job: BatchJob, **options: Any) -> RunningJob:
    async with client.batch_job(job, **options) as running:
        await running.run()
    return running


def job_for(tmp_path: Path, source: str, **fields: Any) -> BatchJob:
    return BatchJob(**{"source": source, "output": str(tmp_path / "out.jsonl"), "max_in_flight": 8, **fields})


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True])
async def test_whole(ordered: bool, tmp_path: Path) -> None:
    """Each row once with its own answer, in the order of the input where that is asked for; again, nothing is sent."""
    out = tmp_path / "out.jsonl"
    job = job_for(tmp_path, write_rows(tmp_path / "in.jsonl", 60), ordered=ordered, window=16)
    config = SimulatorConfig(latency_s=0.004, jitter=1.0)
    async with open_simulated(config) as (client, simulator):
        await run(client, job)
        rows = read_rows(out)
        assert Counter(row["custom_id"] for row in rows) == Counter(f"id-{n}" for n in range(60))
        assert all(text_of(row) == row["custom_id"].removeprefix("id-") for row in rows)
        assert (rows == sorted(rows, key=lambda row: int(row["custom_id"][3:]))) is ordered
        running = await run(client, BatchJob(**{**_fields(job), "if_exists": "resume"}))
        assert (running.earlier_rows, running.tally.rows, running.resent) == (60, 60, 0)
        assert read_rows(out) == rows
        assert simulator.statistics().received == 60


def _fields(job: BatchJob) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__struct_fields__}


async def test_output_that_exists(tmp_path: Path) -> None:
    """It is refused, overwritten with its journal, or gone on with; without its journal it is nobody's."""
    source, out = write_rows(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    async with open_simulated() as (client, _):
        await run(client, job_for(tmp_path, source))
        with pytest.raises(FileExistsError):
            await run(client, job_for(tmp_path, source))
        await run(client, job_for(tmp_path, source, if_exists="overwrite", limit=2))
        assert len(read_rows(out)) == 2
        os.unlink(f"{out}.journal")
        with pytest.raises(ConfigError, match="has no journal"):
            await run(client, job_for(tmp_path, source, if_exists="resume"))
        os.unlink(out)
        await run(client, job_for(tmp_path, source, if_exists="resume"))
        os.unlink(out)
        with pytest.raises(FileExistsError, match="journal of a job whose output is not there"):
            await run(client, job_for(tmp_path, source))
        with pytest.raises(ConfigError, match="has lost 3 lines"):
            await run(client, job_for(tmp_path, source, if_exists="resume"))


@pytest.mark.parametrize("is_directory", [False, True])
async def test_overwrite_beside_another_file(is_directory: bool, tmp_path: Path) -> None:
    """What is named as the journal and is none is not removed, and the output stays as it is."""
    source, out, notes = write_rows(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl", tmp_path / "notes"
    notes.mkdir() if is_directory else notes.write_text("some notes of mine\n" * 100)
    async with open_simulated() as (client, _):
        await run(client, job_for(tmp_path, source))
        lines = out.read_bytes()
        with pytest.raises(StoreError, match="notes: "):
            await run(client, job_for(tmp_path, source, journal=str(notes), if_exists="overwrite"))
    assert (out.read_bytes(), notes.exists()) == (lines, True)
    assert is_directory or notes.read_text().startswith("some notes")


async def test_two_at_a_time(tmp_path: Path) -> None:
    """A second process, or job, on the same output is kept out."""
    source = write_rows(tmp_path / "in.jsonl", 3)
    async with open_simulated() as (client, _), client.batch_job(job_for(tmp_path, source)):
        with pytest.raises(BlockingIOError, match="another process is writing"):
            await run(client, job_for(tmp_path, source, if_exists="resume"))


# --- going on ---------------------------------------------------------------------------------------------------------


async def test_drain_and_go_on(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """A drained job sends nothing more, loses nothing in flight, and goes on with the rest."""
    job = job_for(tmp_path, write_rows(tmp_path / "in.jsonl", 40), if_exists="resume")
    async with open_simulated(SimulatorConfig(latency_s=1.0)) as (client, simulator):
        async with client.batch_job(job) as running, trio.open_nursery() as nursery:
            nursery.start_soon(running.run)
            while running.tally.rows < 8:
                await trio.sleep(0.1)
            running.drain()
        assert running.progress().rows == simulator.statistics().received < 40
        again = await run(client, job)
    assert (again.resent, again.tally.maybe_billed, simulator.statistics().received) == (0, 0, 40)
    assert len({row["custom_id"] for row in read_rows(tmp_path / "out.jsonl")}) == 40


async def test_cancel_and_go_on(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """What was in flight at a cancel is sent again, and says that it may have been billed twice."""
    job = job_for(tmp_path, write_rows(tmp_path / "in.jsonl", 30), if_exists="resume")
    # Virtual time does not wait for the disk: those in flight are to stay there.
    patience = Deadlines(headers_s=math.inf, first_data_s=math.inf, total_s=math.inf)
    async with (
        open_simulated(SimulatorConfig(latency_s=1e9), deadlines=patience) as (client, simulator),
        client.batch_job(job) as running,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(running.run)
        while simulator.statistics().in_flight < 8:
            await trio.sleep(0.01)
        running.cancel()
    async with open_simulated() as (client, _):
        again = await run(client, job)
    rows = read_rows(tmp_path / "out.jsonl")
    assert running.cancelled == 8
    assert (again.resent, len(rows), len({row["custom_id"] for row in rows})) == (8, 30, 30)
    assert sum(row["maybe_billed"] for row in rows) == 8


async def test_torn_line_and_adopted_rows(tmp_path: Path) -> None:
    """Lines that the journal has not heard of count, half a line does not; both are as a kill leaves them."""
    source, out = write_rows(tmp_path / "in.jsonl", 12), tmp_path / "out.jsonl"
    async with open_simulated() as (client, simulator):
        await run(client, job_for(tmp_path, source))
        lines = out.read_bytes().splitlines(keepends=True)
        # As if killed after ten lines and a half, with two marks of answers that were not committed.
        out.write_bytes(b"".join(lines[:10]) + lines[10][:40])
        numbers = [int(json.loads(line)["id"].removeprefix("batch_req_")) for line in lines]
        journal = trio.Path(f"{out}.journal")
        assert await journal.exists()
        await _mark_as_sent(f"{out}.journal", numbers[8:])
        again = await run(client, job_for(tmp_path, source, if_exists="resume"))
    assert again.resent == 2
    assert simulator.statistics().received == 14
    assert len({row["custom_id"] for row in read_rows(out)}) == len(read_rows(out)) == 12


async def _mark_as_sent(path: str, rows: list[int]) -> None:
    from gorouter_trio.batch.journal import SENT, journal_file, mark_rows

    file = journal_file(path)
    await mark_rows(file, rows, state=SENT, facts={})
    await file.aclose()


async def test_changed_input(tmp_path: Path) -> None:
    """Another row, a row less, other settings: refused with what is different, and nothing sent; more rows run."""
    path = tmp_path / "in.jsonl"
    source = write_rows(path, 10)
    async with open_simulated() as (client, simulator):
        await run(client, job_for(tmp_path, source, limit=5))
        resumed = job_for(tmp_path, source, if_exists="resume")
        whole = path.read_text()
        path.write_text(whole.replace("[[say 2]]", "[[say two]]"))
        with pytest.raises(ConfigError, match=r"line 3 is another \(id 'id-2'\)"):
            await run(client, resumed)
        path.write_text("".join(whole.splitlines(keepends=True)[:4]))
        with pytest.raises(ConfigError, match="1 of the 5 rows that were run are not in it any more"):
            await run(client, resumed)
        path.write_text(whole)
        with pytest.raises(ConfigError, match=r"temperature was None and is 0\.5 now"):
            await run(client, resumed, temperature=0.5)
        with pytest.raises(ConfigError, match="duplicates was 'refuse' and is 'suffix' now"):
            await run(client, job_for(tmp_path, source, if_exists="resume", duplicates="suffix"))
        assert simulator.statistics().received == 5
        await run(client, resumed)
    assert len(read_rows(tmp_path / "out.jsonl")) == 10


@pytest.mark.parametrize("ordered", [False, True])
async def test_retry_failed(ordered: bool, tmp_path: Path) -> None:
    """Rows that have failed are run again in their place; the others are not, and nothing stands twice."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["[[fault 403_moderation]]" if n % 3 == 0 else f"[[say {n}]]" for n in range(12)]
    path.write_text("".join(json.dumps({"prompt": prompt, "id": n}) + "\n" for n, prompt in enumerate(prompts)))
    async with open_simulated() as (client, simulator):
        first = await run(client, job_for(tmp_path, str(path), ordered=ordered))
        assert (first.tally.failed, first.tally.succeeded) == (4, 8)
        again = await run(client, job_for(tmp_path, str(path), ordered=ordered, retry_failed=True))
        assert (again.earlier_rows, again.tally.failed, again.tally.succeeded) == (8, 4, 8)
        assert simulator.statistics().received == 16
    rows = read_rows(out)
    assert Counter(row["custom_id"] for row in rows) == Counter(str(n) for n in range(12))
    assert {row["error"]["type"] for row in rows if row["error"]} == {"ModerationError"}
    if ordered:
        assert [row["custom_id"] for row in rows] == [str(n) for n in range(12)]


async def test_retry_failed_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output could not be written anew, and is the next time, when rows are to be run again too: all are whole."""
    from gorouter_trio.batch import resume as module

    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["[[fault 403_moderation]]" if n % 3 == 0 else f"[[say {n}]]" for n in range(12)]
    path.write_text("".join(json.dumps({"prompt": prompt, "id": n}) + "\n" for n, prompt in enumerate(prompts)))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    async with open_simulated() as (client, _):
        await run(client, job_for(tmp_path, str(path), max_in_flight=1))
        anew = job_for(tmp_path, str(path), max_in_flight=1, retry_failed=True)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(module, "rewrite_output", fail)
            await run(client, anew)
        again = await run(client, anew)
    assert (again.tally.failed, again.tally.succeeded) == (4, 8)
    assert sorted(int(row["custom_id"]) for row in read_rows(out)) == list(range(12))


async def test_retry_failed_keeps_mode_and_link(tmp_path: Path) -> None:
    """An output that is written anew can be read by those who could read it before, and is where a link says."""
    path, out, place = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "disk" / "answers.jsonl"
    path.write_text('{"prompt": "[[fault 403_moderation]]"}\n{"prompt": "[[say 1]]"}\n')
    place.parent.mkdir()
    place.touch(mode=0o600)
    out.symlink_to(place)
    async with open_simulated() as (client, _):
        await run(client, job_for(tmp_path, str(path)))
        await run(client, job_for(tmp_path, str(path), retry_failed=True))
    assert out.readlink() == place
    assert len(read_rows(place)) == 2
    assert place.stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in place.parent.iterdir()) == ["answers.jsonl"]


async def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full ends the run with whole lines, and the job goes on when there is room again."""
    from gorouter_trio.batch import output as module

    job = job_for(tmp_path, write_rows(tmp_path / "in.jsonl", 40), if_exists="resume")
    real, left = module._write_all, 2

    def write(fd: int, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.write(fd, data[:20])
            raise OSError(28, "No space left on device")
        real(fd, data)

    async with open_simulated(SimulatorConfig(latency_s=0.001)) as (client, _):
        monkeypatch.setattr(module, "_write_all", write)
        with pytest.raises(OSError, match="No space left"):
            await run(client, job)
        done = len(read_rows(tmp_path / "out.jsonl"))
        monkeypatch.setattr(module, "_write_all", real)
        again = await run(client, job)
    assert 0 < done < 40
    assert again.earlier_rows == done
    assert len({row["custom_id"] for row in read_rows(tmp_path / "out.jsonl")}) == 40


async def test_damaged_files(tmp_path: Path) -> None:
    """Something else in the place of the output or the journal is refused, and left as it is."""
    source, out = write_rows(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    resumed = job_for(tmp_path, source, if_exists="resume")
    async with open_simulated() as (client, _):
        await run(client, resumed)
        good = out.read_bytes()
        for lines, message in (
            (b"broken\n", "line 4 is no line of a batch's output"),
            (b'{"id":"x"}\n', "line 4 was not written by a job like this"),
            (good.splitlines(keepends=True)[0], "has two lines for row"),
            (good.splitlines(keepends=True)[0].replace(b"batch_req_", b"batch_req_9"), "its journal knows nothing"),
        ):
            out.write_bytes(good + lines)
            with pytest.raises(ConfigError, match=message):
                await run(client, resumed)
            assert out.read_bytes() == good + lines
        (tmp_path / "out.jsonl.journal").write_bytes(b"x" * 4096)
        with pytest.raises(StoreError):
            await run(client, resumed)


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_budget(tmp_path: Path) -> None:
    """A job stops before its budget, of all its runs together; with more it goes on."""
    source = write_rows(tmp_path / "in.jsonl", 60, "[[tokens 40]] {n}")
    async with open_simulated() as (client, simulator):
        await client.refresh_prices()
        first = job_for(tmp_path, source, if_exists="resume", budget_usd=Decimal("0.0006"))
        running = await run(client, first, max_tokens=50)
        assert running.stopping == "budget"
        assert 0 < running.tally.cost <= Decimal("0.0006")
        assert 0 < running.tally.rows < 60
        spent = simulator.statistics().charged_nanousd
        again = await run(client, first, max_tokens=50)
        assert simulator.statistics().charged_nanousd - spent <= 600_000 - spent
        assert again.stopping == "budget"
        more = await run(
            client, job_for(tmp_path, source, if_exists="resume", budget_usd=Decimal("0.1")), max_tokens=50
        )
    assert (more.stopping, more.tally.rows, more.tally.maybe_billed) == (None, 60, 0)


@pytest.mark.parametrize("is_same_client", [False, True])
async def test_budget_counts_each_unknown_send(
    is_same_client: bool, autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """What was sent and never heard of counts once each, by its worst case, in this run and in all that go on."""
    source = write_rows(tmp_path / "in.jsonl", 6, "[[tokens 40]] {n}")
    with Path(source).open("a") as file:  # noqa: ASYNC230 - a test's own file
        file.write('{"prompt":"[[fault connection_cut]]","id":"cut"}\n')
    job = job_for(tmp_path, source, if_exists="resume", budget_usd=Decimal(1), max_in_flight=2)
    spent, assumed = list[Decimal](), list[int]()

    async def live(client: Client, simulator: Simulator, job: BatchJob, *, is_killed: bool) -> None:
        await client.refresh_prices()
        before = client.budget().assumed
        async with client.batch_job(job, max_tokens=50) as running, trio.open_nursery() as nursery:
            if is_killed:
                nursery.start_soon(running.run)
                # In small steps: while a thread writes the journal, each of them is over at once.
                while simulator.statistics().in_flight < 2:
                    await trio.sleep(0.001)
                nursery.cancel_scope.cancel()
            else:
                await running.run()
        account = client._runtime.accounting.gate.book.account("batch", running.name)
        assert account is not None
        assert account.held_usd == 0
        spent.append(account.spent_usd)
        assumed.append(client.budget().assumed - before)

    # Killed twice with the first two rows in flight, then run to its end, then looked at again, and a row run anew.
    anew = BatchJob(**{**_fields(job), "retry_failed": True})
    lives = [(job, True), (job, True), (job, False), (job, False), (anew, False), (job, False)]
    async with AsyncExitStack() as stack:
        places = [
            await stack.enter_async_context(open_simulated(SimulatorConfig(latency_s=60)))
            for _ in range(1 if is_same_client else len(lives))
        ]
        for (each, is_killed), (client, simulator) in zip(lives, itertools.cycle(places), strict=False):
            await live(client, simulator, each, is_killed=is_killed)
        charged = Decimal(sum(simulator.statistics().charged_nanousd for _, simulator in places)) / 10**9
    rows = read_rows(tmp_path / "out.jsonl")
    cost = sum(Decimal(str(row["response"]["body"]["usage"]["cost"])) for row in rows if not row["error"])
    assert [row["error"] and row["error"]["code"] for row in rows].count(None) == 6
    # The first two rows twice each; the last one once, and once more when it was run anew.
    assert assumed == [2, 2 + 2, 4 + 1, 5, 5 + 1, 6]
    assert spent[2] == spent[3]
    assert spent[4] == spent[5]
    assert charged <= spent[5]
    worst = (spent[0] / 2, spent[4] - spent[3])
    assert spent[5] == cost + 4 * worst[0] + 2 * worst[1]


class _FarNetwork:
    """The network, with connections that take half a second to open."""

    def __init__(self, near: Network) -> None:
        self._near = near

    async def connect(self, host: str, port: int) -> Any:
        await trio.sleep(0.5)
        return await self._near.connect(host, port)


async def test_unknown_sends_wait_for_prices(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """Two rows in doubt that are counted while the prices are on their way: the job goes on, with its own input."""
    source, out = write_rows(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    async with open_simulated() as (client, _):
        await run(client, job_for(tmp_path, source, limit=20))
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(line for line in lines if b'"id-5"' not in line and b'"id-15"' not in line))
    await _mark_as_sent(f"{out}.journal", [6, 16])
    async with open_simulated(network=_FarNetwork) as (client, simulator):
        job = job_for(tmp_path, source, if_exists="resume", budget_usd=Decimal(5))
        running = await run(client, job)
    assert (running.resent, running.stopping, simulator.statistics().received) == (2, None, 22)
    assert {row["custom_id"] for row in read_rows(out) if row["maybe_billed"]} == {"id-5", "id-15"}
    assert len({row["custom_id"] for row in read_rows(out)}) == len(read_rows(out)) == 40


async def test_unknown_sends_without_a_price(tmp_path: Path) -> None:
    """A row in doubt whose model has no price fails as any row of it does, and the others run."""
    source, out = write_rows(tmp_path / "in.jsonl", 10), tmp_path / "out.jsonl"
    with Path(source).open("a") as file:  # noqa: ASYNC230 - a test's own file
        file.write('{"prompt":"[[say 10]]","id":"unlisted","model":"nobody/unlisted"}\n')
    async with open_simulated() as (client, _):
        await run(client, job_for(tmp_path, source))
        lines = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(line for line in lines if b'"unlisted"' not in line and b'"id-3"' not in line))
        await _mark_as_sent(f"{out}.journal", [4, 11])
        await client.refresh_prices()
        await run(client, job_for(tmp_path, source, if_exists="resume", budget_usd=Decimal(5)))
    rows = {row["custom_id"]: row for row in read_rows(out)}
    assert len(rows) == len(read_rows(out)) == 11
    assert {name: row["error"]["type"] for name, row in rows.items() if row["error"]} == {
        "unlisted": "UnpriceableRequestError"
    }


async def test_parked_rows_in_another_order(tmp_path: Path) -> None:
    """An ordered job that was stopped with answers in its journal goes on without an order, and loses none."""
    source, out = write_rows(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    async with open_simulated() as (client, simulator):
        async with client.batch_job(job_for(tmp_path, source, ordered=True)) as running:
            answer_until(running, last=20, error=InsufficientCreditsError("no credits left", status=402))
            await running.run()
        assert (running.stopping, read_rows(out)) == ("credits", [])
        assert running.tally.rows > 10
        again = await run(client, job_for(tmp_path, source, if_exists="resume"))
        assert (again.resent, simulator.statistics().received) == (0, 40)
    assert len({row["custom_id"] for row in read_rows(out)}) == len(read_rows(out)) == 40


async def test_first_row_of_a_window_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is refused for the row that others wait for ends the run of an ordered job, which goes on later."""
    source, out = write_rows(tmp_path / "in.jsonl", 60), tmp_path / "out.jsonl"
    job = job_for(tmp_path, source, ordered=True, window=16, if_exists="resume")
    async with open_simulated() as (client, simulator):
        async with client.batch_job(job) as running:
            answered = answer_until(running, last=60, error=AuthenticationError("key revoked", status=401))
            window = cast("OrderWindow[Any]", running._window)
            wait_room = window.wait_room

            async def wait(index: int) -> None:
                if index == 16 + 6:
                    # Seven tasks wait for the eighth.
                    answered.set()
                await wait_room(index)

            monkeypatch.setattr(OrderWindow, "wait_room", lambda _window, index: wait(index))
            with trio.fail_after(30):
                await running.run()
        monkeypatch.undo()
        assert (running.stopping, running.tally.rows, read_rows(out)) == ("key", 15, [])
        async with client.batch_job(job) as again:
            # What waits in the journal is counted as what stands in the output.
            assert (again.earlier_rows, again.tally.cost) == (15, running.tally.cost)
            assert again.tally.cost > 0
            await again.run()
    assert (again.resent, again.tally.rows, simulator.statistics().received) == (0, 60, 60)
    assert [row["custom_id"] for row in read_rows(out)] == [f"id-{n}" for n in range(60)]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_no_journal_loses_no_answer(is_cancelled: bool, tmp_path: Path) -> None:
    """An ordered job without a journal writes the answers that it has when it stops, though some before are not."""
    source, out = write_rows(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    job = job_for(tmp_path, source, ordered=True, journal=False)
    async with open_simulated() as (client, _), client.batch_job(job) as running:
        answer_until(running, last=10, error=InsufficientCreditsError("no credits left", status=402))
        if is_cancelled:
            # As by Ctrl-C twice in the moment in which the first row is refused.
            running.put_back = lambda _row: running.cancel()  # type: ignore[method-assign, assignment]
        await running.run()
    names = [int(row["custom_id"].removeprefix("id-")) for row in read_rows(out)]
    assert running.tally.rows == len(names) > 0
    assert names == sorted(names)


def answer_until(running: RunningJob, *, last: int, error: GorouterError) -> trio.Event:
    """Have rows from `last` on refused and then, or when the event is set, the first one."""
    send, answered = running._run_request, trio.Event()

    async def run_request(body: bytes, settings: CallSettings) -> tuple[ChatResult[object], bytes]:
        number = int(body.partition(b"[[say ")[2].partition(b"]]")[0])
        if number == 0:
            await answered.wait()
            raise error
        if number >= last:
            answered.set()
            raise error
        return await send(body, settings)

    running._run_request = run_request
    return answered


@pytest.mark.net
async def test_deadline_and_failures(tmp_path: Path) -> None:
    """No rows are taken after the deadline, nor after so many failures; both can go on."""
    source = write_rows(tmp_path / "in.jsonl", 2_000)
    async with open_simulated(SimulatorConfig(latency_s=0.02)) as (client, _):
        running = await run(client, job_for(tmp_path, source, deadline_s=0.2))
        assert running.stopping == "deadline"
        assert running.tally.rows < 1_000
        bad = write_rows(tmp_path / "bad.jsonl", 100, "[[fault 403_moderation]] {n}")
        stopped = await run(client, job_for(tmp_path, bad, if_exists="overwrite", max_failures=5))
    assert stopped.stopping == "failures"
    assert 5 <= stopped.tally.failed <= 12


async def test_refused_key(tmp_path: Path) -> None:
    """A key that is refused stops the job, and no row is lost to it."""
    job = job_for(tmp_path, write_rows(tmp_path / "in.jsonl", 30), if_exists="resume")
    async with open_simulated(SimulatorConfig(api_keys=("sk-other",))) as (client, simulator):
        running = await run(client, job)
        assert (running.stopping, running.tally.rows) == ("key", 0)
        assert simulator.statistics().completed == 0
    async with open_simulated() as (client, _):
        again = await run(client, job)
    assert (again.tally.succeeded, again.tally.maybe_billed) == (30, 0)


async def test_schema_and_estimate(tmp_path: Path) -> None:
    """A schema holds for every row; an estimate comes from the first rows and the prices, and sends nothing."""
    source = write_rows(tmp_path / "in.jsonl", 50, "Who? {n}")
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    async with open_simulated() as (client, simulator):
        estimate = await client.estimate_job(job_for(tmp_path, source), sample=10, max_tokens=20)
        assert simulator.statistics().received == 0
        assert not (tmp_path / "out.jsonl").exists()
        assert (estimate.sampled_rows, estimate.models) == (10, {"openai/gpt-4o-mini": estimate.rows})
        assert estimate.rows == pytest.approx(50, abs=3)
        assert estimate.cost_usd is not None
        assert estimate.most_cost_usd is not None
        assert 0 < estimate.cost_usd <= estimate.most_cost_usd
        for ways in ({"via": "api"}, {"via": "auto", "deadline_s": 100_000}):
            by_api = await client.estimate_job(job_for(tmp_path, source, **ways), sample=10, max_tokens=20)
            assert (by_api.cost_usd, by_api.most_cost_usd) == (estimate.cost_usd / 2, estimate.most_cost_usd / 2)
        await run(client, job_for(tmp_path, source), response_schema=schema)
    assert all(isinstance(json.loads(text_of(row))["name"], str) for row in read_rows(tmp_path / "out.jsonl"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_in_flight", 0), ("limit", 0), ("window", -1), ("max_failures", True), ("template", 5)),
        *(("budget_usd", value) for value in (Decimal(0), Decimal("NaN"), "1e999999", "much", True, -1)),
        *(("deadline_s", value) for value in (0, "8h", float("nan"), True)),
        *(("via", "API"), ("if_exists", "Resume"), ("input_format", "xml"), ("duplicates", "x"), ("ordered", "yes")),
        *(("source", ""), ("source", True), ("output", None), ("output", b"x"), ("journal", None), ("cache", 3)),
    ],
)
def test_settings_that_cannot_be(field: str, value: object) -> None:
    """What cannot be is refused with its name, before anything is done."""
    settings: dict[str, Any] = {"source": "a", "output": "b", field: value}
    with pytest.raises(ConfigError, match=f"^{field}: "):
        BatchJob(**settings)


def test_settings() -> None:
    """Amounts are taken as those of a budget are, and paths as paths."""
    for amount in (Decimal("0.5"), 0.5, "0.50", " 0.5 "):
        assert BatchJob(source="a", output="b", budget_usd=amount).budget_usd == Decimal("0.5")
    job = BatchJob(source=Path("a"), output=Path("b"), journal=Path("c"), cache=Path("d"), deadline_s=float("inf"))
    assert (job.source, job.output, job.journal, job.cache) == ("a", "b", "c", "d")
    job = BatchJob(source=0, output=1, journal=False)
    assert (job.source, job.output, job.journal, job.cache) == (0, 1, False, None)


@pytest.mark.parametrize("budget_usd", [None, 5])
async def test_budget_of_the_client(budget_usd: float | None, tmp_path: Path) -> None:
    """What the client gives a batch bounds a job that would spend more, over all its runs."""
    source = write_rows(tmp_path / "in.jsonl", 60, "[[tokens 40]] {n}")
    job = job_for(tmp_path, source, if_exists="resume", budget_usd=budget_usd)
    charged = 0
    for _ in range(2):
        async with open_simulated(budget=Budget(batch_usd="0.0006")) as (client, simulator):
            await client.refresh_prices()
            running = await run(client, job, max_tokens=50)
            charged += simulator.statistics().charged_nanousd
        assert running.stopping == "budget"
        assert 0 < charged <= 600_000


# --- kills ------------------------------------------------------------------------------------------------------------


async def kill_until_done(
    tmp_path: Path, rng: random.Random, *, rows: int, kills: int, width: int, ordered: bool, delay_s: float
) -> str:
    """Run a job with SIGKILL at random until it was killed so often, then to its end; check all that it promises."""
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    sent: Counter[str] = Counter()
    killed = 0
    async with trio.open_nursery() as nursery:
        simulator = Simulator(SimulatorConfig(latency_s=0.005, jitter=1.0))
        handler = simulator.handler

        async def count(request: ServerRequest, reply: ServerReply) -> None:
            if request.method == "POST":
                sent[f"id-{request.body.partition(b'[[say ')[2].partition(b']]')[0].decode()}"] += 1
            await handler(request, reply)

        simulator.handler = count  # type: ignore[method-assign]  # in front of the real one
        base_url = await nursery.start(serve_simulator, simulator)
        async with open_crash_harness("batch_worker:work", path=[SUPPORT]) as harness:
            arguments = (base_url, source, str(out), str(width), "ordered" if ordered else "")
            while killed < kills:
                kill = Kill(after_acks=1, delay_s=rng.uniform(0, delay_s))
                crash = await harness.run(*arguments, kill=kill)
                if crash.killed:
                    killed += 1
                elif killed < kills:
                    break
            await harness.run(*arguments)
        nursery.cancel_scope.cancel()
    lines = read_rows(out)
    names = [row["custom_id"] for row in lines]
    assert Counter(names) == Counter(f"id-{n}" for n in range(rows))
    assert all(text_of(row) == row["custom_id"].removeprefix("id-") for row in lines)
    if ordered:
        assert names == [f"id-{n}" for n in range(rows)]
    flagged = {row["custom_id"] for row in lines if row["maybe_billed"]}
    again = sum(sent.values()) - rows
    assert again <= killed * width
    assert len(flagged) <= killed * width
    assert {name for name, times in sent.items() if times > 1} <= flagged
    return f"{rows:,} rows, {killed} kills: each once, {again} sent again, {len(flagged)} rows flagged"


@pytest.mark.net
@pytest.mark.parametrize("ordered", [False, True])
async def test_kills(ordered: bool, tmp_path: Path, rng: random.Random, record_property) -> None:
    """A few kills at random moments: every row once, and what was sent twice is flagged."""
    record_property(
        "figure",
        await kill_until_done(tmp_path, rng, rows=300, kills=4, width=16, ordered=ordered, delay_s=0.15),
    )


@pytest.mark.net
@pytest.mark.long
async def test_a_hundred_kills(tmp_path: Path, rng: random.Random, record_property) -> None:
    """10,000 rows and a hundred kills at random moments."""
    record_property(
        "figure",
        await kill_until_done(tmp_path, rng, rows=10_000, kills=100, width=16, ordered=False, delay_s=0.25),
    )


@pytest.mark.net
@pytest.mark.long
async def test_a_thousand_kills(tmp_path: Path, rng: random.Random, record_property) -> None:
    """The same with a thousand kills, most of them before a run has come far."""
    record_property(
        "figure",
        await kill_until_done(tmp_path, rng, rows=10_000, kills=1_000, width=16, ordered=False, delay_s=0.06),
    )

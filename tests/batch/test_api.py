"""Jobs by the Batch API, against the simulator's own form of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

import gorouter_trio as gr
from gorouter_trio.batch import api as module
from gorouter_trio.batch import wiring
from gorouter_trio.batch.api import choose_back_end
from gorouter_trio.batch.estimate import JobEstimate
from gorouter_trio.batch.job import RunningJob
from gorouter_trio.batch.settings import BatchJob
from gorouter_trio.client import Client, open_client
from gorouter_trio.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    NotFoundError,
    ProviderError,
    RateLimitError,
    StreamBrokenError,
)
from gorouter_trio.simulator import Simulator, SimulatorConfig, open_simulated_network
from gorouter_trio.wire.codec import decode_completion

DAY_S = 86_400.0


@asynccontextmanager
async def open_simulated(
    config: SimulatorConfig | None = None, **settings: Any
) -> AsyncIterator[tuple[Client, Simulator]]:
    simulator = Simulator(config)
    async with (
        open_simulated_network(simulator) as network,
        open_client(
            api_key="sk-test", base_url=network.base_url, transport=network, insecure_http=True, **settings
        ) as client,
    ):
        yield client, simulator


def write_rows(path: Path, prompts: list[str], **fields: object) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "id": f"id-{n}", **fields}) + "\n" for n, p in enumerate(prompts)))
    return str(path)


def read_rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert max(Counter(row["custom_id"] for row in rows).values()) == 1
    return {row["custom_id"]: row for row in rows}


def job_for(tmp_path: Path, source: str, **fields: Any) -> BatchJob:
    settings = {"source": source, "output": str(tmp_path / "out.jsonl"), "via": "api", "if_exists": "resume"}
    return BatchJob(**{**settings, **fields})


async def run(client: Client, job: BatchJob, **options: Any) -> RunningJob:
    async with client.batch_job(job, **options) as running:
        await running.run()
    return running


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of ten rows."""
    real = module.ApiServices

    def make(**fields: Any) -> module.ApiServices:
        return real(**fields, max_requests=10)

    monkeypatch.setattr(wiring, "ApiServices", make)


@pytest.mark.parametrize("ordered", [False, True])
async def test_whole(ordered: bool, small_parts: None, autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """Split by number and model, polled, written as live rows are, at half the price."""
    texts = [f"[[say {n}]]" for n in range(34)]
    path = tmp_path / "in.jsonl"
    source = write_rows(path, texts)
    more = '{"prompt":"[[say other]]","model":"anthropic/claude-sonnet-4","id":"other"}\n{"text":"x"}\n'
    path.write_text(path.read_text() + more)
    async with open_simulated(SimulatorConfig(batch_s=3_600.0)) as (client, simulator):
        running = await run(client, job_for(tmp_path, source, ordered=ordered))
        live = await client.chat("[[say 1]]")
        spent = simulator.statistics().charged_nanousd
    rows = read_rows(tmp_path)
    assert len(rows) == 36
    assert running.tally.failed == 1, rows["id-1"]
    for n in range(34):
        body = rows[f"id-{n}"]["response"]["body"]
        assert body["choices"][0]["message"]["content"] == str(n)
    assert rows["other"]["response"]["body"]["model"].startswith("anthropic/")
    assert rows["row-36"]["error"]["code"] == "invalid_request"
    assert trio.current_time() >= 3_600.0
    assert (running.tally.succeeded, running.tally.failed, running.tally.maybe_billed) == (35, 1, 0)
    assert running.tally.cost + (live.cost or 0) == Decimal(spent) / 10**9
    cost = rows["id-1"]["response"]["body"]["usage"]["cost"]
    assert cost == pytest.approx(float(live.cost or 0) / 2, rel=0.1)
    if ordered:
        assert list(rows) == [*(f"id-{n}" for n in range(34)), "other", "row-36"]


@pytest.mark.parametrize("name", ["find", "list", "submit"])
async def test_outage(name: str, small_parts: None, autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """What fails is done again, and the job goes on: handing a part in, looking at one, and looking for a lost one."""
    source = write_rows(tmp_path / "in.jsonl", [f"[[say {n}]]" for n in range(20)])
    errors = [
        ProviderError("gone for a while", status=503),
        StreamBrokenError("cut"),
        RateLimitError("later", status=429),
    ]
    async with open_simulated(SimulatorConfig(batch_s=60.0)) as (client, _):
        async with client.batch_job(job_for(tmp_path, source)) as running:
            services = running.api._services
            look, submit, lost = getattr(services, name), services.submit, [True]

            async def fail_first(*arguments: Any) -> Any:
                if errors:
                    raise errors.pop()
                return await look(*arguments)

            async def lose_first(body: bytes) -> Any:
                batch = await submit(body)
                if name == "list" and lost:
                    lost.clear()
                    error = StreamBrokenError("the reply was cut")
                    error.maybe_billed = True
                    raise error
                return batch

            replaced: Any = {"submit": lose_first, name: fail_first}
            running.api._services = services._replace(**replaced)
            await running.run()
        assert not errors
    assert (running.tally.succeeded, running.tally.failed, len(read_rows(tmp_path))) == (20, 0, 20)


async def test_key_refused_at_a_look(small_parts: None, autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """A key that is refused while a part is with the API stops the job, and the next run collects the part."""
    source = write_rows(tmp_path / "in.jsonl", [f"[[say {n}]]" for n in range(10)])
    async with open_simulated(SimulatorConfig(batch_s=60.0)) as (client, _):
        async with client.batch_job(job_for(tmp_path, source)) as running:

            async def refuse(_batch_id: str) -> Any:
                raise AuthenticationError("key revoked", status=401)

            running.api._services = running.api._services._replace(find=refuse)
            await running.run()
        assert (running.stopping, running.tally.rows, running.api.parts) == ("key", 0, 1)
        again = await run(client, job_for(tmp_path, source))
    assert (again.tally.succeeded, again.tally.maybe_billed, len(read_rows(tmp_path))) == (10, 0, 10)


async def test_partial_failure(small_parts: None, autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """Requests of a batch that fail are failed rows, with the API's status and words; they can be run again."""
    texts = ["[[fault 403_moderation]]" if n % 4 == 0 else f"[[say {n}]]" for n in range(20)]
    source = write_rows(tmp_path / "in.jsonl", texts)
    async with open_simulated(SimulatorConfig(batch_s=60.0)) as (client, _):
        await run(client, job_for(tmp_path, source))
        rows = read_rows(tmp_path)
        failed = [row for row in rows.values() if row["error"]]
        assert len(rows) == 20
        assert {(row["error"]["type"], row["response"]["status_code"]) for row in failed} == {("ModerationError", 403)}
        assert len(failed) == 5
        again = await run(client, job_for(tmp_path, source, retry_failed=True))
    assert (again.earlier_rows, again.tally.failed) == (15, 5)
    assert len(read_rows(tmp_path)) == 20


async def test_expiry(small_parts: None, autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """What was not done when the batch expired has an error that says so, and costs nothing; the rest has answers."""
    source = write_rows(tmp_path / "in.jsonl", [f"[[say {n}]]" for n in range(10)])
    async with open_simulated(SimulatorConfig(batch_s=2 * DAY_S, batch_window_s=DAY_S)) as (client, _):
        running = await run(client, job_for(tmp_path, source))
    rows = read_rows(tmp_path)
    assert (running.tally.succeeded, dict(running.tally.errors)) == (5, {"batch_expired": 5})
    expired = [row["error"] for row in rows.values() if row["error"]]
    assert {(error["status"], error["cost_usd"], error["maybe_billed"]) for error in expired} == {(504, 0, False)}


async def test_go_on(small_parts: None, autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """A job that was stopped or killed asks for what it has handed in, also where it goes on live; nothing twice."""
    source = write_rows(tmp_path / "in.jsonl", [f"[[say {n}]]" for n in range(25)])
    autojump_clock.autojump_threshold = 0.002  # so that an hour is not over while a thread writes the journal
    async with open_simulated(SimulatorConfig(batch_s=3_600.0)) as (client, simulator):
        async with client.batch_job(job_for(tmp_path, source, limit=20)) as running, trio.open_nursery() as nursery:
            nursery.start_soon(running.run)
            while running.api.parts < 2 or len(simulator._desk._batches) < 2:
                await trio.sleep(1)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert running.api.parts == 2
        assert json.loads(simulator._desk.list(limit=100, after=None))["data"][0]["status"] == "in_progress"
        autojump_clock.autojump_threshold = 0
        again = await run(client, job_for(tmp_path, source, via="live"))
        batches = json.loads(simulator._desk.list(limit=100, after=None))["data"]
    assert [batch["status"] for batch in batches] == ["completed", "completed"]
    assert (again.resent, again.tally.rows, again.tally.maybe_billed) == (0, 25, 0)
    assert simulator.statistics().received == 5
    assert len(read_rows(tmp_path)) == 25


@pytest.mark.parametrize("is_taken", [True, False])
async def test_lost_id(
    is_taken: bool, small_parts: None, autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """A part whose id was lost is found again by what it is; one that never arrived is handed in anew, and flagged."""
    source = write_rows(tmp_path / "in.jsonl", [f"[[say {n}]]" for n in range(10)])
    async with open_simulated() as (client, simulator):
        services = client._services
        real = services.submit_batch

        async def lose(body: bytes) -> Any:
            if is_taken:
                await real(body)
            raise KeyboardInterrupt  # as a kill in the middle of the request

        services.submit_batch = lose  # type: ignore[method-assign]  # the test's kill
        with pytest.raises(KeyboardInterrupt):
            await run(client, job_for(tmp_path, source))
        services.submit_batch = real  # type: ignore[method-assign]
        running = await run(client, job_for(tmp_path, source))
        batches = json.loads(simulator._desk.list(limit=100, after=None))["data"]
    rows = read_rows(tmp_path)
    assert (len(batches), len(rows), running.tally.succeeded) == (1, 10, 10)
    assert running.tally.maybe_billed == (0 if is_taken else 10)


async def test_refused(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """A part that the API refuses is as many failed rows; a refused key stops the job and loses none."""
    source = write_rows(tmp_path / "in.jsonl", ["a", "b"], model="nobody/nothing")
    async with open_simulated() as (client, _):
        running = await run(client, job_for(tmp_path, source))
        assert dict(running.tally.errors) == {"400": 2}
    source = write_rows(tmp_path / "other.jsonl", ["a", "b"])
    async with open_simulated(SimulatorConfig(api_keys=("sk-other",))) as (client, _):
        job = job_for(tmp_path, source, output=str(tmp_path / "other.out"))
        running = await run(client, job)
        assert (running.stopping, running.tally.rows) == ("key", 0)


@pytest.mark.parametrize("ends", ["patience", "deadline"])
async def test_an_outage_without_end(ends: str, autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """Rows that cannot be handed in for an hour fail; where the job stops before, they are left for a later run."""
    source = write_rows(tmp_path / "in.jsonl", ["[[say a]]", "[[say b]]"])
    async with open_simulated() as (client, _):
        async with client.batch_job(
            job_for(tmp_path, source, deadline_s=600.0 if ends == "deadline" else None)
        ) as running:
            tries: list[float] = []

            async def refuse(_body: bytes) -> Any:
                tries.append(trio.current_time())
                raise ProviderError("gone", status=503)

            running.api._services = running.api._services._replace(submit=refuse)
            await running.run()
        if ends == "patience":
            assert dict(running.tally.errors) == {"503": 2}
            assert 3_500 <= tries[-1] - tries[0] <= 3_600
            assert 60 <= len(tries) <= 70
        else:
            assert (running.stopping, running.released, running.tally.rows) == ("deadline", 2, 0)
            again = await run(client, job_for(tmp_path, source))
            assert (again.tally.succeeded, again.tally.maybe_billed, again.resent) == (2, 0, 0)


async def test_lost_reply(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """A reply that is lost in the same run is looked for, and found."""
    source = write_rows(tmp_path / "in.jsonl", ["[[say a]]", "[[say b]]"])
    async with open_simulated() as (client, simulator):
        services = client._services
        real = services.submit_batch

        async def lose(body: bytes) -> Any:
            await real(body)
            error = StreamBrokenError("cut")
            error.maybe_billed = True
            raise error

        services.submit_batch = lose  # type: ignore[method-assign]  # the test's network
        running = await run(client, job_for(tmp_path, source))
        assert len(json.loads(simulator._desk.list(limit=9, after=None))["data"]) == 1
    assert running.tally.succeeded == 2


async def test_budget(small_parts: None, autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """What is handed in is reserved, so that the budget holds, and given back by what answers cost."""
    source = write_rows(tmp_path / "in.jsonl", [f"[[tokens 40]] {n}" for n in range(60)])
    async with open_simulated(SimulatorConfig(batch_s=60.0)) as (client, simulator):
        await client.refresh_prices()
        job = job_for(tmp_path, source, budget_usd=Decimal("0.0004"))
        running = await run(client, job, max_tokens=50)
        assert running.stopping == "budget"
        assert 0 < running.tally.rows < 60
        assert simulator.statistics().charged_nanousd <= 400_000
        assert running.tally.cost == Decimal(simulator.statistics().charged_nanousd) / 10**9


async def test_budget_and_a_model_without_a_price(
    small_parts: None, autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """Its row fails, as it does live; the others are handed in."""
    path = tmp_path / "in.jsonl"
    source = write_rows(path, [f"[[say {n}]]" for n in range(14)])
    lines = path.read_text().splitlines(keepends=True)
    lines.insert(3, '{"prompt":"[[say x]]","id":"unlisted","model":"nobody/unlisted"}\n')
    path.write_text("".join(lines))
    async with open_simulated(SimulatorConfig(batch_s=60.0)) as (client, _):
        await client.refresh_prices()
        running = await run(client, job_for(tmp_path, source, budget_usd=Decimal(5)))
    assert (running.stopping, running.tally.succeeded, running.tally.failed) == (None, 14, 1)
    errors = {name: row["error"]["type"] for name, row in read_rows(tmp_path).items() if row["error"]}
    assert errors == {"unlisted": "UnpriceableRequestError"}


async def test_ledger(small_parts: None, autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """Rows are in the ledger and the costs as live ones are, at what they cost here; handing them in is no attempt."""
    texts = [*(f"[[say {n}]]" for n in range(12)), "[[fault 403_moderation]]", "[[say not in the form]]"]
    source = write_rows(tmp_path / "in.jsonl", [*texts, *['[[say {"a":1}]]'] * 2])
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    async with open_simulated(SimulatorConfig(batch_s=60.0)) as (client, simulator):
        await client.refresh_prices()
        options = {"response_schema": schema, "tenant": "acme"}
        running = await run(client, job_for(tmp_path, source, budget_usd=Decimal(1), max_in_flight=1), **options)
        api = client.ledger_rows()
        batch = client.cost_snapshot().by_batch[running.name]
        budget = client._runtime.accounting.gate.book.account("batch", running.name)
        charged = Decimal(simulator.statistics().charged_nanousd) / 10**9
        live_job = job_for(tmp_path, source, via="live", output=str(tmp_path / "live.jsonl"), max_in_flight=1)
        await run(client, live_job, **options)
        live = client.ledger_rows()[len(api) :]
    assert (batch.attempts, batch.cost_usd, batch.is_exact) == (16, charged, True)
    assert charged > 0
    assert budget is not None
    assert (budget.spent_usd, budget.held_usd) == (charged, 0)
    wrong_form = [row for row in live if row.purpose != "reask"]
    assert len(api) == len(wrong_form) == 16
    for row, other in zip(sorted(api, key=_by_kind), sorted(wrong_form, key=_by_kind), strict=True):
        assert (row.state, row.status, row.error) == (other.state, other.status, other.error)
        assert (row.requested_model, row.model, row.lane) == (other.requested_model, other.model, "batch")
        assert (row.tenant, row.batch, row.purpose) == ("acme", running.name, "chat")
        assert (row.prompt_tokens, row.completion_tokens) == (other.prompt_tokens, other.completion_tokens)
        assert row.cost_usd == pytest.approx((other.cost_usd or 0) / 2, rel=Decimal("0.01"))
        assert bool(row.generation_id) == (not row.error)


def _by_kind(row: gr.LedgerRow) -> tuple[int, int, int]:
    return row.status, row.prompt_tokens, row.completion_tokens


async def test_cost_that_a_reply_does_not_say(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is half of what the list says."""
    source = write_rows(tmp_path / "in.jsonl", ["[[tokens 100]]"])

    def without_cost(body: bytes) -> Any:
        reply = decode_completion(body)
        assert reply.usage is not None
        return msgspec.structs.replace(reply, usage=msgspec.structs.replace(reply.usage, cost=None))

    monkeypatch.setattr(module, "decode_completion", without_cost)
    async with open_simulated() as (client, simulator):
        await client.refresh_prices()
        await run(client, job_for(tmp_path, source))
        (row,) = client.ledger_rows()
        charged = Decimal(simulator.statistics().charged_nanousd) / 10**9
    assert (row.state, row.cost_usd) == ("estimated", None)
    assert row.estimate_usd == pytest.approx(charged, rel=Decimal("0.02"))


async def test_what_it_cannot(tmp_path: Path) -> None:
    """Tools that are run here and fallbacks are refused, and so is a job without a journal; auto goes live then."""

    @gr.tool
    async def now() -> str:
        """Tell the time."""
        return "12:00"

    source = write_rows(tmp_path / "in.jsonl", ["[[say a]]"])
    async with open_simulated() as (client, _):
        with pytest.raises(ConfigError, match="runs no tools"):
            await run(client, job_for(tmp_path, source), tools=[now])
        with pytest.raises(ConfigError, match="knows no fallbacks"):
            await run(client, job_for(tmp_path, source), fallbacks=["a/b"])
        with pytest.raises(ConfigError, match="needs a journal"):
            await run(client, job_for(tmp_path, source, journal=False, if_exists="overwrite"))
        running = await run(client, job_for(tmp_path, source, via="auto", deadline_s=2 * DAY_S), tools=[now])
    assert running.via == "live"


async def test_schema(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """An answer without the form that was asked for is a failed row, as in live rows."""
    source = write_rows(tmp_path / "in.jsonl", ["Who?", "[[say nobody]]"])
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    async with open_simulated() as (client, _):
        running = await run(client, job_for(tmp_path, source), response_schema=schema)
    assert (running.tally.succeeded, dict(running.tally.errors)) == (1, {"invalid_output": 1})


def test_choice() -> None:
    """The Batch API where there is a day and a price; live otherwise."""
    estimate = JobEstimate(
        rows=10,
        sampled_rows=10,
        problem_rows=0,
        prompt_tokens=1,
        completion_tokens=1,
        most_completion_tokens=None,
        cost_usd=Decimal("0.5"),
        most_cost_usd=None,
        models={"a": 10},
    )
    free = JobEstimate(**{**{n: getattr(estimate, n) for n in estimate.__struct_fields__}, "cost_usd": Decimal(0)})
    assert choose_back_end(DAY_S, estimate) == "api"
    assert choose_back_end(DAY_S - 1, estimate) == "live"
    assert choose_back_end(None, estimate) == "live"
    assert choose_back_end(DAY_S, free) == "live"


async def test_the_simulated_api() -> None:
    """It refuses what the API refuses: a wrong order of fields, doubles, nothing, another endpoint, an unknown id."""
    one = b'{"custom_id":"a","body":{"messages":[{"role":"user","content":"x"}]}}'
    model = b'"endpoint":"/v1/chat/completions","model":"openai/gpt-4o-mini"'
    async with open_simulated() as (client, _):
        services = client._services
        for body in (
            b'{"requests":[%b],%b}' % (one, model),
            b'{%b,"requests":[%b,%b]}' % (model, one, one),
            b'{%b,"requests":[]}' % model,
            b'{"endpoint":"/v1/responses","model":"openai/gpt-4o-mini","requests":[%b]}' % one,
            b"{",
        ):
            with pytest.raises(BadRequestError):
                await services.submit_batch(body)
        with pytest.raises(NotFoundError):
            await services.find_batch("batch_none")
        batches = [await services.submit_batch(b'{%b,"requests":[%b]}' % (model, one)) for _ in range(3)]
        page = await services.list_batches(limit=2)
        assert [batch.id for batch in page.data] == [batches[2].id, batches[1].id]
        assert page.has_more
        assert [b.id for b in (await services.list_batches(after=batches[1].id)).data] == [batches[0].id]

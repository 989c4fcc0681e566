"""The billing plugin: a report for each attempt, that nobody waits for and that none is lost of without being told."""

from __future__ import annotations

from decimal import Decimal

import pytest
import trio
from worlds import completion, errors, open_world, replies

import gorouter_trio as gr
from gorouter_trio.plugins import BillingPlugin, BillingReport
from gorouter_trio.simulator import SimulatorConfig

YES = completion("Yes.")


async def test_a_report_for_each_attempt(autojump_clock):
    """What was refused and tried again is two reports; the answer has its usage, its cost and its time."""
    reports: list[BillingReport] = []
    async with open_world(answer=replies((503, b"{}"), YES), plugins=[BillingPlugin(reports.append)]) as world:
        await world.client.chat("Well?", tenant="t", model="a/b")
    first, second = reports
    assert (first.row.status, first.cost_usd, first.usage) == (503, Decimal(0), None)
    assert (first.row.call, second.row.call, first.row.attempt, second.row.attempt) == (1, 1, 1, 2)
    assert (second.model, second.row.tenant, second.cost_usd, second.has_price) == (
        "test/model",
        "t",
        Decimal("0.25"),
        True,
    )
    assert second.usage is not None
    assert second.usage.completion_tokens == 5
    assert second.duration_s is not None
    assert not second.is_update


async def test_an_async_reporter_drains_on_close(autojump_clock, no_leaks):
    """Chats do not wait for the reporter; what is queued is given out when the client closes, in order."""
    reports: list[int] = []

    async def slowly(report: BillingReport) -> None:
        await trio.sleep(1)
        reports.append(report.row.call)

    async with no_leaks():
        plugin = BillingPlugin(slowly)
        async with open_world(answer=replies(YES), plugins=[plugin]) as world:
            began = trio.current_time()
            for _ in range(4):
                await world.client.chat("Well?")
            assert trio.current_time() - began < 0.5
        assert reports == [1, 2, 3, 4]
        assert plugin.statistics().reported == 4


async def test_a_cancel_from_outside(autojump_clock):
    """What is cut off by it is reported like anything else."""
    reports: list[int] = []
    plugin = BillingPlugin(lambda report: reports.append(report.row.call))
    with trio.move_on_after(5):
        slow = SimulatorConfig(latency_s=1, tokens_per_s=1, comment_interval_s=0)
        async with open_world(slow, plugins=[plugin]) as world:

            async def read(session: str) -> None:
                async with world.client.session(session).stream("Well?") as stream:
                    await stream.collect()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, "a")
                nursery.start_soon(read, "b")
                await world.client.chat("Well?")
    assert sorted(reports) == [1, 2, 3]


async def test_what_finds_no_room_is_told(autojump_clock):
    """The queue is bounded, and so is the time for what is in it: what was not reported went to on_error."""
    lost: list[tuple[str, int]] = []

    async def never(_report: BillingReport) -> None:
        await trio.sleep_forever()

    plugin = BillingPlugin(
        never, queue=2, drain_s=1, on_error=lambda error, report: lost.append((str(error), report.row.call))
    )
    async with open_world(answer=replies(YES), plugins=[plugin]) as world:
        for _ in range(5):
            await world.client.chat("Well?")
            await trio.sleep(0.1)
    assert [number for why, number in lost if "wait already" in why] == [3, 4, 5]
    assert [number for why, number in lost if "closed" in why] == [1, 2]
    assert plugin.statistics().dropped == 5


@pytest.mark.parametrize("mode", ["queue", "inline", "thread"])
async def test_a_reporter_that_raises(mode, caplog):
    """Its error has a callback of its own, or goes to the log; the next report comes all the same."""
    seen: list[int] = []
    told: list[str] = []

    def reporter(report: BillingReport) -> None:
        seen.append(report.row.call)
        if report.row.call == 1:
            raise ValueError("no")

    plugin = BillingPlugin(reporter, mode=mode, on_error=lambda error, _report: told.append(repr(error)))
    async with open_world(answer=replies(YES), plugins=[plugin]) as world:
        await world.client.chat("Well?")
        await world.client.chat("Well?")
    assert seen == [1, 2]
    assert told == ["ValueError('no')"]
    assert not caplog.records
    async with open_world(answer=replies(YES), plugins=[BillingPlugin(reporter, mode=mode)]) as world:
        await world.client.chat("Well?")
    assert "ValueError" in caplog.text


@pytest.mark.parametrize("mode", ["inline", "thread"])
async def test_a_reporter_that_turns_out_to_be_async(mode):
    """Where nobody waits for what it gives, that is its failure: the report was not taken."""
    told: list[str] = []

    async def bill(_report: BillingReport) -> None:
        raise AssertionError

    plugin = BillingPlugin(
        lambda report: bill(report), mode=mode, on_error=lambda error, _report: told.append(str(error))
    )
    async with open_world(answer=replies(YES), plugins=[plugin]) as world:
        await world.client.chat("Well?")
    assert (plugin.statistics().reported, plugin.statistics().failed) == (0, 1)
    assert "the reporter is async" in told[0]


async def test_an_on_error_that_raises(autojump_clock, caplog):
    """It goes to the log, and harms nobody."""

    def fail(*_: object) -> None:
        raise RuntimeError("worse")

    async with open_world(answer=replies(YES), plugins=[BillingPlugin(lambda _report: 1 / 0, on_error=fail)]) as world:
        assert (await world.client.chat("Well?")).text == "Yes."
    assert "RuntimeError" in caplog.text


async def test_one_client_at_a_time(autojump_clock):
    """Two clients would give out one queue, and report twice; after the first has ended, the next may begin it."""
    seen: list[str] = []

    async def bill(report: BillingReport) -> None:
        await trio.sleep(0.1)
        seen.append(report.row.tenant)

    plugin = BillingPlugin(bill)
    async with open_world(answer=replies(YES), plugins=[plugin]) as world:
        with pytest.raises(gr.ConfigError, match="another client"):
            async with open_world(answer=replies(YES), plugins=[plugin]):
                pass
        await world.client.chat("Well?", tenant="a")
    async with open_world(answer=replies(YES), plugins=[plugin]) as world:
        await world.client.chat("Well?", tenant="b")
    assert seen == ["a", "b"]


async def test_a_cost_that_is_found_later(autojump_clock):
    """A stream that is left has an unknown cost; what the API says later comes as an update of the same row."""
    reports: list[BillingReport] = []
    ledger = gr.LedgerConfig(lookups=5)
    async with open_world(plugins=[BillingPlugin(reports.append)], ledger=ledger) as world:
        async with world.client.stream("Tell me more. [[tokens 300]]") as stream:
            async for _event in stream:
                break
        await trio.sleep(60)
        first, update = reports
        assert (first.row.state, first.cost_usd, first.has_price) == ("reconciling", None, False)
        assert update.is_update
        assert update.row.state == "reconciled"
        assert update.cost_usd is not None
        assert (update.row.run, update.row.row) == (first.row.run, first.row.row)


class Later:
    """An object that is called like an async function."""

    async def __call__(self, *_args: object) -> None:
        """Take anything."""


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"reporter": 5}, "reporter"),
        ({"reporter": lambda: None}, "reporter"),
        ({"on_error": "x"}, "on_error"),
        ({"on_error": lambda error: None}, "on_error"),
        ({"on_error": Later()}, "on_error"),
        ({"reporter": Later(), "mode": "inline"}, "an async reporter"),
        ({"reporter": Later(), "mode": "thread"}, "an async reporter"),
        ({"mode": "later"}, "mode"),
        ({"queue": 0}, "queue"),
        ({"drain_s": -1}, "drain_s"),
        ({"drain_s": 10}, "drain_s must be less than 10"),
    ],
)
def test_bad_settings(fields, named):
    """Each is refused by its name."""
    with pytest.raises(gr.ConfigError, match=f"billing: {named}"):
        BillingPlugin(**{"reporter": lambda _report: None, **fields})


async def test_errors_do_not_stop_the_chat(autojump_clock):
    """An error of the API is reported like an answer."""
    reports: list[BillingReport] = []
    async with open_world(answer=errors(400), plugins=[BillingPlugin(reports.append)]) as world:
        with pytest.raises(gr.BadRequestError):
            await world.client.chat("Well?")
    assert reports[0].row.error == "BadRequestError"

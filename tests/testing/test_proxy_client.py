"""Requests through the fault proxy: what was processed behind it, against what was attempted and what was flagged.

The provider charges for what it processed, so this is the money of DESIGN.md's table of retries: nothing is processed
twice unless a failure was ambiguous, at most once more per ambiguous failure, and then it is flagged.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
import trio
from msgspec import Struct
from worlds import open_quiet_client

from gorouter_trio.client import Client
from gorouter_trio.config import Deadlines, RetryPolicy
from gorouter_trio.errors import ConnectError, DeadlineExceededError, DecodeError, GorouterError, StreamBrokenError
from gorouter_trio.pool import retry
from gorouter_trio.simulator import Simulator, SimulatorConfig, SimulatorStatistics, serve_simulator
from gorouter_trio.testing.proxy import (
    FAULT_KINDS,
    Blackhole,
    Corrupt,
    Cut,
    Duplicate,
    Fault,
    FaultProxy,
    HalfClose,
    Refuse,
    Stall,
    draw_fault,
    open_fault_proxy,
)

pytestmark = pytest.mark.net

TRUTH = "The harbour opens at six, and the blue permit is needed from noon on. " * 2
PROMPT = f"[[say {TRUTH}]]"
HEAD_END = b"\r\n\r\n"
DELTA = b'"content":"The'


class Outcome(Struct, kw_only=True):
    """What a client saw of one request, and what happened behind the proxy."""

    text: str = ""
    whole: bool = False
    error: GorouterError | None = None
    attempts: int = 0
    flagged: bool = False
    deltas: int = 0
    processed: int = 0
    connections: int = 0


class Bench:
    """A simulator, a proxy in front of it, and clients that come and go."""

    def __init__(self, simulator: Simulator, proxy: FaultProxy) -> None:
        self.simulator = simulator
        self.proxy = proxy

    async def run(
        self, plan: Sequence[Sequence[Fault]], *, stream: bool = False, ambiguous_retries: int = 1, wait_s: float = 5.0
    ) -> Outcome:
        """One request of a client of its own; returns when everything behind it is over."""
        before = self.simulator.statistics().processed, self.proxy.statistics().connections
        self.proxy.set_plan(plan)
        outcome = Outcome()
        async with open_quiet_client(
            api_key="sk-test",
            base_url=f"http://{self.proxy.host}:{self.proxy.port}/api/v1",
            retry=RetryPolicy(base_delay_s=0.0, ambiguous_retries=ambiguous_retries),
            deadlines=Deadlines(headers_s=wait_s, first_data_s=wait_s, data_idle_s=wait_s),
        ) as client:
            try:
                await (_stream(client, outcome) if stream else _chat(client, outcome))
            except GorouterError as exc:
                outcome.error = exc
                outcome.attempts = exc.attempts
                outcome.flagged = exc.maybe_billed
            pool = client.statistics()
            assert (pool.queued, pool.submitted) == (0, pool.answered + pool.failed + pool.abandoned)
        await self.settle()
        outcome.processed = self.simulator.statistics().processed - before[0]
        outcome.connections = self.proxy.statistics().connections - before[1]
        return outcome

    async def settle(self) -> None:
        with trio.move_on_after(30):
            while self.proxy.statistics().open or self.simulator.statistics().in_flight:
                await trio.sleep(0.0005)
            return
        pytest.fail(f"not settled: {self.proxy.statistics()}, {self.simulator.statistics()}")

    def statistics(self) -> SimulatorStatistics:
        return self.simulator.statistics()


async def _chat(client: Client, outcome: Outcome) -> None:
    result = await client.chat(PROMPT)
    outcome.text = result.text
    outcome.whole = True
    outcome.attempts = result.call.attempts
    outcome.flagged = result.call.maybe_billed


async def _stream(client: Client, outcome: Outcome) -> None:
    async with client.stream(PROMPT) as stream:
        async for piece in stream.text:
            outcome.deltas += 1
            outcome.text += piece
        outcome.whole = True
        outcome.attempts = stream.result.call.attempts
        outcome.flagged = stream.result.call.maybe_billed


@asynccontextmanager
async def open_bench(rng: random.Random, config: SimulatorConfig | None = None) -> AsyncIterator[Bench]:
    simulator = Simulator(config)
    async with trio.open_nursery() as nursery:
        url = urlsplit(await nursery.start(serve_simulator, simulator))
        async with open_fault_proxy(url.hostname or "", url.port or 0, rng=rng) as proxy:
            yield Bench(simulator, proxy)
        nursery.cancel_scope.cancel()


# --- the table of DESIGN.md, the pool ---------------------------------------------------------------------------------


class Row(Struct, frozen=True, kw_only=True):
    """The first connection meets `fault`, the others none.

    `processed` is what the first attempt may have cost: two values where the reset races the reading. `flagged`
    is None where the client may know that nothing went out.
    """

    fault: Fault
    processed: tuple[int, ...]
    flagged: bool | None
    retried: bool = True


WHOLE: dict[str, Row] = {
    "reset when accepted": Row(fault=Refuse(), processed=(0,), flagged=None),
    "reset before the request": Row(fault=Cut(direction="up"), processed=(0,), flagged=None),
    "reset in the request's head": Row(fault=Cut(direction="up", after=40), processed=(0,), flagged=True),
    "reset after the request's head": Row(fault=Cut(direction="up", after=HEAD_END), processed=(0,), flagged=True),
    "reset in the request's body": Row(
        fault=Cut(direction="up", after=HEAD_END, plus=99), processed=(0,), flagged=True
    ),
    "end of the request's head": Row(fault=HalfClose(direction="up", after=HEAD_END), processed=(0,), flagged=True),
    "reset after the request": Row(fault=Cut(direction="up", after=b']]"}]}'), processed=(0, 1), flagged=True),
    "reset instead of a reply": Row(fault=Cut(direction="down", after=1), processed=(1,), flagged=True),
    "end instead of a reply": Row(fault=Cut(direction="down", after=1, how="fin"), processed=(1,), flagged=True),
    "reset in the reply's head": Row(fault=Cut(direction="down", after=40), processed=(1,), flagged=True),
    "reset after the reply's head": Row(fault=Cut(direction="down", after=HEAD_END), processed=(1,), flagged=True),
    "reset in the reply's body": Row(
        fault=Cut(direction="down", after=HEAD_END, plus=150), processed=(1,), flagged=True
    ),
    "end of the reply's body": Row(
        fault=HalfClose(direction="down", after=HEAD_END, plus=150), processed=(1,), flagged=True
    ),
}


def check_row(row: Row, outcome: Outcome, *, ambiguous_retries: int) -> None:
    """Whether a request that met the fault on its first connection came out as the table has it."""
    unsent = row.flagged is None and not outcome.flagged
    if ambiguous_retries or unsent:
        assert outcome.whole
        assert outcome.text == TRUTH
        assert outcome.connections == 2
        assert outcome.attempts == 2 or (unsent and outcome.attempts == 1)
        assert outcome.processed - 1 in row.processed
    else:
        assert not outcome.whole
        assert isinstance(outcome.error, StreamBrokenError)
        assert (outcome.attempts, outcome.connections) == (1, 1)
        assert outcome.processed in row.processed
    if row.flagged is not None:
        assert outcome.flagged is row.flagged


@pytest.mark.parametrize("ambiguous_retries", [1, 0])
@pytest.mark.parametrize(
    ("name", "stream"),
    # In a stream, the body of the reply is after the first delta.
    [(name, stream) for name in WHOLE for stream in (False, True) if not (stream and "reply's body" in name)],
)
async def test_a_cut_before_the_first_delta(
    name: str, stream: bool, ambiguous_retries: int, rng: random.Random
) -> None:
    """What was not processed costs nothing, what may have been is tried once more and flagged, or not tried again."""
    row = WHOLE[name]
    async with open_bench(rng) as bench:
        outcome = await bench.run([[row.fault]], stream=stream, ambiguous_retries=ambiguous_retries)
        check_row(row, outcome, ambiguous_retries=ambiguous_retries)


AFTER_DELTA: dict[str, Fault] = {
    "reset": Cut(direction="down", after=DELTA, plus=700),
    "end": Cut(direction="down", after=DELTA, plus=700, how="fin"),
    "half": HalfClose(direction="down", after=DELTA, plus=700),
    "silence": Stall(direction="down", after=DELTA, plus=700),
}


@pytest.mark.parametrize("name", AFTER_DELTA)
async def test_nothing_is_sent_again_after_the_first_delta(name: str, rng: random.Random) -> None:
    """A stream that breaks once something was given out ends there, with what had arrived, flagged."""
    async with open_bench(rng) as bench:
        outcome = await bench.run([[AFTER_DELTA[name]]], stream=True, wait_s=0.2)
        assert outcome.deltas > 0
        assert not outcome.whole
        assert (outcome.attempts, outcome.connections, outcome.processed) == (1, 1, 1)
        assert TRUTH.startswith(outcome.text)
        assert outcome.flagged
        assert isinstance(outcome.error, DeadlineExceededError if name == "silence" else StreamBrokenError)
        assert outcome.error.partial is not None
        assert outcome.error.partial.text == outcome.text


async def test_no_connection_at_all(rng: random.Random) -> None:
    """A refused port is retried to the last, and nothing is flagged, since nothing was sent."""
    async with open_bench(rng) as bench:
        await bench.proxy.stop_listening()
        outcome = await bench.run([])
        assert isinstance(outcome.error, ConnectError)
        assert not outcome.flagged
        assert outcome.processed == 0


@pytest.mark.parametrize("ambiguous_retries", [0, 1, 2])
@pytest.mark.parametrize("fault", [Blackhole(), Stall(direction="down"), Stall(direction="up", after=HEAD_END)])
async def test_silence_is_ambiguous(fault: Fault, ambiguous_retries: int, rng: random.Random) -> None:
    """A reply that does not come in time may have been made: as many more tries as allowed, all flagged."""
    async with open_bench(rng) as bench:
        outcome = await bench.run([[fault]] * 9, ambiguous_retries=ambiguous_retries, wait_s=0.05)
        assert isinstance(outcome.error, DeadlineExceededError)
        assert outcome.flagged
        assert outcome.attempts == outcome.connections == 1 + ambiguous_retries
        expected = outcome.attempts if fault == Stall(direction="down") else 0
        assert outcome.processed == expected


async def test_a_reply_that_is_not_http_is_final(rng: random.Random) -> None:
    """A reply that came and cannot be read is never asked for again, and was paid for."""
    async with open_bench(rng) as bench:
        outcome = await bench.run([[Corrupt(direction="down", after=0, xor=0x01)]])
        assert isinstance(outcome.error, DecodeError)
        assert (outcome.attempts, outcome.processed, outcome.flagged) == (1, 1, True)


async def test_a_connection_that_died_idle_costs_nothing(rng: random.Random) -> None:
    """A kept connection that the server's side closed meanwhile is not used again, and nothing is flagged."""
    async with open_bench(rng) as bench:
        base_url = f"http://{bench.proxy.host}:{bench.proxy.port}/api/v1"
        for how in ("rst", "fin"):
            before = bench.statistics().processed
            async with open_quiet_client(api_key="sk-test", base_url=base_url) as client:
                assert (await client.chat(PROMPT)).text == TRUTH
                assert bench.proxy.sever_all(how) == 1
                await bench.settle()
                result = await client.chat(PROMPT)
                assert (result.text, result.call.attempts, result.call.maybe_billed) == (TRUTH, 1, False)
            assert bench.statistics().processed - before == 2


# --- random faults ----------------------------------------------------------------------------------------------------

# Where bytes arrive changed, HTTP cannot tell, and so the text may differ.
CHANGING = (Corrupt, Duplicate)


def check_money(plan: Sequence[Sequence[Fault]], outcome: Outcome, *, stream: bool, ambiguous_retries: int) -> None:
    """The promises that hold whatever happened to the connections."""
    assert outcome.whole == (outcome.error is None)
    assert outcome.processed <= outcome.attempts
    assert outcome.processed <= 1 + ambiguous_retries, "processed more often than ambiguous retries explain"
    extra = outcome.processed - outcome.whole
    assert outcome.flagged or extra <= 0, "processed and lost, and not flagged"
    if stream and outcome.deltas and not outcome.whole:
        assert outcome.flagged
    if not any(isinstance(fault, CHANGING) for faults in plan for fault in faults):
        assert TRUTH.startswith(outcome.text)
        assert not outcome.whole or outcome.text == TRUTH
    if outcome.whole and not any(plan):
        assert (outcome.attempts, outcome.processed, outcome.flagged) == (1, 1, False)


async def test_a_double_send_is_caught(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes a lost reply for a request that was never sent pays twice, and does not pass for it."""
    honest = retry.classify

    def careless(error: GorouterError) -> retry.FailureKind:
        kind = honest(error)
        return "unsent" if kind == "ambiguous" else kind

    plan = [[Cut(direction="down", after=HEAD_END)]]
    async with open_bench(rng) as bench:
        for stream in (False, True):
            outcome = await bench.run(plan, stream=stream)
            check_money(plan, outcome, stream=stream, ambiguous_retries=1)
            monkeypatch.setattr(retry, "classify", careless)
            outcome = await bench.run(plan, stream=stream)
            monkeypatch.undo()
            with pytest.raises(AssertionError, match="processed and lost, and not flagged"):
                check_money(plan, outcome, stream=stream, ambiguous_retries=1)
            with pytest.raises(AssertionError, match="more often than ambiguous retries explain"):
                check_money(plan, outcome, stream=stream, ambiguous_retries=0)


async def run_random_faults(rng: random.Random, *, count: int, record: Callable[[str, object], None]) -> None:
    """`count` requests, four at a time, each with a simulator and a proxy that no other uses meanwhile."""
    totals: Counter[str] = Counter()
    kinds: set[str] = set()
    async with trio.open_nursery() as nursery:
        for task in range(4):
            nursery.start_soon(_random_faults, random.Random(f"{rng.random()}:{task}"), count // 4, totals, kinds)
    assert kinds == {kind.__name__ for kind in FAULT_KINDS}
    record("figure", ", ".join(f"{name} {value:,}" for name, value in totals.items()))


async def _random_faults(rng: random.Random, count: int, totals: Counter[str], kinds: set[str]) -> None:
    async with open_bench(rng) as bench:
        for number in range(count):
            plan = [
                [draw_fault(rng) for _ in range(rng.choice((1, 1, 1, 2)))] if rng.random() < share else []
                for share in (1.0, 0.4, 0.4)
            ]
            stream, ambiguous_retries = rng.random() < 0.5, rng.choice((0, 1, 1, 2))
            try:
                outcome = await bench.run(plan, stream=stream, ambiguous_retries=ambiguous_retries, wait_s=0.03)
            except BaseException as exc:
                exc.add_note(f"request {number}: {stream=} {ambiguous_retries=} {plan=}")
                raise
            try:
                check_money(plan, outcome, stream=stream, ambiguous_retries=ambiguous_retries)
            except AssertionError as exc:
                exc.add_note(f"request {number}: {stream=} {ambiguous_retries=} {plan=} {outcome=}")
                raise
            totals["requests"] += 1
            totals["whole"] += outcome.whole
            totals["processed"] += outcome.processed
            totals["processed again"] += max(0, outcome.processed - 1)
            totals["flagged"] += outcome.flagged
        totals["faults struck"] += len(bench.proxy.strikes)
        kinds.update(bench.proxy.statistics().struck)


async def test_money_under_random_faults(rng: random.Random, record_property: Callable[[str, object], None]) -> None:
    """300 requests through random faults: no unexplained second processing, nothing lost without a flag."""
    await run_random_faults(rng, count=300, record=record_property)


@pytest.mark.long
async def test_money_under_many_random_faults(
    rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """The same 95,000 times, so that more than 100,000 faults strike."""
    await run_random_faults(rng, count=95_000, record=record_property)

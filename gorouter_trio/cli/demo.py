"""`gorouter-trio demo`: a batch and a conversation, through the whole runtime, without a key."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

import msgspec
import trio
from msgspec import Struct

from ..batch.tally import Tally
from .failures import FAILED, OK, CliError
from .options import REALISTIC, CommonOptions, open_chosen_client
from .progress import BatchView, open_progress
from .prompts import CONVERSATION, make_requests
from .terminal import (
    describe_call,
    facts_table,
    format_cost,
    format_seconds,
    paint,
    print_json,
    print_text,
    printable,
    show,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..client import Client
    from ..session.directory import SessionRef
    from ..wire.result import ChatResult

__all__ = ["DemoJob", "DemoReport", "run_demo"]

# A few of the refusals that every day brings: the runtime asks again.
_FAULTS = {"429_upstream": 0.015, "502": 0.01, "503": 0.01}


class DemoJob(Struct, frozen=True, kw_only=True):
    """How large the batch is, and how many of its requests run at a time."""

    rows: int
    max_in_flight: int

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise CliError(f"--rows must be at least 1, not {self.rows}")
        if self.max_in_flight < 1:
            raise CliError(f"--max-in-flight must be at least 1, not {self.max_in_flight}")


class DemoReport(Struct, frozen=True, kw_only=True):
    """What ran, as `--json` prints it; latencies are those of the batch, first tokens those of the conversation."""

    rows: int
    failed: int
    duration_s: float
    rows_per_s: float
    latency_p50_s: float | None
    latency_p99_s: float | None
    retries: int
    turns: int
    first_token_p50_s: float | None
    remembered: bool
    prompt_tokens: int
    completion_tokens: int
    cost_usd: Decimal
    connections: int


async def run_demo(job: DemoJob, *, seed: int, as_json: bool) -> int:
    """Run a batch and a conversation against a simulated OpenRouter; returns the exit code."""
    options = CommonOptions(simulate=True, seed=seed, json=as_json)
    simulator = msgspec.structs.replace(REALISTIC, fault_rates=_FAULTS, retry_after_s=1)
    demo = _Demo(quiet=as_json)
    async with open_chosen_client(
        options, max_connections=job.max_in_flight, simulator=simulator, has_prices=True
    ) as client:
        await demo.run_batch(client, job, seed)
        await demo.talk(client.session("demo:ada", system="You are friendly and brief."))
        report = demo.report(client.statistics().opened)
    if as_json:
        print_json(report)
    else:
        show(facts_table("What ran", _facts(report)))
    return OK if not report.failed and report.remembered else FAILED


class _Demo:
    """The two parts of the demonstration, and their sums."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._rows = Tally()
        self._turns = Tally()
        self._batch_s = 0.0
        self._last = ""

    async def run_batch(self, client: Client, job: DemoJob, seed: int) -> None:
        """Run the rows, with their progress on stderr."""
        kinds = "tickets, translations, sums, plans"
        self._head(f"A batch: {job.rows:,} prompts ({kinds}), {job.max_in_flight} at a time")
        started_at = trio.current_time()
        requests = make_requests(job.rows, seed)
        async with (
            client.batch(requests, max_in_flight=job.max_in_flight) as results,
            open_progress(BatchView(self._rows, results), total=job.rows),
        ):
            async for result in results:
                self._rows.add(result)
        self._batch_s = trio.current_time() - started_at
        again = f", {self._rows.retries} refused at first and asked again" if self._rows.retries else ""
        self._say(f"{self._rows.succeeded:,} answers in {format_seconds(self._batch_s)}{again}\n\n", "green")

    async def talk(self, session: SessionRef) -> None:
        """Take the turns of the conversation, streamed."""
        self._head("A conversation: three turns of one session, streamed")
        for prompt in CONVERSATION:
            self._say(f"> {prompt}\n", "cyan")
            result = await self._turn(session, prompt)
            self._turns.add_call(result.call)
            self._last = result.text
            self._say(f"\n{describe_call(result.call)}\n\n", "dim")

    async def _turn(self, session: SessionRef, prompt: str) -> ChatResult:
        async with session.stream(prompt) as stream:
            async for text in stream.text:
                self._say(printable(text))
        return stream.result

    def report(self, connections: int) -> DemoReport:
        """The sums of both parts."""
        rows, turns = self._rows, self._turns
        return DemoReport(
            rows=rows.rows,
            failed=rows.failed,
            duration_s=self._batch_s,
            rows_per_s=rows.rows / self._batch_s,
            latency_p50_s=rows.latencies.quantile(0.5),
            latency_p99_s=rows.latencies.quantile(0.99),
            retries=rows.retries + turns.retries,
            turns=turns.latencies.count,
            first_token_p50_s=turns.first_tokens.quantile(0.5),
            remembered="Ada" in self._last,
            prompt_tokens=rows.prompt_tokens + turns.prompt_tokens,
            completion_tokens=rows.completion_tokens + turns.completion_tokens,
            cost_usd=rows.cost + turns.cost,
            connections=connections,
        )

    def _head(self, title: str) -> None:
        self._say(title + "\n", "bold")

    def _say(self, text: str, style: str = "") -> None:
        if not self._quiet and text:
            print_text(paint(text, style) if style else text)


def _facts(r: DemoReport) -> Iterator[tuple[str, str]]:
    yield "rows", f"{r.rows:,}"
    yield "failed", f"{r.failed:,}"
    yield "rate", f"{r.rows_per_s:,.1f} rows/s for {format_seconds(r.duration_s)}"
    yield "latency", f"p50 {format_seconds(r.latency_p50_s)}, p99 {format_seconds(r.latency_p99_s)}"
    yield "retries", f"{r.retries:,}"
    yield "conversation", f"{r.turns} turns, {'the name was remembered' if r.remembered else 'the name was forgotten'}"
    yield "first token", f"p50 {format_seconds(r.first_token_p50_s)}"
    yield "tokens", f"{r.prompt_tokens:,} in, {r.completion_tokens:,} out"
    yield "cost", f"{format_cost(r.cost_usd)} (simulated)"
    yield "connections", f"{r.connections:,}"

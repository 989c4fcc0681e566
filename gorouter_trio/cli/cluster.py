"""`gorouter-trio batch submit|work|status|collect`: a job that several machines share by a Redis."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, cast

import msgspec
from cyclopts import App, Parameter

from ..batch.cluster import ClusterJob
from ..batch.cluster_wiring import make_worker
from ..batch.input import LimitedRows, open_rows
from ..batch.template import Template
from ..batch.wiring import job_services
from ..client import open_client
from ..config import PricePolicy, RateLimits, Seams, Secret
from ..errors import BadRequestError, ConfigError, DecodeError
from ..transport.resp_client import RedisClient
from .batch import STOPPED, BatchCommand, show_estimate
from .batch_options import BatchChoices, choose_batch, import_tools
from .failures import FAILED, INTERRUPTED, OK, CliError, report, why
from .options import FLAG, CommonOptions, client_config, on_interrupt, open_chosen_client, open_simulator_for
from .terminal import facts_table, format_cost, print_json, print_text, show

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from .._turns.request import TurnKeywords
    from ..batch.cluster import ClusterStatus

# What a job that is handed in may be told of the options of a batch.
_SUBMITTED = frozenset(
    (
        *("limit", "input_format", "template", "suffix_duplicates", "schema", "tools", "option", "system"),
        *("budget_usd", "dry_run"),
    )
)
_ELSEWHERE = "batch submit only hands rows in; batch work runs them, and batch collect writes their answers"
_HOW_ON: Mapping[str, str] = {"budget": "submit it again with a larger --budget-usd, and work goes on"}

__all__ = ["JobPlace", "add_cluster_commands", "collect", "status", "submit", "work"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JobPlace:
    """Which job, and where."""

    job: str
    """Name of the job."""
    redis: str | None = None
    """URL of the Redis, such as redis://host:6379/0; by default REDIS_URL."""
    lease: float = 30.0
    """Seconds after which the rows of a worker that is not heard of go to others; the same for all."""


@asynccontextmanager
async def _open_job(place: JobPlace) -> AsyncIterator[ClusterJob]:
    url = place.redis or os.environ.get("REDIS_URL", "")
    if not url:
        raise CliError("no Redis: give --redis URL, or set REDIS_URL")
    async with RedisClient(url) as redis:
        yield ClusterJob(redis, place.job, lease_s=place.lease)


async def submit(
    source: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    place: JobPlace,
    choices: BatchChoices | None = None,
    common: CommonOptions | None = None,
) -> int:
    """Hand the rows of a file in as a job for several machines. Cut off, it is done again, and goes on where it was.

    Parameters
    ----------
    source
        The rows, as for a batch; - is standard input.
    """
    choices, common = choices or BatchChoices(), common or CommonOptions()
    _refuse_others(choices)
    command = choose_batch(source, "-", choices=choices)
    if command.dry:
        async with open_chosen_client(common, system=command.system, has_prices=True) as client:
            return await show_estimate(client, command, as_json=common.json)
    await _hand_in(source, command, place=place, choices=choices, model=common.model)
    return OK


def _refuse_others(choices: BatchChoices) -> None:
    """Options of a batch that say how its rows are sent and written: that is for those who work and collect."""
    for field in fields(choices):
        if field.name not in _SUBMITTED and getattr(choices, field.name) != field.default:
            raise CliError(f"--{field.name.replace('_', '-')} is not for a job that is shared: {_ELSEWHERE}")


async def _hand_in(
    source: str, command: BatchCommand, *, place: JobPlace, choices: BatchChoices, model: str | None
) -> None:
    job, options = command.job, cast("TurnKeywords", command.options)
    template = None if job.template is None else Template(job.template)
    chosen = {} if model is None else {"model": model}
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(_open_job(place))
        # Rows are encoded here and sent elsewhere: this client is never asked anything.
        client = await stack.enter_async_context(
            open_client(api_key=Secret("none"), system=command.system, prices=PricePolicy(on_start=False), **chosen)
        )
        try:
            services = job_services(client.runtime, options)
        except BadRequestError as exc:
            raise CliError(exc.message) from exc
        settings = {**job.settings(), **services.settings, "turn": _turn_of(command.options, choices)}
        try:
            rows = await stack.enter_async_context(
                open_rows(job.source_path, input_format=job.input_format, template=template, duplicates=job.duplicates)
            )
            await rows.check()
            count = await cluster.submit(
                LimitedRows(rows, job.limit),
                services.encode_for(place.job),
                settings=settings,
                budget_usd=job.most_usd,
            )
        except (OSError, DecodeError, ConfigError) as exc:
            reason = why(exc) if isinstance(exc, OSError) else exc.message
            raise CliError(f"{source}: {reason}") from exc
    print_text(f"{count:,} rows of {place.job}\n")


def _turn_of(options: Mapping[str, object], choices: BatchChoices) -> dict[str, object]:
    """What workers have to know besides the bodies of the rows; tools by their names, to be imported there."""
    turn = {name: options[name] for name in ("response_schema", "fallbacks") if name in options}
    return {**turn, "tools": choices.tools} if choices.tools else turn


def _keywords_of(settings: Mapping[str, object]) -> TurnKeywords:
    """The same as keyword arguments of a turn; raises `CliError` where a tool cannot be imported."""
    turn = dict(cast("Mapping[str, object]", settings.get("turn") or {}))
    if "tools" in turn:
        turn["tools"] = import_tools(cast("list[str]", turn["tools"]))
    return cast("TurnKeywords", turn)


async def work(
    *,
    place: JobPlace,
    max_in_flight: int = 64,
    requests_per_minute: float | None = None,
    name: str | None = None,
    common: CommonOptions | None = None,
) -> int:
    """Run rows of a job until all have their answers. Limits and the budget are those of all its workers together.

    Parameters
    ----------
    max_in_flight
        How many requests this worker runs at a time.
    requests_per_minute
        The limit of all workers together; the same for each.
    name
        What the worker is called; by default something new.
    """
    common = common or CommonOptions()
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(_open_job(place))
        settings = await cluster.settings()
        turn = _keywords_of(settings)
        config = client_config(common, max_in_flight)
        rates = RateLimits(requests_per_minute=requests_per_minute)
        config = msgspec.structs.replace(config, shared=cluster.limits, rates=rates)
        simulated = await stack.enter_async_context(open_simulator_for(common))
        client = await stack.enter_async_context(open_client(config, **simulated))
        worker = make_worker(
            client.runtime, cluster, settings=settings, turn=turn, name=name or Seams().new_id(), width=max_in_flight
        )
        async with on_interrupt(worker.drain):
            await worker.run()
    report(f"{worker.finished:,} rows finished, {worker.failed:,} of them failed")
    if worker.stopping == "interrupted":
        return INTERRUPTED
    if worker.stopping is not None:
        report(f"{STOPPED[worker.stopping]}; {_HOW_ON.get(worker.stopping, 'work again goes on')}")
    return OK if worker.stopping is None else FAILED


async def status(*, place: JobPlace, json: Annotated[bool, FLAG] = False) -> int:
    """Say where a job is."""
    async with _open_job(place) as job:
        found = await job.status()
    if json:
        print_json(found)
    else:
        show(facts_table("Job", _facts(found)))
    return OK


def _facts(s: ClusterStatus) -> Iterator[tuple[str, str]]:
    yield "job", s.name
    yield "rows", f"{s.total:,}" + ("" if s.is_submitted else " so far")
    yield "done", f"{s.done:,}"
    yield "failed", f"{s.failed:,}" if s.failed else ""
    yield "in flight", f"{s.in_flight:,}"
    yield "workers", f"{s.workers:,}"
    yield "undone", f"{s.undone:,}" if s.stopped is not None and s.undone else ""
    yield "cost", format_cost(s.cost_usd)
    yield "budget", "" if s.budget_usd is None else f"${s.budget_usd}"
    if s.budget_usd is not None:
        lost = f", {format_cost(s.assumed_usd)} of it by workers that died, at most" if s.assumed_usd else ""
        yield "spent", format_cost(s.spent_usd) + lost
        yield "reserved", format_cost(s.reserved_usd)
        yield "left", format_cost(s.left_usd)
    yield "stopped", _why_stopped(s)


def _why_stopped(s: ClusterStatus) -> str:
    if s.stopped is None or s.is_done:
        return ""
    return STOPPED.get(s.stopped, s.stopped) + (f"; {_HOW_ON[s.stopped]}" if s.stopped in _HOW_ON else "")


async def collect(
    *,
    place: JobPlace,
    output: Annotated[str, Parameter(name=["--output", "-o"])],
    ordered: Annotated[bool, FLAG] = False,
    no_wait: Annotated[bool, FLAG] = False,
    delete: Annotated[bool, FLAG] = False,
) -> int:
    """Write the answers of a job into a file, as they come, behind those that it has.

    Parameters
    ----------
    output
        The file.
    ordered
        Bring it into the order of the rows at the end.
    no_wait
        Take what is there, and do not wait for the rest, which is waited for until all workers have stopped.
    delete
        Forget the job, once every row has its answer in the file; else it is kept.
    """
    async with _open_job(place) as job:
        # Refuses a job that is not there before a file is made.
        await job.status()
        try:
            collected = await job.collect(output, ordered=ordered, follow=not no_wait)
        except OSError as exc:
            raise CliError(f"{output}: {why(exc)}", code=FAILED) from exc
        found = await job.status()
        is_kept = delete and not (found.is_done and collected.lines >= found.total)
        if delete and not is_kept:
            await job.delete()
    print_text(f"{collected.new:,} rows into {output}; {found.done:,} of {found.total:,} are done\n")
    if is_kept:
        report(f"the job is kept: {output} has the lines of {collected.lines:,} of its {found.total:,} rows")
    if why_stopped := _why_stopped(found):
        report(why_stopped)
    return FAILED if found.failed or why_stopped else OK


def add_cluster_commands(app: App) -> None:
    """Put the commands under that of the batch."""
    for command in (submit, work, status, collect):
        app.command(command)

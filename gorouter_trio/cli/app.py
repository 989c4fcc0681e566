"""The commands and their options."""

from __future__ import annotations

import inspect
from datetime import datetime  # noqa: TC003 - read from the annotations by cyclopts
from functools import partial
from importlib import metadata
from pathlib import Path  # noqa: TC003 - read from the annotations by cyclopts
from typing import TYPE_CHECKING, Annotated, cast

import trio
from cyclopts import App, CycloptsError, Parameter

from ..config import DEFAULT_MODEL
from ..errors import GorouterError
from ..simulator.files import show_config
from .account import run_credits, run_key
from .batch import run_batch
from .batch_options import BatchChoices, choose_batch
from .bench import BenchJob, run_bench
from .chat import ChatJob, run_chat
from .cluster import add_cluster_commands
from .cost import CostGrouping, CostJob, run_cost
from .demo import DemoJob, run_demo
from .failures import FAILED, OK, USAGE, CliError, find_failure, hide_keys_in_tracebacks, report, report_failure, why
from .history import make_history_app
from .models import ModelQuery, ModelSort, run_models
from .options import FLAG, CommonOptions
from .serve import ServeJob, run_serve
from .simulate import choose_config, parse_faults, read_recordings, run_simulate
from .terminal import drop_stdout, print_text
from .top import TopJob, run_top

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

__all__ = [
    "batch",
    "bench",
    "chat",
    "cost",
    "credits",
    "demo",
    "key",
    "models",
    "run",
    "serve",
    "simulate",
    "top",
]

# A `-` stands for stdin or stdout, and is no option.
_PATH = Parameter(allow_leading_hyphen=True)
_EACH = Parameter(negative="", show_default=False)


async def batch(
    source: Annotated[str, _PATH],
    /,
    *,
    output: Annotated[str, Parameter(name=["--output", "-o"], allow_leading_hyphen=True)],
    choices: BatchChoices | None = None,
    common: CommonOptions | None = None,
) -> int:
    """Run every row of a file and write the answers as they come.

    A row is {"messages": [...]}, {"prompt": "..."} or {"question": "..."} with an "id" if it likes, or has the form of
    OpenAI's Batch API. A row that cannot be used becomes an error in the output; the others run.

    A journal beside the output knows which rows were sent: a job that was stopped or killed goes on with --resume.
    Ctrl-C takes no more rows and waits for those in flight; once more, and it cancels them.

    Parameters
    ----------
    source
        The rows: JSON Lines, CSV or Parquet, also in gzip or zstd; - is standard input.
    output
        Where the answers go; - is standard output, without a journal.
    """
    command = choose_batch(source, output, choices=choices or BatchChoices())
    return await run_batch(command, common or CommonOptions())


async def chat(
    *,
    prompt: Annotated[str | None, Parameter(name=["--prompt", "-p"], allow_leading_hyphen=True)] = None,
    session: str = "cli",
    system: str | None = None,
    common: CommonOptions | None = None,
) -> int:
    """Talk with a model; the answers come as they are written.

    Without a question in -p or on standard input it is a conversation: Ctrl-C stops an answer, Ctrl-D ends it, and
    /help lists what else it understands. It is kept as long as the program runs.

    Parameters
    ----------
    prompt
        Ask only this, and end.
    session
        Key of the conversation.
    system
        Instructions for the model.
    """
    return await run_chat(ChatJob(session=session, system=system, prompt=prompt), common or CommonOptions())


async def demo(*, rows: int = 400, max_in_flight: int = 64, seed: int = 0, json: Annotated[bool, FLAG] = False) -> int:
    """Run a batch and a conversation against an OpenRouter simulated here, and show what ran.

    Parameters
    ----------
    rows
        How many prompts the batch has.
    max_in_flight
        How many requests run at a time.
    seed
        Seed of the prompts and the answers.
    json
        Print the sums as JSON, and nothing else.
    """
    return await run_demo(DemoJob(rows=rows, max_in_flight=max_in_flight), seed=seed, as_json=json)


async def simulate(
    *,
    listen: str = "127.0.0.1:0",
    scenario: Path | None = None,
    print_scenario: Annotated[bool, FLAG] = False,
    latency: float | None = None,
    first_token: float | None = None,
    tokens_per_s: float | None = None,
    jitter: float | None = None,
    fault: Annotated[list[str] | None, Parameter(negative="")] = None,
    retry_after: int | None = None,
    recordings: Path | None = None,
    only_recordings: Annotated[bool, FLAG] = False,
    seed: int | None = None,
    json: Annotated[bool, FLAG] = False,
) -> int:
    """Serve a simulated OpenRouter until Ctrl-C; its base URL is printed first, its counters last.

    Parameters
    ----------
    listen
        HOST:PORT; port 0 takes a free one.
    scenario
        A TOML file with settings and what happens when; the other options go before it.
    print_scenario
        Print such a file with every setting and its default, and nothing else.
    latency
        Seconds from a request to the head of its reply.
    first_token
        Seconds from there to the first token.
    tokens_per_s
        Speed of generation; 0 is as fast as possible.
    jitter
        By which part these differ from request to request, 0 to 1.
    fault
        NAME=SHARE of the requests that fail, such as 429_upstream=0.05; may be given several times.
    retry_after
        Seconds that refusals ask to wait.
    recordings
        A file of recorded requests and replies, which are answered as they were (docs/simulator.md).
    only_recordings
        Refuse whatever was not recorded, with 404, instead of simulating it.
    seed
        Seed of the answers.
    json
        Print the base URL and the counters as JSON.
    """
    if print_scenario:
        print_text(show_config())
        return OK
    given: dict[str, object] = {
        "seed": seed,
        "latency_s": latency,
        "first_token_s": first_token,
        "tokens_per_s": tokens_per_s,
        "jitter": jitter,
        "fault_rates": parse_faults(fault) if fault else None,
        "retry_after_s": retry_after,
        "recordings": read_recordings(recordings) if recordings else None,
        "only_recordings": only_recordings or None,
    }
    config = choose_config(scenario, {name: value for name, value in given.items() if value is not None})
    return await run_simulate(config, listen=listen, as_json=json)


async def models(
    *search: str,
    input: Annotated[list[str] | None, _EACH] = None,  # noqa: A002 - the name of the option
    output: Annotated[list[str] | None, _EACH] = None,
    supports: Annotated[list[str] | None, _EACH] = None,
    max_price: str | None = None,
    max_output_price: str | None = None,
    min_context: int | None = None,
    free: Annotated[bool, FLAG] = False,
    sort: ModelSort = "name",
    limit: int | None = None,
    common: CommonOptions | None = None,
) -> int:
    """List the models on offer with their prices.

    Parameters
    ----------
    search
        Words that the id or the name has.
    input
        A kind of input that it takes, such as image; may be given several times.
    output
        A kind of output that it makes.
    supports
        A parameter that it supports, such as tools.
    max_price
        USD for a million tokens of the prompt, at most.
    max_output_price
        The same for the completion.
    min_context
        Tokens of context, at least.
    free
        Only those that cost nothing.
    sort
        By name, price, output-price, context or newest.
    limit
        List only so many.
    """
    query = ModelQuery(
        words=[word for words in search for word in words.split()],
        inputs=input or (),
        outputs=output or (),
        parameters=supports or (),
        max_price=max_price,
        max_output_price=max_output_price,
        min_context=min_context,
        only_free=free,
        sort=sort,
        limit=limit,
    )
    return await run_models(query, common or CommonOptions())


async def cost(
    source: Annotated[str, _PATH],
    /,
    *,
    by: CostGrouping = "model",
    since: datetime | None = None,
    until: datetime | None = None,
    top: int = 40,
    plot: Annotated[bool, FLAG] = False,
    reconcile: Annotated[bool, FLAG] = False,
    common: CommonOptions | None = None,
) -> int:
    """Add up what a ledger file, or a store of conversations, cost.

    Parameters
    ----------
    source
        A ledger (JSON Lines), - for one on standard input, or a SQLite store of sessions.
    by
        Rows by model, session, tenant, batch, purpose or state, or over time by day, hour or minute.
    since
        Only what ended at this time or later, in UTC, such as 2026-11-25 or 2026-11-25T08:00:00.
    until
        Only what ended before this time.
    top
        Show only so many rows: the dearest, or the latest.
    plot
        Draw a bar for each row.
    reconcile
        Ask the API what lost attempts cost, and add the answers to the ledger first.
    """
    job = CostJob(source=source, by=by, since=since, until=until, top=top, plot=plot, reconcile=reconcile)
    return await run_cost(job, common or CommonOptions())


async def bench(
    *models: str,
    requests: Annotated[int, Parameter(name=["--requests", "-n"])] = 100,
    in_flight: Annotated[int, Parameter(name=["--in-flight", "-c"])] = 8,
    rate: float | None = None,
    warmup: int = 2,
    prompt: Annotated[str | None, Parameter(name=["--prompt", "-p"], allow_leading_hyphen=True)] = None,
    max_tokens: int = 200,
    temperature: float | None = None,
    whole: Annotated[bool, FLAG] = False,
    common: CommonOptions | None = None,
) -> int:
    """Measure how fast models answer: time to first token, tokens a second, failures, cost.

    Parameters
    ----------
    models
        The models, one after the other; without any, that of --model.
    requests
        How many requests each model gets.
    in_flight
        How many run at a time, when there is no --rate.
    rate
        Begin so many a second at random times, whatever became of the ones before, and measure from those times.
    warmup
        Requests before that, which do not count.
    prompt
        What to ask.
    max_tokens
        Tokens of an answer, at most.
    temperature
        Of the answers.
    whole
        Ask for whole answers, not for streams.
    """
    common = common or CommonOptions()
    job = BenchJob(
        models=models or (common.model or DEFAULT_MODEL,),
        requests=requests,
        in_flight=in_flight,
        rate=rate,
        warmup=warmup,
        prompt=BenchJob.prompt if prompt is None else prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        stream=not whole,
    )
    return await run_bench(job, common)


async def serve(
    *,
    listen: str = "127.0.0.1:8080",
    principals: Path | None = None,
    anonymous: Annotated[bool, FLAG] = False,
    origin: Annotated[list[str] | None, _EACH] = None,
    only_model: Annotated[list[str] | None, _EACH] = None,
    operator_role: Annotated[list[str] | None, _EACH] = None,
    approver_role: Annotated[list[str] | None, _EACH] = None,
    store: Path | None = None,
    redis: str | None = None,
    cluster_url: str | None = None,
    tools: Annotated[list[str] | None, _EACH] = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    max_connections: int = 20_000,
    max_per_address: int = 256,
    upstream: int = 64,
    drain: float = 10.0,
    budget_usd: str | None = None,
    tenant_budget_usd: str | None = None,
    session_budget_usd: str | None = None,
    common: CommonOptions | None = None,
) -> int:
    """Serve sessions over WebSocket, and OpenAI's chat API, until SIGTERM; the URL is printed first.

    Parameters
    ----------
    listen
        HOST:PORT; port 0 takes a free one.
    principals
        A TOML file that says who may connect: a table each, with a token or its sha256, tenant, roles and scopes.
    anonymous
        Let everybody in; all share all sessions then.
    origin
        A web origin whose pages may connect, such as https://app.example.com; may be given several times.
    only_model
        A model that may be asked for; may be given several times. Without any, all may.
    operator_role
        A role that may see what the gateway does; "operator" by default.
    approver_role
        A role that may approve tools; by default whoever asks may.
    store
        A SQLite file to keep sessions in.
    redis
        A Redis to keep sessions in, such as redis://localhost.
    cluster_url
        Where other gateways on the same Redis reach this one; their common secret is in GOROUTER_CLUSTER_SECRET.
    tools
        A module with tools, or module:name; may be given several times.
    tls_cert
        Certificate with its chain (PEM), for wss and https.
    tls_key
        Its key, if that is in a file of its own.
    max_connections
        How many may be connected at once.
    max_per_address
        How many from one address; behind a proxy, everybody has its address.
    upstream
        How many connections to the API there may be.
    drain
        Seconds that running turns have when the gateway is told to stop.
    budget_usd
        What may be spent in all, in USD; requests that might cost more than is left of it are refused.
    tenant_budget_usd
        Likewise for each tenant: the one of a principal, or the principal itself.
    session_budget_usd
        Likewise for each session.
    """
    job = ServeJob(
        listen=listen,
        principals=principals,
        anonymous=anonymous,
        origins=origin or (),
        models=only_model,
        operators=operator_role or ("operator",),
        approvers=approver_role or (),
        store=store,
        redis=redis,
        cluster_url=cluster_url,
        tools=tools or (),
        cert=tls_cert,
        key=tls_key,
        connections=max_connections,
        per_address=max_per_address,
        upstream=upstream,
        drain_s=drain,
        budget_usd=budget_usd,
        tenant_budget_usd=tenant_budget_usd,
        session_budget_usd=session_budget_usd,
    )
    return await run_serve(job, common or CommonOptions())


async def top(
    url: str,
    /,
    *,
    interval: float = 1.0,
    rows: int = 15,
    patience: float = 10.0,
    json: Annotated[bool, FLAG] = False,
) -> int:
    """Show what a gateway does: sessions, queue, limits, spend against budgets, errors; live until Ctrl-C.

    An operator's token is taken from GOROUTER_GATEWAY_TOKEN.

    Parameters
    ----------
    url
        The gateway, such as ws://127.0.0.1:8080.
    interval
        Seconds between two looks.
    rows
        How many sessions, and how many budgets, are shown at most.
    patience
        Seconds to wait for a gateway that cannot be reached.
    json
        Print one snapshot as JSON.
    """
    return await run_top(TopJob(url=url, interval_s=interval, rows=rows, patience_s=patience), as_json=json)


async def key(*, common: CommonOptions | None = None) -> int:
    """Show the limits and the usage of the key in use."""
    return await run_key(common or CommonOptions())


async def credits(*, common: CommonOptions | None = None) -> int:  # noqa: A001 - the name of the command
    """Show the credits that were bought, used and are left."""
    return await run_credits(common or CommonOptions())


def run(arguments: Sequence[str]) -> int:
    """Run one command and return the exit code."""
    hide_keys_in_tracebacks()
    try:
        command, bound, _ = _make_app().parse_args(arguments, print_error=False, exit_on_error=False)
        return _call(partial(command, *bound.args, **bound.kwargs), is_async=inspect.iscoroutinefunction(command))
    except CycloptsError as exc:
        report(f"{str(exc).rstrip('.')} (see --help)")
        return USAGE
    except BaseExceptionGroup as group:
        code = report_failure(find_failure(group))
        if code is None:
            raise
        return code
    except (CliError, GorouterError, KeyboardInterrupt) as exc:
        return report_failure(exc) or FAILED


def _call(command: Callable[[], object], *, is_async: bool) -> int:
    if not is_async:
        # Help and version, which the library prints.
        try:
            command()
        except OSError as exc:
            drop_stdout()
            raise CliError(f"standard output: {why(exc)}", code=FAILED) from exc
        return OK
    return trio.run(cast("Callable[[], Awaitable[int]]", command))


def _make_app() -> App:
    app = App(
        name="gorouter-trio",
        help="Batches and conversations with OpenRouter, or with one simulated here.",
        help_format="markdown",
        version=_version,
    )
    for command in (demo, chat, bench, cost, models, key, credits, serve, top, simulate):
        app.command(command)
    app.command(_make_batch_app())
    app.command(make_history_app())
    return app


def _make_batch_app() -> App:
    """The command, and those of jobs that machines share below it."""
    app = App(name="batch", default_command=batch)
    add_cluster_commands(app)
    return app


def _version() -> str:
    try:
        return metadata.version("gorouter-trio")
    except metadata.PackageNotFoundError:
        return "unknown: not installed"

"""What clients make of the failures that the API documents: every kind is sent to each client, as it is on the wire.

The simulator fails on demand, in the forms that were recorded; each client runs in a process of its own, without
retries, and each call in a thread that is given up on after a time. What became of a call is one of

* typed error: an exception of the client's own tree that says what the API said, its status, code or message;
* wrong type: an exception of its tree that says something else, such as that a schema did not match;
* foreign error: an exception that is not the client's, such as `ValueError`, `TypeError` or that of its HTTP library;
* silent success: it returned, as if nothing had happened (the finish reason may still say that something had);
* hangs: it neither returned nor raised within four times the deadline it was given.

    python benchmarks/failure_kinds.py --json benchmarks/results/failure_kinds.json

prints the table as Markdown. Clients that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import trio

from gorouter_trio.simulator import Scenario, Simulator, SimulatorConfig, Wire, serve_simulator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 1.5
PATIENCE_S = 4 * DEADLINE_S
MODEL = "openai/gpt-4o-mini"
KEY = "sk-or-v1-0123456789abcdef"

TODAY = Wire()

Outcome = Literal["typed error", "wrong type", "foreign error", "silent success", "hangs"]


class Kind(NamedTuple):
    """A failure: how it is asked for, and what of it an error may tell."""

    name: str
    prompt: str
    tells: tuple[str, ...]
    streaming: bool = False
    wire: Wire = TODAY


def _refusal(fault: str, *tells: str) -> Kind:
    status = fault[:3]
    return Kind(f"HTTP {fault.replace('_', ' ')}", f"Tides? [[fault {fault}]]", (status, *tells))


def _in_stream(name: str, *tells: str, fault: str = "mid_stream_error", wire: Wire = TODAY) -> Kind:
    prompt = f"Tides, at length? [[fault {fault}]]" if fault else "Tides?"
    return Kind(f"stream: {name}", prompt, tells, streaming=True, wire=wire)


GONE = ("Provider disconnected", "502")
ENDED = ("incomplete", "ended", "closed", "cut", "finish", "broken", "peer", "Connection", "end of", "without")
LATE = ("timed out", "timeout", "Timeout", "deadline", "no data", "in time")
EMPTY = ("504", "timed out", "empty", "no body", "whitespace", "decode", "JSON", "Expecting value")

KINDS = (
    *[
        _refusal(fault)
        for fault in (
            "400_context", "400_provider", "401", "402_credits", "402_in_flight", "403_key_limit", "403_moderation",
            "404_no_endpoints", "408", "429_admission", "429_free_daily", "429_upstream", "500", "502", "502_html",
            "503", "504", "524_html", "529",
        )
    ],
    Kind("200 with an error in its body", "Tides? [[fault error_in_200]]", ("504", "operation was aborted")),
    Kind("200 with an error in its choice", "Tides? [[fault mid_stream_error]]", GONE),
    Kind("200 of padding only", "Tides? [[fault whitespace_200]]", EMPTY),
    Kind("200 cut in the middle of its JSON", "Tides? [[fault stream_cut]]", ENDED),
    Kind("connection closed without a reply", "Tides? [[fault connection_cut]]", ENDED),
    Kind("padding without end", "Tides? [[fault stall]]", LATE),
    _in_stream("error before the first text", "504", "operation was aborted", fault="error_in_200"),
    _in_stream("error with a finish", *GONE),
    _in_stream("error, and the finish in another event", *GONE, wire=Wire(failure="no_choices")),
    _in_stream("error beside a usage, no finish", *GONE, wire=Wire(failure="with_usage")),
    _in_stream("finish `error` without an error", "error", wire=Wire(failure="no_error")),
    _in_stream("error alone in its event", *GONE, wire=Wire(failure="bare")),
    _in_stream("error whose code is a name", "Provider disconnected", "server_error", wire=Wire(failure="named")),
    _in_stream("cut in the middle", *ENDED, fault="stream_cut"),
    _in_stream("ends without a finish", *ENDED, fault="", wire=Wire(finish="missing", done=False)),
    _in_stream("`[DONE]` without a finish", *ENDED, fault="", wire=Wire(finish="missing")),
    _in_stream("comments without end", *LATE, fault="mid_stream_stall"),
)  # fmt: skip


# --- the clients ------------------------------------------------------------------------------------------------------


class Client(NamedTuple):
    """A way to ask: one call takes a base URL, a prompt and whether to stream, and returns the text."""

    name: str
    package: str
    tree: tuple[str, ...]
    make: Callable[[], Callable[[str, str, bool], str]]


def _openai() -> Callable[[str, str, bool], str]:
    import openai

    def ask(base_url: str, prompt: str, streaming: bool) -> str:
        client = openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=DEADLINE_S)
        messages: Any = [{"role": "user", "content": prompt}]
        if not streaming:
            return client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content or ""
        stream = client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    return ask


def _openrouter() -> Callable[[str, str, bool], str]:
    from openrouter import OpenRouter

    def ask(base_url: str, prompt: str, streaming: bool) -> str:
        messages: Any = [{"role": "user", "content": prompt}]
        timeout_ms = round(DEADLINE_S * 1_000)
        with OpenRouter(api_key=KEY, server_url=base_url, timeout_ms=timeout_ms, retry_config=None) as client:
            if not streaming:
                reply: Any = client.chat.send(model=MODEL, messages=messages, stream=False)
                return reply.choices[0].message.content or ""
            with client.chat.send(model=MODEL, messages=messages, stream=True) as stream:
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    return ask


def _litellm() -> Callable[[str, str, bool], str]:
    import litellm

    litellm.suppress_debug_info = True

    def ask(base_url: str, prompt: str, streaming: bool) -> str:
        reply: Any = litellm.completion(
            model=f"openrouter/{MODEL}",
            messages=[{"role": "user", "content": prompt}],
            api_base=base_url,
            api_key=KEY,
            stream=streaming,
            timeout=DEADLINE_S,
            max_retries=0,
            num_retries=0,
        )
        if not streaming:
            return reply.choices[0].message.content or ""
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices)

    return ask


def _pydantic_ai() -> Callable[[str, str, bool], str]:
    import openai
    from pydantic_ai.direct import model_request_stream_sync, model_request_sync
    from pydantic_ai.messages import ModelRequest
    from pydantic_ai.models.openrouter import OpenRouterModel
    from pydantic_ai.providers.openrouter import OpenRouterProvider

    def ask(base_url: str, prompt: str, streaming: bool) -> str:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=DEADLINE_S)
        model = OpenRouterModel(MODEL, provider=OpenRouterProvider(openai_client=client))
        messages: Any = [ModelRequest.user_text_prompt(prompt)]
        if not streaming:
            return str(model_request_sync(model, messages).text)
        with model_request_stream_sync(model, messages) as stream:
            for _event in stream:
                pass
            return str(stream.response.text)

    return ask


def _gorouter() -> Callable[[str, str, bool], str]:
    import gorouter_trio as gr

    async def ask_once(base_url: str, prompt: str, streaming: bool) -> str:
        deadlines = gr.Deadlines(headers_s=DEADLINE_S, first_data_s=DEADLINE_S, data_idle_s=DEADLINE_S)
        retry = gr.RetryPolicy(max_retries=0)
        fields: dict[str, object] = {"api_key": KEY, "base_url": base_url, "deadlines": deadlines, "retry": retry}
        async with gr.open_client(insecure_http=True, **fields) as client:
            if not streaming:
                return (await client.chat(prompt, model=MODEL)).text
            async with client.stream(prompt, model=MODEL) as stream:
                return (await stream.collect()).text

    return lambda base_url, prompt, streaming: trio.run(ask_once, base_url, prompt, streaming)


CLIENTS = (
    Client("openai", "openai", ("openai",), _openai),
    Client("openrouter", "openrouter", ("openrouter",), _openrouter),
    Client("litellm", "litellm", ("litellm",), _litellm),
    Client("pydantic-ai", "pydantic-ai-slim", ("pydantic_ai",), _pydantic_ai),
    Client("gorouter_trio", "gorouter-trio", ("gorouter_trio",), _gorouter),
)


# --- one client, in a process of its own ------------------------------------------------------------------------------


def run_client(client: Client, plan: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What becomes of each call of the plan."""
    ask = client.make()
    return [_run(client, ask, row) for row in plan]


def _run(client: Client, ask: Callable[[str, str, bool], str], row: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}

    def call() -> None:
        try:
            text = ask(row["base_url"], row["prompt"], row["streaming"])
            found.update(outcome="silent success", detail=repr(text)[:80])
        except Exception as exc:  # noqa: BLE001 - what is raised is what is measured
            found.update(outcome=judge(client, exc, row["tells"]), detail=f"{_name(exc)}: {exc}".splitlines()[0][:120])

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return dict(found) or {"outcome": "hangs", "detail": f"no end after {PATIENCE_S:g} s"}


def judge(client: Client, exc: BaseException, tells: list[str]) -> Outcome:
    """Whether an exception is the client's own, and says what happened."""
    if type(exc).__module__.partition(".")[0] not in client.tree:
        return "foreign error"
    if "validation" in type(exc).__name__.lower():
        return "wrong type"
    said = f"{type(exc).__name__} {exc} {getattr(exc, 'status_code', '')} {getattr(exc, 'code', '')}"
    return "typed error" if any(tell in said for tell in tells) else "wrong type"


def _name(exc: BaseException) -> str:
    kind = type(exc)
    root = kind.__module__.partition(".")[0]
    return kind.__name__ if root == "builtins" else f"{root}.{kind.__name__}"


# --- all of them ------------------------------------------------------------------------------------------------------


async def measure(clients: list[Client], kinds: list[Kind]) -> dict[str, list[dict[str, str]]]:
    """Serve each form on a port of its own, and let every client meet every kind."""
    wires = list(dict.fromkeys(kind.wire for kind in kinds))
    async with trio.open_nursery() as nursery:
        urls: dict[Wire, str] = {}
        for wire in wires:
            config = SimulatorConfig(scenario=Scenario(wire=wire), comment_interval_s=0.3, padding_interval_s=0.3)
            urls[wire] = await nursery.start(serve_simulator, Simulator(config))
        plan = [kind._asdict() | {"wire": None, "base_url": urls[kind.wire]} for kind in kinds]
        results = {client.name: await _measured(client, plan) for client in clients}
        nursery.cancel_scope.cancel()
    return results


async def _measured(client: Client, plan: list[dict[str, Any]]) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "plan.json"
        path.write_text(json.dumps(plan))
        command = [sys.executable, __file__, "--client", client.name, "--plan", str(path)]
        done = await trio.run_process(command, capture_stdout=True, stderr=subprocess.DEVNULL, check=True)
        found: list[dict[str, str]] = json.loads(done.stdout.decode().splitlines()[-1])
        return found


def is_installed(client: Client) -> bool:
    """Whether this client can be imported here."""
    return all(importlib.util.find_spec(root) is not None for root in client.tree)


def table(report: dict[str, Any]) -> Iterator[str]:
    """The outcomes as Markdown, with a line of totals."""
    outcomes: dict[str, dict[str, dict[str, str]]] = report["outcomes"]
    yield "| failure | " + " | ".join(f"{name} {report['versions'][name]}" for name in outcomes) + " |"
    yield "| --- |" + " --- |" * len(outcomes)
    kinds = list(next(iter(outcomes.values())))
    for kind in kinds:
        yield f"| {kind} | " + " | ".join(_cell(rows[kind]["outcome"]) for rows in outcomes.values()) + " |"
    right = [sum(row["outcome"] == "typed error" for row in rows.values()) for rows in outcomes.values()]
    yield "| **typed errors** | " + " | ".join(f"**{count} of {len(kinds)}**" for count in right) + " |"


def _cell(outcome: str) -> str:
    return outcome if outcome == "typed error" else f"**{outcome}**"


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(client.name for client in CLIENTS)
    parser.add_argument("--only", metavar="A,B", help=f"these clients: {names}")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write outcomes with their exceptions there")
    parser.add_argument("--kinds", metavar="A,B", help="only kinds with one of these words in their names")
    parser.add_argument("--details", action="store_true", help="also print the exceptions")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        client = next(client for client in CLIENTS if client.name == args.client)
        print("\n" + json.dumps(run_client(client, json.loads(args.plan.read_text()))))
        return
    chosen = args.only.split(",") if args.only else [client.name for client in CLIENTS]
    clients = [client for client in CLIENTS if client.name in chosen and is_installed(client)]
    words = args.kinds.split(",") if args.kinds else [""]
    kinds = [kind for kind in KINDS if any(word in kind.name for word in words)]
    results = trio.run(measure, clients, kinds)
    report = {
        "versions": {client.name: importlib.metadata.version(client.package) for client in clients},
        "outcomes": {name: dict(zip([k.name for k in kinds], rows, strict=True)) for name, rows in results.items()},
    }
    print("\n".join(table(report)))
    if args.details:
        for name, rows in results.items():
            for kind, row in zip(kinds, rows, strict=True):
                print(f"{name:14} {kind.name:45} {row['outcome']:15} {row['detail']}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Tools of MCP servers: real ones, over standard input and output and over HTTP, which also crash and hang."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from toolbox import LoggingGuard, call, open_bench, told

import gorouter_trio as gr
from gorouter_trio.events import ToolProgress
from gorouter_trio.security.rules import ToolRules
from gorouter_trio.tools.turn import ToolTurn

pytest.importorskip("mcp")
mcp = pytest.importorskip("gorouter_trio.tools.mcp")

pytestmark = pytest.mark.net  # real processes, real time

PROGRAM = Path(__file__).parents[1] / "support" / "mcp_program.py"
COMMAND = [sys.executable, str(PROGRAM)]
NAMES = ["add", "structured", "odd_name_with_signs", "hang", "fail", "large", "die", "garbage", "pid", "environment"]


@asynccontextmanager
async def http_server() -> AsyncIterator[str]:
    process = await trio.lowlevel.open_process([*COMMAND, "--http"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        port = (await process.stdout.receive_some(100)).decode().strip()
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def use(server: Any) -> None:
    """What holds for a server however it is reached."""
    assert list(server.tools._definitions) == NAMES
    definition = server.tools.definitions[0].function
    assert definition.description == "Adds two numbers."
    assert definition.parameters["properties"]["a"]["description"] == "The first"
    async with open_bench(*server.tools, timeout_s=20, include_results=True) as bench:
        calls = [
            call("add", "a", a=2, b=3),
            call("add", "b", a=2),
            call("add", "c", a="x"),
            call("add", "d", a=1, b=-1),
            call("structured", "e", a=7),
            call("odd_name_with_signs", "f"),
            call("fail", "g"),
            call("large", "h"),
            call("garbage", "i"),
        ]
        rows = {outcome.report.call_id: outcome.report for outcome in await bench.run(*calls)}
        assert rows["a"].text == "5"
        assert rows["b"].text == "3"
        assert (rows["c"].status, rows["d"].status) == ("error_validation", "error_validation")
        assert '"total"' in rows["e"].text
        assert rows["f"].text == "one\n[image: image/png]\ntwo"
        assert rows["g"].status == "error_execution"
        assert told(rows["g"]) == "Error executing tool fail"
        assert (len(rows["h"].text), rows["h"].is_cut) == (65_536, True)
        assert rows["i"].text == "fine"


async def test_standard_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command gives its tools: schemas, checks, results, errors; and sees nothing of the environment."""
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-canary")
    async with mcp.open_mcp(COMMAND, env={"WANTED": "1"}) as server:
        await use(server)
        async with open_bench(*server.tools, timeout_s=20) as bench:
            names = (await bench.one(call("environment"))).text
            pid = int((await bench.one(call("pid"))).text)
        assert "WANTED" in names
        assert "OPENROUTER_API_KEY" not in names
        assert repr(server) == f"McpServer({sys.executable}, 10 tools, connected)"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# The HTTP library of the mcp package leaves the readers of connections that it cancels to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_http() -> None:
    """A server at an address does the same."""
    async with (
        http_server() as address,
        mcp.open_mcp(address.replace("//", "//user:canary@") + "?key=canary", prefix="") as server,
    ):
        assert "canary" not in repr(server) + server.name
        await use(server)
        assert len(await server.refresh()) == 10
    gc.collect()


async def test_crashing_server() -> None:
    """A tool that hangs is cancelled; a server that crashes ends the calls that wait for it, and is started again."""
    async with mcp.open_mcp(COMMAND) as server, open_bench(*server.tools, timeout_s=20) as bench:
        row = await bench.one(call("hang"), ToolTurn(limits=gr.ToolLimits(timeout_s=1)))
        assert row.status == "error_timeout"
        assert ToolProgress("call_1", "hang", "a quarter", 0.25) in bench.events
        first = (await bench.one(call("pid"))).text
        for outcome in await bench.run(call("hang", "a"), call("die", "b")):
            assert outcome.report.status == "error_execution"
            assert "server of this tool" in told(outcome.report)
        with trio.fail_after(20):
            while not server.is_connected:
                row = await bench.one(call("add", a=1))
                assert row.text == "2" or "server of this tool" in told(row)
                await trio.sleep(0.05)
        assert (await bench.one(call("pid"))).text != first


async def test_settings() -> None:
    """Names get the prefix; the rules are those that whoever connects gives; of too many tools the first are taken."""
    rules = ToolRules(role="admin")
    chosen = mcp.open_mcp(COMMAND, prefix="t_", rules=lambda name: rules if name == "add" else None, max_tools=2)
    async with chosen as server, open_bench(*server.tools) as bench:
        assert list(server.tools._definitions) == ["t_add", "t_structured"]
        assert set(server.skipped) == {name.replace("_name_with_signs", " name/with.signs") for name in NAMES[2:]}
        row = await bench.one(call("t_add", a=1))
        assert row.status == "error_security"
        assert (await bench.one(call("t_structured", a=1))).status == "success"
        guard = LoggingGuard()
        bench.supervisor.guard = guard
        assert (await bench.one(call("t_add", a=1))).text == "2"
        assert [check.rules for check in guard.checks] == [rules]


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (["/no/such/program"], "cannot be used: .*No such file"),
        ([sys.executable, "-c", "raise SystemExit(1)"], "cannot be used"),
        ([sys.executable, "-c", "print('nonsense')"], "cannot be used"),
        ("http://127.0.0.1:9/mcp", "cannot be used"),
    ],
    ids=range(4),
)
async def test_no_server(target: Any, error: str) -> None:
    """What is no server is one clear error, and nothing is left of it."""
    with trio.fail_after(20), pytest.raises(gr.ConnectError, match=error):
        async with mcp.open_mcp(target):
            pytest.fail("connected")


@pytest.mark.parametrize(
    ("target", "settings", "error"),
    [
        ([], {}, "a command is a list of texts"),
        (["program", "--token=KEY", 5], {}, "a command is a list of texts, not one of str, str, int"),
        ("python server.py --token=KEY", {}, "give an http or https address, or a command as a list"),
        ("user:KEY@example.com/mcp", {}, "give an http or https address"),
        ("ws://user:KEY@example.com/mcp?key=KEY#KEY", {}, "give an http .* not ws://example.com/mcp$"),
        ("http://user:KEY@[example", {}, "give an http"),
        ("http://example.com/mcp?key=KEY", {"headers": {"Authorization": "KEY"}}, "in the clear"),
        (None, {}, "a command is a list of texts, not one of NoneType"),
        (5, {}, "a command is a list of texts, not one of int"),
        (["program"], {"env": {"TOKEN": None, "OTHER": "KEY"}}, "env must be a mapping of texts"),
        (["program"], {"env": "KEY"}, "env must be a mapping of texts"),
        ("https://example.com/mcp", {"headers": {"Authorization": None, "X": "KEY"}}, "headers must be a mapping"),
        (["program"], {"prefix": 5}, "prefix must be a text"),
        (["program"], {"rules": "admin"}, "rules must be ToolRules"),
        (["program"], {"timeout_s": 0}, "timeout_s must be a number above 0"),
        (["program"], {"timeout_s": math.nan}, "timeout_s must be a number above 0"),
        (["program"], {"timeout_s": math.inf}, "timeout_s must be a number above 0"),
        (["program"], {"max_tools": "8"}, "max_tools must be a whole number above 0"),
    ],
    ids=range(18),
)
async def test_bad_target(target: Any, settings: dict[str, Any], error: str) -> None:
    """A target that is none is refused before anything is started."""
    with pytest.raises(gr.ConfigError, match=error) as caught:
        async with mcp.open_mcp(target, **settings):
            pytest.fail("connected")
    assert "KEY" not in str(caught.value)


async def test_secrets_of_an_address(caplog: pytest.LogCaptureFixture) -> None:
    """A password and a query are for the server: no error, name or line of the log has them."""
    with trio.fail_after(20), pytest.raises(gr.ConnectError) as caught:
        async with mcp.open_mcp("http://user:PASSWORD@127.0.0.1:9/mcp?key=QUERYKEY"):
            pytest.fail("connected")
    shown = [str(caught.value), repr(caught.value)]
    shown += [record.getMessage() for record in caplog.records if record.name.startswith("gorouter_trio")]
    assert "127.0.0.1" in shown[0]
    assert not any(secret in line for line in shown for secret in ("PASSWORD", "QUERYKEY", "user"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("'401' for url 'https://a:b@h.example:8/mcp?key=k'", "'401' for url 'https://h.example:8/mcp'"),
        ("see http://h/x#y and mail a@b.c?", "see http://h/x and mail a@b.c?"),
        ("no address: a?b", "no address: a?b"),
    ],
)
def test_addresses_in_reasons(text: str, shown: str) -> None:
    """What a library says went wrong keeps nothing of an address but where it leads."""
    assert mcp._first_line(ValueError(text)) == shown


async def test_errors_of_the_body() -> None:
    """They leave as themselves, groups of the body's own too."""
    for error in (gr.ToolError("mine"), ExceptionGroup("mine", [ValueError()])):
        with trio.fail_after(20), pytest.raises(type(error)) as caught:
            async with mcp.open_mcp(COMMAND):
                raise error
        assert caught.value is error

"""`serve` and `top`: a gateway as a process, who may connect to it, and what it shows of itself."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from gorouter_trio.cli.failures import CliError
from gorouter_trio.cli.serve import find_tools, read_principals
from gorouter_trio.remote import open_remote

DIGEST = hashlib.sha256(b"0123456789abcdef").hexdigest()

pytestmark = pytest.mark.net

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "token-of-ada-0123456789"
PEOPLE = f'[ada]\ntoken = "{TOKEN}"\ntenant = "acme"\nroles = ["operator"]\n'


class Served:
    """The process, and the URL that it printed."""

    def __init__(self, *arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "gorouter_trio",
            "serve",
            "--simulate",
            "--listen",
            "127.0.0.1:0",
            "--json",
            *arguments,
        ]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()
        self.url = json.loads(line)["url"]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=20)
        return self.process.returncode


async def use(url: str, store_key: str) -> str:
    async with open_remote(url, token=TOKEN) as client:
        await client.session(store_key).ask("[[say well]]")
        return str((await client.session(store_key).history())[-1].message.content)


def test_serve_and_top(tmp_path: Path, gorouter) -> None:
    """Who is named may ask, what is said is kept in the store, operators see what goes on, and SIGTERM is success."""
    people = tmp_path / "people.toml"
    people.write_text(PEOPLE)
    served = Served("--principals", str(people), "--store", str(tmp_path / "bot.db"))
    try:
        assert trio.run(use, served.url, "s") == "well"
        done = gorouter("top", served.url, GOROUTER_GATEWAY_TOKEN=TOKEN)
        assert done.code == 0
        assert "1 done, 0 failed" in done.out
        assert max(map(len, done.out.splitlines())) <= 80
        shown = json.loads(gorouter("top", served.url, "--json", GOROUTER_GATEWAY_TOKEN=TOKEN).out)
        assert shown["turns_done"] == 1
        refused = gorouter("top", served.url, "--json", GOROUTER_GATEWAY_TOKEN="not-a-token-of-anybody")
        assert refused.code != 0
        assert "not known" in refused.message
    finally:
        assert served.stop() == 0
    listed = gorouter("history", "list", "--store", str(tmp_path / "bot.db"), "--json")
    assert listed.code == 0
    assert '"s"' in listed.out or "ada" in listed.out


async def test_top_on_a_terminal(tmp_path: Path, on_terminal) -> None:
    """The screen is of the terminal's size, follows what happens, shows budgets, and Ctrl-C gives the terminal back."""
    people = tmp_path / "people.toml"
    people.write_text(PEOPLE)
    served = Served("--principals", str(people), "--budget-usd", "5", "--tenant-budget-usd", "0.5")
    try:
        variables = {"GOROUTER_GATEWAY_TOKEN": TOKEN, "TERM": "xterm"}
        async with on_terminal("top", served.url, "--interval", "0.1", **variables) as terminal:
            begun = await terminal.wait_shown("0 done, 0 failed")
            assert "\x1b[?1049h" in begun  # the screen is one of its own
            async with open_remote(served.url, token=TOKEN) as client:
                await client.session("dialogue").ask("[[say well]]")
                await terminal.wait_shown("1 done, 0 failed")
                looks = [await terminal.wait_shown("dialogue"), await terminal.wait_shown("dialogue")]
                screen = looks[-1]
                assert "a second" in screen
                assert [line.split()[:2] for line in screen.splitlines() if "tenant" in line] == [["tenant", "acme"]]
                assert "$0.50" in screen
                assert "$5.00" in screen
                await client.session("dialogue").ask("[[say well]]")
                await terminal.wait_shown("2 done, 0 failed")
            await terminal.type("\x03")
            assert await terminal.wait_ended() == 130
            assert "\x1b[?1049l" in terminal.shown
            assert "Traceback" not in terminal.shown
    finally:
        assert await trio.to_thread.run_sync(served.stop) == 0


async def test_top_says_why_it_ends(on_terminal) -> None:
    """A gateway that goes away while it is looked at: the terminal is given back, and one line says why."""
    served = Served("--anonymous")
    try:
        async with on_terminal("top", served.url, "--interval", "0.1", "--patience", "0.5", TERM="xterm") as terminal:
            await terminal.wait_shown("0 done, 0 failed")
            assert await trio.to_thread.run_sync(served.stop) == 0
            await terminal.wait_shown("\x1b[?1049l")
            await terminal.wait_shown("gorouter-trio: there is no connection to")
            assert await terminal.wait_ended() == 1
    finally:
        served.process.kill()
        served.process.communicate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "x"], "--listen must look like"),
        ([], "who may connect"),
        (["--anonymous", "--store", "x", "--redis", "redis://x"], "exclude each other"),
        (["--anonymous", "--cluster-url", "ws://x"], "needs --redis"),
        (["--anonymous", "--origin", "*"], "origins"),
        (["--anonymous", "--tools", "no_such_module_at_all"], "--tools"),
        (["--anonymous", "--budget-usd", "much"], "budget.usd"),
        (["--anonymous", "--session-budget-usd", "-1"], "budget.session_usd"),
        (["--anonymous", "--tls-cert", "/no/such/file"], "/no/such/file"),
        (["--principals", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_settings(inside, arguments, message) -> None:
    """One line that names what is wrong, before anything is served."""
    given = arguments if "--listen" in arguments else ["--listen", "127.0.0.1:0", *arguments]
    done = inside("serve", "--simulate", *given)
    assert done.code == 2
    assert message in done.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "not TOML"),
        ("[ada]\n", "ada"),
        ('[ada]\ntoken = "short"\n', "ada"),
        ('[ada]\ntoken = "a"\nsha256 = "b"\n', "ada"),
        ('[ada]\nsha256 = "xyz"\n', "people.toml"),
        ('[ada]\nsha256 = ""\n', "people.toml"),
        (f'[ada]\nsha256 = "{DIGEST[:40]}"\n', "ada.*64 hexadecimal digits"),
        ('[ada]\ntoken = " 0123456789abcdef"\n', "ada.*no spaces"),
        ('[ada]\ntoken = """0123456789abcdef\n"""\n', "ada.*no spaces"),
        ('[ada]\ntoken = "0123456789abcdef"\n[bob]\ntoken = "0123456789abcdef"\n', "bob: has the token of ada"),
        (f'[ada]\ntoken = "0123456789abcdef"\n[bob]\nsha256 = "{DIGEST.upper()}"\n', "bob: has the token of ada"),
        ('[ada]\ntoken = "0123456789abcdef"\nrole = "x"\n', "role"),
    ],
)
def test_bad_principals(tmp_path: Path, text: str, message: str) -> None:
    """Named with the file and the entry; no token is in the message."""
    people = tmp_path / "people.toml"
    people.write_text(text)
    with pytest.raises(CliError, match=message) as caught:
        read_principals(people)
    assert "0123456789abcdef" not in caught.value.message


def test_tools() -> None:
    """A module without tools is refused."""
    with pytest.raises(CliError, match="no tool"):
        find_tools(["json"])


def test_tools_of_this_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module beside which the command is run is found, as `batch --tools` finds it."""
    (tmp_path / "served_tools.py").write_text(
        "from gorouter_trio import tool\n\n\n@tool\nasync def add(a: int, b: int) -> int:\n"
        '    """Add."""\n    return a + b\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert [found.name for found in find_tools(["served_tools"])] == ["add"]
    assert [found.name for found in find_tools(["served_tools:add"])] == ["add"]
    (tmp_path / "more_served_tools.py").write_text("from served_tools import add\n\nplus = add\n")
    assert [found.name for found in find_tools(["served_tools", "more_served_tools"])] == ["add"]

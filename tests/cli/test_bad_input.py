"""Mistakes in how a command is called: one clear line on stderr, exit code 2, and nothing else happens."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
from pathlib import Path

import pytest

ROW = b'{"prompt": "[[say hello]]"}\n'
KEY = "sk-or-v1-0123456789abcdef-secret"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "in.jsonl"
    path.write_bytes(ROW)
    return str(path)


NO_KEY = "no API key: set OPENROUTER_API_KEY, or use --simulate to try it without one"


def test_no_key(gorouter, inside, rows: str, tmp_path: Path) -> None:
    """Without a key and without --simulate, it says which variable to set, and makes no file."""
    out = tmp_path / "out.jsonl"
    done = gorouter("batch", rows, "-o", str(out), OPENROUTER_API_KEY=" ")
    assert (done.code, done.out, done.message) == (2, "", NO_KEY)
    assert not out.exists()
    for command in (["chat", "-p", "hi"], ["models"], ["key"], ["credits"]):
        done = inside(*command)
        assert (done.code, done.out, done.message) == (2, "", NO_KEY)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "IN: No such file or directory"),
        (b"", "IN is empty"),
        (b"\n \r\n\n", "IN is empty"),
        (b"question,answer\nwhat,that\n", "IN is not JSON Lines: line 1: not JSON: invalid character (byte 0)"),
        (b'[\n{"prompt": "x"}]\n', "IN is not JSON Lines: line 1: not JSON: Input data was truncated"),
        (b'[{"prompt": "x"}]\n', "IN is not JSON Lines: line 1: not a JSON object but an array"),
        (b"\x1f\x8b\x08\x00zip", "IN: the file ends in the middle of its gzip data"),
    ],
    ids=["missing", "empty", "blank", "csv", "indented array", "array", "binary"],
)
def test_unusable_input(data: bytes | None, message: str, inside, tmp_path: Path) -> None:
    """An input that is none is told before an output is made."""
    path = tmp_path / "in.jsonl"
    if data is not None:
        path.write_bytes(data)
    done = inside("batch", str(path), "-o", str(tmp_path / "out.jsonl"), "--simulate")
    assert (done.code, done.out, done.message.replace(str(path), "IN")) == (2, "", message)
    assert not (tmp_path / "out.jsonl").exists()


def test_input_that_breaks_off(inside, tmp_path: Path, rng: random.Random) -> None:
    """One that is broken a few hundred rows on is named, as one that is broken from the start."""
    path = tmp_path / "in.jsonl.gz"
    rows = b"".join(b'{"prompt": "%x"}\n' % rng.getrandbits(256) for _ in range(400))
    path.write_bytes(gzip.compress(rows)[:-3000])
    done = inside("batch", str(path), "-o", str(tmp_path / "out.jsonl"), "--simulate")
    assert (done.code, done.message) == (2, f"{path}: the file ends in the middle of its gzip data")


def test_arguments_that_are_no_utf8(inside, rows: str, tmp_path: Path) -> None:
    """Bytes of another encoding are replaced where they are text, and kept where they name a file: no traceback."""
    out, summary = tmp_path / "\udcff.jsonl", tmp_path / "\udcff.json"
    texts = ["--template", "{{prompt}} \udcff", "--system", "\udcff", "--option", "user=\udcff"]
    done = inside("batch", rows, "-o", str(out), "--simulate", "--json", "--report", str(summary), *texts)
    assert (done.code, json.loads(done.out)["output"]) == (0, f"{tmp_path}/\ufffd.jsonl")
    assert json.loads(summary.read_bytes()) == json.loads(done.out)
    assert out.read_bytes().count(b"\n") == 1
    assert inside("chat", "-p", "hello", "--system", "\udcff", "--simulate").code == 0
    ledger = tmp_path / "\udcff.ledger"
    ledger.touch()
    assert json.loads(inside("cost", str(ledger), "--json").out)["source"] == f"{tmp_path}/\ufffd.ledger"


def test_as_processes(gorouter, tmp_path: Path) -> None:
    """Exit code and line come out of a process: a missing file, no JSON, an empty file, an unknown option."""
    csv, out = tmp_path / "in.csv", str(tmp_path / "out.jsonl")
    csv.write_bytes(b"question,answer\n")
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    cases = [
        ((str(tmp_path / "nothing"), "-o", out), "nothing: No such file or directory"),
        ((str(csv), "-o", out), "in.csv is empty"),
        ((str(empty), "-o", out), "empty.jsonl is empty"),
        ((str(csv), "-o", out, "--frobnicate"), "--frobnicate"),
    ]
    for arguments, message in cases:
        done = gorouter("batch", *arguments, "--simulate")
        assert (done.code, done.out) == (2, "")
        assert message in done.message


def test_unusable_output(inside, rows: str, tmp_path: Path) -> None:
    """A folder that is not there, a folder, the input itself by another name, and a file that exists."""
    precious = tmp_path / "precious.jsonl"
    precious.write_bytes(b"{}\n")
    link = tmp_path / "link.jsonl"
    os.symlink(rows, link)
    missing = tmp_path / "no" / "out.jsonl"
    cases = {
        str(missing): f"{missing}: No such file or directory",
        str(tmp_path): f"{tmp_path}: Is a directory",
        str(link): f"{link} is the input as well",
        str(precious): f"{precious} exists already: give another name, --resume, or --overwrite",
    }
    for output, message in cases.items():
        more = ["--overwrite"] if output == str(link) else []
        done = inside("batch", rows, "-o", output, "--simulate", *more)
        assert (done.code, done.message) == (2, message)
    assert Path(rows).read_bytes() == ROW
    assert precious.read_bytes() == b"{}\n"


def test_report_and_cache_that_are_others(inside, rows: str, tmp_path: Path) -> None:
    """A report or a cache in the place of a file of the job, by whatever name: refused before anything is touched."""
    out = tmp_path / "out.jsonl"
    (tmp_path / "hard.jsonl").hardlink_to(rows)
    (tmp_path / "soft.jsonl").symlink_to(out)
    for option, path, what in (
        ("--report", rows, "input"),
        ("--report", str(tmp_path / "hard.jsonl"), "input"),
        ("--report", str(tmp_path / "." / "x" / ".." / "out.jsonl"), "output"),
        ("--report", str(tmp_path / "soft.jsonl"), "output"),
        ("--report", f"{out}.journal", "journal"),
        ("--cache", rows, "input"),
        ("--cache", str(out), "output"),
        ("--cache", f"{out}.journal", "journal"),
    ):
        done = inside("batch", rows, "-o", str(out), option, path, "--simulate")
        assert (done.code, done.message) == (2, f"{path} is the {what} as well")
    done = inside("batch", rows, "-o", str(out), "--cache", "x.db", "--report", "x.db", "--simulate")
    assert (done.code, done.message) == (2, "x.db is the cache as well")
    missing = str(tmp_path / "no" / "report.json")
    done = inside("batch", rows, "-o", str(out), "--report", missing, "--simulate")
    assert (done.code, done.message) == (2, f"{missing}: No such file or directory")
    assert Path(rows).read_bytes() == ROW
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hard.jsonl", "in.jsonl", "soft.jsonl"]


def test_report_that_cannot_be_written(inside, rows: str, tmp_path: Path) -> None:
    """Where the report does not get written in the end, the exit code says so."""
    done = inside("batch", rows, "-o", str(tmp_path / "out.jsonl"), "--report", "/dev/full", "--simulate")
    assert done.code == 1
    assert "/dev/full: No space left on device; the report was not written" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bach"], '"bach"'),
        (["--frobnicate"], "--frobnicate"),
        (["batch", "in.jsonl", "-o", "out.jsonl", "--frobnicate"], "--frobnicate"),
        (["batch", "in.jsonl"], "--output"),
        (["batch", "-o", "out.jsonl"], "SOURCE"),
        (["batch", "in.jsonl", "-o", "out.jsonl", "--max-in-flight", "many"], '"many"'),
        (["batch", "in.jsonl", "-o", "out.jsonl", "--max-in-flight", "0"], "--max-in-flight must be at least 1, not 0"),
        (["batch", "in.jsonl", "-o", "out.jsonl", "--limit", "-3"], "--limit must be at least 1, not -3"),
        (["batch", "in.jsonl", "-o", ""], "output: is empty"),
        *(
            (["batch", "in.jsonl", "-o", "out.jsonl", "--option", f"{name}=5"], f"requests have no field {name!r}")
            for name in ("max_token", "stream", "messages", "system", "turn_id", "job", "self", "approve")
        ),
        *(
            (
                ["batch", "in.jsonl", "-o", "out.jsonl", "--tools", name],
                f"--tools must be MODULE:FUNCTION, not {name!r}",
            )
            for name in (".foo:bar", "foo..bar:x", ":x", "foo")
        ),
        *(
            (
                ["serve", "--anonymous", "--simulate", "--tools", name],
                f"--tools must be MODULE or MODULE:NAME, not {name!r}",
            )
            for name in (":x", ".foo")
        ),
        (["serve", "--anonymous", "--simulate", "--tls-key", "key.pem"], "--tls-key needs --tls-cert"),
        (["history", "list", "--store", "."], ".: is no file"),
        (["history", "list", "--store", ""], ".: is no file"),
        (["history", "import", "-", "--store", "."], ".: is no file"),
        (["demo", "--rows", "0"], "--rows must be at least 1, not 0"),
        (["chat", "-p", " ", "--simulate"], "the question is empty"),
        (["chat", "--simulate"], "the question is empty"),
        (["chat", "-p", "hi", "--session", "", "--simulate"], "session: the key must"),
        (["models", "--simulate", "--base-url", "https://example.org"], "--simulate and --base-url exclude each other"),
        (["simulate", "--listen", "8080"], "--listen must look like 127.0.0.1:8080"),
        (["simulate", "--listen", "127.0.0.1:70000"], "--listen must look like 127.0.0.1:8080"),
        (["simulate", "--listen", "127.0.0.1:" + "9" * 5_000], "--listen must look like 127.0.0.1:8080"),
        (["simulate", "--listen", "a..b:0"], "--listen: 'a..b' cannot be the name of a host"),
        (["serve", "--anonymous", "--simulate", "--listen", "x" * 64 + ":0"], "cannot be the name of a host"),
        (["simulate", "--fault", "502"], "--fault must look like 429_upstream=0.05"),
        (["simulate", "--fault", "earthquake=1"], "unknown fault 'earthquake'"),
        (["simulate", "--latency", "-1"], "latency_s must be 0 or more"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_usage(arguments: list[str], message: str, inside) -> None:
    """Wrong commands, options and values."""
    done = inside(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.message


@pytest.mark.parametrize(
    "command",
    [
        ["batch", "-o", "out.jsonl", "--simulate"],
        ["batch", "-o", "out.jsonl", "--simulate", "--dry-run"],
        ["batch", "submit", "--job", "x", "--redis", "redis://127.0.0.1:1", "--simulate"],
    ],
    ids=["run", "dry", "submit"],
)
def test_wrong_option_value(command: list[str], inside, rows: str) -> None:
    """The value of an option that cannot be is a mistake in the command, whatever it was to do."""
    done = inside(*command, rows, "--option", "temperature=hot")
    assert (done.code, done.out) == (2, "")
    assert done.message.startswith("temperature")


def test_wrong_base_url(inside) -> None:
    """A URL that is none, or that would send the key in the clear."""
    for url, message in (("ftp://x", "must look like https://"), ("http://example.org/api", "in the clear")):
        done = inside("key", "--base-url", url, OPENROUTER_API_KEY=KEY)
        assert done.code == 2
        assert message in done.message


def test_key_that_is_no_header(inside) -> None:
    """A key with a line feed in it is refused without being shown."""
    done = inside("key", OPENROUTER_API_KEY=KEY + "\nX: y")
    assert done.code == 2
    assert done.message == "api_key: must be printable ASCII text"


def test_port_in_use(gorouter) -> None:
    """The simulator says which address it cannot have."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = gorouter("simulate", "--listen", address)
    assert (done.code, done.message) == (2, f"{address}: Address already in use")


def test_closed_streams(gorouter, rows: str) -> None:
    """Without a stdin or stdout, a dash cannot stand for it."""
    import subprocess
    import sys

    from_stdin = [sys.executable, "-m", "gorouter_trio", "batch", "-", "-o", "/dev/null", "--simulate"]
    of_stdin = [sys.executable, "-m", "gorouter_trio", "cost", "-"]
    to_stdout = [sys.executable, "-m", "gorouter_trio", "batch", rows, "-o", "-", "--simulate"]
    for command, closed in ((from_stdin, "<&-"), (of_stdin, "<&-"), (to_stdout, ">&-")):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *command], stderr=subprocess.PIPE, check=False, timeout=50
        )
        assert done.returncode == 2
        assert done.stderr in (
            b"gorouter-trio: standard input is closed\n",
            b"gorouter-trio: standard output is closed\n",
        )


def test_refused_connection(gorouter) -> None:
    """Nobody listens: one line, exit code 1."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api/v1"
    done = gorouter("credits", "--base-url", url, OPENROUTER_API_KEY=KEY)
    assert done.code == 1
    assert "refused" in done.message
    assert KEY not in done.err


def test_wrong_key(gorouter, simulator) -> None:
    """401: one line, exit code 1, and the key is not in it."""
    done = gorouter("chat", "-p", "hi", "--base-url", simulator().base_url, OPENROUTER_API_KEY="not-" + KEY)
    assert (done.code, done.message) == (1, "401: User not found.")

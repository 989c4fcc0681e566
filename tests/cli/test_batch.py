"""`gorouter-trio batch`, as a process."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "gorouter_trio"]
SIMULATE = ("--simulate", "--seed", "1")


def write_rows(path: Path, count: int, prompt: str = "What is {n} plus 3?") -> str:
    path.write_text("".join(json.dumps({"question": prompt.format(n=n), "answer": "?"}) + "\n" for n in range(count)))
    return str(path)


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_many_rows(gorouter, tmp_path: Path, record_property) -> None:
    """1,319 rows at 256 in flight: each id once, all answered, in well under 30 s."""
    out = tmp_path / "out.jsonl"
    source = write_rows(tmp_path / "in.jsonl", 1_319, "[[say the answer to {n}]]")
    done = gorouter("batch", source, "-o", str(out), "--max-in-flight", "256", "--json", *SIMULATE)
    assert done.code == 0, done.err
    rows = read_rows(out)
    assert Counter(row["custom_id"] for row in rows) == Counter(f"row-{n}" for n in range(1, 1_320))
    by_id = {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in rows}
    assert by_id == {f"row-{n + 1}": f"the answer to {n}" for n in range(1_319)}
    summary = json.loads(done.out)
    assert (summary["rows"], summary["succeeded"], summary["failed"]) == (1_319, 1_319, 0)
    assert 100 < summary["connections"] <= 256
    assert summary["cost_usd"] == pytest.approx(sum(row["response"]["body"]["usage"]["cost"] for row in rows))
    assert summary["duration_s"] < 20
    record_property("figure", f"1,319 rows in {summary['duration_s']:.1f} s, {summary['rows_per_s']:.0f} rows/s")


def test_broken_rows(inside, tmp_path: Path) -> None:
    """Lines that cannot be used become error rows that name the line and the reason; the rest runs; exit code 1."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'\xef\xbb\xbf{"prompt": "[[say one]]", "id": "a"}\r\n'
        b"\n"
        b'{"prompt": "x", "id": "a"}\n'
        b'{"text": "x"}\n'
        b"broken\n"
        b'{"messages": [{"role": "user", "content": "[[say two]]"}], "id": 2}\n'
        b'{"custom_id": "c", "method": "POST", "url": "/v1/chat/completions",'
        b' "body": {"messages": [{"role": "user", "content": "[[say three]]"}]}}\n'
        b'{"prompt": "[[fault 400_provider]]", "id": "d"}'
    )
    done = inside("batch", str(source), "-o", str(out), *SIMULATE)
    assert done.code == 1
    rows = {row["id"]: row for row in read_rows(out)}
    answers = {
        row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"]
        for row in rows.values()
        if row["error"] is None
    }
    assert answers == {"a": "one", "2": "two", "c": "three"}
    errors = {row["error"]["line"]: row["error"]["message"] for row in rows.values() if row["error"]}
    assert errors[3] == "line 3: the id 'a' stands on line 1 already"
    assert errors[4] == "line 4: no messages, prompt or question"
    assert errors[5] == "line 5: not JSON: invalid character (byte 0)"
    assert rows["batch_req_8"]["response"]["status_code"] == 400
    assert "4 (3 × invalid_request, 1 × 400)" in done.out


def test_only_broken_rows(inside, tmp_path: Path) -> None:
    """Objects without a prompt are rows that failed, not a file that is none."""
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "x"}\n')
    done = inside("batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *SIMULATE)
    assert done.code == 1
    assert len(read_rows(tmp_path / "out.jsonl")) == 1


def test_limit_and_overwrite(inside, tmp_path: Path) -> None:
    """Only the first rows are taken; an output is replaced when that is wanted."""
    source, out = write_rows(tmp_path / "in.jsonl", 30), tmp_path / "out.jsonl"
    out.write_text("old\n" * 1_000)
    done = inside("batch", source, "-o", str(out), "--limit", "4", "--overwrite", *SIMULATE)
    assert done.code == 0
    assert {row["custom_id"] for row in read_rows(out)} == {"row-1", "row-2", "row-3", "row-4"}


def test_summary_fits_a_terminal(inside, tmp_path: Path) -> None:
    """Names and values in at most 80 columns, without control characters."""
    done = inside("batch", write_rows(tmp_path / "in.jsonl", 5), "-o", str(tmp_path / "out"), *SIMULATE)
    lines = done.out.splitlines()
    assert lines[0] == "Batch"
    assert [line.split()[0] for line in lines[1:]][:6] == ["rows", "failed", "time", "latency", "tokens", "cost"]
    assert all(len(line) <= 80 for line in lines)
    assert "\x1b" not in done.out + done.err


def test_from_stdin_to_stdout(gorouter) -> None:
    """Dashes stand for the streams; the summary goes to stderr."""
    done = gorouter("batch", "-", "-o", "-", "--json", *SIMULATE, stdin=b'{"prompt": "[[say hi]]"}\n')
    assert done.code == 0
    (row,) = map(json.loads, done.out.splitlines())
    assert row["response"]["body"]["choices"][0]["message"]["content"] == "hi"
    assert json.loads(done.err)["rows"] == 1


def test_reader_goes_away(gorouter, tmp_path: Path) -> None:
    """A closed pipe ends the batch with one line and exit code 1."""
    source = write_rows(tmp_path / "in.jsonl", 2_000)
    script = f"{{ {shlex.join(COMMAND)} batch {source} -o - --simulate; echo code $? >&2; }} | head -n 1"
    done = subprocess.run(["sh", "-c", script], capture_output=True, cwd=REPOSITORY, check=False, timeout=50)
    assert done.stderr.decode().splitlines() == ["gorouter-trio: standard output: Broken pipe", "code 1"]
    assert json.loads(done.stdout)["error"] is None


def test_full_disk(tmp_path: Path) -> None:
    """One line, exit code 1, and whole rows only."""
    source, out = write_rows(tmp_path / "in.jsonl", 300), tmp_path / "out.jsonl"
    script = f"ulimit -f 400; exec {shlex.join(COMMAND)} batch {source} -o {out} --simulate"
    done = subprocess.run(["sh", "-c", script], capture_output=True, cwd=REPOSITORY, check=False, timeout=50)
    assert done.returncode == 1
    # The journal grows too, and says of the same reason that the disk failed.
    reason = (
        done.stderr.decode()
        .removeprefix(f"gorouter-trio: {out}")
        .removeprefix(".journal: the disk failed (disk I/O error)")
    )
    assert reason.removeprefix(": File too large") == "; the rows written before are kept\n"
    assert len(read_rows(out)) < 300


async def test_interrupt(tmp_path: Path) -> None:
    """Ctrl-C twice: no more rows, what runs is cancelled, what was answered is written, a summary, exit code 130."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [f"[[say {n}]]" if n < 20 else f"[[tokens 5000]] {n}" for n in range(200)]
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    command = [*COMMAND, "batch", str(source), "-o", str(out), "--max-in-flight", "30", "--simulate", "--json"]
    shown, said = tmp_path / "stdout", tmp_path / "stderr"
    with shown.open("wb") as stdout, said.open("wb") as stderr:
        process = await trio.lowlevel.open_process(command, stdout=stdout, stderr=stderr, cwd=REPOSITORY)
    try:
        with trio.fail_after(30):
            while not out.exists() or out.read_bytes().count(b"\n") < 20:
                await trio.sleep(0.05)
            process.send_signal(signal.SIGINT)
            while "Ctrl-C again" not in said.read_text():
                await trio.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130, said.read_text()
    finally:
        process.kill()
    summary = json.loads(shown.read_text())
    assert (summary["rows"], summary["interrupted"]) == (20, True)
    # A row that was about to be sent at the first Ctrl-C is not sent at all, nor is one taken that was not yet.
    assert 20 <= summary["cancelled"] <= summary["cancelled"] + summary["released"] <= 30
    first, last = said.read_text().splitlines()
    assert first.endswith("in flight come to their end (Ctrl-C again cancels them)")
    assert last == (
        f"gorouter-trio: interrupted: {summary['cancelled']} requests in flight were cancelled and may be billed; "
        "--resume goes on"
    )
    assert {row["custom_id"] for row in read_rows(out)} == {f"row-{n}" for n in range(1, 21)}


async def test_progress_on_a_terminal(on_terminal, tmp_path: Path) -> None:
    """A bar with rows, rate, what is in flight, errors, tokens and cost; then the summary in its place."""
    source = write_rows(tmp_path / "in.jsonl", 240)
    arguments = ("batch", source, "-o", str(tmp_path / "out"), "--simulate", "--max-in-flight", "40")
    async with on_terminal(*arguments, TERM="xterm") as terminal:
        await terminal.wait_shown("/240 rows")
        facts = await terminal.wait_shown("$")
        for word in ("rows/s", "in flight", "failed", "tokens"):
            assert word in facts
        await terminal.wait_shown("Batch")
        assert await terminal.wait_ended() == 0
        assert "240" in terminal.shown


@pytest.mark.net
async def test_open_pipe() -> None:
    """A row that comes through a pipe is answered while the pipe is open."""
    command = [*COMMAND, "batch", "-", "-o", "-", *SIMULATE]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )
        with trio.fail_after(50):
            await process.stdin.send_all(b'{"prompt": "[[say now]]", "id": "first"}\n')
            line = json.loads(await process.stdout.receive_some())
            assert (line["custom_id"], line["response"]["body"]["choices"][0]["message"]["content"]) == ("first", "now")
            await process.stdin.aclose()
            assert await process.wait() == 0

"""The benchmark scripts still run, check what they claim to check, and their pages show the figures that are kept."""

from __future__ import annotations

import http.client
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"

# Those that need nothing but the package; peers join in where they are installed.
OURS = {
    "bench_chat.py": ["bare", "transport", "chat", "ask", "ask8", "httpx-ours"],
    "bench_stream.py": ["bare", "transport", "stream", "httpx-ours"],
}
PEERS = {"bench_chat.py": ["aiohttp", "openai"], "bench_stream.py": ["aiohttp"]}
# All of them, where they are installed: the longest of these takes seconds to import.
ALL_PEERS = ["aiohttp", "httpx2", "openai", "litellm", "pydantic-ai", "httpx", "sdk"]
MODULES = {"pydantic-ai": "pydantic_ai", "sdk": "openrouter"}


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The finished process of a script of benchmarks/."""
    command = [sys.executable, str(BENCHMARKS / arguments[0]), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=55)


@pytest.mark.net
@pytest.mark.parametrize("script", sorted(OURS))
def test_a_smoke_run_measures_every_contender(script: str, tmp_path: Path) -> None:
    """A quick run ends well, and its figures name every contender and setting, and no place on this machine."""
    names = OURS[script] + [name for name in PEERS[script] if importlib.util.find_spec(name)]
    written = tmp_path / "figures.json"
    done = run_script(script, "--quick", "--only", ",".join(names), "--json", str(written))
    assert done.returncode == 0, done.stderr
    report = json.loads(written.read_text("utf-8"))
    assert len(report["tables"]) == (1 if script == "bench_chat.py" else 2)
    for table in report["tables"]:
        assert [row["name"] for row in table["rows"]] == names
        for row in table["rows"]:
            assert row["requests"] >= 4
            assert 5 < row["values"][0] < 1e6
    assert set(report["versions"]) > {"gorouter-trio", "trio", "msgspec"}
    assert str(tmp_path) not in written.read_text("utf-8")
    assert "µs, median" in done.stdout


@pytest.mark.net
@pytest.mark.long
@pytest.mark.parametrize("script", sorted(OURS))
def test_a_smoke_run_of_every_peer(script: str) -> None:
    """Whatever peer is installed sends what the others send, and reads the whole reply."""
    names = [name for name in ALL_PEERS if importlib.util.find_spec(MODULES.get(name, name))]
    done = run_script(script, "--quick", "--only", ",".join(names))
    assert done.returncode == 0, done.stderr
    for name in names:
        assert f": {name} " in done.stderr


def test_the_compression_benchmark_runs() -> None:
    """A quick run prints what unpacking costs and saves, for every coding."""
    done = run_script("bench_compression.py", "--quick")
    assert done.returncode == 0, done.stderr
    for coding in ("zstd", "br", "gzip", "deflate"):
        assert coding in done.stdout


@pytest.mark.net
def test_the_gateway_benchmark_runs() -> None:
    """A quick run prints what a round trip costs beside a bare echo."""
    done = run_script("bench_gateway.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert "bare trio-websocket echo" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs sockets that keep packets apart")
def test_the_events_benchmark_runs() -> None:
    """A quick run prints the cost of an event beside that of bare httptools."""
    done = run_script("bench_events.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert "session.stream" in done.stdout


def test_the_import_benchmark_runs() -> None:
    """A quick run prints the cost of importing the package beside what it stands on."""
    done = run_script("bench_import.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert "gorouter_trio" in done.stdout


def test_the_store_benchmark_runs() -> None:
    """A quick run prints what durable appends cost, with and without groups."""
    done = run_script("bench_store.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert "SqliteStore without groups" in done.stdout


def test_the_batch_benchmark_runs() -> None:
    """A quick run prints what a row costs with its journal, and the memory of a longer job."""
    done = run_script("bench_batch.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert "a job with its journal" in done.stdout
    assert "resident memory" in done.stdout


@pytest.mark.net
def test_the_plugins_benchmark_runs() -> None:
    """A quick run measures a chat with the plugins of the package and without."""
    done = run_script("bench_plugins.py", "--quick", "--only", "chat,all,otel")
    assert done.returncode == 0, done.stderr
    assert "metrics, billing, logging" in done.stdout


@pytest.mark.net
def test_the_fronts_benchmark_runs(tmp_path: Path) -> None:
    """A quick run measures a chat and a stream on trio, on asyncio and in threads, and a peer where there is one."""
    written = tmp_path / "figures.json"
    names = ["aio", "blocking", *(["openai"] if importlib.util.find_spec("openai") else [])]
    done = run_script("bench_fronts.py", "--quick", "--only", ",".join(["chat", *names]), "--json", str(written))
    assert done.returncode == 0, done.stderr
    tables = json.loads(written.read_text("utf-8"))["tables"]
    assert [[row["name"] for row in table["rows"]] for table in tables] == [["chat", *names], ["stream", *names]]


@pytest.mark.net
def test_failures_are_told_apart(tmp_path: Path) -> None:
    """This library gives a typed error for every kind that does not take its time; the page counts those of all."""
    written = tmp_path / "failures.json"
    chosen = ["--only", "gorouter_trio", "--kinds", "HTTP,200,stream: e,closed,cut"]
    done = run_script("failure_kinds.py", *chosen, "--json", str(written))
    assert done.returncode == 0, done.stderr
    rows = json.loads(written.read_text("utf-8"))["outcomes"]["gorouter_trio"]
    assert len(rows) > 25
    assert {row["outcome"] for row in rows.values()} == {"typed error"}
    assert f"**{len(rows)} of {len(rows)}**" in done.stdout


def test_an_unknown_contender_is_refused() -> None:
    """A name that is no contender is said, with those that are."""
    done = run_script("bench_chat.py", "--quick", "--only", "curl")
    assert done.returncode == 1
    assert done.stderr.startswith("no contender 'curl'; there are bare, transport, chat")


@contextmanager
def serving() -> Iterator[int]:
    """The server of the benchmarks."""
    command = [sys.executable, str(BENCHMARKS / "_server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield int(process.stdout.readline())
        process.stdin.close()
        assert process.wait(timeout=10) == 0


def ask(port: int, method: str, path: str, *, body: bytes = b"", key: str = "sk-benchmark") -> bytes:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request(method, path, body=body, headers=headers if body else {})
    reply = connection.getresponse().read()
    connection.close()
    return reply


@pytest.mark.net
def test_the_server_notices_work_that_is_not_equal() -> None:
    """Another prompt, another field or a missing header is counted as wrong; the right request is not.

    Nor is one in which an SDK says what is the default anyway.
    """
    right = _request()
    other_prompt = right.replace(b"14 ships", b"15 ships")
    more = right.replace(b'"model"', b'"top_p":1,"model"')
    added = right.replace(b'"model"', b'"usage":{"include":true},"stream":false,"model"')
    with serving() as port:
        for body, key in (
            (right, "sk-benchmark"),
            (other_prompt, "sk-benchmark"),
            (more, "sk-benchmark"),
            (right, "sk-x"),
            (added, "sk-benchmark"),
        ):
            reply = json.loads(ask(port, "POST", "/api/v1/chat/completions", body=body, key=key))
            assert reply["choices"][0]["finish_reason"] == "stop"
        facts = json.loads(ask(port, "GET", "/stats"))
        assert (facts["requests"], facts["wrong"]) == (5, 3)
        assert json.loads(ask(port, "GET", "/stats"))["requests"] == 0


@pytest.mark.net
def test_the_streamed_reply_is_what_the_api_sends() -> None:
    """200 pieces of text, a first empty one, the finish twice, the usage, and the end; whole JSON in each event."""
    with serving() as port:
        body = _request()[:-1] + b',"stream":true}'
        events = ask(port, "POST", "/api/v1/chat/completions", body=body).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
    assert len(chunks) == 203
    assert sum(bool(chunk["choices"][0]["delta"]["content"]) for chunk in chunks) == 200
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-3:]] == [None, "stop", "stop"]
    assert chunks[-1]["usage"]["completion_tokens"] == 200


def _request() -> bytes:
    """The request that every contender sends."""
    code = "import json, _wire; print(json.dumps(_wire.request(streaming=False)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=BENCHMARKS)
    return done.stdout.strip()


def test_the_pages_show_the_figures_that_are_kept() -> None:
    """benchmarks/README.md and README.md were written from benchmarks/results/, and no page names a place."""
    done = run_script("report.py", "--check")
    assert (done.returncode, done.stdout) == (0, "")
    for path in [*BENCHMARKS.glob("results/*.json"), BENCHMARKS / "README.md"]:
        text = path.read_text("utf-8")
        assert not {place for place in (REPOSITORY, Path.home()) if len(place.parts) > 1 and str(place) in text}

"""The `history` commands: on stores that sessions have written, on exports, and on what GoRouter Kit has left."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from worlds import open_world, there

from gorouter_trio.abc import StoredHistory
from gorouter_trio.cli import history, history_files
from gorouter_trio.cli.plot import bar, cost_table
from gorouter_trio.cli.terminal import make_console
from gorouter_trio.stores import CostPoint, SessionKey, SqliteStore
from gorouter_trio.wire.codec import encode_json
from gorouter_trio.wire.journal import TurnAnswered, TurnStarted
from gorouter_trio.wire.responses import Usage
from gorouter_trio.wire.result import CallRecord

KIT = Path(__file__).resolve().parents[1] / "golden" / "gorouter-history"
AT_S = 1_772_900_000.0  # 2026-03-07 16:13:20 UTC


def turn(number: int, *, cost: str | None = "0.25", model: str = "a/b", says: str = "Yes.") -> list[bytes]:
    """An answered turn, an hour after the one before."""
    at_s = AT_S + 3600 * number
    usage = Usage(prompt_tokens=10, completion_tokens=2, total_tokens=12, cost=None if cost is None else Decimal(cost))
    call = CallRecord(model=model, finish_reason="stop", usage=usage, finished_at_s=at_s + 1, duration_s=1.0)
    asked = msgspec.Raw(encode_json([{"role": "user", "content": f"question {number}"}]))
    answer = msgspec.Raw(encode_json({"role": "assistant", "content": says}))
    return [encode_json(TurnStarted(f"t{number}", asked, at_s)), encode_json(TurnAnswered(f"t{number}", answer, call))]


def fill(path: Path, sessions: dict[str, list[bytes]]) -> None:
    """A store with these sessions, each changed a minute after the one before."""

    async def write() -> None:
        clock = iter(range(10_000))
        async with SqliteStore(path, wall=lambda: AT_S + 60 * next(clock)) as store:
            for key, entries in sessions.items():
                await store.append(key, entries, expected_version=0)

    trio.run(write)


def read(path: Path) -> dict[str, tuple[bytes, ...]]:
    """What a store holds."""

    async def load() -> dict[str, tuple[bytes, ...]]:
        async with SqliteStore(path) as store:
            return {key: tuple((await store.load(key)).entries) for key in await store.list_keys()}

    return trio.run(load)


@pytest.fixture
def bot(tmp_path: Path) -> str:
    """A store with three sessions."""
    path = tmp_path / "bot.db"
    acme = str(SessionKey(tenant="acme", principal="bob", id="1"))
    fill(path, {"user:1": turn(0) + turn(1, cost=None), "user:2": turn(2, cost="1.5", model="c/d"), acme: turn(30)})
    return str(path)


def test_list(inside, bot) -> None:
    """The last changed first, at most so many, by prefix and by owner, as a table or as JSON."""
    done = inside("history", "list", "--store", bot)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()] == [
        *("session", "tenant:acme/principal:bob/1", "user:2", "user:1")
    ]
    assert "2026-03-07 16:15" in done.out
    done = inside("history", "list", "--store", bot, "--limit", "1", "--json")
    assert [session["key"] for session in json.loads(done.out)] == ["tenant:acme/principal:bob/1"]
    done = inside("history", "list", "--store", bot, "--limit", "1")
    assert "2 more" in done.err
    done = inside("history", "list", "--store", bot, "--sort", "key", "--limit", "0", "--json")
    assert [session["key"] for session in json.loads(done.out)][1:] == ["user:1", "user:2"]
    for options, keys in (
        (["--prefix", "user:"], ["user:2", "user:1"]),
        (["--tenant", "acme"], ["tenant:acme/principal:bob/1"]),
        (["--tenant", "acme", "--principal", "bob"], ["tenant:acme/principal:bob/1"]),
    ):
        done = inside("history", "list", "--store", bot, "--json", *options)
        assert [session["key"] for session in json.loads(done.out)] == keys
    done = inside("history", "list", "--store", bot, "--tenant", "nobody")
    assert (done.code, done.message) == (1, "no session has such a key")


def test_list_marks_what_would_steer_the_terminal(inside, tmp_path) -> None:
    """A key with control characters is shown with marks."""
    fill(tmp_path / "h.db", {"a\x1b[2Jb\nc": []})
    done = inside("history", "list", "--store", str(tmp_path / "h.db"))
    assert "\x1b" not in done.out
    assert r"a\x1b[2Jb\nc" in done.out


def test_show(inside, bot) -> None:
    """What was said, with a line a call; the last messages only; as JSON."""
    done = inside("history", "show", "user:1", "--store", bot)
    assert done.code == 0, done.err
    assert done.out == (
        "user\nquestion 0\n\nassistant\nYes.\n2026-03-07 16:13, a/b, 10 + 2 tokens, $0.25, 1.0 s\n\n"
        "user\nquestion 1\n\nassistant\nYes.\n2026-03-07 17:13, a/b, 10 + 2 tokens, cost unknown, 1.0 s\n"
    )
    done = inside("history", "show", "user:1", "--store", bot, "--last", "1", "--json")
    (entry,) = json.loads(done.out)
    assert (entry["message"]["content"], entry["call"]["model"]) == ("Yes.", "a/b")
    done = inside("history", "show", "nobody", "--store", bot)
    assert (done.code, done.message) == (1, "there is no session 'nobody'")


def test_show_of_every_kind_of_message(inside, tmp_path) -> None:
    """Calls, results, parts, refusals and reasoning are shown; controls are not; what cannot be read is counted."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    answers = [
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]},
        {"role": "assistant", "content": "red\x1b[31m", "refusal": "no"},
    ]
    asked = [
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "u"}}],
            }
        ],
        [{"role": "tool", "tool_call_id": "c", "content": "result"}],
    ]
    log = [b"torn"]
    for number, (messages, answer) in enumerate(zip(asked, answers, strict=True)):
        log.append(encode_json(TurnStarted(str(number), msgspec.Raw(encode_json(messages)), 1.0)))
        log.append(encode_json(TurnAnswered(str(number), msgspec.Raw(encode_json(answer)), CallRecord(attempts=0))))
    fill(tmp_path / "h.db", {"k": log})
    done = inside("history", "show", "k", "--store", str(tmp_path / "h.db"))
    assert done.code == 1
    assert done.message == "1 stored entries cannot be read by this version"
    assert done.out == (
        'user\nsee\n[image_url]\n\nassistant\nhm\ncalls f({"x":1})\n\ntool\nresult\n\nassistant\nred[31m\nrefused: no\n'
    )


def test_stats(inside, bot) -> None:
    """Sums, models, and a bar for each stretch of time, with unknown costs called so."""
    done = inside("history", "stats", "--store", bot)
    assert done.code == 0, done.err
    assert "cost      $2.00 and 1 calls of unknown cost" in done.out
    assert re.search(r"^c/d +1 +10 +2 +\$1\.50$", done.out, re.MULTILINE)
    bars = [line for line in done.out.splitlines() if "█" in line]
    assert bars[1].startswith("2026-03-07 18:00  ████████████████████████████████  ")
    assert max(map(len, done.out.splitlines())) <= 80
    done = inside("history", "stats", "user:1", "--store", bot, "--json", "--bucket", "day")
    found = json.loads(done.out)
    assert (found["statistics"]["calls"], found["statistics"]["cost_usd"], found["bucket"]) == (2, 0.25, "day")
    assert [point["unpriced"] for point in found["over_time"]] == [1]


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        (["--model", "c/d"], 1),
        (["--model", "c/d", "--model", "a/b"], 4),
        (["--role", "user"], 0),
        (["--finish-reason", "length"], 0),
        (["--min-cost", "0.5"], 1),
        (["--since", "2026-03-08"], 1),
        (["--until", "2026-03-07T18:00"], 2),
        (["--since", "2026-03-07T17:30:00+01:00", "--until", "2026-03-08T00:00Z"], 2),
        (["--since", "1d"], 0),
        (["--tenant", "acme"], 1),
        (["--prefix", "user:"], 3),
    ],
)
def test_stats_filters(inside, bot, options, calls) -> None:
    """Each filter counts what it names."""
    done = inside("history", "stats", "--store", bot, "--json", *options)
    assert json.loads(done.out)["statistics"]["calls"] == calls


def test_the_stats_of_the_docs(inside, tmp_path) -> None:
    """The command of docs/stores.md finds what a client asked the model for; a name without the date is told that."""

    async def converse() -> list[bytes]:
        async with open_world(model="openai/gpt-4o-mini") as world:
            for number in range(3):
                await world.client.session("user:42").ask(f"{number}?")
            return list((await world.client.store.load("user:42")).entries)

    path = tmp_path / "bot.db"
    fill(path, {"user:42": trio.run(converse, clock=trio.testing.MockClock(autojump_threshold=0))})
    page = (KIT.parents[2] / "docs" / "stores.md").read_text("utf-8")
    dated = there(re.search(r"^gorouter-trio history stats .*--model (\S+)$", page, re.MULTILINE)).group(1)
    done = inside("history", "stats", "--store", str(path), "--json", "--model", dated)
    assert (json.loads(done.out)["statistics"]["calls"], done.err) == (3, "")
    done = inside("history", "stats", "--store", str(path), "--json", "--model", "openai/gpt-4o-mini")
    assert json.loads(done.out)["statistics"]["calls"] == 0
    assert done.message == f"no call was answered by 'openai/gpt-4o-mini', but by {dated}"


def test_stats_of_models_that_are_not_there(inside, bot) -> None:
    """Each is told with the names that there are; one that other filters leave out is none of them."""
    done = inside(
        "history", "stats", "--store", bot, "--model", "c", "--model", "e/f", "--model", "a/b", "--since", "1d"
    )
    assert done.code == 0
    lines = ["no call was answered by 'c', but by c/d", "no call was answered by 'e/f', but by c/d, a/b"]
    assert done.err.splitlines() == [f"gorouter-trio: {line}" for line in lines]


def test_statistics_of_an_owner(inside, bot) -> None:
    """Sessions without an owner whose keys begin as those of the tenant are nobody's."""
    lookalike = "tenant:acme/x"
    assert SessionKey.parse(lookalike).tenant != "acme"
    fill(Path(bot), {lookalike: turn(5, cost="7", model="e/f")})
    for options in (["--tenant", "acme"], ["--tenant", "acme", "--principal", "bob"]):
        found = json.loads(inside("history", "stats", "--store", bot, "--json", *options).out)
        assert (found["statistics"]["calls"], list(found["statistics"]["by_model"])) == (1, ["a/b"])
        assert sum(point["calls"] for point in found["over_time"]) == 1
    found = json.loads(inside("history", "stats", "--store", bot, "--json", "--prefix", "tenant:acme").out)
    assert found["statistics"]["calls"] == 2


def test_export_in_another_encoding(gorouter, tmp_path) -> None:
    """What goes to standard output is what is stored, whatever the terminal can show."""
    fill(tmp_path / "bot.db", {"k": turn(1, says="Été ☃")})
    done = gorouter("history", "export", "--store", str(tmp_path / "bot.db"), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.code, "Été ☃" in done.out) == (0, True)


def test_export_and_import(inside, bot, tmp_path) -> None:
    """What was exported comes in byte for byte, once; what differs is left alone unless it may be replaced."""
    out, copy = tmp_path / "out.jsonl", str(tmp_path / "copy.db")
    done = inside("history", "export", "--store", bot, "-o", str(out))
    assert (done.code, done.err) == (0, f"3 sessions written to {out}\n")
    assert out.stat().st_mode & 0o777 == 0o600
    done = inside("history", "import", str(out), "--store", copy)
    assert done.code == 0, done.err
    assert read(Path(copy)) == read(Path(bot))
    done = inside("history", "import", str(out), "--store", copy, "--json")
    assert json.loads(done.out)["unchanged"] == 3
    fill(tmp_path / "other.db", {"user:1": turn(9)})
    done = inside("history", "import", str(out), "--store", str(tmp_path / "other.db"))
    assert done.code == 1
    assert "line 2: session 'user:1' is there already and differs" in done.message
    done = inside("history", "import", str(out), "--store", str(tmp_path / "other.db"), "--replace")
    assert done.code == 0
    assert read(tmp_path / "other.db") == read(Path(bot))
    done = inside("history", "export", "--store", bot, "-o", str(out))
    assert (done.code, done.message) == (2, f"{out}: exists already; --overwrite replaces it")
    done = inside("history", "export", "user:1", "--store", bot, "-o", str(out), "--overwrite")
    assert out.read_bytes().count(b"\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_export_while_sessions_go(inside, tmp_path, monkeypatch) -> None:
    """A session that its owner deletes meanwhile is left out."""
    store, load = tmp_path / "bot.db", SqliteStore.load

    async def load_last(self: SqliteStore, key: str) -> StoredHistory:
        found = await load(self, key)
        if key in {"a", "z"}:
            await self.delete(key)
        return found

    fill(store, {"a": turn(0), "ab": turn(1), "z": turn(2)})
    monkeypatch.setattr(SqliteStore, "load", load_last)
    done = inside("history", "export", "--store", str(store))
    assert (done.code, [json.loads(line)["key"] for line in done.out.splitlines()]) == (0, ["ab"])


def test_export_onto_a_full_disk(inside, bot, tmp_path, monkeypatch) -> None:
    """It is one line, and nothing is left of what was begun, neither in the place of the file nor beside it."""

    class Full(io.FileIO):
        def write(self, _data: object) -> int:
            raise OSError(28, os.strerror(28))

    def open_part(path: Path) -> io.BufferedWriter:
        return io.BufferedWriter(Full(path.with_name(".part"), "w"))

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(history_files, "_open_part", open_part)
    done = inside("history", "export", "--store", bot, "-o", str(tmp_path / "out.jsonl"))
    assert (done.code, done.message) == (1, f"{tmp_path / 'out.jsonl'}: No space left on device")
    assert sorted(tmp_path.iterdir()) == before


def test_export_onto_other_files(inside, bot, tmp_path) -> None:
    """The store is never the output, a link is kept and a pipe written to."""
    before = Path(bot).read_bytes()
    (tmp_path / "hard").hardlink_to(bot)
    (tmp_path / "soft").symlink_to(bot)
    for output in (bot, str(tmp_path / "hard"), str(tmp_path / "soft"), f"{bot}-wal"):
        done = inside("history", "export", "--store", bot, "-o", output, "--overwrite")
        assert (done.code, done.message) == (2, f"{output}: is a file of the store itself")
    assert Path(bot).read_bytes() == before
    link, out, pipe = tmp_path / "link", tmp_path / "out.jsonl", tmp_path / "pipe"
    link.symlink_to(out)
    assert inside("history", "export", "--store", bot, "-o", str(link)).code == 0
    assert link.is_symlink()
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as threads:
        read_pipe = threads.submit(pipe.read_bytes)
        assert inside("history", "export", "--store", bot, "-o", str(pipe)).code == 0
        assert read_pipe.result(timeout=40) == out.read_bytes()
    assert pipe.is_fifo()


def test_export_to_a_pipe_and_back(inside, bot, tmp_path) -> None:
    """Standard output and standard input; a torn line is named and the others come in."""
    done = inside("history", "export", "--store", bot)
    lines = done.out.encode()
    done = inside("history", "import", "-", "--store", str(tmp_path / "copy.db"), "--prefix", "old/", stdin=lines[:-20])
    assert done.code == 1
    assert done.message.startswith("-: line 3: not a JSON object")
    assert list(read(tmp_path / "copy.db")) == ["old/tenant:acme/principal:bob/1", "old/user:1"]


def test_import_of_gorouter_kit(inside, tmp_path) -> None:
    """Entries and bare messages come in; what a crash cut off is put aside and named; nothing is left out silently."""
    source = tmp_path / ".gorouter-history"
    shutil.copytree(KIT, source)
    (source / "notes.txt").write_text("mine")
    (source / "link.json").symlink_to(source / "cleared.json")
    (source / "folder.json").mkdir()
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    store = tmp_path / "bot.db"
    done = inside("history", "import", str(source), "--store", str(store), "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert (found["imported"], found["unchanged"], found["replaced"]) == (4, 0, 0)
    aside = tmp_path / "bot.db.quarantine"
    assert sorted(Path(name).name for name in found["quarantined"]) == ["____.json", "torn.json"]
    assert sorted(path.name for path in aside.iterdir()) == ["____.json", "torn.json"]
    assert (aside / "torn.json").read_bytes() == (KIT / "torn.json").read_bytes()
    assert aside.stat().st_mode & 0o777 == 0o700
    named = "\n".join(found["problems"] + found["notes"])
    for text in (
        "____.json: the file is empty",
        "torn.json: not JSON",
        "folder.json: ",
        "link.json: ",
        "notes.txt: is no .json file",
        "user_42.json: its session is 'user_42' here; an underscore may have been another character",
        "legacy-bot.json: item 2 was never answered",
        "orphaned.json: item 1 answers no open call",
        "orphaned.json: left out of item 2: its audio",
    ):
        assert text in named
    assert len(done.err.splitlines()) == len(found["problems"] + found["notes"])
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == before
    shown = inside("history", "show", "user_42", "--store", str(store)).out
    assert "Oslo -3, Rome 17." in shown
    assert 'calls weather({"city":"Rome"})' in shown
    stats = json.loads(inside("history", "stats", "--store", str(store), "--json").out)["statistics"]
    assert (stats["calls"], stats["cost_usd"], stats["unpriced"]) == (2, 0.000123, 1)
    again = inside("history", "import", str(source), "--store", str(store), "--json")
    assert json.loads(again.out)["unchanged"] == 4
    assert sorted(path.name for path in aside.iterdir()) == ["____.json", "torn.json"]


def test_erasing_nothing(inside, tmp_path) -> None:
    """Erasing what is not there takes no other session along, whatever that is called."""
    store = tmp_path / "bot.db"
    fill(store, {"erased": turn(0)})
    for named in (["gone"], ["--tenant", "gone"]):
        done = inside("history", "delete", *named, "--store", str(store), "--yes", "--erase")
        assert (done.code, list(read(store))) == (1, ["erased"])


def test_delete(inside, bot) -> None:
    """Nothing is deleted unasked; erased sessions leave no trace in any file."""
    done = inside("history", "delete", "user:1", "--store", bot)
    assert (done.code, done.message) == (2, "nobody is there to ask: confirm with --yes")
    done = inside("history", "delete", "user:1", "--store", bot, "--yes")
    assert (done.code, done.err) == (0, "1 sessions deleted\n")
    assert list(read(Path(bot))) == ["tenant:acme/principal:bob/1", "user:2"]
    done = inside("history", "delete", "--tenant", "acme", "--store", bot, "--yes", "--erase", "--json")
    assert json.loads(done.out) == {"sessions": 1, "erased": True}
    for named in (["--tenant", "acme"], ["gone", "gone as well"]):
        again = inside("history", "delete", *named, "--store", bot, "--yes", "--erase")
        assert again.code == 1
        assert "no session has such a key; what was deleted before is erased" in again.err
    for path in Path(bot).parent.iterdir():
        assert b"acme" not in path.read_bytes()
        assert b"question 30" not in path.read_bytes()
    done = inside("history", "delete", "--all", "--store", bot, "--yes")
    assert read(Path(bot)) == {}


@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("n\n", 1), ("", 1)])
def test_delete_asks(inside, tmp_path, monkeypatch, answer, left) -> None:
    """A person is asked, and anything but a yes deletes nothing."""
    fill(tmp_path / "h.db", {"k": []})
    monkeypatch.setattr(history, "is_interactive", lambda: True)
    done = inside("history", "delete", "k", "--store", str(tmp_path / "h.db"), stdin=answer.encode())
    assert "Delete session k? [y/N]" in done.err
    assert done.code == (1 if left else 0)
    assert len(read(tmp_path / "h.db")) == left


BAD = [
    ["list"],
    ["list", "--limit", "-1"],
    ["list", "--prefix", "a", "--tenant", "b"],
    ["show", "k", "--last", "0"],
    ["show"],
    ["stats", "k", "--prefix", "a"],
    ["stats", "--since", "yesterday"],
    ["stats", "--since", "2026-03-08", "--until", "2026-03-07"],
    ["stats", "--min-cost", "much"],
    ["stats", "--min-cost", "NaN"],
    ["stats", "--bucket", "week"],
    ["export", "k", "--prefix", "a"],
    ["delete"],
    ["delete", "--yes"],
    ["delete", "k", "--all"],
    ["wipe"],
]


@pytest.mark.parametrize("digits", [400, 5_000])
def test_too_long_ago(inside, bot, digits) -> None:
    """A time that no clock can tell is a mistake like others."""
    done = inside("history", "stats", "--store", bot, "--since", f"{'9' * digits}d")
    assert done.code == 2
    assert done.message.startswith("--since must look like")


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_mistakes(inside, bot, arguments) -> None:
    """One line that names the mistake, exit code 2, and the store as it was."""
    before = read(Path(bot))
    store = [] if arguments == ["list"] else ["--store", bot]
    done = inside("history", *arguments, *store)
    assert (done.code, done.out) == (2, "")
    assert done.message
    assert read(Path(bot)) == before


@pytest.mark.parametrize("command", ["list", "stats", "export", "delete"])
def test_stores_that_cannot_be_read(inside, tmp_path, command) -> None:
    """A missing file is named and not made; a file of something else is left as it is."""
    more = ["--all", "--yes"] if command == "delete" else []
    path = tmp_path / "h.db"
    done = inside("history", command, *more, "--store", str(path))
    assert (done.code, done.message) == (2, f"{path}: there is no such file")
    assert not path.exists()
    path.write_text("These are my notes, not a database.\n" * 100)
    done = inside("history", command, *more, "--store", str(path))
    assert done.code == 1
    assert "no SQLite database" in done.message
    assert path.read_text().startswith("These are my notes")


def test_import_of_what_is_not_there(inside, tmp_path) -> None:
    """A source that cannot be read is named."""
    done = inside("history", "import", str(tmp_path / "none.jsonl"), "--store", str(tmp_path / "h.db"))
    assert (done.code, done.message) == (1, f"{tmp_path}/none.jsonl: No such file or directory")


def test_an_output_that_cannot_be_written(inside, bot, tmp_path) -> None:
    """A directory that is not there is named."""
    done = inside("history", "export", "--store", bot, "-o", str(tmp_path / "no" / "out"))
    assert done.code == 1
    assert "No such file" in done.message


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_as_a_process(gorouter, bot) -> None:
    """The commands run as a program, and end with one line when nobody takes what they print."""
    done = gorouter("history", "stats", "--store", bot)
    assert done.code == 0, done.err
    assert "Cost over time" in done.out


def test_bars() -> None:
    """Whole, in eighths, and never empty for something."""
    assert bar(1.0, 4) == "████"
    assert bar(0.5, 4) == "██"
    assert bar(0.03, 4) == "▏"
    assert bar(0.0001, 4) == "▏"
    assert bar(0.0, 4) == ""


def test_a_long_time_has_few_rows() -> None:
    """Empty stretches are shown, and neighbours stand together where there are many; the sums stay."""
    console = make_console()
    points = [CostPoint(at_s=86_400.0 * day, calls=1, cost_usd=Decimal(1)) for day in (1, 2, 300)]
    with console.capture() as capture:
        console.print(cost_table([CostPoint(at_s=0.0, calls=7, unpriced=7), *points], "day"))
    lines = capture.get().splitlines()
    assert len(lines) == 27
    assert sum(int(line.split()[-1]) for line in lines[2:] if line.split()[-1].isdigit()) == 10
    assert lines[-1].split() == ["unknown", "unknown", "7"]

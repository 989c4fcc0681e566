"""`gorouter-trio batch` as a job: formats, templates, going on, estimates, reports, and jobs that machines share."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis_server import fresh_prefix, shared_redis

from gorouter_trio.batch.cluster import ClusterJob
from gorouter_trio.cli.batch_options import BatchChoices
from gorouter_trio.cli.cluster import _keywords_of, _turn_of

SIMULATE = ("--simulate", "--seed", "1", "--max-in-flight", "8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path: Path) -> list[str]:
    return [row["response"]["body"]["choices"][0]["message"]["content"] for row in read_rows(path)]


def test_csv_with_a_template(inside, tmp_path: Path) -> None:
    """Columns go into the messages, lines come in order, and the report is a file as well."""
    (tmp_path / "in.csv").write_text("id,word\na,one\na,two\nb,\n")
    # With a byte order mark, as some editors write one.
    template = '[{"role": "user", "content": "[[say {{word}}]]"}]'
    (tmp_path / "template.txt").write_text(template, encoding="utf-8-sig")
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    arguments = ["--template", f"@{tmp_path / 'template.txt'}", "--ordered", "--suffix-duplicates"]
    more = ["--option", "temperature=0", "--report", str(report), "--json"]
    done = inside("batch", str(tmp_path / "in.csv"), "-o", str(out), *arguments, *more, *SIMULATE)
    assert done.code == 1
    rows = read_rows(out)
    assert [row["custom_id"] for row in rows] == ["a", "a-2", "b"]
    assert [row["error"] and row["error"]["type"] for row in rows] == [None, None, "BadRequestError"]
    summary = json.loads(done.out)
    assert json.loads(report.read_text()) == summary
    assert (summary["rows"], summary["failed"], summary["stopped"]) == (3, 1, None)
    assert summary["estimate"]["sampled_rows"] == 3


def test_resume_and_overwrite(inside, tmp_path: Path) -> None:
    """A part of the rows, then the rest; other settings are refused; again there is nothing to do."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"[[say {n}]]"}) + "\n" for n in range(10)))
    run = ("batch", str(source), "-o", str(out), *SIMULATE)
    assert inside(*run, "--resume", "--limit", "4").code == 0
    assert len(read_rows(out)) == 4
    assert "give another name, --resume, or --overwrite" in inside(*run).message
    refused = inside(*run, "--resume", "--option", "temperature=1")
    assert (refused.code, "temperature was None and is 1 now" in refused.message) == (2, True)
    done = inside(*run, "--resume", "--json")
    summary = json.loads(done.out)
    assert (summary["rows"], summary["resumed_rows"], summary["resent_rows"]) == (10, 4, 0)
    assert sorted(texts(out)) == sorted(map(str, range(10)))
    assert "10, 10 of them before" in inside(*run, "--resume").out


def test_dry_run(inside, tmp_path: Path) -> None:
    """It says what the job will come to, and neither sends nor writes."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(50)))
    run = ("batch", str(source), "-o", str(tmp_path / "out"), "--dry-run", *SIMULATE)
    done = inside(*run, "--option", "max_tokens=100")
    assert done.code == 0
    assert "about 50, by 50 of them" in done.out
    assert "$" in done.out
    assert json.loads(inside(*run, "--json").out)["rows"] == 50
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_budget(inside, tmp_path: Path) -> None:
    """It stops with what is left, exit code 1, and says how to go on."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"[[tokens 40]] {n}"}) + "\n" for n in range(60)))
    run = ("batch", str(source), "-o", str(tmp_path / "out"), *SIMULATE, "--option", "max_tokens=50", "--json")
    done = inside(*run, "--budget-usd", "0.0006")
    summary = json.loads(done.out)
    assert done.code == 1
    assert done.message == "the budget does not cover another row; --resume goes on"
    assert 0 < summary["rows"] < 60
    assert summary["cost_usd"] <= summary["budget_usd"] == 0.0006


def test_cache_and_batch_api(inside, tmp_path: Path) -> None:
    """Answers come from a file the second time; rows go by the Batch API when they are told to."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "[[say a]]"}\n{"prompt": "[[say b]]"}\n')
    cached = ("batch", str(source), "-o", str(tmp_path / "a"), *SIMULATE, "--cache", str(tmp_path / "cache"), "--json")
    assert json.loads(inside(*cached).out)["cached_rows"] == 0
    assert json.loads(inside(*cached, "--overwrite").out)["cached_rows"] == 2
    assert inside("batch", str(source), "-o", str(tmp_path / "b"), *SIMULATE, "--via", "api").code == 0
    assert sorted(texts(tmp_path / "b")) == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overwrite", "--resume"], "give one of them"),
        (["--budget-usd", "much"], "--budget-usd must be an amount"),
        (["--deadline", "soon"], "--deadline must be a time"),
        (["--option", "temperature"], "--option must be NAME=VALUE"),
        (["--option", "temperature=hot"], "temperature"),
        (["--template", "no columns"], "has no {{column}}"),
        (["--template", "@missing"], "missing: No such file"),
        (["--schema", "missing.json"], "missing.json: No such file"),
        (["--tools", "nothing"], "--tools must be MODULE:FUNCTION"),
        (["--tools", "json:nothing"], "json has no function nothing"),
        (["--max-failures", "0"], "--max-failures must be at least 1"),
        (["--via", "api", "--dedup"], "asks nobody before"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, inside, tmp_path: Path) -> None:
    """Each is refused in one line, before anything is written."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    done = inside("batch", str(source), "-o", str(tmp_path / "out"), "--simulate", *arguments)
    assert done.code == 2
    assert message in done.message
    assert not (tmp_path / "out").exists()


@pytest.mark.net
def test_shared_job(inside, tmp_path: Path) -> None:
    """Submitted, worked on, looked at and collected by commands of their own."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"[[say {n}]]"}) + "\n" for n in range(20)) + "broken\n")
    place = ("--job", fresh_prefix(), "--redis", shared_redis().url)
    assert "there is no job" in inside("batch", "status", *place).err
    assert inside("batch", "submit", str(source), *place).out.startswith("21 rows of ")
    status = json.loads(inside("batch", "status", *place, "--json").out)
    assert (status["total"], status["done"], status["is_submitted"]) == (21, 0, True)
    done = inside("batch", "work", *place, "--simulate", "--max-in-flight", "4")
    assert (done.code, done.message) == (0, "21 rows finished, 1 of them failed")
    done = inside("batch", "collect", "-o", str(out), *place, "--ordered", "--delete")
    assert (done.code, done.out) == (1, f"21 rows into {out}; 21 of 21 are done\n")
    assert [row["custom_id"] for row in read_rows(out)][:20] == [f"row-{n}" for n in range(1, 21)]
    assert inside("batch", "status", *place).code == 2


@pytest.mark.net
def test_shared_job_is_kept(inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose last lines came after they were looked for is not deleted, though every row is done."""

    async def none(_job: ClusterJob, *, follow: bool) -> AsyncIterator[list[bytes]]:
        for nothing in ():
            yield nothing

    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"[[say {n}]]"}) + "\n" for n in range(3)))
    place = ("--job", fresh_prefix(), "--redis", shared_redis().url)
    assert inside("batch", "submit", str(source), *place).code == 0
    assert inside("batch", "work", *place, "--simulate").code == 0
    collect = ("batch", "collect", "-o", str(out), *place, "--no-wait", "--delete")
    with monkeypatch.context() as patch:
        patch.setattr(ClusterJob, "_lines", none)
        done = inside(*collect)
    assert done.message == f"the job is kept: {out} has the lines of 0 of its 3 rows"
    assert inside("batch", "status", *place).code == 0
    assert inside(*collect).out == f"3 rows into {out}; 3 of 3 are done\n"
    assert len(read_rows(out)) == 3
    assert inside("batch", "status", *place).code == 2


@pytest.mark.net
def test_submit_options(inside, tmp_path: Path) -> None:
    """A limit holds, an estimate hands nothing in, and options for running rows are refused before anything is."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"[[say {n}]]"}) + "\n" for n in range(7)))
    place = ("--job", fresh_prefix(), "--redis", shared_redis().url)
    submit = ("batch", "submit", str(source), *place)
    for option in (
        *(["--ordered"], ["--resume"], ["--retry-failed"], ["--overwrite"], ["--deadline", "8h"], ["--via", "api"]),
        *(["--dedup"], ["--cache", "x"], ["--max-failures", "3"], ["--report", "x"], ["--max-in-flight", "8"]),
    ):
        done = inside(*submit, *option)
        assert (done.code, done.out) == (2, "")
        assert done.message.startswith(f"{option[0]} is not for a job that is shared")
    estimate = inside(*submit, "--dry-run", "--simulate", "--json", "--limit", "5")
    assert (estimate.code, json.loads(estimate.out)["rows"]) == (0, 5)
    assert inside("batch", "status", *place).code == 2
    assert inside(*submit, "--limit", "5").out.startswith("5 rows of ")
    assert json.loads(inside("batch", "status", *place, "--json").out)["total"] == 5


TOOL = 'def add(a: int, b: int) -> int:\n    """Add two numbers."""\n    return a + b\n'


@pytest.mark.net
def test_shared_schema_and_tools(inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers check answers and ask again, and run tools, as a batch without them does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "adders.py").write_text(TOOL)
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    prompts = ["Name it [[broken x1]]", "Name it [[broken]]", 'Add [[call add {"a": 2, "b": 3}]]']
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ("--schema", "schema.json", "--tools", "adders:add")
    inside("batch", "in.jsonl", "-o", "alone.jsonl", *options, *SIMULATE, "--ordered")

    place = ("--job", fresh_prefix(), "--redis", shared_redis().url)
    assert inside("batch", "submit", "in.jsonl", *place, *options).code == 0
    assert "other settings" in inside("batch", "submit", "in.jsonl", *place).message
    assert inside("batch", "work", *place, *SIMULATE).message == "3 rows finished, 1 of them failed"
    inside("batch", "collect", "-o", "shared.jsonl", *place, "--ordered", "--delete")
    alone, shared = read_rows(tmp_path / "alone.jsonl"), read_rows(tmp_path / "shared.jsonl")
    assert [row["error"] and row["error"]["type"] for row in shared] == [None, "InvalidOutputError", None]
    assert [_without_names(row) for row in shared] == [_without_names(row) for row in alone]
    assert shared[2]["response"]["body"]["usage"]["prompt_tokens"] > 0


def _without_names(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what differs from run to run."""
    body = (row["response"] or {}).get("body") or {}
    return {
        "answer": [choice["message"] for choice in body.get("choices", ())],
        "usage": body.get("usage"),
        "error": row["error"] and {**row["error"], "generation_id": None},
    }


@pytest.mark.net
def test_tools_that_are_not_there(inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has not the tools of its job, or other ones of the same name, sends nothing and says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "changed_adders.py").write_text(TOOL)
    (tmp_path / "in.jsonl").write_text('{"prompt": "[[say x]]"}\n')
    place = ("--job", fresh_prefix(), "--redis", shared_redis().url)
    refused = inside("batch", "submit", "in.jsonl", *place, "--tools", "missing_adders:add")
    assert (refused.code, refused.message) == (2, "--tools: No module named 'missing_adders'")
    assert inside("batch", "submit", "in.jsonl", *place, "--tools", "changed_adders:add").code == 0
    (tmp_path / "changed_adders.py").write_text(TOOL.replace("b: int", "b: float"))
    monkeypatch.delitem(sys.modules, "changed_adders")
    importlib.invalidate_caches()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    changed = inside("batch", "work", *place, *SIMULATE)
    assert (changed.code, "tools: have other names or parameters here" in changed.message) == (2, True)
    (tmp_path / "changed_adders.py").unlink()
    monkeypatch.delitem(sys.modules, "changed_adders")
    importlib.invalidate_caches()
    gone = inside("batch", "work", *place, *SIMULATE)
    assert (gone.code, gone.message) == (2, "--tools: No module named 'changed_adders'")
    assert json.loads(inside("batch", "status", *place, "--json").out)["done"] == 0


@pytest.mark.net
def test_shared_budget(inside, tmp_path: Path) -> None:
    """Workers stop at the budget of the job, status and collect say why, and a larger one is for the rest."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"[[tokens 40]] {n}"}) + "\n" for n in range(60)))
    place = ("--job", fresh_prefix(), "--redis", shared_redis().url)
    submit = ("batch", "submit", str(source), *place, "--option", "max_tokens=50", "--budget-usd")
    assert inside(*submit, "0.0006").code == 0
    work = ("batch", "work", *place, *SIMULATE)
    done = inside(*work)
    assert (done.code, done.err.count("the budget does not cover another row; submit it again")) == (1, 1)
    status = json.loads(inside("batch", "status", *place, "--json").out)
    assert (status["stopped"], status["budget_usd"], status["reserved_usd"]) == ("budget", 0.0006, 0)
    assert status["undone"] == 60 - status["done"] > 0
    assert 0.0005 < status["spent_usd"] == status["cost_usd"] <= 0.0006
    assert "submit it again with a larger --budget-usd" in " ".join(inside("batch", "status", *place).out.split())
    part = inside("batch", "collect", "-o", str(out), *place)
    assert (part.code, "the budget does not cover another row" in part.err) == (1, True)
    assert inside(*submit, "1").code == 0
    assert inside(*work).code == 0
    assert inside("batch", "collect", "-o", str(out), *place, "--ordered", "--delete").code == 0
    assert [row["custom_id"] for row in read_rows(out)] == [f"row-{n}" for n in range(1, 61)]


def test_what_workers_are_told() -> None:
    """What a turn needs besides its body goes to workers as data, and tools by their names; the rest is in the rows."""
    options = {"temperature": 0, "fallbacks": ["a/b"], "response_schema": {"type": "object"}, "tools": [json.loads]}
    told = _turn_of(options, BatchChoices(tools=["json:loads"]))
    assert json.loads(json.dumps(told)) == {
        "fallbacks": ["a/b"],
        "response_schema": {"type": "object"},
        "tools": ["json:loads"],
    }
    assert _keywords_of({"turn": told}) == {name: options[name] for name in told}
    assert _keywords_of({}) == _turn_of({"temperature": 0}, BatchChoices()) == {}

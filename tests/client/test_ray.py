"""The stage for Ray Data: by itself, and in Ray where that is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gorouter_trio.errors import ConfigError, GorouterError, PoolClosedError
from gorouter_trio.ray import ChatStage

pytestmark = pytest.mark.net
REPOSITORY = Path(__file__).resolve().parents[2]
DATA = [REPOSITORY.parent / "shared" / "data" / "gsm8k-test.jsonl"]


@pytest.fixture
def base_url() -> Iterator[str]:
    with simulator() as url:
        yield url


@contextmanager
def simulator() -> Iterator[str]:
    """One in a process of its own, as it is for actors; each gives the same answers to the same questions."""
    command = [sys.executable, "-m", "gorouter_trio", "simulate", "--json", "--seed", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        yield str(json.loads(process.stdout.readline())["base_url"])
        process.terminate()


def settings(base_url: str) -> dict[str, Any]:
    return {"api_key": "sk-test", "base_url": base_url, "insecure_http": True, "template": "[[say {{word}}]]"}


def test_stage(base_url: str) -> None:
    """It adds answers, errors and rows, in the order of the batch; it is closed twice without harm."""
    stage = ChatStage(**settings(base_url), max_in_flight=4)
    made = stage({"id": ["a", "b", "c"], "word": ["one", None, "three"]})
    assert made["answer"] == ["one", None, "three"]
    assert "needs the column 'word', which is null" in str(made["error"][1])
    assert [json.loads(str(row))["custom_id"] for row in made["row"]] == ["a", "b", "c"]
    stage.close()
    stage.close()
    with pytest.raises(PoolClosedError, match="the stage is closed"):
        stage({"id": ["d"], "word": ["four"]})


class Time64:
    """A time as numpy has it in nanoseconds: only in another unit it becomes one of Python."""

    dtype = SimpleNamespace(kind="M")

    def __init__(self, unit: str = "ns") -> None:
        self._unit = unit

    def astype(self, unit: str) -> Time64:
        return Time64(unit)

    def tolist(self) -> object:
        return 1_577_840_523_000_000_000 if self._unit == "ns" else datetime(2020, 1, 1, 1, 2, 3)  # noqa: DTZ001 - as numpy


class Array:
    """An array in another one, which stays what it is when that becomes a list."""

    def __init__(self, *items: object) -> None:
        self._items = items

    def tolist(self) -> list[object]:
        return list(self._items)


def test_values_of_numpy(base_url: str) -> None:
    """What is missing is missing and not asked about, times are times, and arrays in arrays are lists."""
    stage = ChatStage(**settings(base_url))
    made = stage({"word": [float("nan"), Time64(), Array(1, Array(2.5, Time64()))]})
    stage.close()
    assert "needs the column 'word', which is null" in str(made["error"][0])
    assert made["answer"] == [None, "2020-01-01T01:02:03", '[1,[2.5,"2020-01-01T01:02:03"]]']


class Broken:
    """A plugin that cannot start."""

    name = "broken"

    async def init(self, _client: object) -> None:
        raise ValueError("no database")

    async def destroy(self) -> None:
        pass


def test_a_client_that_does_not_open() -> None:
    """Whatever keeps it from opening, the stage is not made, and the reason is told."""
    with pytest.raises(GorouterError, match="does not come up") as caught:
        ChatStage(api_key="sk-test", base_url="http://127.0.0.1:9/api/v1", insecure_http=True, plugins=[Broken()])
    causes = []
    error: BaseException | None = caught.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    assert "no database" in causes[-1]


def test_wrong_settings() -> None:
    """They are refused when the stage is made."""
    with pytest.raises(ConfigError, match="there is no such setting"):
        ChatStage(api_key="sk-test", nonsense=1)


IN_RAY = """
import json, sys
import ray
from gorouter_trio.ray import ChatStage

items, settings, size = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
if isinstance(items, str):
    items = [json.loads(line) for line in open(items)]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
dataset = ray.data.from_items(items)
stage = dataset.map_batches(ChatStage, fn_constructor_kwargs=settings, concurrency=2, batch_size=size)
print(json.dumps([row["answer"] for row in sorted(stage.take_all(), key=lambda row: row["place"])]))
ray.shutdown()
"""


def answers_in_ray(items: list[dict[str, Any]], fields: dict[str, Any], tmp_path: Path, *, size: int) -> list[str]:
    """What two actors answer; in a process of its own, since Ray warns of itself and leaves threads."""
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"place": n, **item}) + "\n" for n, item in enumerate(items)))
    done = subprocess.run(
        [sys.executable, "-c", IN_RAY, json.dumps(str(path)), json.dumps(fields), str(size)],
        capture_output=True,
        check=False,
        timeout=300,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert done.returncode == 0, done.stderr.decode()
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.timeout(300)
def test_in_ray(base_url: str, tmp_path: Path) -> None:
    """Two actors give what one stage gives."""
    pytest.importorskip("ray")
    items = [{"id": str(n), "word": f"number {n}"} for n in range(100)]
    assert answers_in_ray(items, settings(base_url), tmp_path, size=20) == [item["word"] for item in items]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_data_set_in_ray(tmp_path: Path, record_property: Any) -> None:
    """The 1,319 questions of GSM8K through two actors give the answers of one local run."""
    pytest.importorskip("ray")
    path = next((p for p in DATA if p.exists()), None)
    if path is None:
        pytest.skip("the data set is not here")
    items = [json.loads(line) for line in path.read_text().splitlines()]
    with simulator() as url:
        stage = ChatStage(**{**settings(url), "template": "{{question}}"})
        local = stage({"question": [item["question"] for item in items]})["answer"]
        stage.close()
    with simulator() as url:
        made = answers_in_ray(items, {**settings(url), "template": "{{question}}"}, tmp_path, size=128)
    assert made == list(local)
    assert None not in made
    record_property("figure", f"{len(made):,} rows through two actors, the same as by one client")

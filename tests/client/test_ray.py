"""The stage for Ray Data: by itself, and in Ray where that is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gorouter_trio.errors import ConfigError
from gorouter_trio.ray import ChatStage

pytestmark = pytest.mark.net
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def base_url() -> Iterator[str]:
    """A simulator in a process of its own, as it is for actors."""
    command = [sys.executable, "-m", "gorouter_trio", "simulate", "--json"]
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


def test_wrong_settings() -> None:
    """They are refused when the stage is made."""
    with pytest.raises(ConfigError, match="there is no such setting"):
        ChatStage(api_key="sk-test", nonsense=1)


def test_in_ray(base_url: str) -> None:
    """Two actors give what one stage gives."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        items = [{"id": str(n), "word": f"number {n}"} for n in range(200)]
        stage = {"fn_constructor_kwargs": settings(base_url), "concurrency": 2, "batch_size": 20}
        rows = ray.data.from_items(items).map_batches(ChatStage, **stage).take_all()
    finally:
        ray.shutdown()
    assert {row["id"]: row["answer"] for row in rows} == {str(n): f"number {n}" for n in range(200)}

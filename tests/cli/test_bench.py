"""`gorouter-trio bench`: what it measures, at a number in flight and at a rate, and what it says of failures."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.net


def test_streams(inside) -> None:
    """Times in order, one answer for each request, and the cost that the API has charged."""
    (found,) = json.loads(inside("bench", "--simulate", "--json", "-n", "20", "-c", "10", "--seed", "1").out)
    assert (found["asked"], found["succeeded"], found["failed"], found["errors"]) == (20, 20, 0, {})
    for name in ("ttft_s", "duration_s", "gap_s", "tokens_per_s"):
        assert 0 < found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"]
    assert found["ttft_s"]["p50"] < found["duration_s"]["p50"]
    # The simulator makes 260 tokens a second.
    assert 130 < found["tokens_per_s"]["p50"] < 520
    assert found["cost_usd"] > 0
    assert found["completion_tokens"] > 20


def test_reasoning_is_no_part_of_the_speed(inside) -> None:
    """What a model has thought before its text is not counted as made while the text came."""
    # Long enough that a busy machine, which reads much at once, does not tell in it.
    asked = ("-p", "[[tokens 140]]", "-n", "6", "-c", "6", "--seed", "1")
    (found,) = json.loads(inside("bench", "openai/o3-mini", "--simulate", "--json", *asked).out)
    assert found["completion_tokens"] > 6 * (140 + 30)
    assert 130 < found["tokens_per_s"]["p50"] < 520


def test_whole_answers_of_two_models(inside) -> None:
    """A column a model; what only streams tell is left out."""
    done = inside("bench", "openai/gpt-4o-mini", "x-ai/grok-4", "--simulate", "--whole", "-n", "4", "--warmup", "0")
    lines = done.out.splitlines()
    assert lines[0].split() == ["openai/gpt-4o-mini", "x-ai/grok-4"]
    assert lines[1].split() == ["answered", "4", "of", "4", "4", "of", "4"]
    assert "first token" not in done.out
    assert max(map(len, lines)) <= 80


def test_at_a_rate(inside) -> None:
    """Requests begin by the clock and not one after the other; the histograms add up to them all."""
    done = inside("bench", "--simulate", "-n", "30", "--rate", "60", "--warmup", "1", "--seed", "2")
    facts = {line[:20].strip(): line[20:].strip() for line in done.out.splitlines()}
    assert facts["answered"] == "30 of 30"
    assert float(facts["requests/s"]) > 10
    counts = [int(line.split()[-1]) for line in done.out.splitlines() if line.lstrip().startswith("to ")]
    assert sum(counts) == 60


def test_failures(inside) -> None:
    """A model that is not there: counted by kind, and nothing answered is a failure."""
    done = inside("bench", "no/such", "--simulate", "-n", "3", "--warmup", "0")
    assert done.code == 1
    assert "no/such: 3 failed (400: 3)" in done.message
    (found,) = json.loads(inside("bench", "no/such", "--simulate", "-n", "3", "--warmup", "0", "--json").out)
    assert (found["errors"], found["cost_usd"], found["duration_s"]["p50"]) == ({"400": 3}, None, None)


def test_some_failures(inside) -> None:
    """One of two models answers: both are shown, and the exit code says that calls failed."""
    done = inside("bench", "openai/gpt-4o-mini", "no/such", "--simulate", "-n", "2", "--warmup", "0", "--json")
    assert [found["failed"] for found in json.loads(done.out)] == [0, 2]
    assert done.code == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-n", "0"], "--requests must be from 1"),
        (["-c", "0"], "--in-flight must be from 1"),
        (["--rate", "0"], "--rate must be a number above 0"),
        (["--rate", "nan"], "--rate must be a number above 0"),
        (["--warmup", "-1"], "--warmup must be from 0"),
        (["-p", " "], "--prompt is empty"),
    ],
)
def test_bad_numbers(inside, arguments, says) -> None:
    """One line, before anything is sent."""
    done = inside("bench", "--simulate", *arguments)
    assert done.code == 2
    assert done.message.startswith(says)


async def test_ctrl_c(on_terminal) -> None:
    """A bar while it runs; what was measured by then is shown, and the exit code says that it was cut short."""
    async with on_terminal("bench", "--simulate", "-n", "100000", "--warmup", "0", TERM="xterm") as terminal:
        await terminal.wait_shown("/100,000 requests")
        await terminal.wait_shown("half within")
        await terminal.type("\x03")
        await terminal.wait_shown("answered")
        assert await terminal.wait_ended() == 130
        assert "interrupted" in terminal.shown

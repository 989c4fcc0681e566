"""Scenarios: what happens when, capacities, the forms on the wire, and settings as TOML."""

from __future__ import annotations

import json
import re
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from wire_client import WireClient, WireReply

from gorouter_trio.errors import ConfigError
from gorouter_trio.simulator import (
    Behaviour,
    Capacity,
    Latency,
    Limit,
    Phase,
    Scenario,
    SimulatedNetwork,
    Simulator,
    SimulatorConfig,
    Spread,
    Wire,
    open_simulated_network,
)
from gorouter_trio.simulator.files import load_config, parse_config, show_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

WALL = 1_795_300_010.0
MINI = "openai/gpt-4o-mini"
SONNET = "anthropic/claude-sonnet-4.5"
HEADERS = (("Authorization", "Bearer sk-or-v1-0123456789abcdef"),)
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
CALLS = 'Look. [[call tide {"port": "Aber", "day": "–"}]] [[call tide {"port": "Bude"}]]'


@asynccontextmanager
async def simulated(scenario: Scenario, **fields: Any) -> AsyncIterator[tuple[Simulator, SimulatedNetwork]]:
    """A simulator in a scenario, and the way to it."""
    simulator = Simulator(SimulatorConfig(scenario=scenario, **fields), wall=lambda: WALL)
    async with open_simulated_network(simulator) as network:
        yield simulator, network
    assert simulator.statistics().in_flight == 0


async def ask(network: SimulatedNetwork, prompt: str = "Tides?", *, model: str = MINI, **fields: Any) -> WireReply:
    """One chat request on a connection of its own."""
    client = WireClient(await network.connect("openrouter.simulated", 80))
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], **fields}
    try:
        return await client.post("/api/v1/chat/completions", body, headers=HEADERS)
    finally:
        await client.stream.aclose()


# What happens when.


async def test_an_outage_has_a_beginning_and_an_end(autojump_clock) -> None:
    """A phase is half-open, may be for some models only, and the other ones do not notice."""
    down = Phase(from_s=10, to_s=20, models=(MINI,), fault_rates={"502": 1.0})
    async with simulated(Scenario(phases=(down,))) as (_, network):
        seen = []
        for _ in range(6):
            seen.append(((await ask(network)).status, (await ask(network, model=SONNET)).status))
            await trio.sleep(5)
    assert seen == [(200, 200), (200, 200), (502, 200), (502, 200), (200, 200), (200, 200)]


async def test_a_service_can_flap(autojump_clock) -> None:
    """A repeated phase comes back with its period; a later phase decides where two overlap."""
    flaps = Phase(from_s=0, to_s=2, every_s=5, fault_rates={"503": 1.0})
    calm = Phase(from_s=10, to_s=15, fault_rates={})
    async with simulated(Scenario(phases=(flaps, calm))) as (_, network):
        seen = ""
        for _ in range(20):
            seen += "x" if (await ask(network)).status == 503 else "."
            await trio.sleep(1)
    assert seen == "xx...xx........xx..."


async def test_models_have_their_own_ways(autojump_clock) -> None:
    """What a model's own behaviour leaves open is the scenario's."""
    slow = Latency(head=Spread(median_s=3.0))
    scenario = Scenario(latency=slow, models={MINI: Behaviour(fault_rates={"529": 1.0})})
    async with simulated(scenario) as (_, network):
        begin = trio.current_time()
        assert (await ask(network)).status == 529
        assert trio.current_time() - begin == pytest.approx(3.0)
        assert (await ask(network, model=SONNET)).status == 200


async def test_latencies_are_drawn_from_their_distributions(autojump_clock) -> None:
    """Half below the median, within the cap, different from request to request, the same for the same seed."""

    async def times(seed: int) -> list[float]:
        first = Spread(median_s=2.0, spread=0.5, max_s=4.0)
        latency = Latency(head=Spread(median_s=1.0, spread=0.5, kind="uniform"), first_token=first)
        taken = []
        async with simulated(Scenario(latency=latency), seed=seed) as (_, network):
            for _ in range(80):
                begin = trio.current_time()
                await ask(network, max_tokens=1)
                taken.append(trio.current_time() - begin)
        return taken

    taken = await times(3)
    assert taken == pytest.approx(await times(3))
    assert taken != pytest.approx(await times(4))
    assert all(0.5 <= time <= 5.5 for time in taken)
    assert 25 <= sum(time < 3.0 for time in taken) <= 55
    assert len({round(time, 6) for time in taken}) > 60


async def test_the_speed_of_generation_is_a_latency_too(autojump_clock) -> None:
    """Seconds a token, drawn once a request."""
    latency = Latency(per_token=Spread(median_s=0.1))
    async with simulated(Scenario(latency=latency)) as (_, network):
        begin = trio.current_time()
        await ask(network, "[[tokens 40]]", stream=True)
        assert trio.current_time() - begin == pytest.approx(4.0)


# Capacity.


async def count_at_once(network: SimulatedNetwork, number: int) -> list[int]:
    """The statuses of so many requests that come together."""
    statuses: list[int] = []

    async def one() -> None:
        statuses.append((await ask(network)).status)

    async with trio.open_nursery() as nursery:
        for _ in range(number):
            nursery.start_soon(one)
    return statuses


async def test_capacity_changes_over_time(autojump_clock) -> None:
    """Ten, then eighty, then five at a time get through; the others are refused as the scenario says."""
    scenario = Scenario(
        latency=Latency(head=Spread(median_s=2.0)),
        capacity=Capacity(concurrent=10),
        phases=(
            Phase(from_s=60, to_s=120, capacity=Capacity(concurrent=80, refusal="503")),
            Phase(from_s=120, capacity=Capacity(concurrent=5, refusal="529")),
        ),
    )
    async with simulated(scenario) as (simulator, network):
        for concurrent, status in ((10, 429), (80, 503), (5, 529)):
            statuses = await count_at_once(network, 100)
            assert statuses.count(200) == concurrent
            assert statuses.count(status) == 100 - concurrent
            await trio.sleep_until((trio.current_time() // 60 + 1) * 60)
        assert simulator.statistics().processed == 95
        assert simulator.statistics().charged_nanousd == sum(c.nanousd for c in simulator.ledger.charges())


async def test_a_queue_is_served_in_order_and_has_an_end(autojump_clock) -> None:
    """Three at a time, four wait, the rest is refused; those that wait take their turn."""
    capacity = Capacity(concurrent=3, queue=4)
    scenario = Scenario(latency=Latency(head=Spread(median_s=1.0)), capacity=capacity)
    async with simulated(scenario) as (simulator, network):
        begin = trio.current_time()
        ends: list[tuple[int, float, int]] = []

        async def one(number: int) -> None:
            await trio.sleep(number / 1_000)
            status = (await ask(network)).status
            ends.append((number, trio.current_time() - begin, status))

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(one, number)
        assert [number for number, _, status in sorted(ends) if status == 429] == [7, 8, 9]
        served = [(number, time) for number, time, status in sorted(ends) if status == 200]
        assert [time for _, time in served] == pytest.approx([1, 1.001, 1.002, 2, 2.001, 2.002, 3])
        assert simulator.statistics().processed == 7


async def test_who_leaves_the_queue_gives_up_his_place(autojump_clock) -> None:
    """A stream that is left while it waits is not processed, costs nothing, and does not hold up the others."""
    scenario = Scenario(latency=Latency(head=Spread(median_s=5.0)), capacity=Capacity(concurrent=1, queue=9))
    async with simulated(scenario) as (simulator, network):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, network)
            await trio.sleep(1)
            with trio.move_on_after(1):
                await ask(network, stream=True)
            nursery.start_soon(ask, network)
        assert trio.current_time() == pytest.approx(10)
        counts = simulator.statistics()
        assert (counts.processed, counts.completed, counts.refused) == (2, 2, 1)
        assert [record.status for record in simulator.recent_requests()] == [499, 200, 200]
        assert simulator.held_nanousd == 0


@pytest.mark.parametrize("fields", [{}, {"fault_rates": {"503": 1.0}}], ids=["queued", "to be refused"])
async def test_the_end_of_the_simulator_is_in_the_counts(autojump_clock, fields: dict[str, Any]) -> None:
    """What waits for its place, or for its refusal, has started no generation that could have failed."""
    capacity = Capacity(concurrent=1 if fields else 0, queue=1)
    scenario = Scenario(latency=Latency(head=Spread(median_s=60.0)), capacity=capacity)
    async with simulated(scenario, **fields) as (simulator, network), trio.open_nursery() as nursery:
        nursery.start_soon(ask, network)
        await trio.sleep(1)
        assert simulator.statistics().in_flight == 1
        nursery.cancel_scope.cancel()
    counts = simulator.statistics()
    assert counts.received == counts.refused + counts.processed == 1
    assert counts.processed == counts.completed + counts.cancelled + counts.failed == 0


async def test_more_capacity_wakes_the_queue(autojump_clock) -> None:
    """Those that wait start when the phase that has room for them does, without anybody else's end."""
    scenario = Scenario(
        capacity=Capacity(concurrent=0, queue=10), phases=(Phase(from_s=30.3, capacity=Capacity(concurrent=2)),)
    )
    async with simulated(scenario) as (_, network):
        assert await count_at_once(network, 5) == [200] * 5
        assert trio.current_time() == pytest.approx(30.3, abs=1e-3)


# Forms.


def chunks(reply: WireReply) -> list[dict[str, Any]]:
    """The data events of a stream, decoded; `[DONE]` left out."""
    return [json.loads(event) for event in reply.events() if event != "[DONE]"]


def merged(events: list[dict[str, Any]]) -> tuple[str, dict[int, list[str]]]:
    """The text and the calls (id, name, arguments) of a stream, put together by the page's rules."""
    text, calls = "", {}
    for event in events:
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            for entry in choice["delta"].get("tool_calls") or ():
                call = calls.setdefault(entry["index"], ["", "", ""])
                call[0] = entry.get("id") or call[0]
                call[1] = entry["function"].get("name") or call[1]
                call[2] += entry["function"]["arguments"]
    return text, calls


FORMS = [
    Wire(),
    Wire(finish="merged"),
    Wire(finish="empty_choices"),
    Wire(finish="missing", done=False),
    Wire(done=False),
    Wire(tool_calls="in_turn", call_ids="empty"),
    Wire(tool_calls="together", call_content="empty"),
    Wire(tool_calls="whole"),
    Wire(details="null", comments_before=3, comment_every=2),
    Wire(details="absent", key_order="old", padding=4),
    Wire(cut="characters"),
    Wire(cut="newlines"),
    Wire(cut="anywhere", max_write_bytes=3),
]


@pytest.mark.parametrize("wire", FORMS, ids=range(len(FORMS)))
@pytest.mark.parametrize("model", [MINI, SONNET])
async def test_forms_change_no_content(autojump_clock, wire: Wire, model: str) -> None:
    """Text and tool calls are the same in every form, streamed and whole, to the id; so is the bill."""
    async with simulated(Scenario(wire=wire)) as (odd, network), simulated(Scenario()) as (plain, plain_network):
        for fields in ({"prompt": "Tell me of tides – and of ports."}, {"prompt": CALLS, "tools": [TOOL]}):
            given = merged(chunks(await ask(network, model=model, stream=True, **fields)))
            assert given == merged(chunks(await ask(plain_network, model=model, stream=True, **fields)))
            one = (await ask(network, model=model, **fields)).json()
            other = (await ask(plain_network, model=model, **fields)).json()
            assert one["usage"]["cost"] == other["usage"]["cost"]
            message, expected = one["choices"][0]["message"], other["choices"][0]["message"]
            assert message.get("tool_calls") == expected.get("tool_calls")
            assert (message["content"] or None) == expected["content"]
        assert odd.ledger.total_nanousd == plain.ledger.total_nanousd > 0


async def test_streams_end_as_the_form_says(autojump_clock) -> None:
    """The finish and the usage where they belong, and `[DONE]` if there is one."""

    async def ending(**fields: Any) -> list[str]:
        async with simulated(Scenario(wire=Wire(**fields))) as (_, network):
            return (await ask(network, "[[say Hi]]", stream=True)).events()[2:]

    double = await ending()
    assert [json.loads(event)["choices"][0]["finish_reason"] for event in double[:-1]] == ["stop", "stop"]
    assert double[-1] == "[DONE]"
    merged_one = await ending(finish="merged")
    assert len(merged_one) == 2
    assert "usage" in json.loads(merged_one[0])
    empty = await ending(finish="empty_choices", done=False)
    assert [len(json.loads(event)["choices"]) for event in empty] == [1, 0]
    assert await ending(finish="missing", done=False) == []


async def test_calls_come_in_the_pieces_of_the_form(autojump_clock) -> None:
    """Whole in one delta, several in one delta, one after the other, with empty ids repeated."""

    async def deltas(**fields: Any) -> list[list[dict[str, Any]]]:
        async with simulated(Scenario(wire=Wire(**fields))) as (_, network):
            events = chunks(await ask(network, CALLS, stream=True, tools=[TOOL]))
        found = [event["choices"][0]["delta"] for event in events]
        return [delta["tool_calls"] for delta in found if "tool_calls" in delta]

    whole = await deltas(tool_calls="whole")
    assert [[entry["index"] for entry in delta] for delta in whole] == [[0], [1]]
    assert json.loads(whole[0][0]["function"]["arguments"]) == {"port": "Aber", "day": "–"}
    assert [entry["index"] for entry in (await deltas(tool_calls="together"))[1]] == [0, 1]
    in_turn = [delta[0]["index"] for delta in await deltas(tool_calls="in_turn")]
    assert in_turn == sorted(in_turn)
    repeated = await deltas(call_ids="empty")
    assert repeated[0][0]["id"]
    assert {(delta[0]["id"], delta[0]["type"], delta[0]["function"]["name"]) for delta in repeated[2:]} == {
        ("", "", "")
    }


async def test_old_keys_details_padding_and_comments(autojump_clock) -> None:
    """The bytes of the older form: key order, details null or absent, numbers written as before."""
    async with simulated(Scenario(wire=Wire(key_order="old", details="null", padding=2, comments_before=2))) as (
        _,
        net,
    ):
        reply = await ask(net, "[[say Hi]]")
        assert reply.body.startswith(b"\n         \n\n         \n{")
        assert list(reply.json())[:5] == ["id", "provider", "model", "object", "created"]
        assert list(reply.json()["choices"][0])[-1] == "logprobs"
        assert reply.json()["usage"]["prompt_tokens_details"] is None
        assert re.search(rb'"cost":0\.\d+,', reply.body) or re.search(rb'"cost":[\d.]+e-7,', reply.body)
        stream = await ask(net, "[[say Hi]]", stream=True)
        assert stream.body.startswith(b": OPENROUTER PROCESSING\n\n" * 3 + b'data: {"id":')
        assert list(chunks(stream)[1]["choices"][0]["delta"]) == ["role", "content"]
    async with simulated(Scenario(wire=Wire(details="absent", comment_every=1))) as (_, net):
        stream = await ask(net, "[[say Hi there]]", stream=True)
        assert not [name for name in chunks(stream)[-1]["usage"] if name.endswith("_details")]
        assert stream.body.count(b": OPENROUTER PROCESSING") == 1 + len(chunks(stream)) - 2


async def test_pieces_end_where_the_form_says(autojump_clock) -> None:
    """Inside every character that has more than a byte, and between the newlines of every event."""
    async with simulated(Scenario(wire=Wire(cut="characters")), comment_interval_s=0.0) as (_, network):
        pieces = (await ask(network, "[[say é–🧭]]", stream=True)).pieces
        inside = [piece for piece in pieces if piece and piece[0] & 0xC0 == 0x80]
        assert len(inside) == 1 + 2 + 3
    async with simulated(Scenario(wire=Wire(cut="newlines"))) as (_, network):
        reply = await ask(network, "[[say Hi]]", stream=True)
        assert sum(piece.startswith(b"\n") for piece in reply.pieces) == reply.body.count(b"\n\n")


async def test_retry_after_in_other_words(autojump_clock) -> None:
    """As a date that lies as far ahead, or in milliseconds."""
    async with simulated(Scenario(wire=Wire(retry_after="date")), retry_after_s=7) as (_, network):
        date = (await ask(network, "[[fault 429_upstream]]")).header("retry-after")
        assert parsedate_to_datetime(date or "").timestamp() == WALL + 7
    async with simulated(Scenario(wire=Wire(retry_after="ms")), retry_after_s=7) as (_, network):
        reply = await ask(network, "[[fault 429_upstream]]")
        assert (reply.header("retry-after"), reply.header("retry-after-ms")) == (None, "7000")


# As TOML.


def test_the_printed_file_has_every_default() -> None:
    """It reads back as the default settings, and with its comments removed as settings too."""
    text = show_config()
    assert parse_config(text) == SimulatorConfig()
    names = set(re.findall(r"(?m)^(?:# )?(\w+) = ", text))
    for kind in (SimulatorConfig, Wire, Capacity, Spread, Phase):
        tables = {"limits", "free_tier", "scenario", "capacity", "latency", "wire", "models", "embedding_models"}
        assert set(kind.__struct_fields__) - tables <= names
    opened = parse_config(re.sub(r"(?m)^# (?=\w+ = |\[)", "", text))
    assert opened.scenario is not None
    assert opened.scenario.wire == Wire()
    assert opened.limits[0].requests == 600


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed = ?\n", "line 1"),
        ("seed = 1\nsneed = 2", "sneed"),
        ("[scenario.wire]\nfinish = 'never'", "scenario.wire.finish"),
        ("[[limits]]\nrequests = 1\n[[limits]]\nrequests = 'x'", "limits[1]"),
        ("[[scenario.phases]]\nfrom_s = 3\nto_s = 1", "from_s"),
        ("[scenario]\nfault_rates = {502 = 0.5, 777 = 0.1}", "777"),
        ('[scenario.models."no/such"]\n', "scenario.models: 'no/such'"),
        ('[[scenario.phases]]\n[[scenario.phases]]\nmodels = ["no/such"]', "scenario.phases[1].models: 'no/such'"),
        ('[[limits]]\nrequests = 1\nmodels = [":free", "no/such"]', "limits[0].models: 'no/such'"),
        ("credits_nanousd = -1", "credits_nanousd"),
        ("seed = " + "9" * 5_000, "not TOML"),
        ("seed = " + "[" * 5_000, "not TOML"),
    ],
    ids=lambda value: value[:40],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, named: str) -> None:
    """With the file, and the line or the key."""
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Capacity(concurrent=1, refusal="429"), "'429_upstream', '503', '529', not '429'"),  # type: ignore[arg-type]
        (lambda: Limit(requests=1, kind="bucket"), "kind"),  # type: ignore[arg-type]
        (lambda: Limit(requests=1, per="user"), "per"),  # type: ignore[arg-type]
        (lambda: SimulatorConfig(cancel_billing="none"), "cancel_billing"),  # type: ignore[arg-type]
        (lambda: SimulatorConfig(retry_after_s=-5), "retry_after_s"),
        (lambda: SimulatorConfig(api_keys="sk-test"), "api_keys"),  # type: ignore[arg-type]
        (lambda: Spread(kind="normal"), "kind"),  # type: ignore[arg-type]
        (lambda: Wire(finish="never"), "finish"),  # type: ignore[arg-type]
    ],
)
def test_words_that_there_are_not_are_named(make: Callable[[], object], named: str) -> None:
    """In Python too, where they were taken for another, or failed in a request."""
    with pytest.raises(ConfigError, match=named):
        make()


def test_the_example_of_the_page_is_read() -> None:
    """The TOML in docs/simulator.md is one that works."""
    page = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text(encoding="utf-8")
    example = page.split("```toml\n")[1].split("```")[0]
    config = parse_config(example)
    assert config.scenario is not None
    assert config.scenario.phases
    assert config.limits

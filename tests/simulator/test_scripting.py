"""What a prompt can script: rounds of tools, ids, broken arguments, and JSON that is broken at first."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import h11
import pytest
import trio
from wire_client import WireClient

from gorouter_trio.simulator import Simulator, SimulatorConfig, open_simulated_network

HEADERS = (("Authorization", "Bearer sk-or-v1-0123456789abcdef"),)
MINI = "openai/gpt-4o-mini"
TIDE = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {
    "type": "object",
    "properties": {
        "port": {"$ref": "#/$defs/port"},
        "depth": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "null"}]},
        "kind": {"enum": ["ebb", "flood"]},
        "unit": {"const": "m"},
        "hours": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
    },
    "required": ["port", "depth", "kind", "unit", "hours"],
    "additionalProperties": False,
    "$defs": {
        "port": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "tide", "strict": True, "schema": SCHEMA}}


async def answers(bodies: list[dict[str, Any]], *, directives: bool = True) -> list[dict[str, Any]]:
    """The messages that answer these requests, one after the other, from one simulator."""
    simulator = Simulator(SimulatorConfig(directives=directives), wall=lambda: 1_795_300_000.0)
    async with open_simulated_network(simulator) as network:
        client = WireClient(await network.connect("openrouter.simulated", 80))
        replies = []
        for body in bodies:
            reply = await client.post("/api/v1/chat/completions", {"model": MINI, **body}, headers=HEADERS)
            assert reply.status == 200
            replies.append(reply.json()["choices"][0]["message"])
        await client.stream.aclose()
    return replies


async def test_tools_are_called_round_by_round(autojump_clock) -> None:
    """Each round of the conversation has the calls that are meant for it, with their ids and arguments, then text."""
    said = 'Go. [[call tide#first {"a": 1}]] [[call2 tide#second = {"broken": ]] [[call2 tide]] [[call3 tide#third]]'
    messages: list[dict[str, Any]] = [{"role": "user", "content": said}]
    seen = []
    for _ in range(4):
        (message,) = await answers([{"messages": messages, "tools": [TIDE]}])
        calls = message.get("tool_calls") or []
        seen.append([(call["id"], call["function"]["arguments"]) for call in calls])
        messages += [message, *[{"role": "tool", "tool_call_id": c["id"], "content": "ok"} for c in calls]]
    assert seen[0] == [("first", '{"a": 1}')]
    assert seen[1][0] == ("second", '{"broken": ')
    assert len(seen[1]) == 2
    assert seen[1][1][0].startswith("call_")
    assert [call_id for call_id, _ in seen[2]] == ["third"]
    assert seen[3] == []
    assert messages[-1]["content"] == "According to tide: ok"


@pytest.mark.parametrize("form", [FORMAT, {"type": "json_object"}], ids=["schema", "object"])
async def test_json_is_broken_for_the_first_answers(autojump_clock, form: dict[str, Any]) -> None:
    """Whether the client asks again in the same words or goes on with the conversation."""
    first: list[dict[str, Any]] = [{"role": "user", "content": "A tide. [[broken x2]]"}]
    again = [{"messages": first, "response_format": form}] * 3
    await check_broken([message["content"] for message in await answers(again)])
    messages, contents = [*first], []
    for _ in range(3):
        (message,) = await answers([{"messages": messages, "response_format": form}])
        contents.append(message["content"])
        messages += [message, {"role": "user", "content": "That is no JSON. Mend it."}]
    await check_broken(contents)


async def check_broken(contents: list[str]) -> None:
    """Two that are no JSON, and one that is an object."""
    for content in contents[:2]:
        with pytest.raises(json.JSONDecodeError):
            json.loads(content)
    assert isinstance(json.loads(contents[2]), dict)


async def test_structured_answers_obey_the_schema(autojump_clock) -> None:
    """Judged by hand here, and by a validator where there is one."""
    bodies = [{"messages": [{"role": "user", "content": f"Tide {n}"}], "response_format": FORMAT} for n in range(20)]
    values = [json.loads(message["content"]) for message in await answers(bodies)]
    for value in values:
        assert list(value) == ["port", "depth", "kind", "unit", "hours"]
        assert set(value["port"]) == {"name"}
        assert value["depth"] is None or 1 <= value["depth"] <= 9
        assert value["kind"] in {"ebb", "flood"}
        assert value["unit"] == "m"
        assert 2 <= len(value["hours"]) <= 3
    assert {value["depth"] is None for value in values} == {True, False}


async def test_answers_to_a_schema_that_names_itself_end(autojump_clock) -> None:
    """A form of several kinds, one of which holds two of the form again, has a value for every prompt."""
    kinds: list[dict[str, Any]] = [{"$ref": "#/$defs/sum"}, {"$ref": "#/$defs/number"}]
    sides = {"left": {"anyOf": kinds}, "right": {"anyOf": kinds}}
    closed = {"type": "object", "additionalProperties": False}
    schema = {
        "$ref": "#/$defs/sum",
        "$defs": {
            "sum": {**closed, "properties": sides, "required": ["left", "right"]},
            "number": {**closed, "properties": {"value": {"type": "integer"}}, "required": ["value"]},
        },
    }
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    asked = [{"messages": [{"role": "user", "content": str(n)}], "response_format": form} for n in range(20)]

    def check(value: dict[str, Any]) -> None:
        assert set(value) in ({"value"}, {"left", "right"})
        for side in () if "value" in value else ("left", "right"):
            check(value[side])

    for answer in await answers(asked):
        check(json.loads(answer["content"]))


async def test_what_is_broken_stays_whole_without_directives(autojump_clock) -> None:
    """The config turns this directive off like the others."""
    body = {"messages": [{"role": "user", "content": "A tide. [[broken]]"}], "response_format": FORMAT}
    (message,) = await answers([body], directives=False)
    assert json.loads(message["content"])


async def test_numbers_beyond_measure_are_answered(autojump_clock) -> None:
    """A count of thousands of digits is the most that there is, not an error of the server's."""
    said = f"[[tokens {'9' * 5_000}]]"
    (message,) = await answers([{"messages": [{"role": "user", "content": said}], "max_tokens": 5}])
    assert message["content"]
    for limit in ("%C2%B2", "9" * 5_000):
        async with open_simulated_network(Simulator()) as network:
            client = WireClient(await network.connect("openrouter.simulated", 80))
            reply = await client.request("GET", f"/api/v1/batches?limit={limit}", headers=HEADERS)
            await client.stream.aclose()
        assert (reply.status, reply.json()["data"]) == (200, [])


@pytest.mark.parametrize("fault", ["mid_stream_error", "stream_cut", "mid_stream_stall"])
async def test_an_answer_without_a_text_can_fail_too(autojump_clock, fault: str) -> None:
    """A stream that a stop sequence leaves nothing of has no events, and meets its fault all the same."""
    asked = f"[[say Low tide]] [[fault {fault}]]"
    body = {"model": "anthropic/claude-haiku-4.5", "messages": [{"role": "user", "content": asked}], "stop": "Low"}
    simulator = Simulator()
    async with open_simulated_network(simulator) as network:
        client = WireClient(await network.connect("openrouter.simulated", 80))
        with trio.move_on_after(60), contextlib.suppress(h11.RemoteProtocolError):
            reply = await client.post("/api/v1/chat/completions", {**body, "stream": True}, headers=HEADERS)
            assert reply.status == 200
        await client.stream.aclose()
    (record,) = simulator.recent_requests()
    assert (record.status, record.fault) == (200, fault)

"""Cancelling at every step: nothing leaks, the history is valid, the next turn works."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
import trio
import trio.testing
from cancel_sweep import sweep
from failing_store import FailingStore
from histories import check_history
from tool_loop import ONE_ROUND, TOOLS, Loop
from worlds import DONE, World, chunk, open_world, streams

import gorouter_trio as gr
from gorouter_trio.config import ContextPolicy
from gorouter_trio.session.transcript import Transcript
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.wire.codec import decode_log_entry

KEYS = ("k", "l")
LIMITS = gr.RateLimits(requests_per_minute=600, tokens_per_minute=60_000, max_in_flight=1)


@dataclass(slots=True)
class Place:
    """A world with a store, and what the scenario got out of it."""

    world: World
    store: FailingStore
    answers: list[gr.ChatResult[object]] = field(default_factory=list)
    errors: list[gr.GorouterError] = field(default_factory=list)
    is_closed: bool = False


def place(**fields):
    """Opens a place whose client has the settings `fields`."""

    @asynccontextmanager
    async def open_place():
        # One that waits, as stores do that have their data elsewhere: it is cut off there as well.
        store = FailingStore()
        config = SimulatorConfig(latency_s=0.1, tokens_per_s=100, reply_tokens=4, reply_spread=0)
        async with open_world(config, store=store, **fields) as world:
            yield Place(world, store)
            await trio.testing.wait_all_tasks_blocked()
            statistics = world.client.statistics()
            assert statistics.in_flight == 0
            assert [key.in_flight for key in statistics.keys] == [0] * len(statistics.keys)
            assert [model.in_flight for model in statistics.models] == [0] * len(statistics.models)

    return open_place


async def check(place: Place, is_whole: bool) -> None:
    """Nothing is in flight, no turn is left open, and everything works."""
    for key in KEYS:
        transcript = Transcript()
        for entry in (await place.store.load(key)).entries:
            transcript.apply(decode_log_entry(entry))
        machine = transcript.machine
        assert machine is None or machine.is_parked, "the log ends in a turn without an end"
        if machine is not None and not place.is_closed:
            assert await place.world.client.session(key).undo()
    await trio.testing.wait_all_tasks_blocked()
    client = place.world.client
    statistics = client.statistics()
    assert (statistics.in_flight, statistics.queued) == (0, 0)
    if place.is_closed:
        return
    for key in KEYS:
        session = client.session(key)
        assert (await session.statistics()).state == "idle"
        assert (await session.ask("[[say well]]")).text == "well"
        assert check_history(place.world.sent[-1].messages) == []
        stored = [entry.call for entry in await session.history()]
        assert all(answer.call in stored for answer in place.answers if answer.turn_id and answer.turn_id[0] == key)
    if is_whole:
        assert place.answers or place.errors


async def chat(place: Place) -> None:
    """One chat."""
    place.answers.append(await place.world.client.chat("q"))


async def chat_with_a_retry(place: Place) -> None:
    """A chat that is refused once and answered then; no retry is begun for who is cancelled already."""
    try:
        place.answers.append(await place.world.client.chat("[[fault 503 x1]] [[say yes]]"))
    except gr.OverloadedError as exc:
        place.errors.append(exc)


class Sum(msgspec.Struct):
    """What the model is asked for."""

    total: int


async def structured(place: Place) -> None:
    """A chat whose first answer has not the form that was asked for."""
    try:
        result = await place.world.client.chat("[[say none]]", response_type=Sum)
    except gr.InvalidOutputError as exc:
        place.errors.append(exc)
    else:
        assert isinstance(result.value, Sum)
        place.answers.append(result)


async def extended(place: Place) -> None:
    """A chat with a middleware, a hook and a handler of events, all of which wait."""
    client = place.world.client

    async def wait(*_args: object) -> None:
        await trio.lowlevel.checkpoint()

    async def around(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        await wait()
        await proceed()
        await wait()

    hook = gr.Hook(before=wait, after=wait, on_error=wait)
    client.use(around)
    client.add_hook(hook)
    handler = client.on(gr.RuntimeEvent, wait)
    try:
        await chat(place)
    finally:
        client.off(handler)
        client.remove_hook(hook)
        client.unuse(around)


async def chats_in_a_queue(place: Place) -> None:
    """Three chats over one connection."""
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(chat, place)


async def chats_at_a_limit(place: Place) -> None:
    """Chats and a stream, of two lanes, that wait for the rate and for each other's slot, with a refusal for all."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chat_with_a_retry, place)
        nursery.start_soon(chat, place)
        nursery.start_soon(stream, place)


async def stream(place: Place) -> None:
    """A stream, read to its end."""
    async with place.world.client.stream("q") as events:
        place.answers.append(await events.collect())


async def stream_left_early(place: Place) -> None:
    """A stream, left after its first event."""
    async with place.world.client.stream("q") as events:
        await anext(events)
    place.answers.append(await place.world.client.chat("q"))


async def ask(place: Place) -> None:
    """Two turns of a session, the second one on a history."""
    for number in range(2):
        place.answers.append(await place.world.client.session("k").ask("q", turn_id=f"k{number}"))


async def ask_in_a_queue(place: Place) -> None:
    """Three turns at once, which wait for each other."""

    async def one(number: int) -> None:
        place.answers.append(await place.world.client.session("k").ask("q", turn_id=f"k{number}"))

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(one, number)


async def session_stream(place: Place) -> None:
    """A streamed turn, read to its end."""
    async with place.world.client.session("k").stream("q", turn_id="k0") as events:
        result = await events.collect()
    place.answers.append(result)


async def session_stream_left_early(place: Place) -> None:
    """A streamed turn, left early, and another turn."""
    session = place.world.client.session("k")
    async with session.stream("q") as events:
        await anext(events)
    place.answers.append(await session.ask("q", turn_id="k1"))


async def interrupted(place: Place) -> None:
    """A turn and a stream that somebody else interrupts."""

    async def one(key: str) -> None:
        try:
            async with place.world.client.session(key).stream("[[tokens 30]]") as events:
                await events.collect()
        except gr.TurnInterruptedError as exc:
            place.errors.append(exc)

    async with trio.open_nursery() as nursery:
        for key in KEYS:
            nursery.start_soon(one, key)
        await trio.sleep(0.15)
        for key in KEYS:
            await place.world.client.session(key).interrupt()


async def other_operations(place: Place) -> None:
    """Turn, history, fork, clear."""
    session = place.world.client.session("k")
    place.answers.append(await session.ask("q"))
    await session.history()
    await session.fork(f"fork-{len(place.world.sent)}")
    await session.clear()


async def rounds(place: Place) -> None:
    """A turn with a round of two tools, and one on top of it."""
    session = place.world.client.session("k")
    place.answers.append(await session.ask(ONE_ROUND, rounds=Loop(), tools=TOOLS, turn_id="k0"))
    place.answers.append(await session.ask("q", turn_id="k1"))


async def streamed_rounds(place: Place) -> None:
    """The same streamed, each result written down by itself."""
    session = place.world.client.session("k")
    async with session.stream(ONE_ROUND, rounds=Loop(each=True), tools=TOOLS, turn_id="k0") as events:
        result = await events.collect()
    place.answers.append(result)


async def parked(place: Place) -> None:
    """A turn with a call that waits for a reply, and somebody who brings it."""
    session = place.world.client.session("k")

    async def one() -> None:
        loop = Loop(asked=("a1",))
        place.answers.append(await session.ask(ONE_ROUND, rounds=loop, tools=TOOLS, turn_id="k0"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await trio.sleep(0.5)
        assert await session.answer("a1", True)


async def edits(place: Place) -> None:
    """A turn, taken again, asked differently, and taken back; and the log written anew."""
    session = place.world.client.session("k")
    await session.ask("q", turn_id="x")
    await session.retry(turn_id="y")
    await session.edit("y", "r", turn_id="z")
    place.answers.append(await session.ask("s", turn_id="k0"))
    await session.ask("t")
    await session.undo()
    await session.compact()


async def merged(place: Place) -> None:
    """Messages that come while a turn runs, and are taken in one."""

    async def one(number: int) -> None:
        place.answers.append(await place.world.client.session("k").ask("q", turn_id=f"k{number}"))

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(one, number)


async def summarised(place: Place) -> None:
    """Turns whose history is folded."""
    for number in range(3):
        place.answers.append(await place.world.client.session("k").ask("q", turn_id=f"k{number}"))


async def make_summary(_messages: object) -> str:
    await trio.sleep(0.1)
    return "so far"


SUMMARIES = gr.SessionConfig(context=ContextPolicy(max_turns=1, keep_turns=0, summarise=make_summary))


async def shutdown(place: Place) -> None:
    """A client with a running turn, a queued one, a stream and a chat is closed, while its users wait outside."""

    async def one(client: gr.Client, key: str) -> None:
        try:
            place.answers.append(await client.session(key).ask("[[tokens 30]]"))
        except gr.GorouterError as exc:
            place.errors.append(exc)

    async def read(client: gr.Client) -> None:
        try:
            async with client.session("l").stream("[[tokens 30]]") as events:
                await events.collect()
        except gr.GorouterError as exc:
            place.errors.append(exc)

    async with trio.open_nursery() as nursery, place.world.another_client() as client:
        nursery.start_soon(one, client, "k")
        nursery.start_soon(one, client, "k")
        nursery.start_soon(read, client)
        await trio.sleep(0.15)
    assert len(place.answers) + len(place.errors) == 3


async def f(ctx: gr.ToolContext) -> str:
    """Waits."""
    await trio.sleep(0.1)
    return ctx.call_id


async def chat_with_tools(place: Place) -> None:
    """A chat with a round of tools."""
    place.answers.append(await place.world.client.chat(ONE_ROUND, tools=[f, f_again]))


async def stream_with_tools(place: Place) -> None:
    """The same streamed, with a form for the last answer."""
    async with place.world.client.stream(ONE_ROUND, tools=[f, f_again], response_type=Sum) as events:
        async for _event in events:
            pass
    assert isinstance(events.result.value, Sum)
    place.answers.append(events.result)


async def session_stream_with_tools(place: Place) -> None:
    """A turn of a session, streamed, with tools, one of which is approved by somebody who takes time."""
    session = place.world.client.session("k")
    async with session.stream(ONE_ROUND, tools=[f, asked], approve=approve, turn_id="k0") as events:
        result = await events.collect()
    assert [row.status for row in result.tool_calls] == ["success", "success"]
    place.answers.append(result)


@gr.tool(name="g")
async def f_again() -> str:
    """Waits too."""
    await trio.sleep(0.1)
    return "g"


@gr.tool(name="g", rules=gr.security.ToolRules(sensitive=True))
async def asked() -> str:
    """Has to be approved."""
    await trio.lowlevel.checkpoint()
    return "g"


async def approve(request: gr.ApprovalRequest) -> gr.ApprovalDecision:
    """Yes, after a while."""
    await trio.sleep(0.1)
    return gr.ApprovalDecision(request=request, approved=True)


async def structured_turn(place: Place) -> None:
    """A turn of a session whose first answer has not the form that was asked for."""
    session = place.world.client.session("k")
    try:
        place.answers.append(await session.ask("[[broken x1]]", response_type=Sum, turn_id="k0"))
    except gr.InvalidOutputError as exc:
        place.errors.append(exc)


async def services(place: Place) -> None:
    """Everything that is asked for besides chats."""
    client = place.world.client
    result = await client.chat("q")
    for call in (client.models, client.providers, client.key, client.credits):
        await call()
    await client.model_endpoints("openai/gpt-4o-mini")
    await client.generation(result.generation_id or "")
    await client.embeddings("q", model="openai/text-embedding-3-small")
    place.answers.append(result)


async def every_delta(place: Place) -> None:
    """A stream with every kind of delta that there is, as a chat and as a turn."""
    api = place.world.api
    before, api.answer = api.answer, streams(*EVERY_DELTA)
    try:
        async with place.world.client.stream("q", raw_chunks=True) as events:
            kinds = {type(event) async for event in events}
        async with place.world.client.session("k").stream("q", turn_id="k0") as events:
            place.answers.append(await events.collect())
    finally:
        api.answer = before
    assert kinds >= DELTAS


CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
EVERY_DELTA = (
    chunk({"reasoning": "hm"}),
    chunk({"reasoning_details": [{"type": "reasoning.text", "text": "hm", "index": 0}]}),
    chunk({"content": "Look."}, choice={"logprobs": {"content": [{"token": "Look", "logprob": -0.1}]}}),
    chunk({"refusal": "no"}),
    chunk({"annotations": [{"type": "url_citation", "url_citation": {"url": "https://a.test"}}]}),
    chunk({"images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}),
    chunk({"audio": {"data": "AA==", "transcript": "la"}}),
    chunk({"tool_calls": [CALL]}),
    chunk({}, finish="stop"),
    chunk({}, usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "cost": 0.5}),
    DONE,
)
DELTAS = {
    gr.TextDelta,
    gr.ReasoningDelta,
    gr.RefusalDelta,
    gr.AnnotationDelta,
    gr.ImageDelta,
    gr.AudioDelta,
    gr.LogprobsDelta,
    gr.ToolCallDelta,
    gr.RawChunk,
    gr.StreamFinished,
}


LONG = {rounds, streamed_rounds, parked, edits, summarised, stream_with_tools, session_stream_with_tools, services}


@pytest.mark.parametrize(
    ("scenario", "fields"),
    [
        (chat, {}),
        (chat_with_a_retry, {}),
        (structured, {}),
        (extended, {}),
        (chats_in_a_queue, {"pool": gr.PoolLimits(max_connections=1)}),
        (chats_at_a_limit, {"rates": LIMITS, "api_key": ["sk-a", "sk-b"]}),
        (stream, {}),
        (stream_left_early, {}),
        (ask, {}),
        (ask_in_a_queue, {"sessions": gr.SessionConfig(mailbox=1)}),
        (session_stream, {}),
        (session_stream_left_early, {}),
        (interrupted, {}),
        (other_operations, {}),
        (rounds, {}),
        (streamed_rounds, {}),
        (parked, {}),
        (edits, {}),
        (merged, {"sessions": gr.SessionConfig(double_texting="merge")}),
        (summarised, {"sessions": SUMMARIES}),
        (shutdown, {}),
        (chat_with_tools, {}),
        (stream_with_tools, {}),
        (session_stream_with_tools, {}),
        (structured_turn, {}),
        (services, {}),
        (every_delta, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_cancel_at_every_step(autojump_clock, record_property, scenario, fields):
    """Whatever is cancelled at whatever step: no task, slot or turn is left open, and the next turn is right."""
    # The longest ones once: each step is a run.
    seeds = range(1 if scenario in LONG else 2)
    report = await sweep(place(**fields), scenario, check=check, seeds=seeds)
    record_property("figure", str(report))
    assert report.cut_off > report.steps * len(seeds) / 2


async def test_the_sweep_finds_a_leak(autojump_clock):
    """The harness itself: a scenario that forgets something at one step is found."""

    @asynccontextmanager
    async def open_place():
        yield []

    async def forgetful(held):
        held.append("slot")
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        held.clear()

    async def nothing_held(held, _is_whole):
        assert not held

    with pytest.raises(AssertionError):
        await sweep(open_place, forgetful, check=nothing_held)


async def test_the_sweep_repeats_itself(autojump_clock):
    """The same seed gives the same steps."""
    counts = []
    for _ in range(2):
        report = await sweep(place(), chat, check=check, seeds=[7])
        counts.append((report.steps, report.runs, report.cut_off))
    assert counts[0] == counts[1]
    assert msgspec.json.encode(counts[0])

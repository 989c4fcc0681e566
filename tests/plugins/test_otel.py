"""OpenTelemetry: one trace from whoever asks through the session, the queue and the attempt to the tool."""

from __future__ import annotations

import json
from contextvars import ContextVar
from decimal import Decimal
from typing import Any, cast

import pytest
import trio
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from worlds import Handler, chunk, completion, errors, open_world, replies, streams

import gorouter_trio as gr
from gorouter_trio.plugins import OpenTelemetryPlugin

YES = completion("My secret.")


class Telemetry:
    """Providers of the SDK that keep everything in memory, and a plugin on them."""

    def __init__(self, **fields: bool) -> None:
        self._exporter = InMemorySpanExporter()
        self._provider = TracerProvider()
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.tracer = self._provider.get_tracer("tests")
        self.plugin = OpenTelemetryPlugin(
            tracer_provider=self._provider, meter_provider=MeterProvider([self._reader]), **fields
        )

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """The spans that have ended, in that order."""
        return self._exporter.get_finished_spans()

    def tree(self) -> dict[str, list[str]]:
        """The names beneath each name, in the order in which they began; "" for what has nothing above it."""
        names = {span.context.span_id: span.name for span in self.spans if span.context is not None}
        found: dict[str, list[str]] = {}
        for span in sorted(self.spans, key=lambda span: span.start_time or 0):
            parent = "" if span.parent is None else names.get(span.parent.span_id, "?")
            found.setdefault(parent, []).append(span.name)
        return found

    def named(self, name: str) -> list[ReadableSpan]:
        """The spans of this name."""
        return [span for span in self.spans if span.name == name]

    def points(self) -> dict[str, list[tuple[dict[str, object], float, int]]]:
        """What was recorded: attributes, sum and count of each point by name of the metric."""
        data = self._reader.get_metrics_data()
        return {
            metric.name: [
                (dict(p.attributes or {}), p.sum, p.count) for p in cast("list[Any]", metric.data.data_points)
            ]
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def calling() -> Handler:
    """Refuses once, then calls a tool, then answers."""
    return replies((503, b"{}"), completion("", tool_calls=[("call-1", "look")]), YES)


def tools(telemetry: Telemetry, seen: list[object]) -> list[gr.AnyTool]:
    """A tool in a task or in a thread that traces by itself."""

    @gr.tool
    async def look() -> str:
        """Look around."""
        with telemetry.tracer.start_as_current_span("inside"):
            await trio.sleep(0.1)
            seen.append(trace.get_current_span().get_span_context().trace_id)
        return "seen"

    return [look]


@pytest.mark.parametrize("where", ["session", "session stream", "chat", "stream"])
async def test_one_trace(where, autojump_clock):
    """Everything that a turn does is beneath the span of whoever asked, wherever it runs; attributes are as agreed."""
    telemetry, seen = Telemetry(), []
    stream = (
        chunk({"tool_calls": [{"index": 0, "id": "call-1", "function": {"name": "look", "arguments": "{}"}}]}),
        chunk(finish="tool_calls"),
        b"data: [DONE]\n\n",
    )
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "cost": 0.25}
    end = (chunk({"content": "My secret."}), chunk(finish="stop", usage=usage), b"data: [DONE]\n\n")
    answers = [errors(503), streams(*stream), streams(*end)]

    async def answer(request, reply):
        await answers.pop(0)(request, reply)

    is_streamed = "stream" in where
    async with open_world(answer=answer if is_streamed else calling(), plugins=[telemetry.plugin]) as world:
        offered = tools(telemetry, seen)
        front: Any = world.client.session("s", tools=offered) if "session" in where else world.client
        more: dict[str, Any] = {} if "session" in where else {"tools": offered}
        with telemetry.tracer.start_as_current_span("asker") as asker:
            if is_streamed:
                async with front.stream("Look.", temperature=0, **more) as opened:
                    await opened.collect()
            else:
                await (front.ask if "session" in where else front.chat)("Look.", temperature=0, **more)
    model = "chat openai/gpt-4o-mini"
    assert telemetry.tree() == {
        "": ["asker"],
        "asker": ["turn"],
        "turn": [model, "execute_tool look", model],
        model: ["queue", "attempt", "queue", "attempt", "queue", "attempt"],
        "execute_tool look": ["inside"],
    }
    assert {span.context.trace_id for span in telemetry.spans if span.context} == {asker.get_span_context().trace_id}
    assert seen == [asker.get_span_context().trace_id]
    first, last = telemetry.named(model)
    assert last.kind is SpanKind.CLIENT
    expected: dict[str, object] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openrouter",
        "gen_ai.request.model": "openai/gpt-4o-mini",
        "gen_ai.request.temperature": 0.0,
        "gen_ai.response.model": "test/model",
        "gen_ai.response.id": "gen-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 5,
        "gorouter.cost_usd": 0.25,
        "gorouter.purpose": "tool_round",
        "server.address": "simulated.invalid",
    }
    attributes = dict(last.attributes or {})
    server = attributes.pop("server.address")
    assert server
    assert {name: attributes.get(name) for name in expected if name != "server.address"} == {
        name: value for name, value in expected.items() if name != "server.address"
    }
    assert ("gen_ai.conversation.id" in attributes) == ("session" in where)
    assert ("gen_ai.response.time_to_first_chunk" in attributes) == is_streamed
    assert (first.attributes or {})["gen_ai.response.finish_reasons"] == ("tool_calls",)
    (tool,) = telemetry.named("execute_tool look")
    assert {name: (tool.attributes or {})[name] for name in ("gen_ai.tool.name", "gen_ai.tool.call.id")} == {
        "gen_ai.tool.name": "look",
        "gen_ai.tool.call.id": "call-1",
    }
    assert (tool.attributes or {})["gen_ai.tool.description"] == "Look around."
    assert tool.kind is SpanKind.INTERNAL
    attempts = [dict(span.attributes or {}) for span in telemetry.named("attempt")]
    assert [each["http.response.status_code"] for each in attempts] == [503, 200, 200]
    assert attempts[1]["http.request.resend_count"] == 1
    (turn,) = telemetry.named("turn")
    assert dict(turn.attributes or {}).items() >= {"gorouter.attempts": 3, "gorouter.tool_calls": 1}.items()
    everything = json.dumps([span.to_json() for span in telemetry.spans])
    assert "secret" not in everything
    assert "Look." not in everything


async def test_content_is_captured_where_it_is_asked_for(autojump_clock):
    """Messages are in the form of the conventions; arguments and results of tools as well."""
    telemetry = Telemetry(capture_content=True)
    async with open_world(answer=calling(), plugins=[telemetry.plugin]) as world:
        await world.client.chat("Look.", system="Be brief.", tools=tools(telemetry, []))
    first, last = telemetry.named("chat openai/gpt-4o-mini")
    assert json.loads(str((first.attributes or {})["gen_ai.input.messages"])) == [
        {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]},
        {"role": "user", "parts": [{"type": "text", "content": "Look."}]},
    ]
    assert json.loads(str((first.attributes or {})["gen_ai.output.messages"])) == [
        {
            "role": "assistant",
            "parts": [
                {"type": "text", "content": ""},
                {"type": "tool_call", "id": "call-1", "name": "look", "arguments": "{}"},
            ],
            "finish_reason": "tool_calls",
        }
    ]
    asked = json.loads(str((last.attributes or {})["gen_ai.input.messages"]))
    assert asked[-1]["parts"] == [{"type": "tool_call_response", "id": "call-1", "result": "seen"}]
    (tool,) = telemetry.named("execute_tool look")
    assert (tool.attributes or {})["gen_ai.tool.call.result"] == "seen"


async def test_metrics(autojump_clock):
    """Durations, tokens, the first chunk, tools, waits and costs, by the names of the conventions."""
    telemetry = Telemetry()
    async with open_world(answer=calling(), plugins=[telemetry.plugin]) as world:
        await world.client.chat("Look.", tools=tools(telemetry, []))
        world.api.answer = errors(400)
        with pytest.raises(gr.BadRequestError):
            await world.client.chat("Look.")
        world.api.answer = streams(chunk({"content": "a"}), chunk(finish="stop"), b"data: [DONE]\n\n")
        async with world.client.stream("Look.") as stream:
            await stream.collect()
    points = telemetry.points()
    assert sum(count for _, _, count in points["gen_ai.client.operation.duration"]) == 4
    failed = [a for a, _, _ in points["gen_ai.client.operation.duration"] if "error.type" in a]
    assert [each["error.type"] for each in failed] == ["BadRequestError"]
    by_type = {str(a["gen_ai.token.type"]): total for a, total, _ in points["gen_ai.client.token.usage"]}
    assert by_type == {"input": 6, "output": 10}
    ((tool, seconds, count),) = points["gen_ai.execute_tool.duration"]
    assert (tool["gen_ai.tool.name"], count) == ("look", 1)
    assert seconds == pytest.approx(0.1, abs=0.01)
    ((_, _, first),) = points["gen_ai.client.operation.time_to_first_chunk"]
    assert first == 1
    assert sum(total for _, total, _ in points["gorouter.client.cost"]) == pytest.approx(0.5)
    assert sum(count for _, _, count in points["gorouter.client.queue.duration"]) == 5


async def test_errors_and_cancels(autojump_clock):
    """A span of what failed or was cancelled ends with its kind; the message of the error is not in it."""
    telemetry = Telemetry()
    async with open_world(answer=errors(400, "no such secret"), plugins=[telemetry.plugin]) as world:
        with pytest.raises(gr.BadRequestError):
            await world.client.chat("Look.")

        async def never(_request, _reply):
            await trio.sleep_forever()

        world.api.answer = never
        with trio.move_on_after(1):
            await world.client.chat("Look.")
        await trio.sleep(1)
    turns = telemetry.named("turn")
    assert [(span.attributes or {})["error.type"] for span in turns] == ["BadRequestError", "cancelled"]
    assert all(span.status.status_code is StatusCode.ERROR for span in telemetry.spans if span.name != "queue")
    assert "secret" not in json.dumps([span.to_json() for span in telemetry.spans])


async def test_a_stream_that_is_left(autojump_clock):
    """Its spans end when it is left, and say so."""
    telemetry = Telemetry()
    async with (
        open_world(plugins=[telemetry.plugin]) as world,
        world.client.stream("Tell me more. [[tokens 300]]") as stream,
    ):
        await anext(aiter(stream))
    (chat,) = telemetry.named("chat openai/gpt-4o-mini")
    assert (chat.attributes or {})["gorouter.interrupted"] is True
    assert (telemetry.named("attempt")[0].attributes or {})["error.type"] == "cancelled"


async def test_a_tool_that_never_ran(autojump_clock):
    """A call of a tool that is not there has its span as well, with its status."""
    telemetry = Telemetry()
    answer = replies(completion("", tool_calls=[("1", "other")]), YES)
    async with open_world(answer=answer, plugins=[telemetry.plugin]) as world:
        await world.client.chat("Look.", tools=tools(telemetry, []))
    (tool,) = telemetry.named("execute_tool other")
    assert (tool.attributes or {})["gorouter.tool.status"] == "error_not_found"
    assert tool.status.status_code is StatusCode.ERROR


async def test_traces_of_two_askers_stay_apart(autojump_clock):
    """A session and the pool's workers serve many; each turn is in the trace of its own asker, the second as well."""
    telemetry = Telemetry()
    async with open_world(answer=replies(YES), plugins=[telemetry.plugin]) as world:
        session = world.client.session("s")
        for name in ("first", "second"):
            with telemetry.tracer.start_as_current_span(name):
                await session.ask("Look.")
        await session.ask("Without.")
    found = telemetry.tree()
    assert (found["first"], found["second"], found[""]) == (["turn"], ["turn"], ["first", "second", "turn"])


async def test_variables_of_the_asker():
    """Any context variable of whoever asks is there in tools, in tasks and threads, and in no later turn."""
    # In real time: the clock of tests would jump while a thread runs.
    variable: ContextVar[str] = ContextVar("variable", default="nobody")
    seen: list[str] = []

    @gr.tool
    async def in_a_task() -> str:
        """Look."""
        seen.append(variable.get())
        return ""

    @gr.tool
    def in_a_thread() -> str:
        """Look."""
        seen.append(variable.get())
        return ""

    rounds = [completion("", tool_calls=[("1", "in_a_task"), ("2", "in_a_thread")]), YES]

    async with open_world(answer=replies(*rounds * 3)) as world:
        session = world.client.session("s", tools=[in_a_task, in_a_thread], tool_limits=gr.ToolLimits(parallel=False))

        async def ask(name: str) -> None:
            variable.set(name)
            await session.ask("Look.")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "ada")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask, "grace")
        await session.ask("Look.")
    assert seen == ["ada", "ada", "grace", "grace", "nobody", "nobody"]


class Broken:
    """A tracer that raises wherever it is called."""

    def __init__(self, *, at: str) -> None:
        self._at = at

    def _do(self, name: str) -> Broken:
        if name == self._at:
            raise ValueError(name)
        return self

    def begin_request(self, _call: object) -> Broken:
        return self._do("begin_request")

    def begin_tool(self, _start: object) -> Broken:
        return self._do("begin_tool")

    def attempted(self, _record: object) -> None:
        self._do("attempted")

    def activate(self) -> None:
        self._do("activate")

    def finished(self, _result: object) -> None:
        self._do("finished")

    def failed(self, _error: object) -> None:
        self._do("failed")


@pytest.mark.parametrize("at", ["begin_request", "begin_tool", "attempted", "activate", "finished"])
async def test_a_tracer_that_raises(at, autojump_clock):
    """It harms nobody, and is told."""
    telemetry = Telemetry()
    async with open_world(answer=calling()) as world:
        world.client.add_tracer(Broken(at=at))
        with world.client.events(gr.HookFailed) as feed:
            reply = await world.client.chat("Look.", tools=tools(telemetry, []))
            assert (await anext(feed)).phase == "trace"
        assert (reply.text, reply.tool_calls[0].status) == ("My secret.", "success")
        assert reply.cost == Decimal("0.5")


@pytest.mark.parametrize("tracer", [5, object(), None])
async def test_no_tracer(tracer, autojump_clock):
    """What cannot begin spans is refused."""
    async with open_world() as world:
        with pytest.raises(gr.ConfigError, match="tracer"):
            world.client.add_tracer(tracer)


def test_the_extra_is_named() -> None:
    """Without OpenTelemetry the error says what to install; other names are what they were."""
    import gorouter_trio.plugins as plugins

    with pytest.raises(AttributeError, match="Nothing"):
        plugins.Nothing  # noqa: B018 - the access is what is tested

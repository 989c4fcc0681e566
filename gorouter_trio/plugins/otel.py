"""Traces and metrics for OpenTelemetry, by its conventions for generative AI.

Theory of operation. A chat, stream or session turn is a span `turn`, made by a middleware in the task that takes the
turn, which has the context of the asker. In it each request is a span `chat MODEL` with all its attempts, and each tool
call a span `execute_tool NAME`, which is the current one while the tool runs: so what a tool traces by itself stands
beneath it. In a `chat` are a span `queue` for each wait for a place and a span `attempt` for each time it was sent.

Names and units are those of the conventions as published at https://opentelemetry.io/docs/specs/semconv/gen-ai/ (in
development, version 1.41); what these have no name for begins with `gorouter.`. Texts of users, models and tools are
in nothing, unless `capture_content` asks for them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import urlsplit

import trio
from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from ..config import Seams
from ..errors import ApiError, DecodeError, GorouterError
from ..wire.codec import decode_json, encode_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.metrics import Histogram, MeterProvider
    from opentelemetry.trace import Span, TracerProvider
    from opentelemetry.util.types import AttributeValue

    from .._turns.chain import ChatState, Next
    from ..client import Client
    from ..pool.attempts import AttemptRecord
    from ..pool.tracing import ToolStart
    from ..runtime_events import ChatContext
    from ..wire.mail import HttpCall
    from ..wire.responses import Usage
    from ..wire.result import CallRecord, ChatResult
    from ..wire.toolcalls import ToolCallReport

__all__ = ["OpenTelemetryPlugin"]

_SCOPE: Final = "gorouter_trio"
_SCHEMA: Final = "https://opentelemetry.io/schemas/1.41.0"
_PROVIDER: Final = "openrouter"
_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKENS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_USD: Final = (0.00001, 0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
# What a request may say, and how the conventions call it; the first that is there counts.
_OPTIONS: Final = (
    ("temperature", "gen_ai.request.temperature", float),
    ("top_p", "gen_ai.request.top_p", float),
    ("top_k", "gen_ai.request.top_k", float),
    ("frequency_penalty", "gen_ai.request.frequency_penalty", float),
    ("presence_penalty", "gen_ai.request.presence_penalty", float),
    ("max_tokens", "gen_ai.request.max_tokens", int),
    ("max_completion_tokens", "gen_ai.request.max_tokens", int),
    ("seed", "gen_ai.request.seed", int),
)

_Attributes = dict[str, "AttributeValue"]


class OpenTelemetryPlugin:
    """Traces every chat, stream, session turn and tool call, and records the metrics of the conventions.

    Needs the extra `otel`. The providers are the global ones if none are given. `attempts` adds the spans `queue` and
    `attempt` to each request. `capture_content` puts what was asked and answered, and the arguments and results of
    tools, into the spans: it may hold what must not be stored, and may be large.

    The trace of whoever asks goes along into sessions, workers and tools that run in tasks and threads; not into those
    that run in processes, and not to the API.
    """

    name = "opentelemetry"

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        attempts: bool = True,
        capture_content: bool = False,
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider, schema_url=_SCHEMA)
        self._instruments = _Instruments(meter_provider)
        self._attempts = attempts
        self._content = capture_content
        self._wall = Seams().wall
        self._request_key = otel_context.create_key("gorouter_trio request")
        self._server: _Attributes = {}

    def init(self, client: Client) -> None:
        """Called by the client."""
        parts = urlsplit(client.base_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        self._server = {"server.address": parts.hostname or "", "server.port": port}
        client.use(self._turn)
        client.add_tracer(self)

    async def _turn(self, context: ChatContext, state: ChatState, proceed: Next) -> None:
        """The span of a turn, and what of its request is in the spans of its requests."""
        span = self._tracer.start_span(
            "turn", start_time=self.clock()(trio.current_time()), attributes=_of_turn(context)
        )
        around = trace.set_span_in_context(span)
        token = otel_context.attach(otel_context.set_value(self._request_key, _of_options(state.options), around))
        try:
            await proceed()
        except BaseException as exc:
            _set_error(span, exc)
            raise
        else:
            if state.result is not None:
                span.set_attributes(_of_whole(state.result))
        finally:
            otel_context.detach(token)
            span.end(end_time=self.clock()(trio.current_time()))

    def begin_request(self, call: HttpCall) -> _ChatSpan | None:
        """Called by the client."""
        if call.path != "/chat/completions":
            return None
        options = otel_context.get_value(self._request_key)
        attributes: _Attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": call.settings.model,
            "gorouter.purpose": call.purpose,
            **self._server,
            **cast("_Attributes", options or {}),
        }
        if call.streaming:
            attributes["gen_ai.request.stream"] = True
        if call.flow:
            attributes["gen_ai.conversation.id"] = call.flow
        if self._content:
            attributes["gen_ai.input.messages"] = _messages_of(call.body)
        ns = self.clock()
        name = f"chat {call.settings.model}".rstrip()
        span = self._tracer.start_span(
            name, kind=SpanKind.CLIENT, attributes=attributes, start_time=ns(trio.current_time())
        )
        return _ChatSpan(span, self, call, ns)

    def begin_tool(self, start: ToolStart) -> _ExecuteToolSpan:
        """Called by the client."""
        attributes: _Attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": start.tool,
            "gen_ai.tool.call.id": start.call_id,
            "gen_ai.tool.type": "function",
        }
        if start.description:
            attributes["gen_ai.tool.description"] = start.description
        if start.session is not None:
            attributes["gen_ai.conversation.id"] = start.session
        ns = self.clock()
        span = self._tracer.start_span(
            f"execute_tool {start.tool}".rstrip(), attributes=attributes, start_time=ns(trio.current_time())
        )
        return _ExecuteToolSpan(span, self, ns)

    # For spans

    def clock(self) -> _Nanoseconds:
        """The trio clock of now in nanoseconds since the epoch."""
        return _Nanoseconds(self._wall() - trio.current_time())

    @property
    def instruments(self) -> _Instruments:
        """Where metrics are recorded."""
        return self._instruments

    @property
    def has_content(self) -> bool:
        """Whether texts are recorded."""
        return self._content

    def add_attempt(self, record: AttemptRecord, *, parent: Context, ns: _Nanoseconds) -> None:
        """The spans of one attempt, which is over."""
        self._instruments.queue.record(max(0.0, record.taken_at - record.queued_at), {"gorouter.lane": record.lane})
        if not self._attempts:
            return
        was_sent = record.sent_at != -math.inf
        queued_until = record.taken_at if was_sent else record.ended_at
        queue = self._tracer.start_span("queue", parent, start_time=ns(record.queued_at))
        queue.set_attribute("gorouter.lane", record.lane)
        queue.end(end_time=ns(max(record.queued_at, queued_until)))
        if not was_sent:
            return
        attributes: _Attributes = {"gorouter.attempt": record.attempt, "http.request.method": record.method}
        if record.attempt > 1:
            attributes["http.request.resend_count"] = record.attempt - 1
        if record.status is not None:
            attributes["http.response.status_code"] = record.status
        if record.key:
            attributes["gorouter.key"] = record.key
        attributes |= self._server
        span = self._tracer.start_span(
            "attempt", parent, kind=SpanKind.CLIENT, attributes=attributes, start_time=ns(record.taken_at)
        )
        if record.error is not None or record.cancelled:
            kind = "cancelled" if record.cancelled else str(record.error)
            span.set_attribute("error.type", kind)
            span.set_status(Status(StatusCode.ERROR, kind))
        if record.maybe_billed:
            span.set_attribute("gorouter.maybe_billed", True)
        span.end(end_time=ns(max(record.taken_at, record.ended_at)))


class _Nanoseconds:
    """Times of the trio clock as OpenTelemetry wants them."""

    __slots__ = ("_offset_s",)

    def __init__(self, offset_s: float) -> None:
        self._offset_s = offset_s

    def __call__(self, at: float) -> int:
        return int((at + self._offset_s) * 1e9)


class _ChatSpan:
    """`RequestSpan` of a chat."""

    __slots__ = ("_began", "_call", "_ns", "_parent", "_plugin", "_span")

    def __init__(self, span: Span, plugin: OpenTelemetryPlugin, call: HttpCall, ns: _Nanoseconds) -> None:
        self._span = span
        self._plugin = plugin
        self._call = call
        self._ns = ns
        self._parent = trace.set_span_in_context(span)
        self._began = trio.current_time()

    def attempted(self, record: AttemptRecord) -> None:
        """An attempt is over."""
        self._plugin.add_attempt(record, parent=self._parent, ns=self._ns)

    def finished(self, result: ChatResult) -> None:
        """There is an answer."""
        call = result.call
        self._span.set_attributes(_of_answer(call))
        if self._call.streaming and call.ttft_s is not None:
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", call.queue_wait_s + call.ttft_s)
        if self._plugin.has_content:
            self._span.set_attribute("gen_ai.output.messages", _output_of(result))
        self._plugin.instruments.record_answer(self._labels(call.model), call, is_streamed=self._call.streaming)
        self._end(call.model)

    def failed(self, error: BaseException) -> None:
        """There is none."""
        _set_error(self._span, error)
        self._end(None, error)

    def _labels(self, model: str | None) -> _Attributes:
        labels: _Attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": self._call.settings.model,
        }
        return labels if model is None else {**labels, "gen_ai.response.model": model}

    def _end(self, model: str | None, error: BaseException | None = None) -> None:
        now = trio.current_time()
        labels = self._labels(model)
        if error is not None:
            labels["error.type"] = _type_of(error)
        self._plugin.instruments.duration.record(now - self._began, labels)
        self._span.end(end_time=self._ns(now))


class _ExecuteToolSpan:
    """`ToolSpan` of a tool call."""

    __slots__ = ("_began", "_ns", "_plugin", "_span")

    def __init__(self, span: Span, plugin: OpenTelemetryPlugin, ns: _Nanoseconds) -> None:
        self._span = span
        self._plugin = plugin
        self._ns = ns
        self._began = trio.current_time()

    def activate(self) -> None:
        """Be the current span of the tool; its task ends with it, and needs no detaching."""
        otel_context.attach(trace.set_span_in_context(self._span))

    def finished(self, report: ToolCallReport) -> None:
        """The call has its outcome."""
        labels: _Attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": report.name}
        self._span.set_attribute("gorouter.tool.status", report.status)
        if not report.is_success:
            labels["error.type"] = kind = report.status if report.error is None else report.error.type
            self._span.set_attribute("error.type", kind)
            self._span.set_status(Status(StatusCode.ERROR, report.status))
        if self._plugin.has_content:
            self._span.set_attribute("gen_ai.tool.call.arguments", report.raw_arguments)
            self._span.set_attribute("gen_ai.tool.call.result", report.text)
        now = trio.current_time()
        self._plugin.instruments.tool.record(now - self._began, labels)
        self._span.end(end_time=self._ns(now))


class _Instruments:
    """The metrics, under the names of the conventions where they have one."""

    def __init__(self, provider: MeterProvider | None) -> None:
        meter = metrics.get_meter(_SCOPE, meter_provider=provider, schema_url=_SCHEMA)

        def histogram(name: str, unit: str, meaning: str, bounds: Sequence[float]) -> Histogram:
            return meter.create_histogram(name, unit, meaning, explicit_bucket_boundaries_advisory=bounds)

        self.duration = histogram("gen_ai.client.operation.duration", "s", "GenAI operation duration.", _SECONDS)
        self.first = histogram(
            "gen_ai.client.operation.time_to_first_chunk", "s", "Time to receive the first chunk.", _FIRST
        )
        self.tokens = histogram("gen_ai.client.token.usage", "{token}", "Number of tokens used.", _TOKENS)
        self.tool = histogram("gen_ai.execute_tool.duration", "s", "Tool execution duration.", _SECONDS)
        self.queue = histogram("gorouter.client.queue.duration", "s", "Time waited for the pool.", _SECONDS)
        self.between = histogram(
            "gorouter.client.time_per_output_token", "s", "Mean time between the tokens of a stream.", _FIRST
        )
        self.cost = histogram("gorouter.client.cost", "USD", "What was charged, where the reply said it.", _USD)

    def record_answer(self, labels: Mapping[str, AttributeValue], call: CallRecord, *, is_streamed: bool) -> None:
        """What an answer says of itself."""
        usage = call.usage
        if usage is not None:
            for kind, count in (("input", usage.prompt_tokens), ("output", usage.completion_tokens)):
                if count is not None:
                    self.tokens.record(count, {**labels, "gen_ai.token.type": kind})
        if call.cost is not None:
            self.cost.record(float(call.cost), labels)
        if is_streamed and call.ttft_s is not None:
            self.first.record(call.queue_wait_s + call.ttft_s, labels)
            tokens = 0 if usage is None else usage.completion_tokens or 0
            if tokens > 1:
                rest_s = max(0.0, call.duration_s - call.queue_wait_s - call.ttft_s)
                self.between.record(rest_s / (tokens - 1), labels)


# Attributes


def _of_turn(context: ChatContext) -> _Attributes:
    attributes: _Attributes = {"gorouter.chat.id": context.chat_id, "gorouter.lane": context.lane}
    if context.session is not None:
        attributes["gen_ai.conversation.id"] = context.session
    if context.turn_id is not None:
        attributes["gorouter.turn.id"] = context.turn_id
    if context.tenant:
        attributes["gorouter.tenant"] = context.tenant
    return attributes


def _of_whole(result: ChatResult[object]) -> _Attributes:
    attributes: _Attributes = {
        "gorouter.requests": len(result.rounds) + 1,
        "gorouter.attempts": result.attempts,
        "gorouter.tool_calls": len(result.tool_calls),
    }
    if result.cost is not None:
        attributes["gorouter.cost_usd"] = float(result.cost)
    return attributes


def _of_options(options: Mapping[str, object]) -> _Attributes:
    attributes: _Attributes = {}
    for name, attribute, kind in _OPTIONS:
        value = options.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            attributes[attribute] = kind(value)
    stop = options.get("stop")
    if isinstance(stop, str):
        attributes["gen_ai.request.stop_sequences"] = (stop,)
    elif isinstance(stop, list):
        attributes["gen_ai.request.stop_sequences"] = tuple(str(each) for each in stop)
    if options.get("response_format") is not None:
        attributes["gen_ai.output.type"] = "json"
    return attributes


def _of_answer(call: CallRecord) -> _Attributes:
    found: dict[str, AttributeValue | None] = {
        "gen_ai.response.id": call.generation_id,
        "gen_ai.response.model": call.model,
        "gen_ai.response.finish_reasons": None if call.finish_reason is None else (call.finish_reason,),
        "gorouter.upstream_provider": call.provider,
        "gorouter.interrupted": True if call.interrupted else None,
        **({} if call.usage is None else _of_usage(call.usage)),
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_usage(usage: Usage) -> dict[str, AttributeValue | None]:
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": None if prompt is None else prompt.cached_tokens,
        "gen_ai.usage.reasoning.output_tokens": None if completion is None else completion.reasoning_tokens,
        "gorouter.cost_usd": None if usage.cost is None else float(usage.cost),
    }


def _type_of(error: BaseException) -> str:
    return "cancelled" if isinstance(error, trio.Cancelled) else type(error).__name__


def _set_error(span: Span, error: BaseException) -> None:
    """The kind of an error; its message may hold what was said, and is left out."""
    kind = _type_of(error)
    span.set_attribute("error.type", kind)
    if isinstance(error, ApiError):
        span.set_attribute("http.response.status_code", error.status)
    if isinstance(error, GorouterError) and error.maybe_billed:
        span.set_attribute("gorouter.maybe_billed", True)
    span.set_status(Status(StatusCode.ERROR, kind))


# Content


def _messages_of(body: bytes) -> str:
    try:
        decoded = decode_json(body)
    except DecodeError:
        return "[]"
    messages = decoded.get("messages") if isinstance(decoded, dict) else None
    return _encoded([_message(each) for each in messages or () if isinstance(each, dict)])


def _output_of(result: ChatResult) -> str:
    message = decode_json(encode_json(result.message))
    made = _message(cast("dict[str, object]", message))
    return _encoded([{**made, "finish_reason": result.finish_reason or ""}])


def _message(message: Mapping[str, object]) -> dict[str, object]:
    """A message in the form of the conventions: a role, and parts."""
    parts: list[object] = []
    content = message.get("content")
    if message.get("role") == "tool":
        parts.append({"type": "tool_call_response", "id": message.get("tool_call_id"), "result": content})
    elif isinstance(content, str):
        parts.append({"type": "text", "content": content})
    elif isinstance(content, list):
        parts += [_part(each) for each in content]
    for call in cast("list[dict[str, object]]", message.get("tool_calls") or []):
        function = cast("dict[str, object]", call.get("function") or {})
        made = {"id": call.get("id"), "name": function.get("name"), "arguments": function.get("arguments")}
        parts.append({"type": "tool_call", **made})
    return {"role": message.get("role"), "parts": parts}


def _part(part: object) -> object:
    if isinstance(part, dict) and part.get("type") == "text":
        return {"type": "text", "content": part.get("text")}
    # Pictures and sounds are told of, not copied.
    return {"type": str(part.get("type")) if isinstance(part, dict) else "unknown"}


def _encoded(value: object) -> str:
    return encode_json(value).decode()

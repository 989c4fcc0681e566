"""Scripted models and tools: what is answered is written down beforehand, or made from the request.

    model = ScriptedModel(["Hello!", use_tool("weather", city="Paris"), Fail(503), "It is 3 degrees."])

A reply is a text, tool calls, an error, silence, or a function of the request that gives one of them. It goes out in
the wire form of the simulator, whole or as a stream, whichever the request asks for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, cast, final

import trio
from msgspec import Struct

from ..errors import ConfigError
from ..simulator import _tokens, forms
from ..simulator._draws import Draws
from ..simulator.catalog import MODELS, SimulatedModel
from ..simulator.faults import ErrorReply
from ..simulator.forms import Event, Face, Generation, StreamForm
from ..simulator.model import Answer, CalledTool
from ..simulator.requests import parse_chat
from ..transport.http_server import EncodedHeaders, encode_headers, join_headers
from ..wire.codec import decode_json, encode_json

if TYPE_CHECKING:
    from ..simulator.requests import ChatRequest
    from ..transport.http_server import ServerReply, ServerRequest

__all__ = [
    "Break",
    "Fail",
    "Fixed",
    "Hang",
    "Reply",
    "Say",
    "ScriptEndedError",
    "ScriptedModel",
    "ScriptedRequest",
    "ScriptedTool",
    "ToolUse",
    "send_error",
    "use_tool",
]

_JSON: Final = encode_headers([("Content-Type", "application/json")])
_EVENTS: Final = encode_headers([("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")])
_CHAT_PATH: Final = "/chat/completions"


class Say(Struct, frozen=True):
    """A text. The first piece goes out `after_s` after the request, and each other `every_s` after the one before.

    `reasoning` comes before the text. `finish_reason` is what ended it.
    """

    text: str
    reasoning: str = ""
    after_s: float = 0.0
    every_s: float = 0.0
    finish_reason: Literal["stop", "length"] = "stop"


class ToolUse(Struct, frozen=True):
    """A call of a tool; `use_tool` makes one. A list of them is one reply that calls them all."""

    name: str
    arguments: Mapping[str, object] | str
    """A string is sent as it is, also when it is no JSON."""
    after_s: float = 0.0


class Fail(Struct, frozen=True):
    """An error with an HTTP status; `retry_after_s` becomes its Retry-After header."""

    status: int = 500
    message: str = "Internal Server Error"
    retry_after_s: float | None = None
    metadata: Mapping[str, object] | None = None
    after_s: float = 0.0

    def __post_init__(self) -> None:
        if self.retry_after_s is not None and not 0 <= self.retry_after_s < math.inf:
            raise ConfigError(f"Fail: retry_after_s must be 0 or more, and finite, not {self.retry_after_s!r}")


class Break(Struct, frozen=True):
    """A text that is cut off: the connection closes after this many pieces, or in the middle of a whole reply."""

    text: str
    after_pieces: int = 1
    after_s: float = 0.0
    every_s: float = 0.0


class Hang(Struct, frozen=True):
    """No answer at all, until the client gives up."""


@final
class ScriptedRequest:
    """A request as a script sees it; `body` is what came."""

    def __init__(self, body: bytes, chat: ChatRequest, *, number: int) -> None:
        self.body = body
        self.number = number
        """From 1, of the requests to this model."""
        reading = chat.read(0, "")
        self.text = reading.prompt
        """What the user said last."""
        self.prompt_tokens = reading.tokens
        self._chat = chat

    def __repr__(self) -> str:
        return f"<ScriptedRequest {self.number}: {self.text!r}>"

    @property
    def model(self) -> str | None:
        """The model that was asked for."""
        return self._chat.model

    @property
    def is_stream(self) -> bool:
        """Whether the answer is to be streamed."""
        return bool(self._chat.stream)

    @property
    def messages(self) -> list[dict[str, object]]:
        """The messages, as JSON has them."""
        return cast("list[dict[str, object]]", self.fields["messages"])

    @property
    def fields(self) -> dict[str, object]:
        """All fields of the request, as JSON has them."""
        return cast("dict[str, object]", decode_json(self.body))

    @property
    def tools(self) -> list[str]:
        """The names of the tools on offer."""
        return list(self._chat.functions)

    @property
    def tool_results(self) -> dict[str, str]:
        """What the tool messages at the end of the conversation say, by the id of their calls."""
        found: dict[str, str] = {}
        for message in reversed(self._chat.conversation):
            if message.role != "tool":
                break
            found[message.tool_call_id or ""] = message.text
        return found


Fixed: TypeAlias = str | Say | ToolUse | Sequence[ToolUse] | Fail | Break | Hang
"""A reply that is no function."""

Reply: TypeAlias = "Fixed | Callable[[ScriptedRequest], Reply | Awaitable[Reply]]"
"""What a script may hold. A function is called with the request when its turn comes."""


class ScriptEndedError(AssertionError):
    """The model was asked more often than its script has replies."""


@final
class ScriptedModel:
    """A model that answers with `replies`, one a request, in the order of the requests.

    `replies` is any iterable, which is read as requests come, or one function that answers every request. With `loop`,
    they start again at their end, those of an iterator too; without it, or where there are none, one request too many
    raises `ScriptEndedError` in the handler, which fails the world that it runs in. `World.serve` puts a model in the
    place of the simulator; `handler` is for an HTTP server of your own. `requests` holds what was asked so far. Use an
    object in one world only.
    """

    def __init__(self, replies: Iterable[Reply] | Callable[[ScriptedRequest], Reply], *, loop: bool = False) -> None:
        if isinstance(replies, (str, Struct)):
            raise TypeError(f"replies: a list of replies, not one alone: {replies!r}")
        self.requests: list[ScriptedRequest] = []
        self._replies = _every(replies, loop=loop)
        self._given = 0

    def __repr__(self) -> str:
        return f"<ScriptedModel: {len(self.requests)} requests>"

    async def handler(self, request: ServerRequest, reply: ServerReply) -> None:
        """Answer one HTTP request."""
        if request.method != "POST" or not request.path.endswith(_CHAT_PATH):
            await send_error(reply, 404, message="Not Found")
            return
        chat = parse_chat(request.body)
        if isinstance(chat, ErrorReply):
            await reply.send(chat.status, _JSON, body=chat.body)
            return
        seen = ScriptedRequest(request.body, chat, number=len(self.requests) + 1)
        self.requests.append(seen)
        await _Answering(seen, reply).give(await self._next(seen))

    async def _next(self, request: ScriptedRequest) -> Reply:
        for reply in self._replies:
            self._given += 1
            while callable(reply):
                made = reply(request)
                reply = await made if inspect.isawaitable(made) else made
            return reply
        raise ScriptEndedError(
            f"request {request.number} to the model ({request.text!r}); its script has {self._given} replies"
        )


def _every(replies: Iterable[Reply] | Callable[[ScriptedRequest], Reply], *, loop: bool) -> Iterator[Reply]:
    if callable(replies):
        while True:
            yield replies
    given: list[Reply] = []
    for reply in replies:
        if loop:
            given.append(reply)
        yield reply
    while loop and given:
        yield from given


@final
class _Answering:
    """One reply of a script on its way."""

    def __init__(self, request: ScriptedRequest, reply: ServerReply) -> None:
        self._request = request
        self._reply = reply
        self._started_at = trio.current_time()
        self._draws = Draws(b"script %d" % request.number)

    async def give(self, reply: Reply) -> None:
        """Send it; ends early when the client is gone."""
        try:
            async with self._reply.open_disconnect_scope():
                await self._give(reply)
        except trio.BrokenResourceError:
            if not self._reply.is_disconnected:
                raise

    async def _give(self, reply: Reply) -> None:
        match reply:
            case Hang():
                await trio.sleep_forever()
            case Fail():
                await self._fail(reply)
            case Break():
                await self._send(self._generation(reply.text), reply, cut_after=reply.after_pieces)
            case Say():
                generation = self._generation(reply.text, reasoning=reply.reasoning, finish_reason=reply.finish_reason)
                await self._send(generation, reply)
            case str():
                await self._send(self._generation(reply), Say(reply))
            case ToolUse():
                await self._call([reply])
            case [*calls] if calls and all(isinstance(call, ToolUse) for call in calls):
                await self._call(calls)
            case other:
                raise TypeError(f"a script cannot hold {other!r}")

    async def _fail(self, fail: Fail) -> None:
        await self._sleep_until(fail.after_s)
        headers = () if fail.retry_after_s is None else (("Retry-After", _seconds(fail.retry_after_s)),)
        await send_error(self._reply, fail.status, message=fail.message, metadata=fail.metadata, headers=headers)

    async def _call(self, calls: list[ToolUse]) -> None:
        made = [CalledTool(f"call_{self._draws.alnum(24)}", call.name, _encoded(call.arguments)) for call in calls]
        generation = self._generation("", calls=made, finish_reason="tool_calls")
        await self._send(generation, Say("", after_s=max(call.after_s for call in calls)))

    def _generation(
        self,
        text: str,
        *,
        reasoning: str = "",
        calls: Sequence[CalledTool] = (),
        finish_reason: Literal["stop", "length", "tool_calls"] = "stop",
    ) -> Generation:
        thoughts = _tokens.count(reasoning)
        said = _tokens.count(text) + sum(_tokens.count(call.arguments) for call in calls)
        model = _model(self._request.model)
        return Generation(
            id=f"gen-0-{self._draws.alnum(20)}",
            created=0,
            model=model,
            face=Face(model),
            answer=Answer(
                text=text,
                thoughts=reasoning,
                is_thinking_hidden=False,
                calls=calls,
                finish_reason=finish_reason,
                completion_tokens=thoughts + said,
                reasoning_tokens=thoughts,
            ),
            prompt_tokens=self._request.prompt_tokens,
        )

    async def _send(self, generation: Generation, pace: Say | Break, *, cut_after: int | None = None) -> None:
        form = StreamForm(generation)
        events = _pieces(form)
        named = encode_headers([("X-Generation-Id", generation.id)])
        if self._request.is_stream:
            ending = form.ending() if cut_after is None else None
            await self._stream(events[:cut_after], pace, ending=ending, headers=join_headers(_EVENTS, named))
            return
        await self._sleep_until(pace.after_s + pace.every_s * max(0, len(events) - 1))
        body = forms.completion(generation)
        if cut_after is None:
            await self._reply.send(200, join_headers(_JSON, named), body=body, chunked=True)
        else:
            await self._reply.start(200, join_headers(_JSON, named), first=body[: len(body) // 2])
            self._reply.abort()

    async def _stream(
        self, events: Sequence[Event], pace: Say | Break, *, ending: bytes | None, headers: EncodedHeaders
    ) -> None:
        """A comment at once, then the events at their times; without an ending the stream is cut."""
        reply = self._reply
        await reply.start(200, headers, first=forms.COMMENT)
        pieces = [event.data for event in events] if pace.every_s else [b"".join([event.data for event in events])]
        for number, piece in enumerate(pieces):
            await self._sleep_until(pace.after_s + pace.every_s * number)
            await reply.write(piece)
        if ending is None:
            reply.abort()
        else:
            await reply.finish(last=ending)

    async def _sleep_until(self, due_s: float) -> None:
        left = self._started_at + due_s - trio.current_time()
        if left > 0:
            await trio.sleep(left)


async def send_error(
    reply: ServerReply,
    status: int,
    *,
    message: str,
    metadata: Mapping[str, object] | None = None,
    headers: Sequence[tuple[str, str]] = (),
) -> None:
    """Answer with an error as the API writes it."""
    error = {"message": message, "code": status} | ({} if metadata is None else {"metadata": metadata})
    block = join_headers(_JSON, encode_headers(headers))
    await reply.send(status, block, body=encode_json({"error": error}), chunked=True)


def _pieces(form: StreamForm) -> list[Event]:
    """The events, each with something to read: one that only opens the stream goes out with the next."""
    first, *others = form.events() or [Event(b"", 0)]
    if first.tokens or not others:
        return [first, *others]
    return [Event(first.data + others[0].data, others[0].tokens), *others[1:]]


def _model(name: str | None) -> SimulatedModel:
    """The model of this name in the simulator's catalog, or one that is served for nothing."""
    for model in MODELS:
        if model.id == name:
            return model
    name = name or "scripted/model"
    return SimulatedModel(id=name, name=name, provider="Scripted", served_as=name)


def _seconds(value: float) -> str:
    """Without an exponent, which no header may have."""
    return str(int(value)) if value == int(value) else f"{value:.3f}"


def _encoded(arguments: Mapping[str, object] | str) -> str:
    return arguments if isinstance(arguments, str) else encode_json(arguments).decode("utf-8")


def use_tool(name: str, /, **arguments: object) -> ToolUse:
    """A reply that calls the tool `name` with these arguments."""
    return ToolUse(name, arguments)


@final
class ScriptedTool:
    """A tool that gives out `results`, one a call: values, exceptions (or classes of them) to raise, or functions of
    the arguments.

    `await tool(city="Paris")` is a call; `calls` holds the arguments of each so far. `definition` is what stands in
    `tools=[...]` of a request; `parameters` is the JSON schema of the arguments, by default any object.
    """

    def __init__(
        self,
        name: str,
        results: Iterable[object] | Callable[..., object],
        *,
        description: str = "",
        parameters: Mapping[str, object] | None = None,
    ) -> None:
        if isinstance(results, (str, bytes, Mapping)):
            raise TypeError(f"results: a list of results, not one {type(results).__name__}")
        self.name = name
        self.calls: list[dict[str, object]] = []
        self._results = _results(results)
        self._description = description
        self._parameters = parameters or {"type": "object", "additionalProperties": True}

    def __repr__(self) -> str:
        return f"<ScriptedTool {self.name}: {len(self.calls)} calls>"

    @property
    def definition(self) -> dict[str, object]:
        """The tool as a request offers it."""
        function = {"name": self.name, "description": self._description, "parameters": dict(self._parameters)}
        return {"type": "function", "function": function}

    async def __call__(self, **arguments: object) -> object:
        """One call; raises the result when it is an exception, `ScriptEndedError` when there is none left."""
        self.calls.append(arguments)
        await trio.lowlevel.checkpoint()
        for result in self._results:
            if isinstance(result, type) and issubclass(result, BaseException):
                raise result
            made = result(**arguments) if callable(result) else result
            value = await made if inspect.isawaitable(made) else made
            if isinstance(value, BaseException):
                raise value
            return value
        raise ScriptEndedError(f"{self.name} was called {len(self.calls)} times, more often than it has results")


def _results(results: Iterable[object] | Callable[..., object]) -> Iterator[object]:
    if callable(results):
        while True:
            yield results
    yield from results

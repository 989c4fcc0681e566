"""A client, the API that it talks to, and the network between them: everything in one process, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import msgspec

from gorouter_trio import Client, LedgerConfig, PricePolicy, open_client
from gorouter_trio.simulator import SimulatedNetwork, Simulator, SimulatorConfig, open_simulated_network
from gorouter_trio.transport.http_server import ServerReply, ServerRequest, encode_headers

JSON = encode_headers([("Content-Type", "application/json")])
EVENTS = encode_headers([("Content-Type", "text/event-stream")])

T = TypeVar("T")

# Nothing is sent that a test did not ask for.
QUIET: Mapping[str, object] = {"prices": PricePolicy(on_start=False, refresh_s=None), "ledger": LedgerConfig(lookups=0)}

Handler = Callable[[ServerRequest, ServerReply], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that reached the API: its path, its headers and its body."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        """The body as decoded JSON."""
        return msgspec.json.decode(self.raw, type=dict[str, Any])

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of the request."""
        return cast("list[dict[str, Any]]", self.body["messages"])

    @property
    def contents(self) -> list[object]:
        """What the messages say."""
        return [message.get("content") for message in self.messages]


class Api:
    """An API that notes what it is asked and lets `answer` answer it.

    `answer` may be exchanged at any time; it is a simulator's handler or one of the test's own. Noting can be turned
    off for tests that send much.
    """

    def __init__(self, answer: Handler, *, notes: bool = True) -> None:
        self.answer = answer
        self.notes = notes
        self.sent: list[Sent] = []

    async def handler(self, request: ServerRequest, reply: ServerReply) -> None:
        if self.notes:
            headers = {name.decode(): value.decode() for name, value in request.headers}
            self.sent.append(Sent(request.path, headers, bytes(request.body)))
        await self.answer(request, reply)


@dataclass(slots=True)
class World:
    """What a test has to do with."""

    client: Client
    api: Api
    simulator: Simulator
    network: SimulatedNetwork
    fields: dict[str, object] = field(default_factory=dict)

    @property
    def sent(self) -> list[Sent]:
        """The requests so far."""
        return self.api.sent

    def another_client(self, **fields: object) -> AbstractAsyncContextManager[Client]:
        """A second client of the same network, to be entered with `async with`."""
        return open_client(**{**self.fields, **fields})


@asynccontextmanager
async def open_world(
    config: SimulatorConfig | None = None, *, answer: Handler | None = None, notes: bool = True, **fields: object
) -> AsyncIterator[World]:
    """A running client of a simulated API; `fields` are the client's, `answer` replaces the simulator's answers."""
    simulator = Simulator(config or SimulatorConfig(), wall=lambda: 1_800_000_000.0)
    api = Api(answer or simulator.handler, notes=notes)
    async with open_simulated_network(cast("Simulator", api)) as network:
        settings: dict[str, object] = {"api_key": "sk-test", "base_url": network.base_url}
        settings |= {"transport": network, "insecure_http": True, **QUIET, **fields}
        async with open_client(**settings) as client:
            yield World(client, api, simulator, network, settings)


def there(value: T | None) -> T:
    """The value, which has to be there."""
    assert value is not None
    return value


def open_quiet_client(**fields: object) -> AbstractAsyncContextManager[Client]:
    """A client that sends nothing of its own accord."""
    return open_client(**{**QUIET, **fields})


# Replies of an API with a mind of the test's own


def completion(
    content: object = "Yes.", *, tool_calls: Sequence[tuple[str, str]] = (), finish: str = "stop", **more: object
) -> bytes:
    """The body of a whole reply; `tool_calls` are (id, name) pairs, `more` goes into the message."""
    message: dict[str, object] = {"role": "assistant", "content": content, **more}
    if tool_calls:
        finish = "tool_calls"
        message["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}
            for call_id, name in tool_calls
        ]
    return msgspec.json.encode(
        {
            "id": "gen-1",
            "model": "test/model",
            "provider": "Test",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "cost": 0.25},
        }
    )


def chunk(
    delta: Mapping[str, object] | None = None,
    *,
    finish: str | None = None,
    choice: Mapping[str, object] | None = None,
    **more: object,
) -> bytes:
    """One event of a streamed reply; `choice` are further fields of its choice, the others are the event's own."""
    choice = {"index": 0, "delta": {"role": "assistant", **(delta or {})}, "finish_reason": finish, **(choice or {})}
    event = {"id": "gen-1", "model": "test/model", "provider": "Test", "choices": [choice], **more}
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def replies(*bodies: bytes | tuple[int, bytes]) -> Handler:
    """Answers with these bodies, one after the other, the last one for ever; a status other than 200 goes before."""
    left = list(bodies)

    async def answer(_request: ServerRequest, reply: ServerReply) -> None:
        body = left.pop(0) if len(left) > 1 else left[0]
        status, body = body if isinstance(body, tuple) else (200, body)
        await reply.send(status, JSON, body=body)

    return answer


def streams(*pieces: bytes) -> Handler:
    """Answers every request with a stream of these pieces, each in a write of its own."""

    async def answer(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.start(200, EVENTS)
        for piece in pieces:
            await reply.write(piece)
        await reply.finish()

    return answer


def errors(status: int, message: str = "no", **more: object) -> Handler:
    """Answers every request with an error."""

    async def answer(_request: ServerRequest, reply: ServerReply) -> None:
        error = {"code": status, "message": message, **more}
        await reply.send(status, JSON, body=msgspec.json.encode({"error": error}))

    return answer

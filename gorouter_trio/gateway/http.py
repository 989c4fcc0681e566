"""Plain HTTP on the gateway's port: whether it is well, its metrics, and an API that other clients know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import (
    AccessDeniedError,
    ActorGoneError,
    BadRequestError,
    GorouterError,
    NotFoundError,
    SecurityError,
    SessionBusyError,
)
from ..secret import Secret
from ..transport.http_server import encode_headers
from ..wire.codec import encode_json
from .backend import Caller
from .census import address_group
from .metrics import metrics_text
from .openai import CompletionStream, completion_body, error_body, read_request, status_of
from .protocol import SYSTEM_ROLES
from .streams import PrefixedStream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from .._turns.stream import ChatStream
    from ..transport.http_server import ServerReply, ServerRequest
    from ..wire.result import ChatResult
    from .core import GatewayCore
    from .openai import CompletionRequest

__all__ = ["HttpFront"]

_JSON: Final = encode_headers([("Content-Type", "application/json"), ("Cache-Control", "no-store")])
_TEXT: Final = encode_headers([("Content-Type", "text/plain; version=0.0.4; charset=utf-8")])
_EVENTS: Final = encode_headers([("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")])
_SESSION: Final = "x-session"
_TURN: Final = "idempotency-key"
_BEARER: Final = "bearer "
_MOST_ID: Final = 256


class HttpFront:
    """Answers plain requests. Nobody learns more here than over a WebSocket."""

    def __init__(self, core: GatewayCore) -> None:
        self._core = core
        self._routes: Mapping[tuple[str, str], Callable[[ServerRequest, ServerReply], Awaitable[None]]] = {
            ("GET", "/healthz"): self._health,
            ("HEAD", "/healthz"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/chat/completions"): self._complete,
        }

    async def handler(self, request: ServerRequest, reply: ServerReply) -> None:
        """Answer one request."""
        route = self._routes.get((request.method, request.path))
        try:
            if route is None:
                raise NotFoundError(f"there is no {request.method} {request.path}", status=404)
            await route(request, reply)
        except GorouterError as exc:
            if reply.is_started:
                raise
            status = status_of(exc)
            await reply.send(status, _JSON, body=error_body(exc, status=status))

    async def _health(self, _request: ServerRequest, reply: ServerReply) -> None:
        """200 while new turns are taken, 503 while the gateway goes away, so that load balancers look elsewhere."""
        is_well = not self._core.is_draining
        await reply.send(200 if is_well else 503, _JSON, body=b'{"status":"%b"}' % (b"ok" if is_well else b"draining"))

    async def _metrics(self, request: ServerRequest, reply: ServerReply) -> None:
        if not self._core.may_look(await self._caller(request, reply)):
            raise AccessDeniedError("only operators may see what the gateway does")
        await reply.send(200, _TEXT, body=metrics_text(self._core).encode())

    async def _models(self, request: ServerRequest, reply: ServerReply) -> None:
        await self._caller(request, reply)
        allowed = self._core.config.models
        names = sorted(allowed) if allowed is not None else [model.id for model in await self._core.client.models()]
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": name.partition("/")[0]} for name in names]
        await reply.send(200, _JSON, body=encode_json({"object": "list", "data": rows}))

    async def _caller(self, request: ServerRequest, reply: ServerReply) -> Caller:
        """Who asks; raises `SecurityError`. A page of another origin is refused, whatever it brings along."""
        if not self._core.admits_origin(request.get("origin")):
            raise AccessDeniedError("this origin may not ask")
        header = request.get("authorization") or ""
        token = Secret(header[len(_BEARER) :].strip()) if header[: len(_BEARER)].lower() == _BEARER else None
        stream = reply.stream
        address = address_group(stream.address) if isinstance(stream, PrefixedStream) else ""
        try:
            principal = await self._core.identify(token, source=address)
        except SecurityError:
            self._core.note_refused("token")
            raise
        return Caller(principal, None if principal is None else token, address)

    # Chats

    async def _complete(self, request: ServerRequest, reply: ServerReply) -> None:
        caller = await self._caller(request, reply)
        if self._core.is_draining:
            raise ActorGoneError("the gateway goes away; ask another one")
        completion = read_request(bytes(request.body))
        chat = _Chat(self._core, caller, completion, session=_id(request, _SESSION), turn_id=_id(request, _TURN))
        chat.check()
        hub = self._core.hub
        if not hub.has_room(*caller.identity):
            raise SessionBusyError("too many turns of this principal run")
        # Who leaves stops the turn: nobody else waits for it.
        with hub.counted(*caller.identity):
            async with reply.open_disconnect_scope():
                await self._answer(chat, reply)

    async def _answer(self, chat: _Chat, reply: ServerReply) -> None:
        if chat.request.is_streamed:
            await self._stream(chat, reply)
            return
        result = await chat.whole()
        await reply.send(200, _JSON, body=completion_body(result, created=int(self._core.wall())))

    async def _stream(self, chat: _Chat, reply: ServerReply) -> None:
        stream = CompletionStream(
            chat.request, created=int(self._core.wall()), own_tools=bool(self._core.backend.tool_names)
        )
        try:
            await self._send_events(chat, stream, reply)
        except GorouterError as exc:
            if not reply.is_started:
                raise
            await reply.finish(last=stream.fail(exc))

    async def _send_events(self, chat: _Chat, stream: CompletionStream, reply: ServerReply) -> None:
        async with chat.stream() as events:
            stream.identify(events.generation_id)
            await reply.start(200, _EVENTS)
            async for event in events:
                if piece := stream.take(event):
                    await reply.write(piece)
        # The turn of a session is stored by now.
        await reply.finish(last=stream.finish(events.result))


class _Chat:
    """One request: a turn of a session, or a chat of its own."""

    def __init__(
        self,
        core: GatewayCore,
        caller: Caller,
        request: CompletionRequest,
        *,
        session: str | None,
        turn_id: str | None,
    ) -> None:
        self.request = request
        self._core = core
        self._caller = caller
        self._session = session
        self._turn_id = turn_id

    def check(self) -> None:
        """Raise `GorouterError` for what cannot be asked."""
        backend = self._core.backend
        backend.check_options(self.request.options)
        backend.check_system(None, self.request.messages)
        if self._session is None:
            if self._turn_id is not None:
                raise BadRequestError(f"{_TURN}: needs a session, in {_SESSION}", status=400)
            return
        if all(message.get("role") in SYSTEM_ROLES for message in self.request.newest()):
            raise BadRequestError("messages: there is none behind the last answer", status=400)

    async def whole(self) -> ChatResult[object]:
        """The answer."""
        core, request = self._core, self.request
        options = core.backend.options(request.options, self._caller)
        if self._session is None:
            return await core.client.chat(list(request.messages), **options)
        ref = core.backend.session(self._session, self._caller, system=request.system)
        return await ref.ask(request.newest(), turn_id=self._turn_id, **options)

    def stream(self) -> AbstractAsyncContextManager[ChatStream[object]]:
        """The answer, as it comes."""
        core, request = self._core, self.request
        options = core.backend.options(request.options, self._caller)
        if self._session is None:
            return core.client.stream(list(request.messages), **options)
        ref = core.backend.session(self._session, self._caller, system=request.system)
        return ref.stream(request.newest(), turn_id=self._turn_id, **options)


def _id(request: ServerRequest, name: str) -> str | None:
    found = request.get(name)
    if found is None:
        return None
    if not found or len(found) > _MOST_ID:
        raise BadRequestError(f"{name}: must have 1 to {_MOST_ID} characters", status=400)
    try:
        # The server gives headers as Latin-1, clients mean UTF-8.
        return found.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise BadRequestError(f"{name}: is no UTF-8", status=400) from None

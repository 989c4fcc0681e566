"""The simulated OpenRouter: its routes, and how to serve them."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias, final
from urllib.parse import parse_qs, parse_qsl, unquote

import trio

from ..transport.http_server import (
    EncodedHeaders,
    HttpServerLimits,
    ServerReply,
    ServerRequest,
    encode_headers,
    serve_http,
)
from . import forms
from ._admission import Admission
from ._batches import BatchDesk
from ._books import Books
from ._exchange import Exchange, World
from ._listing import keeps_nothing, read_listing
from ._replay import replay
from ._slots import Course
from .config import RequestRecord, SimulatorConfig, SimulatorStatistics
from .faults import ErrorReply, plain
from .ledger import Ledger, generation_body
from .limits import LimitWindow, masked
from .outlet import JSON_HEADERS, Outlet
from .recordings import Recordings

if TYPE_CHECKING:
    from ._jobs import Kind
    from .catalog import SimulatedModel

__all__ = [
    "Simulator",
    "serve_simulator",
]

_PREFIX: Final = "/api/v1"
_MODELS_HEADERS: Final = encode_headers(
    [("Cache-Control", "public, max-age=120, stale-while-revalidate=3600, stale-if-error=3600")]
)
_NO_HEADERS: Final = encode_headers([])
_PRIVATE_HEADERS: Final = encode_headers([("Cache-Control", "private, no-store")])
_ENDPOINTS: Final = "/endpoints"
_BEARER: Final = "bearer "

_Route: TypeAlias = Callable[[ServerRequest, ServerReply], Awaitable[None]]


@final
class Simulator:
    """An OpenRouter in this process. One object is one account: its credits, its charges, its log.

    `handler` answers requests, behind `serve_simulator`, `open_simulated_network` or an HTTP server of your own. *wall*
    gives seconds since the epoch, for ids and dates; all durations are on the trio clock. *on_request* is called with a
    record of each chat request when it has ended; it must not raise.
    """

    def __init__(
        self,
        config: SimulatorConfig | None = None,
        *,
        wall: Callable[[], float] = time.time,  # noqa: TID251 - the default of the injected clock
        on_request: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self.config = config or SimulatorConfig()
        self._books = Books(self.config)
        models = {model.id: model for model in self.config.models}
        self._catalog = (*self.config.models, *self.config.embedding_models)
        embedding_models = {model.id: model for model in self.config.embedding_models}
        faces = {model.id: forms.Face(model) for model in self._catalog}
        server_wall = _with_offset(wall, self.config.clock_offset_s)
        admission = Admission(self.config, self._books.ledger, wall=server_wall)
        course = Course(self.config.scenario) if self.config.scenario is not None else None
        self._world = World(
            self.config, models, embedding_models, faces, self._books, server_wall, on_request, admission, course
        )
        self._desk = BatchDesk(self._world)
        self._recordings = Recordings(self.config.recordings)
        self._replays = bool(self.config.recordings) or self.config.only_recordings
        self._keys = None if self.config.api_keys is None else frozenset(self.config.api_keys)
        self._routes: Mapping[tuple[str, str], _Route] = {
            ("POST", "/chat/completions"): partial(self._generate, kind="chat"),
            ("POST", "/completions"): partial(self._generate, kind="text"),
            ("POST", "/embeddings"): partial(self._generate, kind="embeddings"),
            ("GET", "/models"): self._models,
            ("GET", "/models/user"): self._models_of_the_user,
            ("GET", "/models/count"): self._count_models,
            ("GET", "/embeddings/models"): self._embedding_models,
            ("GET", "/endpoints/zdr"): self._zdr_endpoints,
            ("GET", "/providers"): self._providers,
            ("GET", "/key"): self._key,
            ("GET", "/auth/key"): self._key,
            ("GET", "/credits"): self._credits,
            ("GET", "/generation"): self._generation,
            ("POST", "/batches"): self._submit_batch,
            ("GET", "/batches"): self._list_batches,
        }

    def __repr__(self) -> str:
        return f"<Simulator seed {self.config.seed}, {self._books.in_flight} in flight>"

    @property
    def wall(self) -> Callable[[], float]:
        """The server's wall clock: the one given, and `SimulatorConfig.clock_offset_s`."""
        return self._world.wall

    @property
    def ledger(self) -> Ledger:
        """What the account was charged."""
        return self._books.ledger

    def statistics(self) -> SimulatorStatistics:
        """A snapshot of the counters."""
        return self._books.statistics()

    def limit_windows(self) -> list[LimitWindow]:
        """What each rate limit has admitted and refused, window by window: see `simulator.limits`."""
        return self._world.admission.limit_windows()

    @property
    def held_nanousd(self) -> int:
        """The part of the credits that is held now: by requests in flight, and by those that settle.

        After the run, what was held when it was looked at last.
        """
        now_s = trio.current_time() if trio.lowlevel.in_trio_run() else -math.inf
        return self._world.admission.purse.held_nanousd(now_s)

    def recent_requests(self) -> list[RequestRecord]:
        """The last chat requests that ended, oldest first, as many as `SimulatorConfig.log_size` says."""
        return list(self._books.log)

    async def handler(self, request: ServerRequest, reply: ServerReply) -> None:
        """Answer one request of any kind."""
        path = request.path
        if self._replays and await self._replay(request, reply):
            return
        route = self._routes.get((request.method, path.removeprefix(_PREFIX))) if path.startswith(_PREFIX) else None
        if route is not None:
            await route(request, reply)
        elif request.method == "GET" and path.startswith(f"{_PREFIX}/model/"):
            await self._model(request, reply)
        elif request.method == "GET" and path.startswith(f"{_PREFIX}/models/") and path.endswith(_ENDPOINTS):
            await self._endpoints(request, reply)
        elif path.startswith(f"{_PREFIX}/batches/") and request.method in {"GET", "DELETE"}:
            await self._batch(request, reply)
        else:
            await self._error(reply, plain(404, "Not Found"))

    # Generations.

    async def _replay(self, request: ServerRequest, reply: ServerReply) -> bool:
        """Answer as it was recorded; says whether that answered it."""
        target = request.path.removeprefix(_PREFIX) + (f"?{request.query}" if request.query else "")
        recording = self._recordings.take(request.method, target, body=bytes(request.body))
        if recording is not None:
            await replay(self._world, reply, recording=recording, body=bytes(request.body))
        elif self.config.only_recordings:
            await self._error(reply, plain(404, f"No recording of {request.method} {target} with this body"))
        return recording is not None or self.config.only_recordings

    async def _generate(self, request: ServerRequest, reply: ServerReply, *, kind: Kind) -> None:
        key = await self._authorized(request, reply)
        if key is not None:
            await Exchange(self._world, request, reply=reply, key=key, kind=kind).run()

    # The catalog; it needs no key.

    async def _models(self, request: ServerRequest, reply: ServerReply) -> None:
        await self._list(request, reply, catalog=self._catalog)

    async def _models_of_the_user(self, request: ServerRequest, reply: ServerReply) -> None:
        if await self._authorized(request, reply) is not None:
            await self._list(request, reply, catalog=self._catalog)

    async def _embedding_models(self, request: ServerRequest, reply: ServerReply) -> None:
        await self._list(request, reply, catalog=self.config.embedding_models, default_output="all")

    async def _list(
        self,
        request: ServerRequest,
        reply: ServerReply,
        catalog: Sequence[SimulatedModel],
        *,
        default_output: str = "text",
    ) -> None:
        query = parse_qsl(request.query, keep_blank_values=True)
        listing = read_listing(query, catalog, now_s=self.wall(), default_output=default_output)
        if isinstance(listing, ErrorReply):
            await self._error(reply, listing)
            return
        following = None
        if listing.next_query is not None:
            following = f"{request.path}?{listing.next_query}"
        body = forms.models(listing.page, total=listing.total, next_url=following)
        await self._send(reply, body, extra=_MODELS_HEADERS)

    async def _count_models(self, request: ServerRequest, reply: ServerReply) -> None:
        listing = read_listing(parse_qsl(request.query), self._catalog, now_s=self.wall())
        if isinstance(listing, ErrorReply):
            await self._error(reply, listing)
        else:
            await self._send(reply, forms.model_count(listing.total))

    async def _zdr_endpoints(self, request: ServerRequest, reply: ServerReply) -> None:
        kept = [model for model in self.config.models if keeps_nothing(model)]
        body = forms.endpoint_list(kept, is_known=request.get("authorization") is not None)
        await self._send(reply, body)

    async def _providers(self, _request: ServerRequest, reply: ServerReply) -> None:
        await self._send(reply, forms.providers(sorted({model.provider for model in self._catalog})))

    async def _model(self, request: ServerRequest, reply: ServerReply) -> None:
        model = self._find(request.path.removeprefix(f"{_PREFIX}/model/"))
        if model is None:
            await self._error(reply, plain(404, "Not Found"))
        else:
            await self._send(reply, forms.one_model(model))

    async def _endpoints(self, request: ServerRequest, reply: ServerReply) -> None:
        model = self._find(request.path.removeprefix(f"{_PREFIX}/models/").removesuffix(_ENDPOINTS))
        if model is None:
            await self._error(reply, plain(404, "Not Found"))
        else:
            body = forms.endpoints(model, is_known=request.get("authorization") is not None)
            await self._send(reply, body)

    def _find(self, quoted: str) -> SimulatedModel | None:
        name = unquote(quoted)
        return self._world.models.get(name) or self._world.embedding_models.get(name)

    # The account.

    async def _key(self, request: ServerRequest, reply: ServerReply) -> None:
        key = await self._authorized(request, reply)
        if key is not None:
            body = forms.key(masked(key), self.ledger.used_by(key), free_requests=self._world.admission.free_requests())
            await self._send(reply, body, extra=_PRIVATE_HEADERS)

    async def _credits(self, request: ServerRequest, reply: ServerReply) -> None:
        if await self._authorized(request, reply) is not None:
            await self._send(reply, forms.credit_balance(self.config.credits_nanousd, self.ledger.total_nanousd))

    async def _generation(self, request: ServerRequest, reply: ServerReply) -> None:
        if await self._authorized(request, reply) is None:
            return
        wanted = parse_qs(request.query).get("id", [""])[0]
        charge = self.ledger.find(wanted)
        if charge is None or trio.current_time() < charge.ended_at_s + self.config.generation_lag_s:
            await self._error(reply, plain(404, f"Generation {wanted} not found"))
            return
        created_at = datetime.fromtimestamp(charge.created, UTC).isoformat(timespec="milliseconds")
        await self._send(reply, generation_body(charge, created_at=created_at))

    # The Batch API.

    async def _submit_batch(self, request: ServerRequest, reply: ServerReply) -> None:
        key = await self._authorized(request, reply)
        if key is not None:
            await self._say(reply, self._desk.submit(bytes(request.body), key), status=202)

    async def _list_batches(self, request: ServerRequest, reply: ServerReply) -> None:
        if await self._authorized(request, reply) is not None:
            query = parse_qs(request.query)
            limit = query.get("limit", ["20"])[0]
            is_number = limit.isascii() and limit.isdigit() and len(limit) < 10
            after = query.get("after", [None])[0]
            await self._say(reply, self._desk.list(limit=int(limit) if is_number else 20, after=after))

    async def _batch(self, request: ServerRequest, reply: ServerReply) -> None:
        if await self._authorized(request, reply) is not None:
            name = unquote(request.path.rpartition("/")[2])
            act = self._desk.delete if request.method == "DELETE" else self._desk.find
            await self._say(reply, act(name))

    async def _say(self, reply: ServerReply, body: bytes | ErrorReply, *, status: int = 200) -> None:
        if isinstance(body, ErrorReply):
            await self._error(reply, body)
        else:
            await reply.send(status, EncodedHeaders(JSON_HEADERS), body=body, chunked=self.config.chunked)

    # Common to all.

    async def _authorized(self, request: ServerRequest, reply: ServerReply) -> str | None:
        """The key of the request, or None after the 401 was sent."""
        header = request.get("authorization")
        if header is None:
            await self._error(reply, plain(401, "Missing Authentication header"))
            return None
        key = header[len(_BEARER) :].strip() if header[: len(_BEARER)].lower() == _BEARER else ""
        is_good = key.startswith("sk-") if self._keys is None else key in self._keys
        if not is_good:
            await self._error(reply, plain(401, "User not found."))
            return None
        return key

    async def _send(self, reply: ServerReply, body: bytes, *, extra: EncodedHeaders = _NO_HEADERS) -> None:
        await reply.send(200, EncodedHeaders(JSON_HEADERS + extra), body=body, chunked=self.config.chunked)

    async def _error(self, reply: ServerReply, error: ErrorReply) -> None:
        await Outlet(reply, self.config).error(error)


def _with_offset(wall: Callable[[], float], offset_s: float) -> Callable[[], float]:
    return (lambda: wall() + offset_s) if offset_s else wall


async def serve_simulator(
    simulator: Simulator,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: HttpServerLimits | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve *simulator* over HTTP until cancelled; port 0 takes a free one.

    The started value is the base URL, such as `http://127.0.0.1:8080/api/v1`. Raises `OSError` when the port is taken.
    """
    listeners = await trio.open_tcp_listeners(port, host=host)
    address = listeners[0].socket.getsockname()
    shown = f"[{host}]" if ":" in host else host
    async with trio.open_nursery() as nursery:
        await nursery.start(_serve, simulator, listeners, limits)
        task_status.started(f"http://{shown}:{address[1]}{_PREFIX}")


async def _serve(
    simulator: Simulator,
    listeners: list[trio.SocketListener],
    limits: HttpServerLimits | None,
    task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
) -> None:
    await serve_http(simulator.handler, listeners, limits=limits, wall=simulator.wall, task_status=task_status)

"""A world: all that a client meets, in one process and from one seed: OpenRouter, network, store, clock and chance."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Final, Protocol, TypedDict, cast, final

import msgspec
import trio

from ..client import open_client
from ..config import ClientConfig, PricePolicy, Seams
from ..simulator.config import SimulatorConfig
from ..simulator.server import Simulator
from ..stores.memory import MemoryStore
from ..transport.http_server import HttpServerLimits, open_http_server
from ._wire import Link
from .faults import Fault, FaultPlan, check_faults
from .history import check_history
from .log import EventLog
from .network import VirtualNetwork
from .scripts import ScriptedModel, send_error
from .store import FaultyStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import TracebackType
    from typing import Unpack

    from ..abc import HistoryStore
    from ..client import Client
    from ..simulator.config import RequestRecord
    from ..transport.http_server import ServerReply, ServerRequest

__all__ = ["START_S", "Serves", "World", "WorldSettings", "check_settings", "open_world", "unwrapped"]

START_S: Final = 1_767_225_600.0
"""When worlds begin, unless they are told: 2026-01-01T00:00:00Z, in seconds since the epoch."""

_CHAT_PATH: Final = "/chat/completions"
# In virtual time, a client that waits long is no client that is gone.
_LIMITS: Final = HttpServerLimits(
    idle_timeout_s=float("inf"), request_timeout_s=float("inf"), send_timeout_s=float("inf")
)


class Serves(Protocol):
    """What answers HTTP requests: a `Simulator`, a `ScriptedModel`, or something of yours."""

    async def handler(self, request: ServerRequest, reply: ServerReply, /) -> None:
        """Answer one request; see `transport.http_server`."""


class WorldSettings(TypedDict, total=False):
    """The settings of a world, by name.

    `start` is the wall clock at the start: seconds since the epoch, or an aware `datetime`. `simulator` are the
    settings of the simulated OpenRouter; a seed of 0 there stands for one that follows from the world's. `link` is what
    connections are like, `faults` what goes wrong. With `strict` (the default), a request whose history a provider
    would refuse is answered 400 and kept in `World.invalid_histories`.
    """

    start: float | datetime
    simulator: SimulatorConfig
    link: Link
    faults: Sequence[Fault]
    strict: bool


def check_settings(settings: WorldSettings) -> None:
    """Raise `TypeError` for a setting that there is not, and `ConfigError` for a fault that would never strike."""
    known = WorldSettings.__annotations__
    for name in settings:
        if name not in known:
            raise TypeError(f"{name!r} is no setting of a world; there are {', '.join(known)}")
    check_faults(settings.get("faults", ()))


@final
class World:
    """Made by `open_world`, and by `run` and `sweep` for each run.

    `seed` is where all chance comes from, `log` the event log. `simulator` is the simulated OpenRouter, `network` leads
    to it, `store` is where clients keep their histories: one store for all, so that a client opened later finds what an
    earlier one left. `failures` are exceptions of servers, `invalid_histories` what `strict` refused.
    """

    def __init__(self, seed: int, settings: WorldSettings) -> None:
        check_settings(settings)
        self.seed = seed
        self.log = EventLog()
        self._streams: dict[str, random.Random] = {}
        self._start_s = _epoch_s(settings.get("start", START_S))
        self.plan = FaultPlan(settings.get("faults", ()), rng=self.rng, log=self.log)
        self.store = FaultyStore(MemoryStore(), self.plan, log=self.log)
        config = settings.get("simulator") or SimulatorConfig()
        config = msgspec.structs.replace(config, seed=config.seed or self.rng("simulator").getrandbits(32))
        self.simulator = Simulator(config, wall=self.wall, on_request=self._tell_request)
        self.failures: list[Exception] = []
        self.invalid_histories: list[str] = []
        self._is_strict = settings.get("strict", True)
        self._served: dict[str | None, Serves] = {}
        self._clients: dict[int, Client] = {}
        self._opened = 0
        self._bodies: list[bytes] = []
        # Set by open_world, before anybody else has the object.
        self.network = cast("VirtualNetwork", None)
        self._far: tuple[trio.Nursery, ...] = ()

    def __repr__(self) -> str:
        return f"<World of seed {self.seed}: {len(self.log)} events, {len(self._clients)} clients>"

    # Chance and time

    def rng(self, name: str) -> random.Random:
        """The stream of chance with this name: the same draws for the same seed, whatever the other streams do.

        Asking again gives the same object, which goes on where it was.
        """
        stream = self._streams.get(name)
        if stream is None:
            stream = self._streams[name] = random.Random(f"{self.seed}/{name}")
        return stream

    def new_id(self) -> str:
        """32 hex digits, from the seed."""
        return f"{self.rng('ids').getrandbits(128):032x}"

    def wall(self) -> float:
        """The wall clock: seconds since the epoch, as far as its skew allows."""
        now = self.log.now()
        return self._start_s + now + self.plan.skew_s(now)

    def now(self) -> float:
        """Virtual seconds since the start of the world."""
        return self.log.now()

    async def sleep(self, seconds: float) -> None:
        """Let virtual time pass; the same as `trio.sleep`."""
        await trio.sleep(seconds)

    def record(self, kind: str, /, **fields: object) -> None:
        """Add an event to the log."""
        self.log.record(kind, **fields)

    # Clients

    @asynccontextmanager
    async def open_client(self, config: ClientConfig | None = None, /, **fields: object) -> AsyncIterator[Client]:
        """`gorouter_trio.open_client` in this world: network, store, key, clock and chance are filled in.

        What `config` or `fields` give stands, only the seams of `config` give way to the world's. A store that is given
        is wrapped, so that faults and the log reach it. No prices are fetched, unless a policy says so.
        """
        self._opened += 1
        number = self._opened
        async with open_client(config, **self._fields(number, config or ClientConfig(), fields)) as client:
            self.log.record("client", client=number, state="opened")
            self._clients[number] = client
            try:
                yield client
            finally:
                del self._clients[number]
                self.log.record("client", client=number, state="closing")

    @property
    def clients(self) -> list[Client]:
        """The clients that are open, in the order in which they were opened."""
        return list(self._clients.values())

    @property
    def client(self) -> Client:
        """The client that was opened first, of those that are open; `LookupError` when there is none."""
        if not self._clients:
            raise LookupError("no client is open in this world")
        return self.clients[0]

    def seams(self, name: str) -> Seams:
        """Clock, chance and ids of this world, for a client or something of yours."""
        return Seams(wall=self.wall, random=self.rng(name), new_id=self.new_id)

    def watch(self, store: HistoryStore) -> FaultyStore:
        """`store` with this world's faults and log around it; the same where it has them already."""
        is_watched = isinstance(store, FaultyStore) and store.has_plan(self.plan)
        return cast("FaultyStore", store) if is_watched else FaultyStore(store, self.plan, log=self.log)

    def _fields(self, number: int, config: ClientConfig, fields: dict[str, object]) -> dict[str, object]:
        filled = {name: getattr(config, name) for name in ("api_key", "base_url", "transport", "store")}
        filled["api_key"] = filled["api_key"] or f"sk-simulated-{number}"
        filled["base_url"] = filled["base_url"] or self.network.base_url
        filled["transport"] = filled["transport"] or self.network
        filled.update(insecure_http=True, seams=self.seams(f"clients/{number}"))
        if config.prices == PricePolicy():
            # Nothing is sent that a test did not ask for.
            filled["prices"] = PricePolicy(on_start=False, refresh_s=None)
        filled.update(fields)
        filled["store"] = self.watch(cast("HistoryStore", filled["store"] or self.store))
        return filled

    # Servers

    def serve(self, model: Serves, *, host: str | None = None) -> None:
        """From now on, `model` answers the chat requests; those to `host` only, at whatever port, if it is given.

        The simulator goes on answering everything else.
        """
        self._served[None if host is None else host.lower()] = model

    async def handler(self, request: ServerRequest, reply: ServerReply) -> None:
        """Answer one request of any host."""
        server: Serves = self.simulator
        if request.path.endswith(_CHAT_PATH):
            self._bodies.append(request.body)
            if self._is_strict and (problems := check_history(request.body)):
                await self._refuse(problems, reply)
                return
            server = self._served.get(_without_port(request.get("host"))) or self._served.get(None) or server
        await server.handler(request, reply)

    def requests(self) -> list[bytes]:
        """The bodies of the chat requests that arrived so far."""
        return list(self._bodies)

    async def _refuse(self, problems: list[str], reply: ServerReply) -> None:
        self.invalid_histories += problems
        self.log.record("invalid_history", problems=problems)
        metadata = {"raw": "; ".join(problems), "provider_name": "Strict"}
        await send_error(reply, 400, message="Provider returned error", metadata=metadata)

    def fail(self, error: Exception) -> None:
        """Keep an exception of a server; the run fails with the first one."""
        self.log.record("failure", error=type(error).__name__, message=str(error))
        self.failures.append(error)

    def _tell_request(self, record: RequestRecord) -> None:
        fields = msgspec.to_builtins(record)
        self.log.record("served", **fields)

    def is_far(self, nursery: trio.Nursery) -> bool:
        """Whether the tasks in `nursery` are those of the far end: of the servers, and of their connections."""
        return nursery in self._far

    # Histories

    async def next_requests(self, prompt: str = "And now?") -> dict[str, bytes]:
        """For each session in `store`, the body of the request that would come next, with `prompt` asked.

        Nothing of this world is changed: the sessions are copied to another one and asked there.
        """
        written = {key: await self.store.inside.load(key) for key in self.store.keys_seen}
        # One that was deleted since has no next request.
        stored = {key: history for key, history in written.items() if history.version}
        if not stored:
            return {}
        model = ScriptedModel(lambda _request: "Noted.")
        # Another seed: the same one would make the same turn ids, and a turn that is known is not asked again.
        async with open_world(seed=-1 - self.seed, strict=False) as copy, copy.open_client() as client:
            copy.serve(model)
            for key, history in stored.items():
                if history.entries:
                    await copy.store.inside.append(key, history.entries, expected_version=0)
                await client.session(key).ask(prompt)
        return {key: request.body for key, request in zip(stored, model.requests, strict=True)}


@asynccontextmanager
async def open_world(*, seed: int = 0, **settings: Unpack[WorldSettings]) -> AsyncIterator[World]:
    """A world inside a trio run of your own, which should have a mock clock; `run` brings one, and repeats itself.

    An error of the body leaves as itself, not in an exception group; an exception that a server has raised meanwhile
    takes its place, with the body's as its cause. Leaving ends all connections. Raises `TypeError` for a setting that
    there is not, and `ConfigError` for a fault that would never strike.
    """
    world = World(seed, settings)
    world.log.now()
    with _with_failures(world), unwrapped():
        async with _open_network(world, settings.get("link") or Link()):
            yield world


@asynccontextmanager
async def _open_network(world: World, link: Link) -> AsyncIterator[None]:
    around = len(trio.lowlevel.current_task().child_nurseries)
    async with (
        open_http_server(world.handler, limits=_LIMITS, on_error=world.fail) as server,
        trio.open_nursery() as nursery,
    ):
        world._far = tuple(trio.lowlevel.current_task().child_nurseries[around:])  # noqa: SLF001 - set here only
        world.network = VirtualNetwork(server, nursery, link=link, plan=world.plan, rng=world.rng, log=world.log)
        try:
            yield
        finally:
            world.network.close()
            nursery.cancel_scope.cancel()


@final
class unwrapped:  # noqa: N801 - reads as the statement it is
    """`with unwrapped(): async with trio.open_nursery()...`: a lone exception leaves as itself."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, traceback: TracebackType | None) -> None:
        found = exc
        while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
            found = found.exceptions[0]
        if found is not None and found is not exc and not isinstance(found, BaseExceptionGroup):
            raise found from found.__cause__


@final
class _with_failures:  # noqa: N801 - reads as the statement it is
    """A world in which a server has failed has failed."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if self._world.failures and (exc is None or isinstance(exc, Exception)):
            raise self._world.failures[0] from exc


def _without_port(host: str | None) -> str | None:
    """The name in a Host header, as it is compared."""
    if host is None:
        return None
    name, _, port = host.rpartition(":")
    return (name if port.isdecimal() and name else host).lower()


def _epoch_s(start: float | datetime) -> float:
    if isinstance(start, datetime):
        if start.tzinfo is None:
            raise ValueError("start: a datetime needs a time zone")
        return start.timestamp()
    return float(start)

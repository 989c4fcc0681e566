"""A network inside the process: connections to a simulator without sockets, threads or real time."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import trio

from .._contain import ungrouped
from ..transport.http_server import HttpServer, HttpServerLimits, open_http_server
from ..transport.memory import memory_stream_pair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .server import Simulator

__all__ = [
    "BASE_URL",
    "SimulatedNetwork",
    "open_simulated_network",
]

BASE_URL: Final = "http://openrouter.simulated/api/v1"

# In virtual time, a client that waits long is no client that is gone.
_LIMITS: Final = HttpServerLimits(idle_timeout_s=math.inf, request_timeout_s=math.inf, send_timeout_s=math.inf)


@final
class SimulatedNetwork:
    """Where all hosts are the simulator; made by `open_simulated_network`."""

    base_url: Final = BASE_URL
    """What a client of this network takes for its base URL; any plain-http URL ending in `/api/v1` does."""

    def __init__(self, server: HttpServer, nursery: trio.Nursery) -> None:
        self._server = server
        self._nursery = nursery
        self._is_open = True
        self._connected = 0

    def __repr__(self) -> str:
        return f"<SimulatedNetwork {'open' if self._is_open else 'closed'}, {self._connected} connections made>"

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """Return the client's end of a new connection, whatever *host* and *port* are; the caller closes it.

        Raises `OSError` when the network is closed.
        """
        await trio.lowlevel.checkpoint()
        if not self._is_open:
            raise ConnectionRefusedError(f"the simulated network is closed: no connection to {host}:{port}")
        ours, theirs = memory_stream_pair()
        self._connected += 1
        self._nursery.start_soon(self._server.serve_stream, theirs)
        return ours

    def close(self) -> None:
        """Refuse new connections from now on."""
        self._is_open = False


@asynccontextmanager
async def open_simulated_network(simulator: Simulator) -> AsyncIterator[SimulatedNetwork]:
    """Yield a network that leads to *simulator*; leaving it closes the server's end of all its connections.

    An error of the body leaves as itself, not inside an exception group.
    """
    async with ungrouped(_served(simulator)) as network:
        yield network


@asynccontextmanager
async def _served(simulator: Simulator) -> AsyncIterator[SimulatedNetwork]:
    async with open_http_server(simulator.handler, limits=_LIMITS) as server, trio.open_nursery() as nursery:
        network = SimulatedNetwork(server, nursery)
        try:
            yield network
        finally:
            network.close()
            nursery.cancel_scope.cancel()

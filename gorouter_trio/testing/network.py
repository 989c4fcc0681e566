"""A network inside the process, in virtual time: latency, jitter, speed, and faults."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, final

import trio
from msgspec import Struct

from ._wire import Link, WireConnection

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from ..transport.http_server import HttpServer
    from .faults import Aim, Direction, FaultPlan, Refuse
    from .log import EventLog

__all__ = ["BASE_URL", "Link", "NetworkStatistics", "VirtualNetwork"]

BASE_URL: Final = "http://openrouter.simulated/api/v1"


class NetworkStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot of a network. `open` are connections that their clients have not closed."""

    connects: int
    failed_connects: int
    open: int
    requests: int


@final
class VirtualNetwork:
    """The network of a world, made by `open_world`: a `transport` for clients. All its hosts are one server's.

    The log has `connect`, `request` and `reply` with the number of the connection, `close` with what went over it
    (bytes, and a digest of each direction), and every fault that strikes.
    """

    base_url: Final = BASE_URL
    """What a client takes for its base URL; any plain-http URL does."""

    def __init__(
        self,
        server: HttpServer,
        nursery: trio.Nursery,
        *,
        link: Link,
        plan: FaultPlan,
        rng: Callable[[str], random.Random],
        log: EventLog,
    ) -> None:
        self.link = link
        self.plan = plan
        self._server = server
        self._nursery = nursery
        self._rng = rng
        self._log = log
        self._is_open = True
        self._connections: dict[int, WireConnection] = {}
        self._served: dict[int, WireConnection] = {}
        self._connects = self._failed = self._requests = 0

    def __repr__(self) -> str:
        s = self.statistics()
        return f"<VirtualNetwork {'open' if self._is_open else 'closed'}: {s.open} connections, {s.requests} requests>"

    def statistics(self) -> NetworkStatistics:
        """A snapshot; cheap."""
        return NetworkStatistics(
            connects=self._connects,
            failed_connects=self._failed,
            open=sum(not connection.client.is_closed for connection in self._connections.values()),
            requests=self._requests,
        )

    @property
    def lingering(self) -> int:
        """How many connections the server has not let go of, although it has heard of their end."""
        return sum(connection.has_ended_at_server for connection in self._served.values())

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """The client's end of a new connection, after a round trip; the caller closes it.

        Raises `OSError` when a fault refuses, or when the network is closed. Cancelling leaves nothing open.
        """
        self._connects += 1
        number = self._connects
        self._log.record("connect", connection=number, host=host, port=port)
        refusal = self.plan.on_connect(connection=number, host=host, now=self._log.now())
        if not self._is_open or self.plan.on_operation("connect"):
            await trio.lowlevel.checkpoint()
            raise self._refused(errno.ECONNREFUSED)
        if refusal is not None:
            await self._refuse(refusal)
        rng = self._rng(f"connection/{number}/connect")
        await trio.sleep(self.link.draw_latency_s(rng) + self.link.draw_latency_s(rng))
        connection = WireConnection(number, host, link=self.link, rng=self._rng, network=self)
        self._forget_closed()
        self._connections[number] = connection
        self._nursery.start_soon(self._serve, connection)
        return connection.client

    def close(self) -> None:
        """Refuse new connections from now on."""
        self._is_open = False

    # For connections

    def on_request(self, connection: WireConnection) -> tuple[int, dict[Direction, list[Aim]]]:
        """Number a request, and aim faults at it; used by connections."""
        self._requests += 1
        self._log.record("request", connection=connection.number, request=self._requests)
        aims = self.plan.on_request(
            connection=connection.number, host=connection.host, request=self._requests, now=self._log.now()
        )
        return self._requests, aims

    def on_reply(self, connection: WireConnection) -> None:
        """Write down that a reply begins; used by connections."""
        self._log.record("reply", connection=connection.number, request=connection.request)

    async def _serve(self, connection: WireConnection) -> None:
        self._served[connection.number] = connection
        try:
            await self._server.serve_stream(connection.server)
        finally:
            del self._served[connection.number]
            self._log.record("close", connection=connection.number, **connection.totals())

    def _forget_closed(self) -> None:
        closed = [number for number, connection in self._connections.items() if connection.is_closed]
        for number in closed:
            del self._connections[number]

    async def _refuse(self, refusal: Refuse) -> None:
        if refusal.how == "silent":
            await trio.sleep_forever()
        await trio.sleep(refusal.after_s)
        raise self._refused(errno.ECONNREFUSED if refusal.how == "refused" else errno.EHOSTUNREACH)

    def _refused(self, code: int) -> OSError:
        self._failed += 1
        return OSError(code, "nobody to connect to (simulated)")

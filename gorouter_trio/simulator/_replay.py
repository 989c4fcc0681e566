"""A recorded reply on its way out, and in the books: it costs what its usage says."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Final, cast

import msgspec
import trio

from . import _json
from .config import RequestRecord
from .outlet import Outlet
from .requests import ChatRequest, parse_chat

if TYPE_CHECKING:
    from ..transport.http_server import ServerReply
    from ._exchange import World
    from .recordings import Recording

_GENERATING: Final = frozenset({"/chat/completions", "/completions", "/embeddings"})


async def replay(world: World, reply: ServerReply, *, recording: Recording, body: bytes) -> None:
    """Answer with a recorded reply, whole or as a stream of its events; cut up where the config says so."""
    block = recording.encoded_headers()
    is_counted = recording.path.partition("?")[0] in _GENERATING
    started_at_s = trio.current_time()
    is_sent = False
    if is_counted:
        world.books.arrive()
    try:
        if recording.status == 200:
            if is_counted:
                world.books.process(is_stream=recording.content_type.startswith("text/event-stream"))
            await Outlet(reply, world.config).whole(recording.content, headers=block)
        else:
            await reply.send(recording.status, block, body=recording.content, chunked=world.config.chunked)
        is_sent = True
    finally:
        if is_counted:
            _book(world, recording, body=body, started_at_s=started_at_s, is_sent=is_sent)


def _book(world: World, recording: Recording, *, body: bytes, started_at_s: float, is_sent: bool) -> None:
    chat = parse_chat(body)
    found = world.find_model(chat) if isinstance(chat, ChatRequest) else None
    usage = _usage_of(recording.content) if recording.status == 200 else {}
    record = RequestRecord(
        generation_id=next((value for name, value in recording.headers if name.lower() == "x-generation-id"), None),
        model=found.id if found is not None else None,
        status=recording.status,
        outcome="refused" if recording.status != 200 else "completed" if is_sent else "failed",
        fault=None,
        streamed=recording.content_type.startswith("text/event-stream"),
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        charged_nanousd=_nanousd(usage),
        started_at_s=started_at_s,
        duration_s=trio.current_time() - started_at_s,
    )
    world.books.ledger.count(record.prompt_tokens, record.completion_tokens, nanousd=record.charged_nanousd)
    world.books.leave(record)
    if world.on_request is not None:
        world.on_request(record)


def _usage_of(content: bytes) -> dict[str, object]:
    """The usage in a reply, or in the last event of a stream that has one."""
    found: dict[str, object] = {}
    for line in content.splitlines() if content.lstrip()[:1] in {b":", b"d"} else [content]:
        text = line.removeprefix(b"data: ").strip()
        usage = _field(text, "usage") if text[:1] == b"{" else None
        found = usage if isinstance(usage, dict) else found
    return found


def _field(text: bytes, name: str) -> object:
    """A field of an object; None where it has none, or is none: what was recorded may be cut, or not of the API."""
    try:
        return cast("dict[str, object]", _json.decode_any(text)).get(name)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _count(usage: dict[str, object], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


def _nanousd(usage: dict[str, object]) -> int:
    cost = usage.get("cost")
    return round(Decimal(str(cost)) * _json.NANO) if isinstance(cost, (int, float)) else 0

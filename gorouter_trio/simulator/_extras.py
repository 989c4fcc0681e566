"""What an answer has besides its text when a request asks for it: log probabilities, citations, images, speech.

Like other forms it is put into today's bytes, event by event: slower than writing them in one go, and only for such
requests.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from msgspec import Struct

from . import _tokens
from ._draws import Draws
from ._json import decode_exact, encode, raw_number
from .forms import Event, StreamForm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .forms import Generation
    from .requests import ChatRequest

__all__ = ["Extras", "add_to_ending", "add_to_events", "add_to_whole", "find_extras"]

Fields: TypeAlias = "dict[str, object]"

_SEARCH: Final = frozenset({"web", "openrouter:web_search"})
# One transparent pixel.
_PIXEL: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
_DATA: Final = b"data: "
_END: Final = b"\n\n"
_SAMPLES_A_TOKEN: Final = 240
_AUDIO_S: Final = 3_600


class Extras(Struct, frozen=True, kw_only=True):
    """What to add to the reply of one generation."""

    top_logprobs: int | None = None
    cites: bool = False
    images: bool = False
    speaks: bool = False
    refusal: str = ""
    has_metadata: bool = False


def find_extras(chat: ChatRequest, *, refusal: str | None, has_metadata: bool) -> Extras | None:
    """What a request asks for besides text; None for most."""
    modalities = chat.modalities or ()
    named = {plugin.id for plugin in chat.plugins or () if plugin.enabled is not False}
    named |= {tool.type for tool in chat.tools or ()}
    extras = Extras(
        top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        cites=not named.isdisjoint(_SEARCH),
        images="image" in modalities,
        speaks="audio" in modalities,
        refusal=refusal or "",
        has_metadata=has_metadata,
    )
    return None if extras == _NONE else extras


_NONE: Final = Extras()


def add_to_whole(body: bytes, generation: Generation, *, extras: Extras) -> bytes:
    """The body of a whole reply with them."""
    reply = cast("Fields", decode_exact(body))
    choice = cast("list[Fields]", reply["choices"])[0]
    message = cast("Fields", choice["message"])
    if extras.top_logprobs is not None:
        choice["logprobs"] = _logprobs(_tokens.split(generation.answer.text), extras)
    if extras.refusal:
        message["refusal"] = extras.refusal
    if extras.cites:
        message["annotations"] = _citations(generation.answer.text)
    if extras.images:
        message["images"] = _images()
    _add_to_end(reply, generation, extras=extras)
    return encode(reply)


def add_to_events(events: Sequence[Event], generation: Generation, *, extras: Extras) -> list[Event]:
    """The events of a stream before its end with them: citations before the text, the rest behind it."""
    before: list[Fields] = []
    after: list[Fields] = []
    if extras.cites:
        before += [{"annotations": [one]} for one in _citations(generation.answer.text)]
    if extras.refusal:
        after += [{"refusal": piece} for piece in _tokens.split(extras.refusal)]
    if extras.images:
        after.append({"images": _images()})
    if extras.speaks:
        after.append({"audio": {"expires_at": generation.created + _AUDIO_S}})
    form = StreamForm(generation)
    last = events[-1].tokens if events else 0
    return [
        *[Event(form.delta(more), 0) for more in before],
        *[_with_piece(event, generation, extras=extras) for event in events],
        *[Event(form.delta(more), last) for more in after],
    ]


def add_to_ending(ending: bytes, generation: Generation, *, extras: Extras) -> bytes:
    """The end of a stream with them; an ending of another kind stays as it is."""
    lines = ending.split(_END)
    for number, line in enumerate(lines):
        if b'"usage":' in line:
            chunk = cast("Fields", decode_exact(line.removeprefix(_DATA)))
            _add_to_end(chunk, generation, extras=extras)
            lines[number] = _DATA + encode(chunk)
    return _END.join(lines)


def _with_piece(event: Event, generation: Generation, *, extras: Extras) -> Event:
    """The event with what belongs to its piece of text."""
    if not event.data.startswith(_DATA):
        return event
    chunk = cast("Fields", decode_exact(event.data.removeprefix(_DATA).removesuffix(_END)))
    choice = cast("list[Fields]", chunk["choices"])[0]
    delta = cast("Fields", choice["delta"])
    piece = delta.get("content")
    if not isinstance(piece, str) or not piece:
        return event
    if extras.top_logprobs is not None:
        choice["logprobs"] = _logprobs([piece], extras)
    if extras.speaks:
        delta["content"] = ""
        delta["audio"] = _spoken(piece, generation)
    return Event(_DATA + encode(chunk) + _END, event.tokens)


def _add_to_end(reply: Fields, generation: Generation, *, extras: Extras) -> None:
    """What stands beside the usage."""
    usage = reply.get("usage")
    if extras.cites and isinstance(usage, dict):
        usage["server_tool_use_details"] = {
            "web_search_requests": 1,
            "tool_calls_requested": 1,
            "tool_calls_executed": 1,
        }
    if extras.has_metadata:
        reply["openrouter_metadata"] = _metadata(generation)


def _logprobs(pieces: Sequence[str], extras: Extras) -> Fields:
    content = []
    for piece in pieces:
        draws = Draws(b"logprob:" + piece.encode("utf-8", "surrogatepass"))
        best = -draws.unit() / 2
        others = [(f"{piece}{number}", best - number) for number in range(1, extras.top_logprobs or 0)]
        top = [(piece, best), *others] if extras.top_logprobs else []
        content.append({**_logprob(piece, best), "top_logprobs": [_logprob(token, value) for token, value in top]})
    return {"content": content, "refusal": None}


def _logprob(token: str, value: float) -> Fields:
    data = token.encode("utf-8", "surrogatepass")
    return {"token": token, "logprob": raw_number(round(value, 6)), "bytes": list(data)}


def _citations(text: str) -> list[Fields]:
    """Two pages that are cited for the two halves of the text."""
    half = len(text) // 2
    return [
        {
            "type": "url_citation",
            "url_citation": {
                "url": f"https://{name}.example/tides",
                "title": f"The tides, by {name}",
                "content": text[start:end],
                "start_index": start,
                "end_index": end,
            },
        }
        for name, start, end in (("harbour", 0, half), ("lighthouse", half, len(text)))
    ]


def _images() -> list[Fields]:
    return [{"type": "image_url", "image_url": {"url": _PIXEL}, "index": 0}]


def _spoken(piece: str, generation: Generation) -> Fields:
    """Noise that is as long as saying the piece would take, as 16-bit PCM."""
    samples = hashlib.shake_128(piece.encode("utf-8", "surrogatepass")).digest(2 * _SAMPLES_A_TOKEN)
    data = base64.b64encode(samples).decode("ascii")
    return {"id": f"audio_{generation.id[-20:]}", "data": data, "transcript": piece}


def _metadata(generation: Generation) -> Fields:
    model = generation.model
    endpoint = {"provider": model.provider, "model": model.served_as, "selected": True}
    return {
        "requested": model.id,
        "strategy": "direct",
        "region": None,
        "summary": f"{model.id} by {model.provider}",
        "attempt": 1,
        "is_byok": False,
        "endpoints": {"total": 1, "available": [endpoint]},
        "attempts": [{"provider": model.provider, "model": model.served_as, "status": 200}],
    }

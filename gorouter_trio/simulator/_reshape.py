"""Replies in other forms than today's: made from today's bytes, event by event, with their numbers as they are.

It is slower than writing them in one go, and serves the replies of scenarios only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias, cast

from . import forms
from ._json import decode_exact, encode
from .forms import Event

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .scenario import Wire

__all__ = ["reshape_ending", "reshape_events", "reshape_text", "reshape_whole"]

Fields: TypeAlias = "dict[str, object]"

_OLD_ORDER: Final = ("id", "provider", "model", "object", "created")
_DATA: Final = b"data: "


def reshape_whole(body: bytes, wire: Wire) -> bytes:
    """The body of a whole reply."""
    reply = cast("Fields", decode_exact(body))
    _shape(reply, wire)
    return encode(reply)


def reshape_events(events: Sequence[Event], wire: Wire) -> list[Event]:
    """The events of a stream before its end."""
    made: list[Event] = []
    calls: list[Event] = []
    for event in events:
        if b'"tool_calls":[' in event.data:
            calls.append(event)
        else:
            made.append(_event([_shaped(line, wire) for line in _read(event.data)], event.tokens))
    made += _reshape_calls(calls, wire)
    if wire.comment_every:
        made = [
            Event(event.data + forms.COMMENT, event.tokens) if number % wire.comment_every == 0 else event
            for number, event in enumerate(made, start=1)
        ]
    return made


def reshape_ending(ending: bytes, wire: Wire) -> bytes:
    """The finish, the usage and the end mark; an ending of another kind, such as an error, only loses its mark."""
    chunks = [_shaped(chunk, wire) for chunk in _read(ending)]
    if len(chunks) == 2 and "usage" in chunks[1]:
        chunks = _finish(chunks[0], chunks[1], wire)
    elif len(chunks) == 1 and chunks[0].get("choices"):
        chunks = _failure(chunks[0], wire)
    return _event(chunks, 0).data + (forms.DONE if wire.done else b"")


def reshape_text(events: Sequence[Event]) -> list[Event]:
    """The events of a chat as those of a stream of /completions: what a delta says is the choice's own text."""
    made = []
    for event in events:
        chunks = [_with_text(chunk) for chunk in _read(event.data)]
        rest = (forms.DONE if forms.DONE in event.data else b"") if chunks else event.data
        made.append(Event(_event(chunks, 0).data + rest, event.tokens))
    return made


def _with_text(chunk: Fields) -> Fields:
    if "object" in chunk:
        chunk["object"] = "text_completion"
    for choice in cast("list[Fields]", chunk.get("choices") or ()):
        delta = cast("Fields", choice.pop("delta", {}))
        rest = dict(choice)
        choice.clear()
        choice |= {"text": delta.get("content") or "", **rest, "logprobs": None}
        if "reasoning" in delta:
            choice["reasoning"] = delta["reasoning"]
    return chunk


def _finish(finish: Fields, usage: Fields, wire: Wire) -> list[Fields]:
    match wire.finish:
        case "double":
            return [finish, usage]
        case "merged":
            return [usage]
        case "empty_choices":
            usage["choices"] = []
            return [finish, usage]
        case "missing":
            return []


def _failure(chunk: Fields, wire: Wire) -> list[Fields]:
    """An error in the middle of a stream, in the forms that were seen."""
    error = cast("Fields", chunk["error"])
    without = {name: value for name, value in chunk.items() if name != "error"}
    match wire.failure:
        case "chunk":
            return [chunk]
        case "no_choices":
            return [{**chunk, "choices": []}, without]
        case "with_usage":
            choice = cast("list[Fields]", chunk["choices"])[0]
            usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "cost": 0}
            return [{**chunk, "choices": [{**choice, "finish_reason": None}], "usage": usage}]
        case "no_error":
            choice = cast("list[Fields]", chunk["choices"])[0]
            return [{**without, "choices": [{**choice, "native_finish_reason": "MALFORMED_FUNCTION_CALL"}]}]
        case "bare":
            return [{"error": error}]
        case "named":
            return [{**chunk, "error": {**error, "code": "server_error"}}]


def _read(data: bytes) -> list[Fields]:
    lines = data.split(b"\n\n")
    return [
        cast("Fields", decode_exact(line[len(_DATA) :]))
        for line in lines
        if line.startswith(_DATA) and line != forms.DONE.rstrip()
    ]


def _event(chunks: Iterable[Fields], tokens: int) -> Event:
    return Event(b"".join([_DATA + encode(chunk) + b"\n\n" for chunk in chunks]), tokens)


def _shaped(chunk: Fields, wire: Wire) -> Fields:
    _shape(chunk, wire)
    return chunk


def _shape(reply: Fields, wire: Wire) -> None:
    """What whole replies and events have in common: details, contents beside calls, and the order of keys."""
    usage = reply.get("usage")
    if isinstance(usage, dict) and wire.details != "full":
        for name in [name for name in usage if name.endswith("_details")]:
            if wire.details == "null":
                usage[name] = None
            else:
                del usage[name]
    for choice in cast("list[Fields]", reply.get("choices") or ()):
        _shape_choice(choice, wire)
    if wire.key_order == "old":
        _reorder(reply, _OLD_ORDER)


def _shape_choice(choice: Fields, wire: Wire) -> None:
    message = cast("Fields | None", choice.get("delta") or choice.get("message"))
    if message is None:
        return
    if "tool_calls" in message:
        message["content"] = None if wire.call_content == "null" else ""
    if wire.key_order == "old":
        _reorder(message, ("role", "content"))
        if "logprobs" in choice:
            choice["logprobs"] = choice.pop("logprobs")


def _reorder(fields: Fields, first: Sequence[str]) -> None:
    """Put the keys *first* before the others."""
    rest = dict(fields)
    fields.clear()
    fields.update({name: rest.pop(name) for name in first if name in rest})
    fields.update(rest)


# Tool calls in streams.


def _reshape_calls(events: Sequence[Event], wire: Wire) -> list[Event]:
    if not events:
        return []
    chunks = [chunk for event in events for chunk in _read(event.data)]
    groups = _grouped([_entry(chunk) for chunk in chunks], wire)
    start, end = events[0].tokens, events[-1].tokens
    made = []
    for number, entries in enumerate(groups, start=1):
        chunk = cast("Fields", decode_exact(encode(chunks[0])))
        _delta(chunk)["tool_calls"] = entries
        made.append(_event([_shaped(chunk, wire)], start + (end - start) * number // len(groups)))
    return made


def _grouped(entries: Sequence[Fields], wire: Wire) -> list[list[Fields]]:
    """The entries of all deltas, those of one delta together."""
    by_call: dict[object, list[Fields]] = {}
    for entry in entries:
        queue = by_call.setdefault(entry["index"], [])
        if queue and wire.call_ids == "empty":
            function = {"name": "", **cast("Fields", entry["function"])}
            entry = {"index": entry["index"], "id": "", "type": "", "function": function}
        queue.append(entry)
    queues = list(by_call.values())
    if wire.call_index != "own":
        queues = [[_renumbered(entry, queues, wire) for entry in queue] for queue in queues]
    match wire.tool_calls:
        case "in_turn":
            return [[entry] for queue in queues for entry in queue]
        case "together":
            longest = max(map(len, queues))
            return [[queue[turn] for queue in queues if turn < len(queue)] for turn in range(longest)]
        case "whole":
            return [[_whole_call(queue)] for queue in queues]
        case "interleaved":
            heads = [[queue[0]] for queue in queues]
            longest = max(map(len, queues))
            return heads + [[q[turn]] for turn in range(1, longest) for q in queues if turn < len(q)]


def _renumbered(entry: Fields, queues: Sequence[Sequence[Fields]], wire: Wire) -> Fields:
    """A piece of a call without a number, or with that and the id of the first call."""
    if wire.call_index == "absent":
        return {name: value for name, value in entry.items() if name != "index"}
    shared = {"id": queues[0][0]["id"]} if entry.get("id") else {}
    return {**entry, **shared, "index": 0}


def _whole_call(queue: Sequence[Fields]) -> Fields:
    functions = [cast("Fields", entry["function"]) for entry in queue]
    arguments = "".join([cast("str", function["arguments"]) for function in functions])
    return {**queue[0], "function": {**functions[0], "arguments": arguments}}


def _delta(chunk: Fields) -> Fields:
    choices = cast("list[Fields]", chunk["choices"])
    return cast("Fields", choices[0]["delta"])


def _entry(chunk: Fields) -> Fields:
    return cast("list[Fields]", _delta(chunk)["tool_calls"])[0]

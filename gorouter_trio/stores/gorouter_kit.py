"""What GoRouter Kit left on a disk: one JSON file a session, of entries or of bare messages. Pure.

Its file names are session ids in which every character outside of `a-z A-Z 0-9 _ . -` became `_`, so that several ids
may have shared a file; nothing tells which. It wrote files in place: a crash left them torn or empty.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, TypeAlias, cast

from msgspec import Struct

from ..errors import DecodeError
from ..wire.codec import checked_usage, decode_json, decode_message, encode_json
from ..wire.responses import Usage
from ..wire.result import CallRecord, HistoryEntry

if TYPE_CHECKING:
    from ..wire.messages import Message

__all__ = ["KitHistory", "key_of_file", "read_kit_file"]

_Object: TypeAlias = "dict[str, object]"

# Beyond what any clock says: no time at all.
_LATEST_MS = Decimal(10) ** 18

_NO_TRACE = re.compile(r"[^a-zA-Z0-9.\-]")


class KitHistory(Struct, frozen=True):
    """The messages of one file, and what could not be taken along, a line each."""

    entries: tuple[HistoryEntry, ...]
    notes: tuple[str, ...] = ()


def key_of_file(name: str) -> tuple[str, bool]:
    """The session id that a file name stands for, and whether that is certain."""
    key = name.removesuffix(".json")
    return key, _NO_TRACE.search(key) is None and key != "default"


def read_kit_file(data: bytes) -> KitHistory:
    """The messages in the bytes of a file. Raises `DecodeError` for a file that is empty, torn, or something else."""
    if not data.strip():
        raise DecodeError("the file is empty: a crash cut it off, or nothing was ever written")
    found = decode_json(data)
    if found is None:
        # A session that was cleared.
        return KitHistory(())
    if not isinstance(found, list):
        raise DecodeError("not a list of entries or messages")
    notes: list[str] = []
    entries = tuple(_entry(item, position, notes) for position, item in enumerate(found))
    return KitHistory(entries, tuple(notes))


def _entry(item: object, position: int, notes: list[str]) -> HistoryEntry:
    """One entry, or one bare message, whichever it is."""
    fields = _object(item, f"item {position}")
    if "message" not in fields:
        return HistoryEntry(_message(fields, position, notes))
    message = _message(_object(fields["message"], f"item {position}: message"), position, notes)
    call = fields.get("api_call_metadata")
    where = f"item {position}: api_call_metadata"
    return HistoryEntry(message, None if call is None else _call(_object(call, where), where))


def _message(fields: _Object, position: int, notes: list[str]) -> Message:
    wanted = dict(fields)
    if wanted.pop("audio", None):
        notes.append(f"item {position}: its audio, of which there was only a hint")
    if "content" not in wanted:
        # It leaves empty texts out.
        says_nothing = wanted.get("tool_calls") or wanted.get("refusal")
        wanted["content"] = None if wanted.get("role") == "assistant" and says_nothing else ""
    try:
        return decode_message(encode_json(wanted))
    except DecodeError as exc:
        raise DecodeError(f"item {position}: {exc.message}") from exc


def _call(fields: _Object, where: str) -> CallRecord:
    at_ms = _number(fields.get("timestamp"), f"{where}.timestamp") or Decimal(0)
    return CallRecord(
        generation_id=_text(fields.get("call_id"), f"{where}.call_id"),
        model=_text(fields.get("model_used"), f"{where}.model_used"),
        finish_reason=_text(fields.get("finish_reason"), f"{where}.finish_reason"),
        usage=_usage(fields, where),
        finished_at_s=float(at_ms / 1000) if abs(at_ms) < _LATEST_MS else 0.0,
    )


def _usage(fields: _Object, where: str) -> Usage | None:
    if fields.get("usage") is None and fields.get("cost") is None:
        return None
    counts = _object(fields.get("usage") or {}, f"{where}.usage")

    def count(name: str) -> int | None:
        number = _number(counts.get(name), f"{where}.usage.{name}")
        return None if number is None else int(number)

    return checked_usage(
        Usage(
            prompt_tokens=count("prompt_tokens"),
            completion_tokens=count("completion_tokens"),
            total_tokens=count("total_tokens"),
            cost=_number(fields.get("cost"), f"{where}.cost"),
        )
    )


def _object(value: object, where: str) -> _Object:
    if not isinstance(value, dict):
        raise DecodeError(f"{where}: not an object")
    return cast("_Object", value)


def _text(value: object, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise DecodeError(f"{where}: not a text")
    return value or None


def _number(value: object, where: str) -> Decimal | None:
    if value is None:
        return None
    try:
        # By its shortest text, which is what was written.
        return Decimal(str(value)) if isinstance(value, int | float) and not isinstance(value, bool) else Decimal("x")
    except InvalidOperation:
        raise DecodeError(f"{where}: not a number") from None

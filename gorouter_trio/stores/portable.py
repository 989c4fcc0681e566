"""Sessions as lines of text, one a session, byte for byte as a store has them. Pure.

    {"format":"gorouter-trio/history","version":1,"key":"user:42","updated_at_s":1750000000.0,"entries":[...]}

An entry stands there as the JSON object that it is, so that other programs can read it, and as a base64 text where it
is none.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, cast

from msgspec import Struct

from ..errors import ConfigError, DecodeError
from ..wire.codec import decode_json, encode_json, split_list, split_object
from .keys import check_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    import msgspec

__all__ = ["PortableSession", "decode_session", "encode_session"]

_FORMAT = "gorouter-trio/history"
_VERSION = 1


class PortableSession(Struct, frozen=True):
    """A session outside of a store."""

    key: str
    entries: tuple[bytes, ...]
    updated_at_s: float | None = None


def encode_session(session: PortableSession) -> bytes:
    """One line, with its end."""
    head = {"format": _FORMAT, "version": _VERSION, "key": session.key, "updated_at_s": session.updated_at_s}
    entries = b",".join(map(_encode_entry, session.entries))
    return b'%b,"entries":[%b]}\n' % (encode_json(head)[:-1], entries)


def decode_session(line: bytes) -> PortableSession:
    """The session in one line. Raises `DecodeError` for a line that is torn, or something else."""
    fields = split_object(line)
    if _value(fields, "format") != _FORMAT:
        raise DecodeError(f"not a session of ours: its format is not {_FORMAT!r}")
    version = _value(fields, "version")
    if version != _VERSION:
        raise DecodeError(f"written by another version of the program: format {version}, this one knows {_VERSION}")
    key, updated_at_s = _value(fields, "key"), _value(fields, "updated_at_s")
    try:
        check_key(key if isinstance(key, str) else "")
    except ConfigError as exc:
        raise DecodeError(exc.message) from exc
    if "entries" not in fields:
        raise DecodeError("there are no entries")
    entries = tuple(_decode_entries(split_list(fields["entries"])))
    return PortableSession(cast("str", key), entries, updated_at_s if isinstance(updated_at_s, float) else None)


def _value(fields: dict[str, msgspec.Raw], name: str) -> object:
    return decode_json(bytes(fields[name])) if name in fields else None


def _encode_entry(entry: bytes) -> bytes:
    if entry[:1] == b"{" and entry[-1:] == b"}" and b"\n" not in entry and b"\r" not in entry and _is_object(entry):
        return entry
    return b'"%b"' % base64.b64encode(entry)


def _is_object(entry: bytes) -> bool:
    try:
        split_object(entry)
    except DecodeError:
        return False
    return True


def _decode_entries(items: Iterable[msgspec.Raw]) -> Iterable[bytes]:
    for number, item in enumerate(items):
        data = bytes(item)
        if data[:1] == b"{":
            yield data
            continue
        text = decode_json(data)
        try:
            yield base64.b64decode(text if isinstance(text, str) else "?", validate=True)
        except ValueError as exc:
            raise DecodeError(f"entry {number} is neither an object nor base64") from exc

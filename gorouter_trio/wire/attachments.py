"""What an answer brings besides its text: annotations, images, audio. Read on demand from the raw JSON that is kept.

An answer keeps these byte for byte, since they are echoed to the provider; what is here are their typed forms. An
entry with an odd field loses that field, an entry that is none is left out. Types of annotations grow: those that are
not known here have their `type` and nothing else.
"""

# ruff: noqa: TID251 - results are read without the codec, which stands above them

from __future__ import annotations

import base64
import binascii
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
from msgspec import Struct, UnsetType

from .salvage import Salvage

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Annotation",
    "FileAnnotation",
    "ImageUrl",
    "OutputAudio",
    "OutputImage",
    "UrlCitation",
    "read_annotations",
    "read_audio",
    "read_images",
    "read_texts",
    "read_thoughts",
    "split_entries",
]

S = TypeVar("S", bound=Struct)


class UrlCitation(Struct, frozen=True, kw_only=True):
    """A page that the answer rests on; the indices are characters of the answer's text, the end exclusive."""

    url: str | None = None
    title: str | None = None
    content: str | None = None
    start_index: int | None = None
    end_index: int | None = None


class FileAnnotation(Struct, frozen=True, kw_only=True):
    """A file that was read for the answer: echoed with the message, it need not be read and paid for again.

    `content` are its parts in wire names.
    """

    hash: str | None = None
    name: str | None = None
    content: list[dict[str, object]] | None = None


class Annotation(Struct, frozen=True, kw_only=True):
    """One annotation; the field that is called as its `type` says is the one that is set."""

    type: str | None = None
    url_citation: UrlCitation | None = None
    file: FileAnnotation | None = None


class ImageUrl(Struct, frozen=True):
    """Where an image is."""

    url: str = ""


class OutputImage(Struct, frozen=True, kw_only=True):
    """An image that the model made; usually a data URL."""

    type: str | None = None
    image_url: ImageUrl = ImageUrl()
    index: int | None = None

    @property
    def url(self) -> str:
        """The URL; empty when there was none."""
        return self.image_url.url

    @property
    def media_type(self) -> str | None:
        """Such as `image/png`; None when the URL is no data URL."""
        head, comma, _ = self.url.partition(",")
        return head[5:].partition(";")[0] or "text/plain" if comma and head[:5].lower() == "data:" else None

    @property
    def data(self) -> bytes | None:
        """The image itself; None when the URL is no data URL, or a broken one (RFC 2397)."""
        head, comma, data = self.url.partition(",")
        if not comma or head[:5].lower() != "data:":
            return None
        content = unquote_to_bytes(data)
        return _from_base64(content) if head.lower().endswith(";base64") else content


class OutputAudio(Struct, frozen=True, kw_only=True):
    """What the model said aloud: base64 in the format asked for, 24 kHz PCM for `pcm16`; `id` is for the echo."""

    id: str | None = None
    data: str | None = None
    transcript: str | None = None
    expires_at: int | None = None

    @property
    def content(self) -> bytes | None:
        """The audio itself; None when there is none, or it is broken."""
        return None if self.data is None else _from_base64(self.data.encode("ascii", "replace"))


class _Block(Struct, frozen=True):
    """The readable part of a block of reasoning, or of a part of the content."""

    text: str | None = None
    summary: str | None = None


_salvage = Salvage(lambda kind: msgspec.json.Decoder(kind).decode)
_split_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def split_entries(raw: msgspec.Raw | UnsetType) -> list[msgspec.Raw]:
    """The entries of a list that is kept raw; none for what is no list."""
    if isinstance(raw, UnsetType):
        return []
    try:
        return _split_list(raw)
    except _MALFORMED:
        return []


def read_annotations(entries: Iterable[msgspec.Raw]) -> list[Annotation]:
    """Annotations in their order."""
    return _read(Annotation, entries)


def read_images(entries: Iterable[msgspec.Raw]) -> list[OutputImage]:
    """Images in their order."""
    return _read(OutputImage, entries)


def read_audio(raw: msgspec.Raw | UnsetType) -> OutputAudio | None:
    """The audio of an answer, or a piece of it; None when there is none."""
    found = [] if isinstance(raw, UnsetType) else _read(OutputAudio, [raw])
    return found[0] if found else None


def read_thoughts(entries: Iterable[msgspec.Raw]) -> str:
    """What is readable in blocks of reasoning (`reasoning_details`), joined."""
    return "".join([block.text or block.summary or "" for block in _read(_Block, entries)])


def read_texts(parts: Iterable[msgspec.Raw]) -> list[str]:
    """The texts among the parts of a content."""
    return [part.text for part in _read(_Block, parts) if part.text]


def _read(kind: type[S], entries: Iterable[msgspec.Raw]) -> list[S]:
    found: list[S] = []
    for raw in entries:
        with suppress(*_MALFORMED):
            found.append(_salvage.decode(kind, raw))
    return found


def _from_base64(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4))
    except binascii.Error:
        return None
